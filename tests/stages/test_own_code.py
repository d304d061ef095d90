"""Code that comes with a model, tokenizer, scorer or task runs only if the user says so; nobody is asked."""

import json
import shutil
import sys
from types import ModuleType

import numpy as np
import pytest
from transformers import BertConfig, BertForSequenceClassification

import aura_dist
from aura_dist.cli import main
from aura_dist.models.extras import own_code
from aura_dist.store.access import open_group
from aura_dist.text.own_code import code_of_tasks
from tests.models import save_tiny

REFUSED = "comes with code of its own, which would run on this machine"


@pytest.fixture(autouse=True)
def nobody_answers(monkeypatch):
    """Every question that a library asks would be answered with yes."""
    asked = []
    monkeypatch.setattr("builtins.input", lambda question="": asked.append(question) or "y")
    yield
    assert not asked


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("text,toxic\n" + "".join(f"a text number {i},{i % 2}\n" for i in range(8)))
    return path


def own_model(directory, kind, factor=1.0):
    """A Llama whose classes come in files beside its weights; the file `directory.ran` shows that they were run."""
    save_tiny("llama", directory)
    ran = f"import pathlib; pathlib.Path({str(directory) + '.ran'!r}).touch()\n"
    change(
        directory / "config.json",
        model_type=kind,
        auto_map={"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"},
    )
    (directory / "configuration_own.py").write_text(
        f"from transformers import LlamaConfig\n{ran}class OwnConfig(LlamaConfig):\n    model_type = {kind!r}\n"
    )
    (directory / "helper_own.py").write_text(f"FACTOR = {factor}\n")
    (directory / "modeling_own.py").write_text(
        "from transformers import LlamaForCausalLM\nfrom .configuration_own import OwnConfig\n"
        f"from .helper_own import FACTOR\n{ran}class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    return directory


def change(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def has_run(directory):
    return directory.with_name(directory.name + ".ran").exists()


def test_model_with_code_of_its_own_is_refused_by_every_verb(texts, tmp_path, capsys):
    model = own_model(tmp_path / "M", "own_a")
    data = ["--data", str(texts), "--concepts", "toxic", "--store", str(tmp_path / "S.zarr")]
    out = ["--out", str(tmp_path / "out")]
    verbs = [
        ["collect", *data], ["plan", *data], ["generate", "--prompt", "the"],
        ["evaluate", "--perplexity-texts", str(texts), *out],
        ["export", "--intervention", str(tmp_path / "X"), *out], ["demo", *out],
    ]  # fmt: skip
    for verb in verbs:
        assert main([*verb, "--model", str(model)]) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith(f"error: --model {str(model)!r} {REFUSED}")
        assert "--trust-remote-code" in error
    assert not has_run(model)


def test_trusted_model_is_measured_and_its_code_is_recorded_and_part_of_what_it_is(texts, tmp_path, capsys):
    model, same = own_model(tmp_path / "M", "own_b"), save_tiny("llama", tmp_path / "plain")
    data = ["--data", str(texts), "--concepts", "toxic", "--modules", "*.gate_proj"]
    for directory, store, flags in ((model, "S", ["--trust-remote-code"]), (same, "P", [])):
        verb = ["collect", *data, "--model", str(directory), "--store", str(tmp_path / f"{store}.zarr")]
        assert main([*verb, *flags]) == 0
    groups = [open_group(str(tmp_path / f"{store}.zarr")) for store in "SP"]
    values = [np.asarray(group["activations/model.layers.1.mlp.gate_proj/max"]) for group in groups]
    assert np.array_equal(*values)
    recorded = groups[0].attrs["model"]["own_code"]
    assert set(recorded) == {"configuration_own.py", "helper_own.py", "modeling_own.py"}
    assert groups[0].attrs["config"]["trust_remote_code"] is True
    assert groups[1].attrs["model"]["own_code"] is None
    out = tmp_path / "r.json"
    evaluate = ["evaluate", "--perplexity-texts", str(texts), "--out", str(out), "--model", str(model)]
    assert main([*evaluate, "--trust-remote-code"]) == 0
    results = json.loads(out.read_text())
    assert results["model"]["own_code"] == recorded
    assert results["model_fingerprint"] == groups[0].attrs["model"]["fingerprint"]
    assert main(["plan", *data, "--model", str(model), "--trust-remote-code"]) == 0
    other = own_model(tmp_path / "other", "own_b", factor=2.0)
    assert "sets trust_remote_code" not in capsys.readouterr().err
    verb = ["collect", *data, "--model", str(other), "--store", str(tmp_path / "S.zarr"), "--trust-remote-code"]
    assert main(verb) == 2
    assert "another model own_code" in capsys.readouterr().err


def test_code_of_two_repositories_counts_where_files_have_one_name(tmp_path, monkeypatch):
    """A configuration's code may be in another repository than the model's, and import a file of the same name."""
    files = {}
    for repository in ("of_model", "of_config"):
        files[repository] = tmp_path / repository / "shared.py"
        files[repository].parent.mkdir()
        files[repository].write_text(f"# {repository}\n")
        module = ModuleType(f"transformers_modules.{repository}.shared")
        module.__file__ = str(files[repository])
        monkeypatch.setitem(sys.modules, module.__name__, module)
    config = type("OwnConfig", (), {"__module__": "transformers_modules.of_config.shared"})()
    model = type("OwnModel", (), {"__module__": "transformers_modules.of_model.shared", "config": config})()
    before = own_code(model)
    assert set(before) == {"of_model/shared.py", "of_config/shared.py"}
    files["of_model"].write_text("# changed\n")
    assert own_code(model) != before


def test_trust_that_a_file_gives_is_said(tmp_path, capsys):
    model = own_model(tmp_path / "M", "own_c")
    file = tmp_path / "run.yaml"
    file.write_text(f"model: {model}\ntrust_remote_code: true\ngenerate:\n  prompt: [the]\n")
    assert main(["generate", "--config", str(file), "--max-new-tokens", "1"]) == 0
    assert f"{file} sets trust_remote_code" in capsys.readouterr().err
    assert main(["generate", "--config", str(file), "--no-trust-remote-code"]) == 2


def test_exported_model_keeps_its_code(tmp_path, capsys):
    model = own_model(tmp_path / "M", "own_d")
    intervention = aura_dist.Intervention({"model.layers.0.mlp.gate_proj": np.full(80, 0.5, np.float32)})
    intervention.save(tmp_path / "X")
    verb = ["export", "--model", str(model), "--intervention", str(tmp_path / "X"), "--out", str(tmp_path / "E")]
    assert main([*verb, "--dtype", "float32"]) == 2
    assert main([*verb, "--dtype", "float32", "--trust-remote-code"]) == 0
    assert (tmp_path / "E" / "modeling_own.py").is_file()
    assert main(["generate", "--model", str(tmp_path / "E"), "--prompt", "the", "--trust-remote-code"]) == 0


@pytest.mark.parametrize("flags", [[], ["--trust-remote-code"]])
def test_native_class_is_used_where_there_is_one(flags, tmp_path):
    model = own_model(tmp_path / "M", "llama")
    assert main(["generate", "--model", str(model), "--prompt", "the", *flags]) == 0
    assert not has_run(model)


def test_tokenizer_with_code_of_its_own(tmp_path, capsys):
    model = save_tiny("llama", tmp_path / "M")
    change(
        model / "tokenizer_config.json",
        tokenizer_class="OwnTokenizer",
        auto_map={"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]},
    )
    (model / "tokenization_own.py").write_text(
        "from transformers import PreTrainedTokenizerFast\nclass OwnTokenizer(PreTrainedTokenizerFast):\n    pass\n"
    )
    verb = ["generate", "--model", str(model), "--prompt", "the"]
    assert main(verb) == 2
    assert f"error: the tokenizer of --model {str(model)!r} {REFUSED}" in capsys.readouterr().err
    assert main([*verb, "--trust-remote-code"]) == 0


def test_scorer_with_code_of_its_own(tmp_path, capsys):
    scorer = own_model(tmp_path / "scorer", "own_e")
    config = BertConfig(
        vocab_size=384, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        id2label={0: "fine", 1: "toxic"},
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(scorer)
    kinds = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForSequenceClassification": "modeling_own.OwnBert"}
    change(scorer / "config.json", model_type="own_e", auto_map=kinds)
    code = (scorer / "configuration_own.py").read_text()
    (scorer / "configuration_own.py").write_text(code.replace("LlamaConfig", "BertConfig"))
    (scorer / "modeling_own.py").write_text(
        "from transformers import BertForSequenceClassification\nfrom .configuration_own import OwnConfig\n"
        "class OwnBert(BertForSequenceClassification):\n    config_class = OwnConfig\n"
    )
    (tmp_path / "p.csv").write_text("text\nthe cat\nthe dog\n")
    verb = [
        "evaluate", "--model", str(save_tiny("llama", tmp_path / "M")), "--toxicity-prompts", str(tmp_path / "p.csv"),
        "--num-samples", "1", "--max-new-tokens", "1", "--scorer", str(scorer), "--out", str(tmp_path / "r.json"),
    ]  # fmt: skip
    assert main(verb) == 2
    assert f"error: --scorer {str(scorer)!r} {REFUSED}" in capsys.readouterr().err
    assert not has_run(scorer)
    assert main([*verb, "--trust-remote-code"]) == 0


@pytest.mark.parametrize("place", ["itself", "included"])
def test_tasks_that_name_functions(place, tmp_path, capsys):
    pytest.importorskip("lm_eval", reason="the extra `evaluation` is not installed")
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "rows.jsonl").write_text("".join(json.dumps({"q": f"{i} and", "a": i % 2}) + "\n" for i in range(4)))
    own, general = "doc_to_choice: !function own.choices\n", "test_split: test\noutput_type: multiple_choice\n"
    shared = tmp_path / "shared_template"
    shared.write_text(general + (own if place == "included" else ""))
    (tasks / "tiny.yaml").write_text(
        f"include: ../shared_template\ntask: tiny\ndataset_path: json\ndataset_kwargs:\n  data_files:\n"
        f"    test: {tasks / 'rows.jsonl'}\ndoc_to_text: '{{{{q}}}}'\ndoc_to_target: a\n"
        f"metric_list:\n  - metric: acc\n{own if place == 'itself' else ''}"
    )
    for directory in (tasks, tmp_path):
        (directory / "own.py").write_text(
            f"import pathlib; pathlib.Path({str(tmp_path / 'ran')!r}).touch()\ndef choices(doc): return ['a', 'b']\n"
        )
    verb = [
        "evaluate", "--model", str(save_tiny("llama", tmp_path / "M")), "--tasks", "tiny", "--tasks-path", str(tasks),
        "--out", str(tmp_path / "r.json"),
    ]  # fmt: skip
    assert main(verb) == 2
    assert f"error: --tasks-path: {str(tasks / 'tiny.yaml')!r} (!function) {REFUSED}" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()
    assert main([*verb, "--trust-remote-code"]) == 0
    assert json.loads((tmp_path / "r.json").read_text())["zero_shot"]["tiny"]["num_examples"] == 4


@pytest.mark.parametrize(
    ("task", "found"),
    [
        ("include: other # as it is\n", "!function"),
        ("include: [other]\n", "!function"),
        ("'include': ['other']\n", "!function"),
        ("doc_to_choice: !%66unction own.choices\n", "!function"),
        ("%TAG !e! !func\n---\ndoc_to_choice: !e!tion own.choices\n", "!function"),
        ("metric_list:\n  - metric: ./own.py\n", "metric './own.py'"),
        ("metric_list: [{metric: acc, hf_evaluate: true}]\n", "hf_evaluate"),
        ("# no !function here\ninclude: [tiny.yaml]\nmetric_list: [{metric: acc}]\n", ""),
        ("task: [\n", ""),  # broken: lm-eval says so
    ],
)
def test_code_in_tasks_is_found_however_it_is_spelled(task, found, tmp_path):
    (tmp_path / "other").write_text("doc_to_choice: !function own.choices\n")
    (tmp_path / "a.yaml").mkdir()
    (tmp_path / "tiny.yaml").write_text(task)
    expected = f"{str(tmp_path / 'tiny.yaml')!r} ({found})" if found else ""
    assert code_of_tasks(tmp_path, {"acc"}) == expected


def test_data_set_with_a_script(texts, tmp_path, capsys, tiny_dir):
    """No flag lets it run, because `datasets` runs none."""
    directory = tmp_path / "data"
    directory.mkdir()
    shutil.copy(texts, directory / "t.csv")
    (directory / "data.py").write_text(f"import pathlib; pathlib.Path({str(tmp_path / 'ran')!r}).touch()\n")
    data = ["--data", str(directory), "--concepts", "toxic", "--store", str(tmp_path / "S.zarr")]
    assert main(["collect", "--model", str(tiny_dir("llama")), *data]) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith(f"error: data {str(directory)!r}")
    assert not (tmp_path / "ran").exists()


def test_standard_input_is_empty_for_whatever_a_verb_calls(monkeypatch, tmp_path):
    found = []
    monkeypatch.setattr("aura_dist.cli.run", lambda argv: found.append(sys.stdin.read()))
    given = sys.stdin
    assert main(["status", str(tmp_path)]) == 0
    assert found == [""]
    assert sys.stdin is given
