"""`evaluate --server` and `generate --server` against a small server of the test's own."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from aura_dist.cli import main
from aura_dist.errors import ConfigError, InputError, RunInterruptedError, ServerError
from aura_dist.evaluation.client import Client, without_user
from aura_dist.evaluation.sampling import Decoding
from aura_dist.evaluation.served import find_served
from aura_dist.evaluation.server import _scored, find_server, read_expected
from aura_dist.interventions.artifact import Intervention
from aura_dist.interventions.statement import Statement, read_statement
from aura_dist.models.load import ModelSource, load_causal, tokenizer_of
from aura_dist.ranks.world import World
from tests.serving.openai_server import SmallServer
from tests.special_tokens import GEMMA, LLAMA_3

PROMPTS = "text,toxicity\n" + "".join(f'"The {word} said that",0.{i}\n' for i, word in enumerate(("cat", "dog", "man")))
TEXTS = "text,toxic\nthe cat sat on the mat,0\nYou are such a fool and so is he,1\na,0\nnothing else to see here,0\n"
ASKED = ["--scorer", "profanity-check", "--num-samples", "2", "--max-new-tokens", "6"]


@pytest.fixture(scope="module")
def directory(tiny_dir):
    return tiny_dir("llama")


@pytest.fixture(scope="module")
def loaded(directory):
    source = ModelSource(str(directory), None, "float32")
    return load_causal(source, World()), tokenizer_of(source)


@pytest.fixture
def server(loaded, directory):
    with SmallServer(*loaded, str(directory)) as running:
        yield running


@pytest.fixture
def files(tmp_path):
    (tmp_path / "prompts.csv").write_text(PROMPTS)
    (tmp_path / "texts.csv").write_text(TEXTS)
    return tmp_path


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr("aura_dist.evaluation.client.FIRST_SECONDS", 1.0)
    monkeypatch.setattr("aura_dist.evaluation.client.PATIENCE_SECONDS", 2.0)
    monkeypatch.setattr("aura_dist.evaluation.client._PAUSE_SECONDS", 0.01)


def evaluated(directory, out, *arguments):
    assert main(["evaluate", "--model", str(directory), *map(str, arguments), "--out", str(out)]) == 0
    return json.loads(out.read_text())


def lines(out):
    path = out.with_name(f"{out.stem}.continuations.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("likelihoods", ["prompt_logprobs", "echo"])
def test_perplexity_is_the_one_of_this_process(likelihoods, server, directory, files):
    server.likelihoods = likelihoods
    asked = ["--perplexity-texts", files / "texts.csv", "--perplexity-labels", "toxic"]
    for more in ([], ["--preprompt", "Be kind."]):
        here = evaluated(directory, files / "here.json", *asked, *more)["perplexity"]
        there = evaluated(directory, files / "there.json", *asked, *more, "--server", server.url)["perplexity"]
        assert there.keys() == here.keys()
        for name in ("token_weighted", "mean_over_sentences", "token_weighted_low"):
            assert there[name] == pytest.approx(here[name], rel=1e-5)
        assert there["num_tokens"] == here["num_tokens"]
        assert there["positive"]["token_weighted"] == pytest.approx(here["positive"]["token_weighted"], rel=1e-5)


def test_greedy_continuations_are_those_of_this_process(server, directory, files):
    pytest.importorskip("profanity_check", reason="the extra `evaluation` is not installed")
    asked = ["--toxicity-prompts", files / "prompts.csv", *ASKED, "--temperature", "0", "--preprompt", "So."]
    evaluated(directory, files / "here.json", *asked)
    results = evaluated(directory, files / "there.json", *asked, "--server", server.url)
    here, there = ({(r["prompt"], r["sample"]): r for r in lines(files / f"{n}.json")} for n in ("here", "there"))
    assert here.keys() == there.keys()
    for pair, record in here.items():
        assert (record["ids"], record["text"], record["num_tokens"]) == tuple(
            there[pair][key] for key in ("ids", "text", "num_tokens")
        )
    assert results["server"]["engine"] == "small"
    assert results["server"]["version"] == "1.2"
    assert results["server"]["dialect"] == {"token_ids": True, "extended": True}
    assert results["server"]["probe"]["num_tokens"] == len(results["server"]["probe"]["ids"])
    assert results["model"]["dtype"] is None
    assert results["model_fingerprint"].startswith("served-")
    assert there[0, 0]["settings"] != here[0, 0]["settings"], "they must not mix in one journal"


def test_draws_are_repeated_and_depend_on_the_pair(server, directory, files):
    pytest.importorskip("profanity_check", reason="the extra `evaluation` is not installed")
    asked = ["--toxicity-prompts", files / "prompts.csv", *ASKED, "--server", server.url]
    server.seconds = 0.02
    evaluated(directory, files / "a.json", *asked)
    assert 1 < server.most_at_once <= 6
    server.most_at_once = 0
    evaluated(directory, files / "b.json", *asked, "--requests-in-flight", "1")
    assert server.most_at_once == 1
    a, b = ({(r["prompt"], r["sample"]): r["ids"] for r in lines(files / f"{n}.json")} for n in "ab")
    assert a == b
    assert len({tuple(ids) for ids in a.values()}) == 6
    seeds = {body["seed"] for _, body in server.requests if body.get("temperature") == 1.0}
    assert len(seeds) == 6
    assert all(0 <= seed < 2**31 for seed in seeds)
    evaluated(directory, files / "c.json", *asked, "--seed", "1")
    assert {tuple(r["ids"]) for r in lines(files / "c.json")} != {tuple(ids) for ids in a.values()}


def test_failures_that_pass_are_asked_again_and_an_end_keeps_what_is_there(
    server, directory, files, refused, impatient
):
    pytest.importorskip("profanity_check", reason="the extra `evaluation` is not installed")
    asked = ["--toxicity-prompts", files / "prompts.csv", *ASKED]
    command = ["evaluate", "--model", directory, *asked, "--server", server.url, "--out", files / "r.json"]
    server.fails = [503, 429, 500]
    server.num_until_silent = 3 + 1 + 4  # the probe, and four of six
    refused([*command, "--requests-in-flight", "1"], "expected a server that answers, got .*; start it")
    assert sum(path.read_text().count("\n") for path in files.glob("r.continuations*")) == 4
    server.num_until_silent, before = float("inf"), len(server.requests)
    evaluated(directory, files / "r.json", *asked, "--server", server.url)
    made = [body for _, body in server.requests[before:] if body["temperature"] == 1.0]
    assert len(made) == 2, "what is there is not asked for again"
    assert sorted((r["prompt"], r["sample"]) for r in lines(files / "r.json")) == [
        (p, s) for p in range(3) for s in (0, 1)
    ]
    with SmallServer(server.model, server.tokenizer, server.name) as again:
        evaluated(directory, files / "r.json", *asked, "--server", again.url)
        assert len(again.requests) == 1, "another address of the same server changes nothing: the probe alone"


def test_killed_client_goes_on(server, directory, files):
    pytest.importorskip("profanity_check", reason="the extra `evaluation` is not installed")
    server.seconds = 0.15
    asked = ["--toxicity-prompts", files / "prompts.csv", "--scorer", "profanity-check", "--num-samples", "20"]
    asked += ["--max-new-tokens", "2", "--server", server.url, "--requests-in-flight", "2"]
    command = [sys.executable, "-m", "aura_dist", "evaluate", "--model", directory, *asked, "--out", files / "r.json"]
    process = subprocess.Popen(list(map(str, command)), env=dict(os.environ), stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240  # a machine with other work takes its time to import torch
    while len(server.requests) < 12 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = len(server.requests)
    assert 12 <= before < 50
    server.seconds = 0.0
    evaluated(directory, files / "r.json", *asked)
    pairs = [(r["prompt"], r["sample"]) for r in lines(files / "r.json")]
    assert sorted(pairs) == [(p, s) for p in range(3) for s in range(20)], "no pair twice, none missing"
    assert len(server.requests) - before < 60


def test_a_signal_ends_between_requests(server, directory, files, monkeypatch):
    """Requests in flight end, and are kept; none follows."""
    asked = []

    def ask(item):
        asked.append(item)
        time.sleep(0.05)
        return item

    got = []
    with Client(server.url, 2) as client:
        answers = client.each(ask, range(100), lambda: signal.SIGTERM if len(asked) > 5 else None)
        with pytest.raises(RunInterruptedError):
            got.extend(item for some in answers for item, _ in some)
    assert sorted(got) == sorted(asked)
    assert len(asked) < 20


def opened(client, directory, received=lambda: None):
    source = ModelSource(str(directory), None, "float32")
    return find_server(client, read_expected(source, None, 1.0), None, chat=False, received=received)


def test_a_signal_ends_the_first_request_for_likelihoods(server, directory, monkeypatch):
    monkeypatch.setattr("aura_dist.evaluation.client._LAST_SECONDS", 0.2)
    with Client(server.url, 2) as client:
        asked = opened(client, directory, received=lambda: signal.SIGTERM)
        server.seconds, began = 5.0, time.monotonic()
        with pytest.raises(RunInterruptedError):
            list(asked.score_all([[3, 4, 5]]))
    assert time.monotonic() - began < 4


def test_each_kind_of_failure_has_its_own_patience(server, monkeypatch):
    monkeypatch.setattr("aura_dist.evaluation.client.PATIENCE_SECONDS", 0.2)
    monkeypatch.setattr("aura_dist.evaluation.client._PAUSE_SECONDS", 0.01)
    with Client(server.url, 1) as client:
        body = {"prompt": [3, 4], "max_tokens": 1, "temperature": 0}
        server.fails, began = [429] * 6 + [503], time.monotonic()
        assert client.post("completions", body)["choices"]
        assert time.monotonic() - began > 0.2, "it was busy for longer than it may fail"
        server.fails = [503] * 20
        with pytest.raises(ServerError, match=r"was refused .503."):
            client.post("completions", body)


def test_no_server_is_said_within_seconds():
    """With the real patience, in a process of its own, whose imports take their time on a busy machine."""
    code = (
        "import time\nfrom aura_dist.evaluation.client import Client\nbegan = time.monotonic()\n"
        "try: Client('http://127.0.0.1:9', 1).get('models')\nfinally: print(time.monotonic() - began)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert "expected a server that answers, got" in found.stderr
    assert float(found.stdout) < 12


def test_tries_end_at_a_deadline_also_where_packets_are_lost(monkeypatch):
    monkeypatch.setattr("aura_dist.evaluation.client.FIRST_SECONDS", 0.5)
    monkeypatch.setattr("aura_dist.evaluation.client.PATIENCE_SECONDS", 0.5)
    monkeypatch.setattr("aura_dist.evaluation.client._LAST_CONNECT_SECONDS", 0.1)
    with socket.create_server(("127.0.0.1", 0), backlog=0) as deaf, socket.create_connection(deaf.getsockname()):
        for port in (9, deaf.getsockname()[1]):  # whose backlog is full, so that the kernel drops what comes
            with Client(f"http://127.0.0.1:{port}", 1) as client:
                began = time.monotonic()
                with pytest.raises(ServerError, match="that answers, got"):
                    client.get("models")
                assert 0.5 <= time.monotonic() - began < 3  # a connection alone may take 5


def test_user_and_password_are_sent_and_not_shown(server, monkeypatch):
    monkeypatch.setattr(server, "get", lambda path, headers: (200, {"got": headers["Authorization"]}))
    with Client(server.url.replace("//", "//me:s3cret@"), 1) as client:
        assert client.get("models") == {"got": "Basic bWU6czNjcmV0"}
        assert client.url == server.url
        server.fails = [404]
        with pytest.raises(ServerError, match=f"--server {server.url}: /completions was refused"):
            client.post("completions", {})


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("ALL_PROXY", "socks5://me:s3cret@host:1", "HTTP_PROXY.* got Using SOCKS proxy, but .*; correct or unset"),
        ("ALL_PROXY", "socks://me:s3cret@host:1", "HTTP_PROXY.* got Unknown scheme for proxy URL"),
        (
            "HTTP_PROXY",
            "http://me:s3cret#x@host:1",
            "HTTP_PROXY.* got an address that cannot be parsed; correct or unset",
        ),
        ("HTTP_PROXY", "http://a..b:1", "HTTP_PROXY.* got encoding with 'idna' codec failed"),
        ("OPENAI_API_KEY", "s3crät", "OPENAI_API_KEY: expected printable ASCII characters, got others; correct"),
        ("OPENAI_API_KEY", "s3cret\rs3cret", "OPENAI_API_KEY: expected printable ASCII characters, got others"),
        ("SERVER", "http://me:s3cret@a..b:9/v1", "--server: expected an address such as .*, got 'http://a..b:9/v1'"),
        ("SERVER", "http://me:s3/s3cret@host:x", "--server: expected an address such as .*, got 'http://host:x'"),
    ],
)
def test_what_the_environment_says_of_connections(variable, value, message, monkeypatch):
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setenv(variable, value)
    url = value if variable == "SERVER" else "http://models.invalid/v1"
    with pytest.raises(ConfigError, match=message) as caught:
        Client(url, 1, os.environ.get("OPENAI_API_KEY")).get("models")
    assert "s3" not in str(caught.value), "neither a key nor a password is shown"


def test_a_key_without_what_surrounds_it(server):
    server.key = "secret"
    with Client(server.url, 1, " secret\r\n") as client:
        assert client.get("models")["data"]


A, B = "org/a", "org/b"


@pytest.mark.parametrize(
    ("entries", "name", "model", "warns"),
    [
        ([{"id": A}], None, A, False),
        ([{"id": A, "root": A}], None, A, False),
        ([{"id": "short", "root": A}], None, "short", False),
        ([{"id": "short", "root": A}], "short", "short", False),
        ([{"id": "short", "root": "short"}], "short", "short", False),  # as SGLang lists it
        ([{"id": A, "root": B}], None, None, False),
        ([{"id": A, "root": B}, {"id": "short", "root": A}], None, "short", False),
        ([{"id": A, "root": B}], A, A, True),
        ([{"id": A, "root": A}, {"id": "lora", "root": "/lora", "parent": A}], None, A, False),
        ([{"id": B, "root": B}, {"id": "lora", "root": "/lora", "parent": A}], "lora", "lora", False),
        ([{"id": B, "root": B}, {"id": A, "root": "/lora", "parent": B}], None, A, False),
    ],
)
def test_the_root_of_a_served_model_is_the_checkpoint(entries, name, model, warns, caplog):
    client = SimpleNamespace(url="http://there/v1", get=lambda _: {"data": entries}, find=lambda _: None)
    if model is None:
        with pytest.raises(ServerError, match=f"--model '{A}', got .* the checkpoint '{B}'; .*--server-model {A}"):
            find_served(client, A, name)
    else:
        assert find_served(client, A, name).model == model
    assert ("whether it is the same as --model" in caplog.text) == warns


def test_the_root_of_a_served_model_may_be_another_path_to_it(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "a")
    entry = {"id": str(tmp_path / "link"), "root": str(tmp_path / "a")}
    client = SimpleNamespace(url="http://there/v1", get=lambda _: {"data": [entry]}, find=lambda _: None)
    assert find_served(client, str(tmp_path / "link"), None).root == str(tmp_path / "a")


LIKELY = {"3": {"logprob": -1.0, "rank": 2}, "4": {"logprob": -0.5, "rank": 1}}


@pytest.mark.parametrize(
    ("choice", "greedy"),
    [
        ({"prompt_logprobs": [None, LIKELY, LIKELY]}, [False, True]),
        ({"prompt_logprobs": [None, LIKELY, {"4": {"logprob": -0.5}}]}, None),
        ({"logprobs": {"token_logprobs": [None, -1, -0.5], "top_logprobs": [None, *[{"x": -0.5}] * 2]}}, [False, True]),
        *(
            ({"logprobs": {"token_logprobs": [None, -1, -0.5], "top_logprobs": tops}}, None)
            for tops in (None, [], [None, {}, {}], [None, {"x": None}, {"x": 1}], [None, 7, 7], [None, {"x": -0.5}] * 2)
        ),
    ],
)
def test_likelihoods_without_which_token_is_the_likeliest(choice, greedy):
    found = _scored(choice, [2, 3, 4])
    assert (found.logprobs, found.greedy) == ([-1.0, -0.5], greedy)


@pytest.mark.parametrize(
    "choice",
    [
        {"prompt_logprobs": [None, LIKELY, {}]},
        {"prompt_logprobs": [None, LIKELY, [1]]},
        {"prompt_logprobs": [None, LIKELY, {"4": -0.5}]},
        {"prompt_logprobs": [None, LIKELY, {"4": {"logprob": None, "rank": 1}}]},
        {"logprobs": [1, 2, 3]},
        {"logprobs": {"token_logprobs": 3, "top_logprobs": []}},
        {"logprobs": {"token_logprobs": [None, -1, None], "top_logprobs": [None, {"x": -0.5}, {"x": -0.5}]}},
    ],
)
def test_odd_likelihoods_are_none(choice):
    assert _scored(choice, [2, 3, 4]) is None


def test_a_resumed_run_is_of_the_same_weights(server, directory, files, refused, impatient, tiny_dir):
    pytest.importorskip("profanity_check", reason="the extra `evaluation` is not installed")
    asked = ["--toxicity-prompts", files / "prompts.csv", *ASKED, "--out", files / "r.json"]
    command = ["evaluate", "--model", directory, *asked, "--server", server.url, "--requests-in-flight", "1"]
    server.num_until_silent = 1 + 4
    refused(command, "expected a server that answers, got .*; start it")
    server.num_until_silent = float("inf")
    weights = server.model.lm_head.weight.data
    weights.copy_(weights.flip(0))
    try:
        refused(command, "expected the server to continue the probe greedily as it did .*; give another --out, or, if")
    finally:
        weights.copy_(weights.flip(0))
    assert main([str(a) for a in command]) == 0
    assert len(lines(files / "r.json")) == 6


def test_servers_that_take_less(server, directory, files):
    """Texts in place of ids; no fields beyond OpenAI's."""
    pytest.importorskip("profanity_check", reason="the extra `evaluation` is not installed")
    asked = ["--toxicity-prompts", files / "prompts.csv", *ASKED, "--temperature", "0", "--server", server.url]
    evaluated(directory, files / "ids.json", *asked)
    server.takes_ids, server.takes_more = False, False
    results = evaluated(directory, files / "texts.json", *asked)
    assert results["server"]["dialect"] == {"token_ids": False, "extended": False}
    assert [r["text"] for r in lines(files / "ids.json")] == [r["text"] for r in lines(files / "texts.json")]
    assert "ids" not in lines(files / "texts.json")[0]
    assert lines(files / "texts.json")[0]["num_tokens"] == 6


@pytest.mark.parametrize("takes_more", [True, False], ids=["ids", "text"])
def test_the_token_that_ends_a_continuation_is_not_counted(takes_more, server, directory, monkeypatch):
    server.takes_more, made = takes_more, [5, server.tokenizer.eos_token_id]
    with Client(server.url, 1) as client:
        asked = opened(client, directory)
        monkeypatch.setattr(server, "_continue", lambda ids, body: made[: body["max_tokens"]])
        for longest in (1, 2):
            assert asked.continuation([3], [], Decoding(1, longest, 0.0, 1.0, 0), 0)["num_tokens"] == 1
        assert asked.continuation([3], [], Decoding(1, 0, 0.0, 1.0, 0), 0)["num_tokens"] == 0


def test_a_server_that_refuses_top_p_1(server, directory, refused):
    server.takes_ids, server.takes_top_p_1 = False, False
    command = ["generate", "--model", directory, "--prompt", "Hi", "--server", server.url, "--top-p", "1"]
    assert main([str(a) for a in command]) == 0
    assert "top_p" not in server.requests[-1][1]
    assert main([str(a) for a in (*command[:-1], "0.5")]) == 0
    assert server.requests[-1][1]["top_p"] == 0.5
    server.takes_texts = False
    refused(command, "expected one that takes prompts at /completions, got one that takes none: .*404.: .*Not Found")


def test_chats_by_ids_and_by_turns(loaded, directory, tmp_path, capsys):
    model, tokenizer = loaded
    where = tmp_path / "chat"
    model.save_pretrained(where)
    tokenizer = type(tokenizer).from_pretrained(directory)
    tokenizer.chat_template = LLAMA_3
    tokenizer.save_pretrained(where)
    command = [
        "generate",
        "--model",
        where,
        "--chat",
        "--temperature",
        "0",
        "--prompt",
        "Hi there",
        "--max-new-tokens",
        "5",
    ]
    shown = []
    with SmallServer(model, tokenizer, "mine", str(where)) as server:
        for more, ids in (([], True), (["--server", server.url], True), (["--server", server.url], False)):
            server.takes_ids = ids
            assert main([str(a) for a in (*command, *more, "--preprompt", "Be kind.")]) == 0
            shown.append(capsys.readouterr().out)
        assert shown[0] == shown[1] == shown[2]
        path, body = server.requests[-1]
    assert path == "/v1/chat/completions"
    assert [turn["role"] for turn in body["messages"]] == ["system", "user"]


@pytest.fixture
def intervention(directory, tmp_path):
    scale = {"model.layers.0.mlp.down_proj": np.linspace(0, 1, 48, dtype=np.float32)}
    made = Intervention(scale, {}, {"method": "aura", "model": {"name": "elsewhere/other"}})
    made.save(tmp_path / "iv")
    return made, tmp_path / "iv"


def test_the_intervention_is_the_one_that_the_server_states(
    server, directory, intervention, capsys, refused, impatient
):
    made, where = intervention
    command = ["generate", "--model", directory, "--prompt", "Hi", "--server", server.url, "--max-new-tokens", "2"]
    given = [*command, "--intervention", where, "--strength", "0.5"]
    refused(given, "expected a server that states --intervention .* at strength 0.5, got one that states none; start")
    server.statement = Statement(made.digest, 0.5, 1)
    assert main([str(a) for a in given]) == 0
    shown = capsys.readouterr()
    assert "  aura |" in shown.out
    assert "was made for 'elsewhere/other'" in shown.err
    server.statement_fails = True
    refused(command, "/metrics was refused .500.")
    server.statement_fails = False
    refused(command, "expected a server of the plain model, because no --intervention was given, got one")
    refused([*given[:-1], "0.25"], "expected a server that states .* at strength 0.25, got one of digest .* 0.5")
    assert not any("vllm_xargs" in body for _, body in server.requests)
    server.statement = replace(server.statement, of_requests=True)
    for asked, strength in ((given, 0.5), ([*given[:-1], "0.25"], 0.25), (command, 0.0)):
        server.requests.clear()
        assert main([str(a) for a in asked]) == 0
        assert server.requests
        assert all(body.get("vllm_xargs") == {"aura_strength": strength} for _, body in server.requests)
    server.statement = replace(server.statement, digest="0" * 64)
    refused(given, "got one of digest 000000000000 at strength 0.5; start vLLM with AURA_INTERVENTION=")
    Intervention({"model.layers.9.mlp": np.ones(4, np.float32)}, {}, {}).save(where)
    refused(given, "has no module 'model.layers.9.mlp'")


def test_statements_are_read_among_metrics():
    found = Statement("a" * 64, 0.3, 12, of_requests=True)
    labels = ",".join(f'{key}="{value}"' for key, value in reversed(found.labels.items()))
    assert read_statement(f"other 1\naura_dist_intervention{{{labels}}} 1.0\nlast 2\n") == found
    assert read_statement("other 1\n") is None
    earlier = f'digest="{"b" * 64}",strength="0.3",num_sites="12"'  # of a plugin that knows nothing of requests
    found = read_statement(f"aura_dist_intervention{{{earlier}}} 1.0\n")
    assert found == Statement("b" * 64, 0.3, 12, of_requests=False)
    with pytest.raises(ServerError, match="expected digest, strength and num_sites among the server's metrics"):
        read_statement('aura_dist_intervention{digest="b"} 1.0\n')


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--server localhost", "expected an address such as http://localhost:8000/v1, got 'localhost'"),
        ("--server http://127.0.0.1:9/v1", "expected a server that answers, got .*; start it, or correct the address"),
        ("--server URL --model DEMO", "expected a server of --model .*, got one of .*; start it with that model"),
        ("--server URL --server-model x", "expected a server of --server-model 'x', got one of "),
        ("--server URL --dtype bfloat16", "--dtype: expected it without --server, got it with one"),
        ("--server URL --sharding fsdp", "--sharding: expected it without --server"),
        ("--server URL --device cpu", "--device: expected it without --server"),
        ("--server URL --tokens-per-batch 7", "--tokens-per-batch: expected it without --server"),
        ("--server URL --continuations-per-batch 7", "--continuations-per-batch: expected it without --server"),
        ("--server-model x", "--server-model: expected it with --server, got it without"),
        ("--requests-in-flight 3", "--requests-in-flight: expected it with --server, got it without"),
        ("--server URL --max-tokens 300", "expected at most 256"),
    ],
)
def test_bad_input(options, message, server, directory, files, refused, impatient, tiny_dir):
    (files / "texts.csv").write_text("text\n" + "word " * 400 + "\n")
    words = options.replace("URL", server.url).split()
    if "DEMO" in words:
        words[words.index("DEMO")] = str(tiny_dir("qwen3"))
    else:
        words += ["--model", str(directory)]
    began = time.monotonic()
    refused(["evaluate", "--perplexity-texts", files / "texts.csv", "--out", files / "r.json", *words], message)
    assert time.monotonic() - began < 30
    assert not (files / "r.json").exists()


def test_a_server_without_likelihoods_or_with_a_key(server, directory, files, refused, monkeypatch):
    command = ["evaluate", "--model", directory, "--perplexity-texts", files / "texts.csv", "--server", server.url]
    command += ["--out", files / "r.json"]
    server.likelihoods = None
    refused(command, "expected one that tells the likelihoods of a prompt's tokens")
    server.likelihoods, server.key = "echo", "secret"
    refused(command, "models was refused .401.: Unauthorized")
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    assert main([str(a) for a in command]) == 0
    monkeypatch.setenv("WORLD_SIZE", "1")
    server.name = "other"
    refused(command, "got one of 'other'; start it with that model, or name by --server-model")
    assert main([str(a) for a in (*command, "--server-model", "other")]) == 0


@pytest.fixture
def tasks(files, monkeypatch):
    """The directory of the tasks sums, whole, say, and draw, which samples three answers."""
    pytest.importorskip("lm_eval", reason="the extra `evaluation` is not installed")
    # lm-eval's bootstrap would fork this process, and a fork of a process with threads may never end
    monkeypatch.setattr("multiprocessing.Pool", lambda *_, **__: pytest.fail("lm-eval starts processes"))
    rows = [{"question": f"{a} and {b} make", "choices": [str(a + b), "none"]} for a in range(3) for b in range(2)]
    (files / "tasks").mkdir()
    (files / "tasks" / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    shared = (
        f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {files}/tasks/rows.jsonl\ntest_split: test\n"
    )
    (files / "tasks" / "sums.yaml").write_text(
        f"task: sums\n{shared}output_type: multiple_choice\ndoc_to_text: '{{{{question}}}}'\ndoc_to_choice: choices\n"
        "doc_to_target: 0\nmetric_list:\n  - metric: acc\n  - metric: acc_norm\n"
    )
    (files / "tasks" / "whole.yaml").write_text(
        f"task: whole\n{shared}output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{{{question}}}}'\n"
        "metric_list:\n  - metric: byte_perplexity\n"
    )
    for name, more in (("say", ""), ("draw", "  do_sample: true\n  temperature: 1.0\nrepeats: 3\n")):
        (files / "tasks" / f"{name}.yaml").write_text(
            f"task: {name}\n{shared}output_type: generate_until\ndoc_to_text: '{{{{question}}}}'\n"
            "description: 'Add. '\n"
            "doc_to_target: '{{choices[0]}}'\ngeneration_kwargs:\n  until: ['e']\n  max_gen_toks: 5\n"
            f"{more}metric_list:\n  - metric: bleu\n"
        )
    return files / "tasks"


def test_tasks_have_the_figures_of_this_process(server, directory, files, tasks):
    asked = ["--tasks", "sums", "whole", "say", "--tasks-path", tasks]
    here = evaluated(directory, files / "here.json", *asked)["zero_shot"]
    there = evaluated(directory, files / "there.json", *asked, "--server", server.url)["zero_shot"]
    assert there.keys() == here.keys()
    for task, figures in here.items():
        assert there[task] == pytest.approx(figures, rel=1e-4)


def test_answers_of_a_task_that_samples_several_differ(server, directory, files, tasks):
    drawn = []
    for name in ("a", "b"):
        before = len(server.requests)
        asked = ["--tasks", "draw", "--tasks-path", tasks, "--limit", "2", "--server", server.url]
        evaluated(directory, files / f"{name}.json", *asked)
        made = [body for _, body in server.requests[before:] if body["temperature"] == 1.0]
        drawn.append(sorted((body["prompt"], body["seed"]) for body in made))
    assert drawn[0] == drawn[1]
    assert len(drawn[0]) == 6
    assert len({seed for _, seed in drawn[0]}) == 6


@pytest.mark.parametrize("takes_more", [True, False], ids=["ids", "text"])
def test_texts_that_end_an_answer_are_sent_and_change_nothing(takes_more, server, directory, monkeypatch):
    pytest.importorskip("lm_eval", reason="the extra `evaluation` is not installed")
    server.takes_more, lengths, whole = takes_more, [], server._continue
    monkeypatch.setattr(server, "_continue", lambda *asked: lengths.append(len(made := whole(*asked))) or made)
    asked = {"until": ["e", "z", "q", "x", "u"], "max_gen_toks": 30}
    found = []
    with Client(server.url, 1) as client:
        harness = opened(client, directory).harness(None, None)
        requests = [SimpleNamespace(args=(text, asked)) for text in ("the cat", "You are")]
        for server.takes_stop in (False, True):
            found.append(harness.generate_until(requests))
    assert found[0] == found[1]
    assert server.requests[-1][1]["stop"] == ["e", "z", "q", "x"]
    assert max(lengths[-2:]) < 30 == max(lengths[:-2])


def test_answers_that_leave_no_room_are_refused(server, directory):
    pytest.importorskip("lm_eval", reason="the extra `evaluation` is not installed")
    with Client(server.url, 1) as client:
        harness = opened(client, directory).harness(None, None)
        for answer in ([], [3] * 400):
            with pytest.raises(InputError, match=f"expected answers of 1 to 254 tokens, .* got one of {len(answer)}"):
                harness._loglikelihood_tokens([(None, [3, 4], answer)])


@pytest.mark.parametrize("template", [LLAMA_3, GEMMA], ids=["system", "no system"])
def test_contexts_of_tasks_are_put_into_the_template_once(template, loaded, directory, tasks, tmp_path, refused):
    model, tokenizer = loaded
    where = tmp_path / "chat"
    model.save_pretrained(where)
    tokenizer = type(tokenizer).from_pretrained(directory)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(where)
    asked = ["--tasks", "say", "--tasks-path", tasks, "--chat"]
    here = evaluated(where, tmp_path / "here.json", *asked)["zero_shot"]
    with SmallServer(model, tokenizer, "mine", str(where), takes_ids=False) as server:
        there = evaluated(where, tmp_path / "there.json", *asked, "--server", server.url)["zero_shot"]
        assert there["say"] == pytest.approx(here["say"], rel=1e-4)
        path, body = server.requests[-1]
        assert path == "/v1/completions"
        turn = "<|header|>user" if template is LLAMA_3 else "<turn>user"
        assert body["prompt"].count(turn) == 1, body["prompt"]
        server.takes_texts = False
        command = ["evaluate", "--model", where, *asked, "--server", server.url, "--out", tmp_path / "r.json"]
        refused(command, "expected one that takes prompts at /completions, got one that takes none")


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("http://me:s3cret@host:8000/v1", "http://host:8000/v1"),
        ("http://localhost:8000/user/me@uni.edu/v1", "http://localhost:8000/user/me@uni.edu/v1"),
        ("me:s3/cret@host", "host"),
        ("http://me:s3/cret@host", "http://host"),
    ],
)
def test_an_address_is_shown_without_user(address, shown):
    assert without_user(address) == shown
