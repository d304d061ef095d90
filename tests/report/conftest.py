"""A small real run and its page, made once for the tests that read them."""

import pytest

from aura_dist.cli import main
from tests.models import DEMO_SENTENCES
from tests.results import write_results


@pytest.fixture(scope="session")
def report_run(tiny_dir, tmp_path_factory):
    """A run by the real stages, with results of `evaluate` (perplexity) and synthetic ones (toxicity)."""
    out = tmp_path_factory.mktemp("runs") / "tiny"
    model, store, data = str(tiny_dir("llama")), str(out / "store.zarr"), str(DEMO_SENTENCES)
    collect = ["collect", "--model", model, "--data", data, "--concepts", "toxic"]
    assert main([*collect, "--num-positive", "40", "--num-negative", "40", "--store", store]) == 0
    assert main(["score", "--store", store]) == 0
    for method in (["aura"], ["damp", "--top-k", "20"]):
        fit = ["fit", "--store", store, "--concept", "toxic", "--out", str(out / "interventions" / method[0])]
        assert main([*fit, "--method", *method]) == 0
    texts = str(DEMO_SENTENCES.with_name("passages.csv"))
    evaluate = [
        "evaluate",
        "--model",
        model,
        "--perplexity-texts",
        texts,
        "--out",
        str(out / "results" / "measured.json"),
    ]
    assert main([*evaluate, "--intervention", str(out / "interventions" / "aura")]) == 0
    write_results(out, "plain", texts=["one", "<script>alert(1)</script>", "three", "four & more"])
    write_results(
        out, "pressed", method="aura", strength=0.5, toxic=0.1, preprompt="Be kind.", texts=["a", "b", "c", "d"]
    )
    return out


@pytest.fixture(scope="session")
def report_page(report_run, tmp_path_factory):
    """Path of its page."""
    page = tmp_path_factory.mktemp("page") / "page.html"
    assert main(["report", str(report_run), "--out", str(page), "--expert-auroc", "0.6"]) == 0
    return page
