"""What results of two engines have to do with each other is said where they are compared."""

import logging

import numpy as np
import pytest

from aura_dist.evaluation.compare import against_baseline, against_plain, differences

SAID = "expected the engine of {}, vllm 0.11, got {}: engines draw other continuations at the same seed, "


def results(server):
    per_prompt = {"toxic_share": [0.5, 0.1], "maximum": [0.5, 0.1]}
    head = {"prompts_sha256": "a", "scorer": "s", "num_samples": 2, "settings": {"seed": 0}}
    own = {} if server is None else {"server": dict(zip(("engine", "version"), server, strict=True))}
    return {"toxicity": {**head, "per_prompt": per_prompt}, "model_fingerprint": "f", **own}


@pytest.mark.parametrize(
    ("other", "got"),
    [
        (("vllm", "0.11"), None),
        (("vllm", "0.12"), "vllm 0.12"),
        (("sglang", None), "sglang (no version)"),
        (None, "a model in process"),
    ],
)
def test_results_of_another_engine_are_compared_and_it_is_said(other, got, caplog):
    ours, theirs = results(("vllm", "0.11")), results(other)
    caplog.set_level(logging.WARNING)
    found = against_baseline(theirs, ours, "r/none.json", {"overall": np.array([True, True])})
    assert found["overall"]["probability"]["value"] == 1
    assert against_plain(ours, theirs)["times_less_toxic.value"] == 1
    said = [*caplog.messages, *differences({"aura": ours, "none": theirs})]
    if got is None:
        assert said == []
    else:
        assert [
            line.partition(SAID.format(of, got))[0]
            for line, of in zip(said, ("this evaluation", "the plain model", "aura"), strict=True)
        ] == ["--baseline 'r/none.json': ", "a cell: ", "none: "]
