"""An intervention on the Hugging Face hub: its two files, and a model card that describes them."""

import json
import re
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from aura_dist.errors import StoreError, brief
from aura_dist.interventions.artifact import META_FILE, WEIGHTS_FILE, Intervention, method_of

CARD_FILE = "README.md"
# the hub refuses a card whose `base_model` has another form
_HUB_NAME = re.compile(r"([A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*", re.ASCII)


def push(intervention: Intervention, repo: str, *, private: bool, token: str | None) -> str:
    """Upload files and card to `repo`, created if missing; returns the address of the commit. StoreError if it fails.

    Only the last part of a local path is uploaded. An existing card is replaced.
    """
    from huggingface_hub import HfApi

    with tempfile.TemporaryDirectory() as scratch:
        replace(intervention, meta=without_paths(intervention.meta)).save(scratch)
        (Path(scratch) / CARD_FILE).write_text(card(intervention, repo), encoding="utf-8")
        try:
            api = HfApi(token=token)
            api.create_repo(repo, private=private, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repo, folder_path=scratch, commit_message=f"Intervention {method_of(intervention.meta)}"
            )
        except Exception as error:  # the hub's client raises a dozen kinds
            raise StoreError(f"intervention cannot be pushed to {repo!r}: {brief(error)}") from error
    return str(commit.commit_url)


def pull(repo: str, *, revision: str | None, token: str | None) -> Path:
    """The local directory of the files at `repo`; StoreError if they cannot be downloaded."""
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(repo, revision=revision, token=token, allow_patterns=[META_FILE, WEIGHTS_FILE])
    except Exception as error:
        raise StoreError(f"intervention {repo!r} cannot be pulled: {brief(error)}") from error
    return Path(found)


def card(intervention: Intervention, repo: str) -> str:
    """The model card: method, concept, data, figures, and how to use it."""
    meta = intervention.meta
    model = (meta.get("model") or {}).get("name")
    header = ["library_name: aura_dist", "tags: [activation-steering, aura_dist]"]
    header += [f"base_model: {model}"] if model and _is_hub_name(model) else []
    kinds = Counter(gate.kind for gate in intervention.gate.values())
    gates = "".join(f"- gates of {kind}: {number} modules\n" for kind, number in sorted(kinds.items()))
    formula = "z ← z + g ⊙ ((ω − 1) ⊙ z + b), with a gate g in [0, 1]," if kinds else "z ← ω ⊙ z + b"
    figures = (
        f"- modules: {len(intervention.sites)}\n"
        f"- neurons changed: {intervention.num_changed:,} of {intervention.num_neurons:,}\n"
        f"{gates}"
        f"- digest: `{intervention.digest[:16]}`"
    )
    return (
        "---\n" + "\n".join(header) + "\n---\n\n"
        f"# {repo.rpartition('/')[2]}\n\n"
        f"An elementwise map {formula} on the outputs of a language model's modules, made with "
        "`aura_dist`.\n\n"
        f"{_parts(meta)}\n\n## Figures\n\n{figures}\n\n## Use\n\n```python\nimport aura_dist\n\n"
        f'intervention = aura_dist.Intervention.from_hub("{repo}")\n'
        "with aura_dist.intervene(model, intervention, strength=1.0):\n    model.generate(...)\n```\n"
    )


def _parts(meta: Mapping[str, Any]) -> str:
    """Method, concept, model and data of one fitted map, as a list."""
    if meta.get("composed"):
        strength = f"\n\nall at strength {meta['applied_strength']}" if meta.get("applied_strength") is not None else ""
        return "\n\nafter\n\n".join(_parts(m) for m in meta["composed"]) + strength
    model, data = meta.get("model") or {}, meta.get("data") or {}
    sampling, name = data.get("sampling") or {}, model.get("name")
    control = (meta.get("gate") or {}).get("control") or {}
    rows = ", ".join(f"{k} {v}" for k, v in sampling.items() if v is not None)
    lines = {
        "method": method_of(meta),
        "parameters": json.dumps(meta.get("parameters") or {}),
        "at strength": meta.get("applied_strength"),
        "concept": meta.get("concept"),
        "model": name and f"{public_name(name)} (fingerprint `{str(model.get('fingerprint'))[:16]}`)",
        "data": data.get("path") and f"{_last(data['path'])} (sha256 `{str(data.get('sha256'))[:16]}`)",
        "rows": rows or None,
        "control": control.get("store") and f"{_last(control['store'])} ({control.get('num_texts')} texts)",
    }
    return "\n".join(f"- {key}: {value}" for key, value in lines.items() if value)


def without_paths(meta: Mapping[str, Any]) -> dict[str, Any]:
    """A description with only the last part of each local path, as on the card."""
    found = dict(meta)
    for part, key, shown in (("model", "name", public_name), ("data", "path", _last)):
        if (found.get(part) or {}).get(key):
            found[part] = {**found[part], key: shown(str(found[part][key]))}
    control = (found.get("gate") or {}).get("control")
    if control:
        data = {**control["data"], "path": _last(control["data"].get("path"))} if control.get("data") else {}
        found["gate"] = {**found["gate"], "control": {**control, "store": _last(control.get("store")), "data": data}}
    if found.get("composed"):
        found["composed"] = [without_paths(inner) for inner in found["composed"]]
    return found


def _last(path: Any) -> str:
    return Path(str(path)).name


def public_name(model: str) -> str:
    """A hub name unchanged; of a directory, the last part."""
    return model if _is_hub_name(model) else Path(model).name


def _is_hub_name(model: str) -> bool:
    """Whether a name can be a name on the hub, not a local path."""
    return _HUB_NAME.fullmatch(model) is not None and not Path(model).exists()
