"""One rank of a host asks the hub for a model; the others take its files from the cache."""

import re
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests.distributed.from_hub import run_from_hub
from tests.distributed.launch import Launch, launched, run_ranks

pytestmark = pytest.mark.timeout(200)
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tiny_dir):
    """(Address, asked): a hub with one model, `some/model`, and the paths that it was asked for."""
    asked: list[str] = []
    directory = tiny_dir("llama")

    class Hub(SimpleHTTPRequestHandler):
        def send_head(self):
            found = re.fullmatch(r"/rank-./some/model/resolve/[^/]+/([^?]+)", self.path)
            file = directory / found[1] if found else None
            asked.append(self.path)
            there = file is not None and file.is_file()
            self.send_response(200 if there else 404)
            self.send_header("X-Repo-Commit", COMMIT)
            if not there:
                self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("ETag", f'"{found[1] if found else ""}"')
            self.send_header("Content-Length", str(file.stat().st_size if there else 0))
            self.end_headers()
            return file.open("rb") if there else None

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("verb", ["collect", "evaluate"])
def test_one_rank_of_a_host_asks_the_hub(verb, hub, sentences_csv, tmp_path):
    address, asked = hub
    words = {
        "collect": ["--data", sentences_csv, "--concepts", "toxic", "--num-positive", "20", "--num-negative", "20",
                    "--store", str(tmp_path / "store")],
        "evaluate": ["--perplexity-texts", sentences_csv, "--max-tokens", "8", "--out", str(tmp_path / "out.json")],
    }[verb]  # fmt: skip
    run_ranks(3, [address, str(tmp_path / "cache"), verb, "--model", "some/model", *words], run_from_hub)
    of_ranks = [path for path in asked if path.startswith("/rank-")]
    assert any(path.endswith("model.safetensors") for path in of_ranks), "the weights are the hub's"
    assert len({path.split("/")[1] for path in of_ranks}) <= (2 if verb == "collect" else 1), of_ranks
    asking = {path.split("/")[1] for path in of_ranks if path.endswith("model.safetensors")}
    assert len(asking) == 1, "of each file one rank"


def test_model_that_the_hub_does_not_have_ends_all_ranks_with_one_error(hub, tmp_path):
    address, _ = hub
    command = [address, str(tmp_path / "cache"), "generate", "--model", "some/other", "--prompt", "the cat"]
    with launched(Launch(3, command, run_from_hub)) as launch:
        assert launch.wait(60) == [2, 2, 2], launch.text()
        assert launch.text().count("error: --model 'some/other'") == 1, launch.text()
        assert "Traceback" not in launch.text()
