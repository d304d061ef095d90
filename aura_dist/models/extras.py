"""What changes a model's numbers beside its weights and configuration: an adapter, code of its own, a quantisation."""

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.utils import TRANSFORMERS_DYNAMIC_MODULE_NAME

from aura_dist.models.adapter import adapter_digest
from aura_dist.models.fingerprints import marked
from aura_dist.models.load import ModelSource


def find_extras(source: ModelSource, model: PreTrainedModel) -> dict[str, Any]:
    """What is recorded of them, each None where there is none.

    `adapter` {name, sha256}, `own_code` {file: sha256}, and `quantization` as `quantization.settled` spells it.

    `model` may be on the meta device.
    """
    adapter = {"name": source.adapter, "sha256": adapter_digest(source.adapter)} if source.adapter else None
    return {"adapter": adapter, "own_code": own_code(model) or None, "quantization": source.quantization}


def with_extras(fingerprint: str, extras: Mapping[str, Any]) -> str:
    """The fingerprint of a checkpoint as it is used: its own where there are no extras."""
    if not any(extras.values()):
        return fingerprint
    parts = [fingerprint, (extras["adapter"] or {}).get("sha256"), extras["own_code"]]
    parts += filter(None, [extras["quantization"]])  # fingerprints of others stay as they were
    return marked(json.dumps(parts, sort_keys=True))


def own_code(model: PreTrainedModel) -> dict[str, str]:
    """File → sha256 of the modules that came with the model and that were imported for its classes.

    Files of one name that differ, from the repositories of the model and of its configuration, are named with their
    directories.
    """
    packages = {type(part).__module__.rpartition(".")[0] + "." for part in (model, model.config)}
    packages = {package for package in packages if package.startswith(f"{TRANSFORMERS_DYNAMIC_MODULE_NAME}.")}
    files = {
        Path(file)
        for name, module in list(sys.modules.items())
        if name.startswith(tuple(packages)) and (file := getattr(module, "__file__", None))
    }
    digests = {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(files)}
    different = Counter(name for name, _ in {(path.name, digest) for path, digest in digests.items()})
    return {
        path.name if different[path.name] == 1 else f"{path.parent.name}/{path.name}": digest
        for path, digest in digests.items()
    }
