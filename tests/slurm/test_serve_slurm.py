"""Evaluation with a server of its own on a real Slurm: `launch/serve.sh`, and a sweep whose jobs each start one."""

import json
import sys

import numpy as np
import pytest

from aura_dist.interventions.artifact import Intervention
from tests.slurm.conftest import tail
from tests.slurm.test_sweep_slurm import start, states, write_grid

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(300)]
TEXTS = ["the cat sat on the mat", "nobody knows a thing", "rivers carry silt to the sea"]


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "texts.csv"
    path.write_text("text\n" + "\n".join(TEXTS) + "\n")
    return path


def test_serve_script_as_a_job(slurm, tiny_dir, texts, tmp_path):
    model = tiny_dir("llama")
    made = Intervention({"model.layers.0.mlp.down_proj": np.linspace(0, 1, 48, dtype=np.float32)}, {}, {})
    made.save(tmp_path / "iv")
    # `vllm serve MODEL --host ADDRESS --port PORT`
    (tmp_path / "vllm").write_text(f'#!/bin/sh\nexec {sys.executable} -m tests.serving.openai_server "$2" "$6"\n')
    (tmp_path / "vllm").chmod(0o755)
    log = tmp_path / "job.log"
    job = slurm.submit(
        "--output", log, "--partition=main", "--mem=1500M", "launch/serve.sh", model, "--perplexity-texts", texts,
        "--out", tmp_path / "r.json", VLLM=str(tmp_path / "vllm"), AURA_INTERVENTION=f"{tmp_path}/iv@0.5",
    )  # fmt: skip
    assert slurm.wait(job, 120, log) == "COMPLETED", tail([log, tmp_path / "r-server.log"])
    found = json.loads((tmp_path / "r.json").read_text())
    assert (found["intervention"]["digest"], found["intervention"]["strength"]) == (made.digest, 0.5)
    assert found["perplexity"]["num_texts"] == len(TEXTS)
    assert found["server"]["command"].startswith(str(tmp_path / "vllm"))


def test_each_cell_of_a_sweep_has_its_server(slurm, tiny_dir, sentences_csv, texts, tmp_path):
    server = f"{sys.executable} -m tests.serving.openai_server {{model}} {{port}}"
    evaluate = {"server": server, "perplexity_texts": str(texts)}
    path = write_grid(
        tmp_path, tiny_dir("llama"), sentences_csv, {"method": ["none", "aura"], "strength": [0.5]}, evaluate=evaluate
    )
    sweep = start(slurm, path)
    said = sweep.communicate(timeout=200)[1]
    logs = sorted((tmp_path / "sweep").glob("logs/*"))
    assert sweep.returncode == 0, said + tail(logs)
    assert {state["state"] for state in states(tmp_path / "sweep").values()} == {"done"}
    results = [json.loads(one.read_text()) for one in (tmp_path / "sweep" / "results").glob("*.json")]
    assert len(results) == 2
    assert all(one["server"]["command"] == server for one in results)
    assert len({round(one["perplexity"]["token_weighted"], 6) for one in results}) == 2
