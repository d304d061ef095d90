"""Grids → cells → jobs: what is shared, what counts, what is refused. Pure functions."""

import hashlib
from dataclasses import fields
from pathlib import Path

import pytest

from aura_dist.config.file import read_config_file
from aura_dist.config.verbs import VERBS
from aura_dist.errors import ConfigError
from aura_dist.sweep.driver import read_grid
from aura_dist.sweep.grid import make_cells
from aura_dist.sweep.stage_specs import STAGE_SPECS, StageSpec
from aura_dist.sweep.table import cell_row, figures

KNOWN = {stage: {spec.name for spec in fields(VERBS[stage].config)} for stage in STAGE_SPECS}
BASE = {
    "model": "m/tiny",
    "collect": {"data": "d.csv", "concepts": ["toxic"]},
    "evaluate": {"perplexity_texts": "t.csv"},
}
CONFIGS = Path(__file__).parents[2] / "configs"


def graph_of(grid, **more):
    return read_grid({**BASE, **more, "grid": grid})


def count(graph):
    return {stage: sum(job.stage == stage for job in graph.jobs.values()) for stage in STAGE_SPECS}


def test_what_cells_have_in_common_is_one_job():
    cells, graph = graph_of({"seed": [0, 1, 2], "method": ["aura", "det0"], "strength": [0.25, 0.5, 1.0]})
    assert len(cells) == 18
    assert count(graph) == {"collect": 3, "score": 3, "fit": 6, "evaluate": 18}
    assert len(graph.ends) == 18
    for chain in graph.chains:
        assert [job.stage for job in chain] == list(STAGE_SPECS)


def test_every_job_comes_after_those_it_needs():
    _, graph = graph_of({"seed": [0, 1], "method": ["none", "aura"], "strength": [0.5, 1.0]})
    seen = set()
    for job in graph.jobs.values():
        assert set(job.needs) <= seen
        seen.add(job.id)


def test_plain_model_is_one_cell_whatever_the_other_values():
    cells, graph = graph_of(
        {"method": ["none", "damp", "aura"], "strength": [0.5, 1.0], "alpha": [0.2, 0.5], "num_positive": [10, 20]}
    )
    values = [tuple(cell.values.values()) for cell in cells]
    assert values.count(("none", None, None, None)) == 1
    assert len(values) == len(set(values)) == 1 + 2 * 2 * 2 + 2 * 2, "alpha counts for damp alone"
    assert count(graph)["evaluate"] == 13


def test_plain_model_of_a_cell_is_evaluated_by_the_same_settings():
    prompts = {"toxicity_prompts": ["a.jsonl", "b.jsonl"], "preprompt": ["Be kind.", "Be rude."], "num_samples": [5, 9]}
    cells, graph = graph_of({"method": ["none", "aura"], "strength": [0.5, 1.0], "seed": [0, 1], "evaluate": prompts})
    measured = ("seed", "evaluate.toxicity_prompts", "evaluate.preprompt", "evaluate.num_samples")
    plain = {
        tuple(cell.values[name] for name in measured): chain[-1].id
        for cell, chain in zip(cells, graph.chains, strict=True)
        if cell.values["method"] == "none"
    }
    assert len(plain) == 16
    for cell, chain in zip(cells, graph.chains, strict=True):
        mine = plain[tuple(cell.values[name] for name in measured)]
        assert graph.plain(chain[-1].id) == (None if chain[-1].id == mine else mine)
    assert not any(graph.plain(job.id) for job in graph.jobs.values() if job.stage != "evaluate")


def test_cell_without_a_plain_model_by_its_settings_has_none():
    parts = [{"method": ["none"], "dtype": ["float32"]}, {"method": ["aura"], "dtype": ["float32", "bfloat16"]}]
    _, graph = graph_of(parts, evaluate={**BASE["evaluate"], "strength": 0.5, "sharding": "fsdp"})
    last = [chain[-1].id for chain in graph.chains]
    assert [graph.plain(job) for job in last] == [None, last[0], None]
    _, alone = graph_of({"method": ["aura"]})
    assert alone.plain(alone.chains[0][-1].id) is None


def test_section_leaves_the_grid_to_the_other_stages():
    grid = {"pooling": ["max", "mean"], "method": ["aura"]}
    _, apart = graph_of(grid)
    assert count(apart) == {"collect": 2, "score": 2, "fit": 2, "evaluate": 2}
    _, together = graph_of(grid, collect={**BASE["collect"], "pooling": ["max", "mean"]})
    assert count(together) == {"collect": 1, "score": 1, "fit": 2, "evaluate": 2}


def test_grids_of_a_list_are_joined():
    cells, _ = graph_of([{"method": ["none", "aura"]}, {"method": ["det0"], "top_k": [5, 10]}])
    assert [(c.values["method"], c.values["top_k"]) for c in cells] == [
        ("none", None), ("aura", None), ("det0", 5), ("det0", 10),
    ]  # fmt: skip


def test_larger_grid_has_the_same_jobs_and_more():
    _, small = graph_of({"method": ["aura"], "strength": [0.5, 1.0]})
    _, large = graph_of({"method": ["aura", "damp"], "strength": [0.25, 0.5, 1.0], "alpha": [0.5], "seed": [0]})
    assert set(small.jobs) < set(large.jobs)
    assert all(large.jobs[name] == job for name, job in small.jobs.items())


def test_digest_follows_what_changes_a_result_and_nothing_else():
    _, one = graph_of({"method": ["aura"]})
    _, same = graph_of({"method": ["aura"]}, sharding="fsdp", device="cpu", strength=1.0, dtype="float32")
    assert set(one.jobs) == set(same.jobs)
    _, other = graph_of({"method": ["aura"]}, dtype="bfloat16")
    assert not set(one.jobs) & set(other.jobs)
    assert [len(set(g.jobs)) for g in (one, other)] == [4, 4]


def test_strength_is_laid_on_once():
    cells, graph = graph_of({"method": ["aura"], "strength": [0.5]})
    assert "strength" not in cells[0].settings["fit"]
    (fit,) = (job for job in graph.jobs.values() if job.stage == "fit")
    assert "strength" not in fit.settings
    assert graph.chains[0][-1].settings["strength"] == 0.5


def test_concept_is_the_first_that_was_collected():
    cells, _ = graph_of({"method": ["aura"]})
    assert cells[0].settings["fit"]["concept"] == "toxic"


def test_without_evaluation_cells_end_with_the_fit():
    _, graph = read_grid({"model": "m", "collect": BASE["collect"], "grid": {"method": ["aura", "det0"]}})
    assert count(graph) == {"collect": 1, "score": 1, "fit": 2, "evaluate": 0}


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        (None, "grid: expected names and lists of values"),
        ({}, "grid: expected names and lists of values"),
        ({"method": "aura"}, "method: expected a list of values, got 'aura'"),
        ({"method": []}, "expected a list of values"),
        ({"metod": ["aura"]}, "unknown name 'metod'; known: "),
        ({"store": ["a.zarr"]}, "expected settings that change a result, got 'store'"),
        ({"sharding": ["fsdp"]}, "expected settings that change a result, got 'sharding'"),
        ({"fit": {"seed": [1]}}, "unknown name 'fit.seed'"),
        ({"method": ["none"], "top_k": [3]}, "takes from it, got 'top_k'"),
        ({"data": ["a.csv"]}, "got 'data', which a section fixes"),
        ({"top_k": [0]}, "fit of the cell top_k 0: --top-k: expected an integer of at least 1, got 0"),
        ({"strength": ["high"]}, "evaluate of the cell strength high: --strength"),
    ],
)
def test_grid_that_cannot_be_is_refused(grid, message):
    with pytest.raises(ConfigError) as error:
        graph_of(grid)
    assert message in str(error.value)


@pytest.mark.parametrize("more", [{"store": "s.zarr"}, {"fit": {"out": "i"}}, {"evaluate": {"intervention": "i"}}])
def test_paths_that_the_sweep_sets_are_refused(more):
    with pytest.raises(ConfigError, match="the sweep sets it"):
        graph_of({"method": ["aura"]}, **more)


def test_strength_on_top_of_a_sweep_that_evaluates_nothing_would_count_for_nothing():
    document = {**BASE, "strength": 0.5, "grid": {"method": ["aura"]}}
    document.pop("evaluate", None)
    with pytest.raises(ConfigError, match="expected 'strength' in the section 'fit'"):
        make_cells(document, KNOWN)


def test_alpha_of_the_section_is_for_the_methods_that_look_at_it():
    cells, graph = graph_of({"method": ["aura", "damp"]}, fit={"alpha": 0.3})
    fits = [job.settings for job in graph.jobs.values() if job.stage == "fit"]
    assert [settings.get("alpha") for settings in fits] == [None, 0.3]
    assert len(cells) == 2
    with pytest.raises(ConfigError, match="--alpha"):
        graph_of({"top_k": [1, 2]}, fit={"alpha": 0.3, "method": "aura"})


@pytest.mark.parametrize(
    ("grid", "more", "message"),
    [
        ({"method": ["aura"]}, {"fit": {"alpha": 0.3}}, "got 'alpha'; leave it out, or add"),
        ({"method": ["aura", "det0"]}, {"alpha": 0.3}, "got 'alpha'"),
        ({"method": ["none"]}, {"evaluate": {**BASE["evaluate"], "strength": 0.5}}, "got 'strength'"),
    ],
)
def test_setting_that_no_cell_reads_is_refused(grid, more, message):
    with pytest.raises(ConfigError, match=message):
        graph_of(grid, **more)


def test_setting_on_top_for_a_stage_that_the_sweep_has_not_is_refused():
    document = {"model": "m", "collect": BASE["collect"], "scorer": "profanity-check", "grid": {"method": ["aura"]}}
    with pytest.raises(ConfigError, match=r"got 'scorer'; .*\(evaluate\)"):
        read_grid(document)
    assert read_grid({**document, "evaluate": BASE["evaluate"]})


def test_plain_models_alone_need_no_settings_of_a_fit():
    more = {"alpha": 0.3, "num_positive": 5, "fit": {"max_q": 0.1}}
    assert count(graph_of({"method": ["none"]}, **more)[1]) == {"collect": 0, "score": 0, "fit": 0, "evaluate": 1}


def test_axis_without_a_value_changes_nothing():
    assert graph_of({"method": ["aura"], "top_k": [None]})[1].jobs == graph_of({"method": ["aura"]})[1].jobs


def test_figures_are_flat_and_settings_are_left_out():
    results = {
        "config": {"model": "m"},
        "perplexity": {"token_weighted": 2.5, "by": [1, 2]},
        "toxicity": {"a": {"p": 0}},
    }
    assert figures(results) == {"perplexity.token_weighted": 2.5, "toxicity.a.p": 0}


def test_row_names_the_job_that_failed():
    cells, graph = graph_of({"method": ["aura"]})
    chain = graph.chains[0]
    states = {job.id: {"state": "done", "reason": "", "seconds": 1.0, "attempts": 1} for job in chain}
    assert cell_row(cells[0], chain, states)["state"] == "done"
    states[chain[-1].id]["state"] = "queued"
    assert cell_row(cells[0], chain, states)["state"] == "waiting"
    states[chain[1].id] |= {"state": "failed", "reason": "no room"}
    row = cell_row(cells[0], chain, states)
    assert (row["state"], row["reason"]) == ("failed", f"{chain[1].id}: no room")


def test_jobs_keep_the_names_of_sweeps_that_have_been_run():
    """So that a later version finds what an earlier one has done, also where a setting's default is given."""
    _, graph = graph_of(
        {"method": ["none", "damp"], "alpha": [0.2, 0.5], "strength": [0.5]},
        score={"statistics": ["auroc"]}, sharding="fsdp",
    )  # fmt: skip
    assert list(graph.jobs) == [
        "collect-tiny-mlp-max-7884188ef3",
        "score-tiny-mlp-max-7884188ef3-7b9df6fe99",
        "fit-damp-47fc6669c4",
        "fit-damp-f105334473",
        "evaluate-tiny-plain-432378bc75",
        "evaluate-tiny-damp-s0.5-8883d765a8",
        "evaluate-tiny-damp-s0.5-7b5d07e642",
    ]
    _, gemma = read_grid(read_config_file(str(CONFIGS / "sweep-gemma.yaml")))
    assert len(gemma.jobs) == 37
    assert hashlib.sha256("\n".join(gemma.jobs).encode()).hexdigest().startswith("b79a83cb9be2d917")


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("sweep-*.yaml")), ids=lambda p: p.stem)
def test_sweep_files_are_whole(path):
    _, graph = read_grid(read_config_file(str(path)))
    counts = count(graph)
    assert counts["collect"] == counts["score"] < counts["fit"] <= counts["evaluate"] == len(graph.ends)


def test_other_statistics_are_scored_and_no_fit_is_made_anew():
    grid = {"method": ["aura"]}
    _, everything = graph_of(grid)
    _, some = graph_of(grid, score={"statistics": ["auroc"], "num_workers": 3})
    _, more = graph_of(grid, score={"statistics": ["auroc", "q_value"]})
    stages = {name: {job.id for graph in (everything, some, more) for job in graph.jobs.values() if job.stage == name}
              for name in STAGE_SPECS}  # fmt: skip
    assert {name: len(ids) for name, ids in stages.items()} == {"collect": 1, "score": 3, "fit": 1, "evaluate": 1}
    (fit,) = (job for job in some.jobs.values() if job.stage == "fit")
    assert some.jobs[fit.needs[0]].settings["statistics"] == ["auroc"]


def test_new_stage_is_one_row(monkeypatch):
    """An export of every fitted intervention, beside its evaluation."""
    export = StageSpec(
        paths={"intervention": "{fit[out]}", "out": "exports/{name}"},
        needs=("fit",),
        label=lambda settings, needed: [*needed, settings.get("dtype", "keep")],
        optional=True,
    )
    grid = {"method": ["none", "aura"], "export": {"dtype": ["keep", "float32"]}}
    _, without = graph_of({"method": ["none", "aura"]})
    monkeypatch.setitem(STAGE_SPECS, "export", export)
    cells, graph = graph_of(grid)
    assert [tuple(cell.values.values()) for cell in cells] == [("none", None), ("aura", "keep"), ("aura", "float32")]
    assert count(graph) == {"collect": 1, "score": 1, "fit": 1, "evaluate": 2, "export": 2}
    assert set(without.jobs) < set(graph.jobs)
    exports = [job for job in graph.jobs.values() if job.stage == "export"]
    (fit,) = (job for job in graph.jobs.values() if job.stage == "fit")
    assert {job.paths["intervention"] for job in exports} == {fit.paths["out"]}
    assert [job.product for job in exports] == [f"exports/{job.name}" for job in exports]
    chain = graph.chains[1]
    assert graph.ends >= {chain[-2].id, chain[-1].id}, "neither waits for the other"
    states = {job.id: {"state": "done", "reason": "", "seconds": 1.0, "attempts": 1} for job in chain}
    assert cell_row(cells[1], chain, states)["state"] == "done"
    states[chain[-2].id] |= {"state": "failed", "reason": "no room"}
    assert cell_row(cells[1], chain, states)["reason"] == f"{chain[-2].id}: no room"
