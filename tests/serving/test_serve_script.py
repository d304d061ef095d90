"""`launch/serve.sh` with stand-ins for vLLM and evaluate: the server runs while evaluate does, and ends with it."""

import os
import subprocess
import sys
import time

import pytest

from tests.distributed.launch import REPOSITORY

HEALTHY = """
import sys, http.server, pathlib
pathlib.Path("{place}/served").write_text(" ".join(sys.argv[1:]))
class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Health).serve_forever()
"""


@pytest.fixture
def serve(tmp_path):
    """`serve(server, code, …)`: the script around a server's program, and an evaluate that ends with `code`."""

    def run(server, code, *arguments, **env):
        (tmp_path / "server.py").write_text(server.replace("{place}", str(tmp_path)))
        evaluate = tmp_path / "evaluate"
        evaluate.write_text(
            f'#!/bin/sh\necho "$@" > {tmp_path}/asked\npgrep -f {tmp_path}/server.py >&2\nexit {code}\n'
        )
        evaluate.chmod(0o755)
        given = {
            "PATH": os.environ["PATH"], "CONTAINER": str(evaluate), "PORT": "8761", "SERVE": "--dtype float32",
            "VLLM": f"{sys.executable} {tmp_path}/server.py", "SERVER_LOG": str(tmp_path / "log"), **env,
        }  # fmt: skip
        return subprocess.run(
            ["bash", REPOSITORY / "launch" / "serve.sh", *arguments],
            env=given, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip

    return run


def is_running(tmp_path):
    return subprocess.run(["pgrep", "-f", f"{tmp_path}/server.py"], check=False, capture_output=True).returncode == 0


def test_evaluates_what_it_serves(serve, tmp_path):
    (tmp_path / "aura").mkdir()
    done = serve(HEALTHY, 3, "m", "--out", "r.json", AURA_INTERVENTION=f"{tmp_path}/aura@0.5")
    assert done.returncode == 3, done.stderr
    assert done.stderr.strip().isdigit(), "the server runs while evaluate does"
    port = (tmp_path / "served").read_text().split("--port ")[1].split()[0]
    assert (tmp_path / "served").read_text() == f"serve m --host 127.0.0.1 --port {port} --dtype float32"
    asked = f"python -m aura_dist evaluate --model m --server http://127.0.0.1:{port}/v1"
    laid = f"--intervention {tmp_path}/aura --strength 0.5 --out r.json"
    assert (tmp_path / "asked").read_text().strip() == f"{asked} {laid}"
    assert not is_running(tmp_path)
    done = serve(HEALTHY, 0, "m", "--out", "r.json", AURA_INTERVENTION=f"{tmp_path}/aura")
    assert done.returncode == 0
    assert (tmp_path / "asked").read_text().strip().endswith(f"--intervention {tmp_path}/aura --out r.json")


def test_a_server_that_ends_or_never_answers(serve, tmp_path):
    began = time.monotonic()
    done = serve("print('no such model'); raise SystemExit(1)", 0, "m")
    assert done.returncode == 2
    assert done.stderr.splitlines()[0] == "no such model"
    assert done.stderr.splitlines()[-1].startswith("error: expected a server of m within 1800 s, got none; see ")
    done = serve("import time; time.sleep(60)", 0, "m", SERVER_SECONDS="2")
    assert done.returncode == 2
    assert time.monotonic() - began < 40
    assert not (tmp_path / "asked").exists()
    assert not is_running(tmp_path)
