"""LinEAS with its texts over two ranks, against one process."""

import shlex

import numpy as np
import pytest
from safetensors.numpy import load_file

from aura_dist.cli import main
from aura_dist.interventions import lineas
from aura_dist.interventions.artifact import Intervention
from aura_dist.ranks.rows import shares_of
from tests.distributed.launch import Launch, launched
from tests.distributed.learned import BATCH_TOKENS, SAVE_EVERY, run_commands

STEPS = 10
MODULES = {"gpt2": ["transformer.h.0.mlp.c_fc", "transformer.h.1.ln_2"], "gemma3": ["norm"]}
# an odd number of texts, in several batches; one text, which is fewer than ranks; steps that are taken back
CASES = {
    "odd": ("gpt2", 11), "other": ("gemma3", 11), "single": ("gpt2", 1), "resumed": ("gpt2", 11), "steep": ("gpt2", 11),
}  # fmt: skip
AS = {"recomputed": "other", "whole": "single"}  # of one process: with less memory, and without sharding
SPLIT = ["--sharding", "fsdp"]


@pytest.fixture(scope="module")
def stores(tiny_dir, sentences_csv, tmp_path_factory):
    found = {}
    for model, modules in MODULES.items():
        found[model] = tmp_path_factory.mktemp("ranks") / "store.zarr"
        known = ["--model", str(tiny_dir(model)), "--data", sentences_csv, "--concepts", "toxic"]
        numbers = ["--num-positive", "12", "--num-negative", "12", "--max-tokens", "24", "--store", str(found[model])]
        assert main(["collect", *known, *numbers, "--modules", *modules]) == 0
    assert main(["score", "--store", str(found["gpt2"]), "--statistics", "auroc"]) == 0
    return found


def fit(store, out, method="lineas", *more):
    return ["fit", "--store", str(store), "--concept", "toxic", "--out", str(out), "--method", method, *map(str, more)]


def lineas_of(stores, case, out):
    model, texts = CASES[case]
    rate = 30 if case == "steep" else 0.05
    few = ["--steps", STEPS, "--texts-per-class", texts, "--learning-rate", rate, "--sparsity", 0.001]
    return fit(stores[model], out, "lineas", *few)


def interrupt(command, monkeypatch):
    """Run it in this process until its eighth step."""
    descend, taken = lineas._Learner._descend, []

    def broken(self, at, rate):
        taken.append(rate)
        if len(taken) == 8:
            raise MemoryError
        descend(self, at, rate)

    with monkeypatch.context() as patch:
        patch.setattr(lineas, "_SAVE_EVERY", SAVE_EVERY)
        patch.setattr(lineas._Learner, "_descend", broken)
        with pytest.raises(MemoryError):
            main(command)


def test_texts_over_two_ranks_make_the_maps_of_one_process(stores, tmp_path, monkeypatch):
    monkeypatch.setattr(lineas, "_BATCH_TOKENS", BATCH_TOKENS)
    alone, ranks = tmp_path / "alone", tmp_path / "ranks"
    for case in CASES:
        assert main(lineas_of(stores, case, alone / case)) == 0
    interrupt(lineas_of(stores, "resumed", ranks / "resumed"), monkeypatch)
    kept = load_file(ranks / "resumed.training")
    assert int(kept["step"]) == 6
    split = {"single", "resumed", "steep"}
    commands = [[*lineas_of(stores, c, ranks / c), *(SPLIT if c in split else ())] for c in CASES]
    commands.append([*lineas_of(stores, "other", ranks / "recomputed"), *SPLIT, "--recompute"])
    commands.append(lineas_of(stores, "single", ranks / "whole"))
    commands.append(fit(stores["gpt2"], ranks / "aura", "aura"))
    commands.append(lineas_of(stores, "odd", ranks / "failed"))
    with launched(Launch(2, [shlex.join(command) for command in commands], run_commands)) as launch:
        codes = launch.wait(150)
        said = launch.text()
    assert codes == [2, 2], said
    for case in [*CASES, *AS]:
        ours = Intervention.load(ranks / case)
        theirs = Intervention.load(alone / AS.get(case, case))
        assert ours.meta == theirs.meta or case == "recomputed"
        assert ours.num_changed > 0
        for site in theirs.sites:
            for mine, expected in zip(ours.map_of(site), theirs.map_of(site), strict=True):
                np.testing.assert_allclose(mine, expected, rtol=0, atol=1e-5, err_msg=f"{case}, {site}\n{said}")
    # what is written comes from rank 0, once; the state of the failed one stays, the others' states are gone
    assert sorted(line for line in said.splitlines() if " writes " in line) == sorted(
        f"rank 0 writes {name}" for name in [*CASES, *AS, "aura"]
    )
    assert sorted(path.name for path in ranks.iterdir()) == sorted([*CASES, *AS, "aura", "failed.training"])
    assert "lineas: 6 steps were taken before" in said
    assert said.count("error: ") == said.count("error: no more steps here") == 1
    assert said.count("ended, because another rank failed: rank 1: no more steps here") <= 1
    failed = load_file(ranks / "failed.training")
    assert int(failed["step"]) == SAVE_EVERY
    assert bytes(failed["key"]) == bytes(kept["key"]), "a state is of any number of ranks"


def test_sharding_that_nothing_would_look_at_is_refused(stores, tmp_path, refused):
    store, out = stores["gpt2"], tmp_path / "out"
    refused(fit(store, out, "aura", *SPLIT), "--sharding: expected replicate with --method aura, got 'fsdp'; leave it")
    refused(fit(store, out, "lineas", "--sharding", "tensor"), "--sharding: expected replicate or fsdp with --method l")
    refused(fit(store, out, "lineas", *SPLIT, "--gate", "tokens"), "expected replicate with --gate tokens without --g")
    file = tmp_path / "file.yaml"
    file.write_text(f"sharding: fsdp\nfit: {{store: {store}, concept: toxic, method: aura, out: {out}}}\n")
    assert main(["fit", "--config", str(file), "--check"]) == 0, "on top of a file it is for other verbs"


@pytest.mark.parametrize(
    ("costs", "rows_of_ranks"),
    [
        ([1, 1, 1, 1], [2, 2]),
        ([5, 5, 400], [2, 1, 0]),
        ([400, 5, 5], [0, 1, 2]),
        ([3], [0, 1]),
        ([1, 1, 2, 4, 8], [4, 1]),
    ],
)
def test_ranks_share_the_costs(costs, rows_of_ranks):
    shares = shares_of(np.array(costs, float), len(rows_of_ranks))
    assert [s.stop - s.start for s in shares] == rows_of_ranks
    assert [n for share in shares for n in range(len(costs))[share]] == list(range(len(costs)))
