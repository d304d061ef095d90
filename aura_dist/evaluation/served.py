"""What a server says of itself: which model, by which program, and which intervention is laid over it."""

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aura_dist.errors import ServerError, brief
from aura_dist.evaluation.client import Client
from aura_dist.interventions.artifact import Intervention
from aura_dist.interventions.statement import Statement, read_statement
from aura_dist.models.fingerprints import SERVED

logger = logging.getLogger(__name__)

# where programs state their version, beside `/v1`: page → key of its JSON object (vLLM; SGLang; TGI; llama.cpp)
_VERSIONS = {"version": "version", "server_info": "version", "info": "version", "props": "build_info"}


@dataclass(frozen=True)
class Served:
    """One of the models of a server."""

    model: str  # what requests call it
    root: str  # the checkpoint's name or path, as the server knows it
    engine: str  # the program, as the server names its models' owner
    version: str | None
    max_tokens: int | None  # most tokens of a prompt with its continuation
    statement: Statement | None

    @property
    def identity(self) -> dict[str, Any]:
        """What a continuation depends on, as far as the server tells it; its address does not count."""
        return {"model": self.model, "root": self.root, "engine": self.engine, "version": self.version}

    @property
    def fingerprint(self) -> str:
        """What stands in for the digest of the weights, which nobody here has read."""
        named = json.dumps([self.model, self.root], sort_keys=True)
        return (SERVED + hashlib.sha256(named.encode()).hexdigest())[:64]


def find_served(client: Client, model: str, name: str | None) -> Served:
    """The served model that `name` calls, or else the one that is `model`; ServerError if there is none.

    A model that only has the name of `model`, and another checkpoint as its root, is taken where `name` says so.
    """
    listed = client.get("models").get("data")
    entries = [one for one in listed if isinstance(one, dict) and one.get("id")] if isinstance(listed, list) else []
    wanted = model if name is None else name
    found = [one for one in entries if any(_same(wanted, str(one.get(key) or "")) for key in ("id", "root"))]
    if not found:
        has = ", ".join(repr(brief(str(one["id"]), 80)) for one in entries) or "none"
        flag = "--model" if name is None else "--server-model"
        raise ServerError(
            f"--server {client.url}: expected a server of {flag} {wanted!r}, got one of {has}; start it with that "
            "model, or name by --server-model what it serves of it"
        )
    entry = next((one for one in found if not _is_of_another(model, one)), found[0])
    if _is_of_another(model, entry):
        if name is None:
            raise ServerError(
                f"--server {client.url}: expected a server of --model {model!r}, got one that gives this name to the "
                f"checkpoint {brief(str(entry['root']))!r}; start it with that model, or, if both are the same, give "
                f"--server-model {entry['id']}"
            )
        logger.warning(
            "--server-model %r is the checkpoint %r: whether it is the same as --model %r is not checked",
            name, str(entry["root"]), model,
        )  # fmt: skip
    longest = entry.get("max_model_len")
    return Served(
        str(entry["id"]),
        str(entry.get("root") or entry["id"]),
        str(entry.get("owned_by") or "unknown"),
        _version(client),
        longest if isinstance(longest, int) else None,
        read_statement(client.find("metrics") or ""),
    )


def _same(model: str, other: str) -> bool:
    """Whether two names of a checkpoint mean the same, as names or as paths of this machine."""
    return model == other or (bool(other) and Path(model).exists() and Path(model).resolve() == Path(other).resolve())


def _is_of_another(model: str, entry: Mapping[str, Any]) -> bool:
    """Whether an entry says that its checkpoint is another one; an adapter's root is where the adapter is."""
    root = str(entry.get("root") or entry["id"])
    return not (entry.get("parent") or root == str(entry["id"]) or _same(model, root))


def _version(client: Client) -> str | None:
    for page, key in _VERSIONS.items():
        try:
            found = json.loads(client.find(page) or "")
        except ValueError:
            continue
        if isinstance(found, Mapping) and found.get(key):
            return str(found[key])
    return None


def check_statement(
    stated: Statement | None, intervention: Intervention | None, strength: float, directory: str | None, url: str
) -> float | None:
    """The strength that each request must ask for; None if the server has one for all, or states no intervention.

    ServerError unless the server states just the intervention that was asked for, at its strength or one that requests
    set, or none. The plain model is that of strength 0.
    """
    if intervention is None:
        if stated is None:
            return None
        if stated.of_requests:
            return 0.0
        raise ServerError(
            f"--server {url}: expected a server of the plain model, because no --intervention was given, got one "
            f"that has laid an intervention (digest {stated.digest[:12]}, strength {stated.strength:g}) over it; "
            "give --intervention, or start the server without AURA_INTERVENTION"
        )
    start = f"start vLLM with AURA_INTERVENTION={directory}@{strength:g} where aura_dist is installed"
    asked = f"--intervention {directory!r} (digest {intervention.digest[:12]}) at strength {strength:g}"
    if stated is None:
        raise ServerError(
            f"--server {url}: expected a server that states {asked}, got one that states none; {start}, or serve what "
            "`export` writes and leave --intervention out"
        )
    if stated.digest != intervention.digest or not (stated.strength == strength or stated.of_requests):
        raise ServerError(
            f"--server {url}: expected a server that states {asked}, got one of digest {stated.digest[:12]} at "
            f"strength {stated.strength:g}; {start}"
        )
    return strength if stated.of_requests else None  # asked for although it is the server's, which may start anew
