"""The intervention as a file: `intervention.safetensors` and `intervention.json`.

The tensors are `<site>.scale`, `<site>.shift` and, of a site with a gate, `<site>.gate.<part>`, the parts of its kind.
"""

import hashlib
import json
import logging
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from aura_dist.errors import InputError, StoreError
from aura_dist.files import replacing
from aura_dist.interventions.gates import GATES, Gate, kind_of
from aura_dist.interventions.methods import Map, compose, with_strength
from aura_dist.models.fingerprints import is_earlier

logger = logging.getLogger(__name__)

WEIGHTS_FILE = "intervention.safetensors"
META_FILE = "intervention.json"
FORMAT_VERSION = 1
_PARTS = sorted({part for row in GATES.values() for part in row.parts})
_TENSOR = re.compile(rf"(?P<site>.+)\.(?P<what>scale|shift|gate\.(?:{'|'.join(_PARTS)}))")


@dataclass(frozen=True)
class Intervention:
    """One elementwise affine map z ← scale ⊙ z + shift per site, which a gate may hold back.

    `b @ a` is `b` after `a`, as one intervention; InputError if their models or widths differ, or if both act at a
    site where one has a gate.
    """

    scale: Mapping[str, NDArray[np.float32]]  # site → [D]
    shift: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)  # a site without one is not shifted
    # method, parameters, concept, model fingerprint, store digest; `applied_strength` if `at_strength` changed the maps
    meta: Mapping[str, Any] = field(default_factory=dict)
    gate: Mapping[str, Gate] = field(default_factory=dict)  # a site without one is moved wholly, at every token

    @property
    def sites(self) -> list[str]:
        """Names of the sites: the scaled ones in their order, then the ones that are only shifted."""
        return list({**self.scale, **self.shift})

    @property
    def num_changed(self) -> int:
        """Number of neurons that the maps change."""
        maps = (self.map_of(site) for site in self.sites)
        changed = ((scale != 1) | (False if shift is None else shift != 0) for scale, shift in maps)
        return sum(int(np.count_nonzero(neurons)) for neurons in changed)

    @property
    def num_neurons(self) -> int:
        """Number of neurons of all its sites."""
        return sum(len(self.map_of(site)[0]) for site in self.sites)

    def map_of(self, site: str) -> Map:
        """(scale, shift or None) of a site."""
        scale, shift = self.scale.get(site), self.shift.get(site)
        if scale is None:
            scale = np.ones(0 if shift is None else shift.shape, dtype=np.float32)
        return scale, shift

    @property
    def digest(self) -> str:
        """sha256 of the maps and gates alone, whatever made them and wherever they are saved."""
        digest = hashlib.sha256()
        for site in sorted(self.sites):
            gate = self.gate[site].parts if site in self.gate else {}
            parts = zip(("scale", "shift"), self.map_of(site), strict=True)
            for name, values in (*parts, *((f"gate.{part}", gate[part]) for part in sorted(gate))):
                if values is not None:
                    digest.update(f"{site}.{name}".encode() + np.ascontiguousarray(values, dtype=np.float32).tobytes())
        return digest.hexdigest()

    def identity(self, strength: float) -> dict[str, Any]:
        """What a store that is collected under this intervention records of it."""
        return {
            "digest": self.digest,
            "method": method_of(self.meta),
            "parameters": self.meta.get("parameters"),
            "strength": strength,
        }

    def at_strength(self, strength: float) -> "Intervention":
        """The same intervention at strength s; see `methods.with_strength`."""
        if strength == 1.0:
            return self
        maps = {site: with_strength(*self.map_of(site), strength) for site in self.sites}
        shifts = {site: shift for site, (_, shift) in maps.items() if shift is not None}
        before = self.meta.get("applied_strength")
        meta = {**self.meta, "applied_strength": strength * (1.0 if before is None else before)}
        return Intervention({site: scale for site, (scale, _) in maps.items()}, shifts, meta, self.gate)

    def restricted(self, sites: Collection[str]) -> "Intervention":
        """The same on some of its sites."""
        kept = set(sites)
        scale, shift = ({s: v for s, v in maps.items() if s in kept} for maps in (self.scale, self.shift))
        return Intervention(scale, shift, self.meta, {s: gate for s, gate in self.gate.items() if s in kept})

    def push_to_hub(self, repo: str, *, private: bool = False, token: str | None = None) -> str:
        """Upload to `user/name` on the Hugging Face hub, with a model card; returns the address of the commit.

        The repository is created if it does not exist, and `private` then holds for it. Without `token`, the token of
        the user who is logged in is used. StoreError if the hub cannot be reached, or refuses.
        """
        from aura_dist.interventions.hub import push

        return push(self, repo, private=private, token=token)

    @classmethod
    def from_hub(cls, repo: str, *, revision: str | None = None, token: str | None = None) -> "Intervention":
        """Download from the Hugging Face hub; StoreError if there is no intervention at `repo`."""
        from aura_dist.interventions.hub import pull

        return cls.load(pull(repo, revision=revision, token=token))

    def __matmul__(self, inner: "Intervention") -> "Intervention":
        models = [m for m in (inner.meta.get("model"), self.meta.get("model")) if m]
        prints = {m["fingerprint"] for m in models if m.get("fingerprint")}
        if len(prints) > 1:
            names = " and ".join(repr(m.get("name")) for m in models)
            if len({is_earlier(one) for one in prints}) == 1:
                raise InputError(f"expected two interventions of one model, got interventions of {names}")
            logger.warning("an earlier version made one of the interventions of %s: one model is not checked", names)
        scale: dict[str, NDArray[np.float32]] = {}
        shift: dict[str, NDArray[np.float32]] = {}
        for site in dict.fromkeys([*inner.sites, *self.sites]):
            if site not in inner.sites or site not in self.sites:
                maps = (self if site in self.sites else inner).map_of(site)
            else:
                check_no_gate(site, inner, self)
                widths = [len(one.map_of(site)[0]) for one in (inner, self)]
                if widths[0] != widths[1]:
                    raise InputError(f"expected maps of one width at {site!r}, got {widths[0]} and {widths[1]} neurons")
                maps = compose(self.map_of(site), inner.map_of(site))
            scale[site] = maps[0]
            if maps[1] is not None:
                shift[site] = maps[1]
        meta: dict[str, Any] = {"composed": [dict(self.meta), dict(inner.meta)]}
        if models:
            # so that a model which refuses a part refuses the whole
            meta["model"] = max(
                models, key=lambda m: (bool(m.get("fingerprint")), not is_earlier(m.get("fingerprint")))
            )
        return Intervention(scale, shift, meta, {**inner.gate, **self.gate})

    def save(self, directory: str | Path) -> None:
        """Write both files; StoreError if the directory cannot be written, or `load` would refuse the files.

        Both are written aside, then renamed. Until both are in place the description is missing, so that an
        interruption never leaves files of two interventions that `load` would take for one.
        """
        place = Path(directory)
        tensors = {f"{s}.scale": np.asarray(v, dtype=np.float32) for s, v in self.scale.items()}
        tensors |= {f"{s}.shift": np.asarray(v, dtype=np.float32) for s, v in self.shift.items()}
        tensors |= {
            f"{s}.gate.{n}": np.asarray(v, np.float32) for s, g in self.gate.items() for n, v in g.parts.items()
        }
        meta = {**self.meta, "format_version": FORMAT_VERSION, "sites": self.sites}
        try:
            _, _, gates = _parsed(tensors)
            _check_description(self.meta)
            _check_gates(self.meta, self.sites, gates)
            place.mkdir(parents=True, exist_ok=True)
            # the weights, whose context ends first, take their place before the description
            with replacing(place / META_FILE) as description, replacing(place / WEIGHTS_FILE) as weights:
                save_file(tensors, weights)
                description.write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
                (place / META_FILE).unlink(missing_ok=True)
        except (OSError, ValueError, SafetensorError) as error:
            raise StoreError(f"intervention {str(place)!r} cannot be written: {error}") from error

    @classmethod
    def load(cls, directory: str | Path) -> "Intervention":
        """Read both files; StoreError if one is missing or damaged."""
        place = Path(directory)
        try:
            meta = json.loads((place / META_FILE).read_text(encoding="utf-8"))
            tensors = load_file(place / WEIGHTS_FILE)
            order = list(meta.pop("sites"))
            version = meta.pop("format_version")
            _check_description(meta)
            scale, shift, gate = _parsed(tensors)
            _check_gates(meta, order, gate)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
            raise StoreError(
                f"intervention {str(place)!r}: expected {META_FILE} and {WEIGHTS_FILE} as `fit` writes them: {error}"
            ) from error
        if version != FORMAT_VERSION:
            raise StoreError(
                f"intervention {str(place)!r}: expected format version {FORMAT_VERSION}, got {version}; "
                "read it with the version of aura_dist that wrote it"
            )
        if sorted({*scale, *shift}) != sorted(map(str, order)):
            raise StoreError(f"intervention {str(place)!r}: {WEIGHTS_FILE} and {META_FILE} name different modules")
        scale, shift = ({s: maps[s] for s in order if s in maps} for maps in (scale, shift))
        return cls(scale, shift, meta, {s: gate[s] for s in order if s in gate})


def check_no_gate(site: str, *both: Intervention) -> None:
    """InputError if an intervention has a gate at a site, because two maps make one only where both always act."""
    for kind in [one.gate[site].kind for one in both if site in one.gate]:
        raise InputError(
            f"{site!r}: expected maps without gates where two interventions act one after the other, got one with a "
            f"gate of {kind}; let one of them leave this module out, or nest `intervene`"
        )


def method_of(meta: Mapping[str, Any]) -> str:
    """The method in a description; of a composed intervention, the one method of all its parts and their number."""
    methods = _methods(meta)
    if len(methods) > 1:
        return f"{methods[0]} in {len(methods)} steps" if len(set(methods)) == 1 else "composed"
    return methods[0]


def _methods(meta: Mapping[str, Any]) -> list[str]:
    parts = meta.get("composed")
    if isinstance(parts, list) and parts:
        return [method for part in parts if isinstance(part, Mapping) for method in _methods(part)] or ["unknown"]
    return [str(meta.get("method") or "unknown")]


def _check_description(meta: Mapping[str, Any]) -> None:
    """ValueError if a value has another type than its readers expect; null counts as missing."""
    for name in ("model", "data", "parameters", "gate"):
        if not isinstance(meta.get(name) or {}, dict):
            raise ValueError(f"{META_FILE} has {name} = {meta[name]!r} where an object belongs")
    model = meta.get("model") or {}
    for name in ("name", "fingerprint"):
        if not isinstance(model.get(name) or "", str):
            raise ValueError(f"{META_FILE} has {name} = {model[name]!r} for the model, where a text belongs")
    strength = meta.get("applied_strength")
    if strength is not None and (isinstance(strength, bool) or not isinstance(strength, int | float)):
        raise ValueError(f"{META_FILE} has applied_strength = {strength!r}, where a number belongs")
    sampling = (meta.get("data") or {}).get("sampling") or {}
    if not isinstance(sampling, dict):
        raise ValueError(f"{META_FILE} has {sampling!r} for the data's sampling, where an object belongs")
    control = (meta.get("gate") or {}).get("control") or {}
    if not isinstance(control, dict) or not isinstance(control.get("data") or {}, dict):
        raise ValueError(f"{META_FILE} has {control!r} for the gate's control, where an object belongs")
    for part in meta.get("composed") or []:
        if not isinstance(part, dict):
            raise ValueError(f"{META_FILE} has {part!r} where a composed intervention's description belongs")
        _check_description(part)


def _fits(meta: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The descriptions of single fits, of which a composed intervention has several."""
    if not meta.get("composed"):
        yield meta
    for part in meta.get("composed") or ():
        yield from _fits(part)


def is_gated(meta: Mapping[str, Any]) -> bool:
    """Whether some fit that a description tells of has gates."""
    return any(one.get("gate") for one in _fits(meta))


def _check_gates(meta: Mapping[str, Any], sites: Collection[str], gates: Collection[str]) -> None:
    """ValueError if a module lacks the gate that the description gives it: its map would act at every token."""
    fits = list(_fits(meta))
    named = {site for one in fits for site in (one.get("gate") or {}).get("sites") or ()}
    lost = sorted((set(sites) if len(fits) == 1 and fits[0].get("gate") else named & set(sites)) - set(gates))
    if lost:
        raise ValueError(f"{META_FILE} says that maps have a gate, and {WEIGHTS_FILE} has none for {lost[0]!r}")


def _parsed(
    tensors: Mapping[str, NDArray[Any]],
) -> tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]], dict[str, Gate]]:
    """Site → scale, site → shift, site → gate; ValueError unless all are finite, and of one width for each module."""
    found: dict[str, dict[str, NDArray[Any]]] = {}
    for name, values in tensors.items():
        parsed = _TENSOR.fullmatch(name)
        if parsed is None or values.ndim != 1 or values.dtype.kind != "f":
            raise ValueError(f"{WEIGHTS_FILE} has {name!r}, {values.dtype} of shape {values.shape}")
        if not np.isfinite(values).all():
            raise ValueError(f"{WEIGHTS_FILE} has values in {name!r} that are not finite")
        found.setdefault(parsed["site"], {})[parsed["what"]] = values
    gates = {}
    for site, of_site in found.items():
        widths = sorted({len(v) for what, v in of_site.items() if what in ("scale", "shift")})
        if len(widths) != 1:
            raise ValueError(f"{WEIGHTS_FILE} has {' and '.join(map(str, widths)) or 'no'} neurons for {site!r}")
        parts = {what.removeprefix("gate."): v for what, v in of_site.items() if what.startswith("gate.")}
        if parts:
            try:
                gates[site] = Gate(kind_of(parts), parts)
                gates[site].check(*widths)
            except ValueError as error:
                raise ValueError(f"{WEIGHTS_FILE} has for {site!r} {error}") from error
    scales, shifts = ({s: v[what] for s, v in found.items() if what in v} for what in ("scale", "shift"))
    return scales, shifts, gates
