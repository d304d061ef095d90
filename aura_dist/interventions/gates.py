"""Gates: how far a site's map acts, g in [0, 1], from the site's own values alone. Pure NumPy.

z ← z + g ⊙ ((ω − 1) ⊙ z + b). A gate of *tokens* is one number for a token, a gate of *units* one for each unit at a
token. The strength of an intervention acts on ω and b, never on g. A new kind of gate is one row of `GATES`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aura_dist.errors import ConfigError, InputError

Parts = Mapping[str, NDArray[Any]]
NO_GATE = "none"
DEFAULT_SHARPNESS = 1.0
# of single tokens of control texts, the share that may pass g = ½ where no threshold is given
PASSING_SHARE = 0.01
# what the gate's logit is multiplied by then: the least under which their mean gate is twice that share or less
SHARPNESSES = tuple(2.0**power for power in range(7))


@dataclass(frozen=True)
class GateKind:
    """One kind of gate; its value is the logistic function of its logit."""

    summary: str  # for `--help`
    parts: Mapping[str, bool]  # its arrays → whether it has a value for each unit, [D], or one in all, [1]
    # parts, z [..., D] → logits, [..., 1] or [..., D]
    logits: Callable[[Parts, NDArray[Any]], NDArray[Any]]
    in_torch: str  # `module:function`, the same in torch: see `interventions.callbacks`
    constant: str  # the part that is added to the logit
    options: tuple[str, ...]  # options of `fit` that it reads
    of_token: bool  # whether one number needs all values of a token


def _token_logits(parts: Parts, z: NDArray[Any]) -> NDArray[Any]:
    """w · z + c."""
    logits: NDArray[Any] = (z @ parts["weight"])[..., None] + parts["bias"]
    return logits


def _unit_logits(parts: Parts, z: NDArray[Any]) -> NDArray[Any]:
    """q z² + l z + c, which is the log odds of two Gaussians."""
    logits: NDArray[Any] = (parts["quadratic"] * z + parts["linear"]) * z + parts["constant"]
    return logits


GATES: dict[str, GateKind] = {
    "units": GateKind(
        "a unit moves at a token as far as its value is likelier under the Gaussian of texts with the concept",
        {"quadratic": True, "linear": True, "constant": True}, _unit_logits,
        "aura_dist.interventions.callbacks:unit_logits", "constant",
        ("gate_threshold", "gate_sharpness", "control"), of_token=False,
    ),
    "tokens": GateKind(
        "all units move at a token as far as a logistic regression finds the concept in the module's values",
        {"weight": True, "bias": False}, _token_logits,
        "aura_dist.interventions.callbacks:token_logits", "bias",
        ("gate_pooling", "gate_threshold", "gate_sharpness", "control", "gate_min_accuracy"), of_token=True,
    ),
}  # fmt: skip
# responses that a gate of tokens may be fitted on: a token's own values, or on their scale
FITTED_ON = {
    "mean": "the mean over a text's tokens",
    "drawn": "one token of a text, as a gate sees it",
    "last": "a text's last token",
}
CHOICES = {NO_GATE: "the map acts at every token", **{name: row.summary for name, row in GATES.items()}}


@dataclass(frozen=True)
class Gate:
    """The gate of one site."""

    kind: str  # one of `GATES`
    parts: Mapping[str, NDArray[np.float32]]

    @property
    def row(self) -> GateKind:
        return GATES[self.kind]

    def values(self, z: NDArray[Any]) -> NDArray[np.float64]:
        """g of values z [..., D]: [..., 1] or [..., D]. The reference for what the hooks compute."""
        logits = self.row.logits(self.parts, np.asarray(z, dtype=np.float64))
        with np.errstate(over="ignore"):  # exp overflows to infinity, and g to 0
            opened: NDArray[np.float64] = 1.0 / (1.0 + np.exp(-logits))
        return opened

    def restricted(self, columns: NDArray[np.intp]) -> "Gate":
        """The same with the values of some units alone; of a gate of tokens, its part of the sum."""
        return Gate(self.kind, {n: v[columns] if self.row.parts[n] else v for n, v in self.parts.items()})

    def moved(self, threshold: float, sharpness: float) -> "Gate":
        """The gate whose logit is `sharpness` times what this one's exceeds `threshold` by.

        InputError if its numbers are too large for float32.
        """
        parts = {name: values.astype(np.float64) for name, values in self.parts.items()}
        parts[self.row.constant] = parts[self.row.constant] - threshold
        with np.errstate(over="ignore"):
            made = {name: (sharpness * values).astype(np.float32) for name, values in parts.items()}
        if any((np.isfinite(self.parts[name]) & ~np.isfinite(values)).any() for name, values in made.items()):
            raise InputError(
                "--gate-threshold and --gate-sharpness: expected numbers with which a gate's logit fits into float32, "
                f"got {threshold:g} and {sharpness:g}; give smaller ones"
            )
        return Gate(self.kind, made)

    def check(self, width: int) -> None:
        """ValueError unless its arrays are those of its kind, finite, for a site of `width` units."""
        if self.kind not in GATES or set(self.parts) != set(self.row.parts):
            raise ValueError(f"a gate {self.kind!r} of {', '.join(sorted(self.parts)) or 'nothing'}")
        for name, each in self.row.parts.items():
            values, wanted = self.parts[name], width if each else 1
            if values.shape != (wanted,) or values.dtype.kind != "f" or not np.isfinite(values).all():
                raise ValueError(f"{name!r} of a gate, {values.dtype} of shape {values.shape}: not {wanted} numbers")


def gate_options() -> set[str]:
    """Names of the options that some gate reads."""
    return {option for row in GATES.values() for option in row.options}


def kind_of(parts: Mapping[str, Any]) -> str:
    """The kind that has these parts; ValueError if there is none."""
    for name, row in GATES.items():
        if set(row.parts) == set(parts):
            return name
    raise ValueError(f"a gate of {', '.join(sorted(parts))}")


@dataclass(frozen=True)
class GateFit:
    """Which gate to fit, and the options that it reads."""

    kind: str
    pooling: str | None = None  # of the responses that a regression is fitted on; None: the mean
    threshold: float | None = None  # in logits; None: see `PASSING_SHARE` for tokens, 0 for units
    sharpness: float | None = None  # None: see `SHARPNESSES` where tokens give the threshold, else `DEFAULT_SHARPNESS`
    control: str | None = None  # a store of texts that must stay as they are
    min_accuracy: float | None = None

    @property
    def runs_model(self) -> bool:
        """Whether the threshold comes from single tokens, for which the model runs."""
        return GATES[self.kind].of_token and self.threshold is None

    @property
    def settled_sharpness(self) -> float:
        return DEFAULT_SHARPNESS if self.sharpness is None else self.sharpness

    @property
    def written(self) -> dict[str, Any]:
        """The options that an artifact's parameters name, where they were given."""
        names = ("pooling", "threshold", "sharpness", "min_accuracy")
        return {f"gate_{name}": given for name in names if (given := getattr(self, name)) is not None}


def settle_gate(kind: str, given: Mapping[str, Any]) -> GateFit | None:
    """What to fit, from options that are set (not None); None without a gate.

    ConfigError if an option is given that this kind of gate does not read; InputError if there is no such kind.
    """
    if kind not in CHOICES:
        raise InputError(f"--gate: expected one of {', '.join(CHOICES)}, got {kind!r}")
    read = GATES[kind].options if kind in GATES else ()
    options = {name: value for name, value in given.items() if value is not None}
    for name in options:
        if name not in read:
            readers = [other for other, row in GATES.items() if name in row.options]
            raise ConfigError(
                f"--{name.replace('_', '-')}: expected it with --gate {' or '.join(readers)} alone, got it with "
                f"{kind}; leave it out"
            )
    return GateFit(kind, **{name.removeprefix("gate_"): v for name, v in options.items()}) if kind in GATES else None


def settled(logits_T: NDArray[np.floating[Any]], share: float) -> tuple[float, float, float]:
    """Threshold and sharpness of a gate, and its mean with them, from its logits at tokens that must stay as they are.

    The threshold is the least logit that at most `share` of them exceed. The sharpness is the least of `SHARPNESSES`
    under which the mean gate is at most twice `share`, because a gate whose logits hardly differ would be a little open
    everywhere; where none does, it is the largest.
    """
    least = -1 - int(share * len(logits_T))
    threshold = float(np.partition(logits_T, least)[least])
    above_T = logits_T.astype(np.float64) - threshold
    for sharpness in SHARPNESSES:
        mean = float((0.5 + 0.5 * np.tanh(sharpness / 2 * above_T)).mean())
        if mean <= 2 * share:
            break
    return threshold, sharpness, mean


def posterior(
    means: tuple[NDArray[np.float64], NDArray[np.float64]],
    mean_squares: tuple[NDArray[np.float64], NDArray[np.float64]],
) -> Gate:
    """The gate of units: the odds that a value is of the Gaussian of positives, not of negatives, both equally likely.

    log (s₀ / s₁) + (z − m₀)² / 2s₀² − (z − m₁)² / 2s₁², a quadratic of z (the posterior of GAPS, arXiv 2609.01878).
    `means` and `mean_squares` are [D] of single tokens, of positives and of negatives. A variance counts as at least a
    millionth of the mean square, because it is the difference of both, which float32 rounds. Parts are NaN where the
    moments are not finite, and 0 where a unit is always 0.
    """
    both = list(zip(means, mean_squares, strict=True))
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        (m1, v1), (m0, v0) = ((m, np.maximum(square - m * m, 1e-6 * square)) for m, square in both)
        one_sided = (v1 == 0) != (v0 == 0)  # a unit that is 0 throughout one class: the other's spread for both
        v1, v0 = (np.where(one_sided, np.maximum(v1, v0), v) for v in (v1, v0))
        never = (v1 == 0) & (v0 == 0)
        v1, v0 = (np.where(never, 1.0, v) for v in (v1, v0))
        parts = {
            "quadratic": 0.5 * (1 / v0 - 1 / v1),
            "linear": m1 / v1 - m0 / v0,
            "constant": 0.5 * (np.log(v0 / v1) + m0 * m0 / v0 - m1 * m1 / v1),
        }
        return Gate("units", {name: values.astype(np.float32) for name, values in parts.items()})
