"""Servers that `--server COMMAND` starts: they are there while they are needed, and end with whoever started them."""

import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from aura_dist.cli import main
from aura_dist.config.settings import resolve
from aura_dist.config.verbs import SweepConfig
from aura_dist.errors import ConfigError, ServerError
from aura_dist.interventions.artifact import Intervention
from aura_dist.serving import start
from aura_dist.serving.start import running
from aura_dist.sweep.driver import Sweep, read_grid
from aura_dist.sweep.stage_specs import num_ranks
from tests.distributed.launch import REPOSITORY

SMALL = f"{sys.executable} -m tests.serving.openai_server {{model}} {{port}}"
HEALTHY = """
import http.server, os, signal, sys, threading
print(os.environ.get("AURA_INTERVENTION"), *sys.argv[2:], flush=True)
if "stubborn" in sys.argv:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Health).serve_forever()
"""


@pytest.fixture
def healthy(tmp_path):
    """The command of a server that only says that it is healthy."""
    (tmp_path / "server.py").write_text(HEALTHY)
    return f"{sys.executable} {tmp_path}/server.py {{port}} {{model}}"


def listens(url):
    port = int(re.search(r":(\d+)", url)[1])
    with socket.socket() as there:
        return there.connect_ex(("127.0.0.1", port)) == 0


def falls_silent(url):
    """Within seconds: a killed process closes its sockets a little later."""
    end = time.monotonic() + 10
    while listens(url) and time.monotonic() < end:
        time.sleep(0.05)
    return not listens(url)


def test_the_command_gets_what_it_needs_and_ends_with_the_context(healthy, tmp_path, monkeypatch):
    monkeypatch.setenv("AURA_INTERVENTION", "another")
    monkeypatch.setattr(start, "_STOP_SECONDS", 0.5)
    log = tmp_path / "log"
    for intervention, name in ((None, "None"), (str(tmp_path / "iv"), f"{tmp_path}/iv@0.5")):
        with running(healthy, "a model", intervention, 0.5, log) as url:
            assert listens(url)
            assert log.read_text().splitlines()[0] == f"{name} a model"
        assert falls_silent(url)
    with pytest.raises(ZeroDivisionError), running(healthy, "stubborn", None, 1.0, log) as url:
        raise ZeroDivisionError
    assert falls_silent(url)
    with running("http://there:8000", "m", None, 1.0, log) as url:
        assert url == "http://there:8000"


def test_a_server_that_does_not_come_up_is_an_error(healthy, tmp_path, monkeypatch):
    log, began = tmp_path / "log", time.monotonic()
    for command, said in (
        ("sh -c 'echo error: no such model; echo Bye; exit 3' {port}", "got one that ended: no such model; see"),
        ("sh -c 'echo \"(W pid=1) ERROR aura_dist.errors.ModelError: no site\"' {port}", "ended: no site; see"),
        ("no-such-program {port}", "got one that ended: .*no-such-program: .*not found; see"),
    ):
        with pytest.raises(ServerError, match=said), running(command, "m", None, 1.0, log):
            pass
    monkeypatch.setattr(start, "START_SECONDS", 1.0)
    with pytest.raises(ServerError, match="within 1 s, got no answer"), running("sleep 60{port}", "m", None, 1.0, log):
        pass
    assert time.monotonic() - began < 20


def test_what_does_not_speak_http_is_not_healthy():
    with socket.create_server(("127.0.0.1", 0)) as other:

        def greet():
            there, _ = other.accept()
            with there:
                there.sendall(b"SSH-2.0-OpenSSH\r\n")

        greeter = threading.Thread(target=greet)
        greeter.start()
        assert not start._is_healthy(other.getsockname()[1])
        greeter.join()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("evaluate --perplexity-texts {}/texts.csv --out {}/r.json --intervention {}/none", "intervention .*none': "),
        ("generate --prompt Hi --intervention {}/none", "intervention .*none': expected intervention.json"),
        ("generate --prompt Hi --intervention {}/other", "has no module 'model.layers.9.mlp'"),
        ("generate --prompt Hi --max-new-tokens 999", "--max-new-tokens with the prompt: expected at most"),
        ("evaluate --perplexity-texts {}/texts.csv --out {}/r.json --max-tokens 999", "--max-tokens: expected at most"),
        ("evaluate --toxicity-prompts {}/texts.csv --out {}/r.json --scorer {}/none", "none' cannot be loaded: "),
        ("evaluate --perplexity-texts {}/texts.csv --out {}/r.json --model {}/none", "--model .*none': expected a "),
    ],
)
def test_no_server_is_started_for_what_is_wrong_without_one(arguments, message, tiny_dir, tmp_path, refused):
    (tmp_path / "texts.csv").write_text("text\n" + "word " * 400 + "\n")
    Intervention({"model.layers.9.mlp": np.ones(4, np.float32)}, {}, {}).save(tmp_path / "other")
    words = [*arguments.replace("{}", str(tmp_path)).split(), "--server", f"sh -c 'touch {tmp_path}/started' {{port}}"]
    refused([*words, *([] if "--model" in words else ["--model", tiny_dir("llama")])], message)
    assert not (tmp_path / "started").exists()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_server_ends_with_who_started_it_and_not_at_slurms_warning(healthy, tmp_path, number):
    code = (
        "import sys, time, pathlib\nfrom aura_dist.serving.start import running\n"
        f"with running({healthy!r}, 'm', None, 1.0, pathlib.Path({str(tmp_path / 'log')!r})) as url:\n"
        "    print(url, flush=True)\n    time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=REPOSITORY) as process:
        url = process.stdout.readline()
        assert listens(url)
        found = subprocess.run(["pgrep", "-f", f"{tmp_path}/server.py"], capture_output=True, text=True, check=True)
        for pid in found.stdout.split():
            if "-c" not in Path(f"/proc/{pid}/cmdline").read_text().split("\0"):
                subprocess.run(["kill", "-USR1", pid], check=True)
        time.sleep(0.2)
        assert listens(url)
        process.send_signal(number)
    end = time.monotonic() + 20
    while listens(url) and time.monotonic() < end:
        time.sleep(0.05)
    assert not listens(url)


def test_evaluate_starts_the_server_that_it_asks(tiny_dir, tmp_path, refused, monkeypatch):
    directory = str(tiny_dir("llama"))
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    (tmp_path / "texts.csv").write_text("text\nthe cat sat on the mat\nYou are such a fool and so is he\n")
    scale = {"model.layers.0.mlp.down_proj": np.linspace(0, 1, 48, dtype=np.float32)}
    Intervention(scale, {}, {"method": "aura"}).save(tmp_path / "iv")
    asked = ["evaluate", "--model", directory, "--perplexity-texts", str(tmp_path / "texts.csv")]
    asked += ["--intervention", str(tmp_path / "iv"), "--strength", "0.5", "--out"]
    found = []
    for name, more in (("here", []), ("there", ["--server", SMALL])):
        assert main([*asked, str(tmp_path / f"{name}.json"), *more]) == 0
        found.append(json.loads((tmp_path / f"{name}.json").read_text()))
    there = found[1]["perplexity"]["token_weighted"]
    assert there == pytest.approx(found[0]["perplexity"]["token_weighted"], rel=1e-5)
    assert found[1]["server"]["command"] == SMALL
    assert not listens(found[1]["server"]["url"])
    assert (tmp_path / "there-server.log").exists()
    refused([*asked, tmp_path / "r.json", "--server", "false {port}"], "expected a server that answers /health")


def test_a_sweep_starts_one_process_for_a_server(tmp_path):
    def sweep(grid, **more):
        document = {
            "model": "m", "out": str(tmp_path), "collect": {"data": "d.csv", "concepts": ["toxic"]},
            "evaluate": {"perplexity_texts": "p.csv"}, "grid": grid,
        }  # fmt: skip
        cells, graph = read_grid(document)
        return graph, Sweep(resolve(SweepConfig, {"out": str(tmp_path), "grid": grid, **more}), cells, graph)

    grid = {"method": ["none", "aura"], "evaluate": {"server": [SMALL]}}
    graph, made = sweep(grid, ranks=2)
    jobs = [job for job in graph.jobs.values() if job.stage == "evaluate"]
    assert [made.settings(job)["server"] for job in jobs] == [SMALL, SMALL]
    assert {num_ranks(job.stage, job.settings, 2) for job in jobs} == {1}
    assert [num_ranks(stage, {}, 2) for stage in ("collect", "score", "evaluate")] == [2, 1, 2]
    slurm = {"launcher": "slurm", "resources": {"tasks_per_node": 8}}
    with pytest.raises(ConfigError, match="expected nodes 1 and tasks_per_node 1 for evaluate with 'server', got 8"):
        sweep(grid, **slurm)
    sweep({"method": ["aura"]}, **slurm)
    slurm["resources"]["evaluate"] = {"tasks_per_node": 1}
    sweep(grid, **slurm)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_sweep_has_a_server_for_each_cell(tiny_dir, sentences_csv, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    (tmp_path / "texts.csv").write_text("text\nthe cat sat on the mat\nYou are such a fool and so is he\n")
    document = {
        "model": str(tiny_dir("llama")), "out": str(tmp_path / "sweep"), "retries": 0,
        "collect": {"data": sentences_csv, "concepts": ["toxic"], "num_positive": 20, "num_negative": 20},
        "evaluate": {"perplexity_texts": str(tmp_path / "texts.csv"), "server": SMALL},
        "grid": [{"method": ["none"]}, {"method": ["aura"], "strength": [0.5]}],
    }  # fmt: skip
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(document))
    assert main(["sweep", "--config", str(tmp_path / "grid.yaml")]) == 0
    table = pd.read_csv(tmp_path / "sweep" / "table.csv")
    assert list(table["state"]) == ["done", "done"]
    assert len(set(table["perplexity.token_weighted"])) == 2
    found = [json.loads(path.read_text()) for path in (tmp_path / "sweep" / "results").glob("*.json")]
    assert [one["server"]["command"] for one in found] == [SMALL, SMALL]
    assert not any(listens(one["server"]["url"]) for one in found)
    assert len(list((tmp_path / "sweep" / "results").glob("*-server.log"))) == 2
