"""A small OpenAI-compatible server of a model in this process, with switches for what other servers lack.

`python -m tests.serving.openai_server MODEL PORT` serves a checkpoint, under the intervention of AURA_INTERVENTION.
"""

import json
import os
import sys
import threading
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from aura_dist.interventions.hooks import intervene
from aura_dist.interventions.statement import METRIC, Statement
from aura_dist.models.load import ModelSource, load_causal, tokenizer_of
from aura_dist.ranks.world import World
from aura_dist.serving.vllm_plugin import VARIABLE, chosen


@dataclass
class SmallServer:
    """A context; `url` ends in `/v1`. The switches may change while it runs."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    root: str | None = None
    takes_ids: bool = True
    takes_more: bool = True  # fields that OpenAI's own have not
    takes_top_p_1: bool = True
    takes_texts: bool = True  # prompts without turns, as texts
    takes_stop: bool = True  # texts that end a continuation
    likelihoods: str | None = "prompt_logprobs"
    statement: Statement | None = None
    statement_fails: bool = False
    key: str | None = None
    fails: list[int] = field(default_factory=list)  # statuses of the next answers
    num_until_silent: float = float("inf")  # completions until the connection is cut without an answer
    seconds: float = 0.0  # that a completion takes longer
    port: int = 0  # 0: a free one
    requests: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    most_at_once: int = 0

    def __enter__(self) -> "SmallServer":
        server = self
        self._lock, self._at_once = threading.Lock(), 0

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def do_GET(self) -> None:
                self._answer(*server.get(self.path, self.headers))

            def do_POST(self) -> None:
                size = int(self.headers["Content-Length"])
                content = self.rfile.read(size)
                has_left = len(content) < size  # a client that was stopped while it asked
                found = None if has_left else server.post(self.path, json.loads(content))
                if found is None:
                    self.close_connection = True
                else:
                    self._answer(*found)

            def _answer(self, status: int, answer: Any) -> None:
                content = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

        class Server(ThreadingHTTPServer):
            def handle_error(self, *of_whom: Any) -> None:
                if not isinstance(sys.exc_info()[1], ConnectionError):  # a client that has left
                    super().handle_error(*of_whom)

        self._http = Server(("127.0.0.1", self.port), Handler)
        self._http.daemon_threads = True
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_address[1]}/v1"

    def get(self, path: str, headers: Any) -> tuple[int, Any]:
        if self.key is not None and headers["Authorization"] != f"Bearer {self.key}":
            return 401, {"error": "Unauthorized"}
        if path == "/v1/models":
            entry = {"id": self.name, "owned_by": "small", "root": self.root, "max_model_len": 256}
            return 200, {"object": "list", "data": [entry]}
        if path == "/health":
            return 200, {}
        if path == "/version":
            return 200, {"version": "1.2"}
        if path == "/metrics" and self.statement_fails:
            return 500, {"detail": "busy"}
        if path == "/metrics" and self.statement is not None:
            labels = ",".join(f'{key}="{value}"' for key, value in self.statement.labels.items())
            return 200, f'# TYPE {METRIC} gauge\n{METRIC}{{{labels},pid="7"}} 1.0\n'
        return 404, {"detail": "Not Found"}

    def post(self, path: str, body: dict[str, Any]) -> tuple[int, Any] | None:
        with self._lock:
            self.requests.append((path, body))
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
            silent = len(self.requests) > self.num_until_silent
            status = self.fails.pop(0) if self.fails else None
        try:
            time.sleep(self.seconds)
            if silent:
                return None
            if status is not None:
                return status, {"error": {"message": "too much to do"}}
            return self._complete(path, body)
        finally:
            with self._lock:
                self._at_once -= 1

    def _complete(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if not self.takes_more and body.keys() & {"top_k", "min_p", "stop_token_ids", "prompt_logprobs"}:
            return 400, {"error": {"message": "unrecognized request argument"}}
        if not self.takes_top_p_1 and body.get("top_p") == 1:
            return 422, {"error": {"message": "`top_p` must be > 0.0 and < 1.0"}}
        if path == "/v1/chat/completions":
            rendered = self.tokenizer.apply_chat_template(body["messages"], tokenize=False, add_generation_prompt=True)
            ids = self.tokenizer(rendered, add_special_tokens=False)["input_ids"]
        elif path != "/v1/completions":
            return 404, {"detail": "Not Found"}
        elif isinstance(body["prompt"], str):
            if not self.takes_texts:
                return 404, {"detail": "Not Found"}
            ids = self.tokenizer(body["prompt"])["input_ids"]
        elif not self.takes_ids:
            return 422, {"error": {"message": "prompt: expected a string"}}
        else:
            ids = body["prompt"]
        with self._lock:
            made = self._continue(ids, body)
            choice: dict[str, Any] = {"index": 0, **self._likelihoods(ids, body)}
        text = self.tokenizer.decode(made, skip_special_tokens=True)
        for stop in self._stops(body):
            text = text.split(stop)[0]
        choice["finish_reason"] = "stop" if self._has_ended(made, body) else "length"
        choice |= {"message": {"role": "assistant", "content": text}} if "messages" in body else {"text": text}
        if body.get("return_token_ids"):
            choice["token_ids"] = made
        return 200, {"choices": [choice], "usage": {"prompt_tokens": len(ids), "completion_tokens": len(made)}}

    @torch.no_grad()
    def _continue(self, ids: list[int], body: dict[str, Any]) -> list[int]:
        made: list[int] = []
        generator = torch.Generator().manual_seed(int(body.get("seed") or 0))
        while len(made) < body["max_tokens"] and not self._has_ended(made, body):
            logits = self.model(torch.tensor([ids + made])).logits[0, -1].float()
            if body.get("temperature", 1.0) == 0:
                made.append(int(logits.argmax()))
            else:
                made.append(int(torch.multinomial(logits.softmax(-1), 1, generator=generator)))
        return made

    def _has_ended(self, made: list[int], body: dict[str, Any]) -> bool:
        ends = body.get("stop_token_ids") or [self.tokenizer.eos_token_id]
        text = self.tokenizer.decode(made, skip_special_tokens=True)
        return bool(made) and (made[-1] in ends or any(stop in text for stop in self._stops(body)))

    def _stops(self, body: dict[str, Any]) -> list[str]:
        return body.get("stop", []) if self.takes_stop else []

    @torch.no_grad()
    def _likelihoods(self, ids: list[int], body: dict[str, Any]) -> dict[str, Any]:
        asked = "prompt_logprobs" if "prompt_logprobs" in body else "echo" if body.get("echo") else None
        if asked is None or asked != self.likelihoods:
            return {}
        found = self.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        best = found.max(-1)
        if asked == "echo":
            logprobs = [None, *(float(found[t, token]) for t, token in enumerate(ids[1:])), -1.0]
            tops = [None, *({"best": float(value)} for value in best.values[:-1]), {"best": -1.0}]
            return {"logprobs": {"token_logprobs": logprobs, "top_logprobs": tops}}
        entries: list[Any] = [None]
        for t, token in enumerate(ids[1:]):
            top = int(best.indices[t])
            entry = {str(top): {"logprob": float(best.values[t]), "rank": 1}}
            entry[str(token)] = {"logprob": float(found[t, token]), "rank": int((found[t] > found[t, token]).sum()) + 1}
            entries.append(entry)
        return {"prompt_logprobs": entries}


def main(name: str, port: str) -> None:
    source = ModelSource(name, None, "float32")
    model, acting, statement = load_causal(source, World()), nullcontext(), None
    if given := os.environ.get(VARIABLE):
        intervention, strength = chosen(given)
        acting = intervene(model, intervention, strength)
        statement = Statement(intervention.digest, strength, len(intervention.sites))
    with acting, SmallServer(model, tokenizer_of(source), name, statement=statement, port=int(port)):
        threading.Event().wait()


if __name__ == "__main__":
    main(*sys.argv[1:])
