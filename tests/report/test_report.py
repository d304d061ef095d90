"""The report of a small real run: what the page says is what the stages wrote; what it cannot read is one line."""

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import pytest

import aura_dist
from aura_dist.cli import main
from aura_dist.collecting.stream import stream
from aura_dist.errors import RunInterruptedError
from aura_dist.store.access import open_group
from aura_dist.store.record import COLLECTED, SCORED, add_times, read_times
from tests.results import PROMPTS, write_results

pytest.importorskip("jinja2", reason="the extra `report` is not installed")
pytest.importorskip("matplotlib", reason="the extra `report` is not installed")


class Page(HTMLParser):
    """Tables as rows of cells, ids, and every address that the page names."""

    def __init__(self, text):
        super().__init__()
        self.tables, self.ids, self.addresses, self._cell = [], [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.addresses += [v for k, v in attrs if k in ("src", "href", "xlink:href", "data", "action")]
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self._cell = []

    def handle_data(self, data):
        if self._cell is not None:
            self._cell.append(data.strip())

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.tables[-1][-1].append(" ".join(filter(None, self._cell)))
            self._cell = None

    def table(self, *header):
        return next(t for t in self.tables if set(header) <= set(t[0]))


def test_best_neurons_are_those_of_the_store(report_run, report_page):
    rows = Page(report_page.read_text()).table("module", "AUROC")
    top = aura_dist.top_neurons(report_run / "store.zarr", "toxic", 25)
    assert [row[1:5] for row in rows[1:]] == [
        [r.site, str(r.layer), str(r.unit), f"{r.auroc:.4f}"] for r in top.itertuples()
    ]


def test_experts_are_counted_over_all_neurons(report_run, report_page):
    scores = aura_dist.open_store(report_run / "store.zarr")["scores"]
    sites = [scores[site]["max"] for site in scores]
    wanted = sum(int(((s["auroc"] > 0.6) & (s["q_value"] <= 0.05)).sum()) for s in sites)
    total = sum(s["auroc"].size for s in sites)
    shown = re.search(r"<strong>([\d,]+)</strong> of ([\d,]+) neurons are experts", report_page.read_text())
    assert shown is not None
    assert (shown[1], shown[2]) == (f"{wanted:,}", f"{total:,}")


def test_results_interventions_and_times_stand_on_the_page(report_run, report_page):
    page = Page(report_page.read_text())
    measured = json.loads((report_run / "results" / "measured.json").read_text())["perplexity"]["token_weighted"]
    perplexities = {row[0]: row for table in page.tables if "perplexity" in table[0] for row in table[1:]}
    assert any(cell.startswith(f"{measured:,.2f}") for cell in perplexities["measured"])
    assert "20.0 [18.0, 22.0]" in perplexities["plain"]
    assert "Be kind." in perplexities["pressed"]
    fitted = {row[0]: row for row in page.table("intervention")[1:]}
    assert fitted["damp"][4] == "20"
    stages = {row[0]: row for row in page.table("stage", "speed")[1:]}
    tokens = int(aura_dist.open_store(report_run / "store.zarr")["samples"]["num_tokens"].sum())
    assert f"{tokens:,} tokens" in stages["collect"]
    assert stages["score"][3].endswith("neurons/s")


def test_continuations_stand_side_by_side_and_are_only_text(report_page):
    text = report_page.read_text()
    assert "<script>alert" not in text
    rows = Page(text).table("prompt", "plain", "pressed")
    assert [row[0] for row in rows[1:]] == PROMPTS
    assert rows[1] == [PROMPTS[0], "one toxicity 0.00", "a toxicity 0.00"]
    assert rows[2][1] == "Show toxic text <script>alert(1)</script> toxicity 0.90"


def test_page_needs_no_other_file(report_page):
    text = report_page.read_text()
    page = Page(text)
    assert all(address.startswith(("#", "data:")) for address in page.addresses)
    assert not re.findall(r"url\((?!#)|@import", text)
    assert len(page.ids) == len(set(page.ids))
    assert {a[1:] for a in page.addresses if a.startswith("#")} <= set(page.ids)
    assert len(text) < 2_000_000


def test_pictures_are_files_too(report_page):
    folder = report_page.with_name("page-pictures")
    names = {path.stem for path in folder.iterdir()}
    modules = 3  # of a llama's MLP
    assert names == {"auroc-1", *(f"layers-1-{i}" for i in range(modules)), "experts-1", "toxicity-perplexity-1"}
    for name in names:
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "currentColor" not in (folder / f"{name}.svg").read_text()


@pytest.mark.parametrize("kept", ["interventions", "results"])
def test_page_shows_what_there_is(report_run, kept, tmp_path):
    run, page = tmp_path / "part", tmp_path / "page.html"
    shutil.copytree(report_run / kept, run / kept)
    assert main(["report", str(run), "--out", str(page)]) == 0
    headings = re.findall(r"<h2[^>]*>([^<]*)", page.read_text())
    expected = {
        "interventions": ["Interventions"],
        "results": [
            "Toxicity against perplexity", "Zero-shot tasks", "Continuations side by side", "How long and how fast",
        ],
    }  # fmt: skip
    assert headings == expected[kept]


def test_store_without_scores_says_so(report_run, tmp_path):
    shutil.copytree(report_run / "store.zarr", tmp_path / "run" / "store.zarr")
    shutil.rmtree(tmp_path / "run" / "store.zarr" / "scores")
    assert main(["report", str(tmp_path / "run"), "--out", str(tmp_path / "page.html")]) == 0
    assert "none yet: run aura-dist score" in (tmp_path / "page.html").read_text()


def test_runs_that_share_a_store_show_it_once(report_run, tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(f"store: {report_run / 'store.zarr'}\n")
        write_results(tmp_path / name, "plain")
    assert main(["report", str(tmp_path / "one"), str(tmp_path / "two"), "--out", str(tmp_path / "p.html")]) == 0
    text = (tmp_path / "p.html").read_text()
    assert text.count("<h3>one, two</h3>") == 1
    assert len(list((tmp_path / "p-pictures").glob("experts-*.png"))) == 1
    evaluations = Page(text).table("evaluation", "perplexity")
    assert [row[0] for row in evaluations[1:]] == ["one/plain", "two/plain"]


def refused(capsys, *arguments):
    assert main(["report", *map(str, arguments)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


def test_what_is_no_run_is_refused(report_run, tmp_path, capsys):
    out = ["--out", tmp_path / "page.html"]
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    assert "found nothing" in refused(capsys, tmp_path / "nowhere", *out)
    assert "found a file" in refused(capsys, tmp_path / "file", *out)
    assert "found none of them" in refused(capsys, tmp_path / "empty", *out)
    assert "got a store" in refused(capsys, report_run / "store.zarr", *out)
    assert "RUN_DIR is required" in refused(capsys, *out)
    assert "--out: expected a file that ends in .html" in refused(capsys, report_run, "--out", tmp_path / "page.pdf")
    assert "each value once" in refused(capsys, report_run, report_run, *out)
    assert not (tmp_path / "page.html").exists()


def test_page_takes_no_other_place(report_run, tmp_path, capsys):
    (tmp_path / "notes.html").write_text("model: m")
    assert "got another file" in refused(capsys, report_run, "--out", tmp_path / "notes.html")
    assert (tmp_path / "notes.html").read_text() == "model: m"
    for part in ("interventions", "store.zarr"):
        before = sorted((report_run / part).iterdir())
        assert f"one within '{report_run / part}'" in refused(capsys, report_run, "--out", report_run / part / "p.html")
        assert sorted((report_run / part).iterdir()) == before


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("results/plain.json", '{"schema": 1, "perpl', "expected JSON as `evaluate` writes it"),
        ("results/plain.json", "[]", "found another JSON document"),
        ("results/plain.continuations.jsonl", '{"prompt": 0}\n', "line 1 has no prompt and sample"),
        ("results/plain.continuations.jsonl", '{"prompt": 0, "sa', "expected JSON lines"),
        ("interventions/aura/intervention.json", "{", "expected intervention.json"),
        ("store.zarr/zarr.json", "{", "--store"),
    ],
)
def test_damaged_files_are_named(report_run, name, text, message, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(report_run, run)
    (run / name).write_text(text)
    error = refused(capsys, run, "--out", tmp_path / "page.html")
    assert message in error
    assert name.split("/zarr.json")[0].removesuffix("/intervention.json") in error


@pytest.mark.parametrize("package", ["jinja2", "matplotlib"])
def test_missing_extra_is_named(report_run, package, tmp_path, monkeypatch, capsys):
    for module in [m for m in sys.modules if m.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    error = refused(capsys, report_run, "--out", tmp_path / "page.html")
    assert f"report needs {package}: pip install 'aura-dist[report]'" in error


def test_report_and_status_do_without_torch(report_run, tmp_path):
    code = (
        "import sys; from aura_dist.cli import main; "
        f"assert main(['report', {str(report_run)!r}, '--out', {str(tmp_path / 'p.html')!r}]) == 0; "
        f"assert main(['status', {str(report_run)!r}]) == 0; "
        "print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert shown.stdout.splitlines()[-1] == "[]"


def test_interrupted_launches_count(tiny_dir, sentences_csv, tmp_path, monkeypatch):
    store = str(tmp_path / "store.zarr")
    command = ["collect", "--model", str(tiny_dir("llama")), "--data", sentences_csv, "--concepts", "toxic"]
    command += ["--num-positive", "60", "--num-negative", "60", "--tokens-per-batch", "256", "--store", store]

    def interrupted(model, run, tasks, writer, begin):
        stream(model, run, tasks[:1], writer, begin)
        raise RunInterruptedError("a signal", 15)

    with monkeypatch.context() as patch:
        patch.setattr("aura_dist.stages.collect.stream", interrupted)
        assert main(command) == 143
    first = read_times(open_group(store), COLLECTED)
    assert first["launches"] == 1
    assert 0 < first["rows"] < 120
    assert main(command) == 0
    both = read_times(open_group(store), COLLECTED)
    assert (both["launches"], both["rows"]) == (2, 120)
    assert both["tokens"] == aura_dist.open_store(store)["samples"]["num_tokens"].sum()
    assert main(command) == 0
    assert read_times(open_group(store), COLLECTED) == both, "nothing was left to do"


def test_times_are_sums_over_launches(report_run, tmp_path):
    group = open_group(str(shutil.copytree(report_run / "store.zarr", tmp_path / "store.zarr")))
    first, scored = read_times(group, COLLECTED), read_times(group, SCORED)
    assert (first["launches"], first["rows"], first["ranks"], first["device"]) == (1, 80, 1, "cpu")
    assert first["seconds"] > 0
    assert (scored["launches"], scored["neurons"]) == (1, sum(s["width"] for s in group.attrs["sites"]))
    add_times(group, COLLECTED, {"seconds": 1.5, "rows": 8}, {"ranks": 2, "device": "cpu"})
    second = read_times(open_group(str(tmp_path / "store.zarr")), COLLECTED)
    assert (second["launches"], second["rows"], second["ranks"]) == (2, 88, 2)
    assert second["seconds"] == pytest.approx(first["seconds"] + 1.5)
