"""LinEAS: maps of all sites learned together, by gradients through the model (Rodríguez et al., NeurIPS 2025).

n texts with the concept and n without are drawn. Texts with it run under the maps. At each site, the responses, pooled
by their mean, are compared with those to texts without it in the plain model: unit by unit, sorted, which is the 1-D
Wasserstein distance. Stochastic gradient descent makes all distances small at once, so that a map corrects only what
the maps before it have left (arXiv 2503.10679).

Responses count in standard deviations of the texts without the concept, so that one rate fits units of any scale:
ẑ = (z − m) / s becomes (1 + u) ẑ + c, which is ω = 1 + u, b = s c − u m. After each step, u and c are shrunk, unit by
unit (ℓ1) and site by site (group lasso).

n texts, T tokens, D units of a site.
"""

import hashlib
import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from aura_dist.errors import InputError, ModelError
from aura_dist.files import replacing
from aura_dist.interventions.methods import Scales, Shifts
from aura_dist.interventions.training import Training
from aura_dist.models.load import input_device
from aura_dist.ranks.signals import StopFlag, interruption
from aura_dist.sites.find import tap_of
from aura_dist.sites.routed import Routed
from aura_dist.sites.tap import Callback, Tap, attached
from aura_dist.text.tokens import Batch, TokenizedTexts

logger = logging.getLogger(__name__)

SAVE_SECONDS = 60.0
KEPT = "the steps so far are kept: run the same command to go on"
LEAST_SPREAD = 1e-6  # relative to a unit's size; a unit whose responses differ by less is left as it is


@dataclass
class _Learned:
    """One site: its parameters, and what its responses are to become."""

    tap: Tap
    mean_D: Tensor
    spread_D: Tensor  # 0: the unit is left as it is
    target_ND: Tensor  # standardised, each unit sorted
    u_D: Tensor
    c_D: Tensor
    pooled_ND: Tensor = field(default_factory=lambda: torch.empty(0))  # under the map, of the last forward

    @property
    def scale(self) -> Tensor:
        """[D] ω."""
        return 1 + self.u_D

    @property
    def shift(self) -> Tensor:
        """[D] b."""
        return self.spread_D * self.c_D - self.u_D * self.mean_D

    def distance(self) -> Tensor:
        """Mean over units and texts of the squared difference of sorted responses, in standard deviations."""
        moves = self.spread_D > 0
        standard_ND = (self.pooled_ND - self.mean_D) / torch.where(moves, self.spread_D, 1)
        gaps_ND = standard_ND.sort(dim=0).values - self.target_ND
        return gaps_ND.square().mean(dim=0)[moves].sum() / len(moves)

    @torch.no_grad()
    def step(self, rate: float, l1: float, group: float) -> None:
        """One step against the gradient, then the proximal operators of both penalties, each times the rate."""
        for values_D in (self.u_D, self.c_D):
            assert values_D.grad is not None
            values_D -= rate * values_D.grad
            values_D.copy_(torch.nn.functional.softshrink(values_D, rate * l1))
            bound = rate * group * len(values_D) ** 0.5
            values_D *= (1 - bound / values_D.norm().clamp(min=1e-30)).clamp(min=0)
            values_D.grad = None


def train(training: Training) -> tuple[Scales, Shifts]:
    """Site → scale, and site → shift; with no steps the identity.

    InputError if there are too few texts; ModelError if responses or the loss are not finite.
    """
    options, model = training.options, training.model
    source, target = _drawn(training)
    learned = _prepared(model, [tap_of(model, site) for site in training.sites], target)
    state = _State(training.unfinished, _key(training, source, target), learned)
    begun = state.load()
    rows = source.batch(slice(0, len(source.ids)))
    with StopFlag(KEPT) as stop, stop.deferred():
        for step in range(begun, options["num_steps"]):
            loss = _loss(model, learned, rows)
            loss.backward()  # type: ignore[no-untyped-call]
            rate = options["learning_rate"] * 0.5 * (1 + np.cos(np.pi * step / options["num_steps"]))
            for site in learned:
                site.step(rate, options["l1"], options["group_lasso"])
            _log(step, options["num_steps"], loss.item() / len(learned))
            state.save_sometimes(step + 1, at_once=stop.received is not None)
            if stop.received is not None:
                raise interruption(stop.received, outcome=KEPT)
    state.remove()
    with torch.no_grad():
        scales = {site.tap.site: site.scale.cpu().numpy() for site in learned}
        return scales, {site.tap.site: site.shift.cpu().numpy() for site in learned}


def _drawn(training: Training) -> tuple[TokenizedTexts, TokenizedTexts]:
    """Texts with the concept and texts without it, equally many, by the seed."""
    rng, wanted = np.random.default_rng(training.options["training_seed"]), training.options["num_texts"]
    drawn = []
    for label, name in ((True, "with"), (False, "without")):
        rows = np.flatnonzero(training.is_positive == label)
        if len(rows) < wanted:
            raise InputError(
                f"--num-texts: expected at most {len(rows)}, the texts {name} the concept, got {wanted}; lower it, or "
                "collect more"
            )
        drawn.append(training.tokens.take(np.sort(rng.choice(rows, wanted, replace=False))))
    return drawn[0], drawn[1]


def _log(step: int, num_steps: int, loss: float) -> None:
    if not np.isfinite(loss):
        raise ModelError(
            f"--method lineas: expected a finite loss, got {loss} at step {step + 1}; lower --learning-rate"
        )
    if step % max(1, num_steps // 10) == 0 or step + 1 == num_steps:
        logger.info("step %d of %d: mean squared distance %.4f", step + 1, num_steps, loss)


def _forward(model: PreTrainedModel, rows: Batch, callbacks: Sequence[tuple[Tap, Callback]]) -> None:
    device = input_device(model)
    with attached(model, callbacks):
        model.get_decoder()(
            input_ids=torch.from_numpy(rows.input_ids).to(device),
            attention_mask=torch.from_numpy(rows.attention_mask).to(device, torch.int64),
            use_cache=False,
        )


def _pool(rows: Batch, acts_BTD: Tensor | Routed) -> Tensor:
    """[B, D] means of the counted tokens, float32 at least."""
    counted_BT = torch.from_numpy(rows.pool_mask).to(acts_BTD.device)
    count_B1 = counted_BT.sum(dim=1, keepdim=True)
    if isinstance(acts_BTD, Routed):
        return acts_BTD.sum(counted_BT, torch.float32) / count_B1
    wide_BTD = acts_BTD.reshape(*counted_BT.shape, -1).to(torch.promote_types(acts_BTD.dtype, torch.float32))
    return (wide_BTD * counted_BT[..., None]).sum(dim=1) / count_B1


@torch.no_grad()
def _prepared(model: PreTrainedModel, taps: Sequence[Tap], target: TokenizedTexts) -> list[_Learned]:
    """Every site at the identity, with the responses to `target` of the plain model."""
    rows, pooled = target.batch(slice(0, len(target.ids))), dict[str, Tensor]()

    def listening(tap: Tap) -> Callback:
        def listen(raw: Any, alone: bool) -> None:
            pooled[tap.site] = _pool(rows, tap.read(raw, tap.width, rows.input_ids.shape))

        return listen

    _forward(model, rows, [(tap, listening(tap)) for tap in taps])
    learned = []
    for tap in taps:
        values_ND = pooled.get(tap.site)
        if values_ND is None or not bool(values_ND.isfinite().all()):
            raise ModelError(
                f"module {tap.site!r}: expected finite responses to every text, got NaN or infinity, or the module is "
                "not called; leave it out by `fit --modules`"
            )
        mean_D, spread_D = values_ND.mean(dim=0), values_ND.std(dim=0, correction=0)
        spread_D = torch.where(spread_D > LEAST_SPREAD * values_ND.abs().amax(dim=0), spread_D, 0)
        standard_ND = (values_ND - mean_D) / torch.where(spread_D > 0, spread_D, 1)
        u_D, c_D = (torch.zeros_like(mean_D, requires_grad=True) for _ in range(2))
        learned.append(_Learned(tap, mean_D, spread_D, standard_ND.sort(dim=0).values, u_D, c_D))
    return learned


def _loss(model: PreTrainedModel, learned: Sequence[_Learned], rows: Batch) -> Tensor:
    """Sum of all sites' distances, of texts that run under the maps."""

    def mapping(site: _Learned) -> Callback:
        def write(raw: Any, alone: bool) -> Any:
            def change(values: Tensor, along: Callable[[Tensor], Tensor]) -> Tensor:
                wide = values.to(torch.promote_types(values.dtype, torch.float32))
                mapped = wide * along(site.scale) + along(site.shift)
                site.pooled_ND = _pool(rows, replace(raw, values_SI=mapped) if isinstance(raw, Routed) else mapped)
                return mapped.to(values.dtype)

            return site.tap.write(raw, site.tap.width, change)

        return write

    _forward(model, rows, [(site.tap, mapping(site)) for site in learned])
    distances = [site.distance() for site in learned]
    return torch.stack([distance.to(distances[0].device) for distance in distances]).sum()


# what an interrupted training has learned


def _key(training: Training, *texts: TokenizedTexts) -> str:
    """What a state must agree in to be gone on with."""
    about = {
        "identity": training.identity,
        "options": dict(training.options),
        "sites": [site.name for site in training.sites],
        "texts": [some.digest() for some in texts],
    }
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


@dataclass
class _State:
    """A file of the parameters, and of how many steps have made them."""

    path: Path | None
    key: str
    learned: Sequence[_Learned]
    saved: float = field(default_factory=time.monotonic)

    def load(self) -> int:
        """Take the parameters of the file, if it is of the same training; returns the number of its steps."""
        if self.path is None or not self.path.exists():
            return 0
        try:
            with np.load(self.path) as file:
                found: dict[str, NDArray[Any]] = dict(file)
            agrees = str(found["key"]) == self.key
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"{str(self.path)!r} is no state of a training: {error}; remove it") from error
        if not agrees:
            logger.warning("%s is of a training with other settings: it is begun anew", self.path)
            return 0
        with torch.no_grad():
            for index, site in enumerate(self.learned):
                site.u_D.copy_(torch.from_numpy(found[f"u{index}"]))
                site.c_D.copy_(torch.from_numpy(found[f"c{index}"]))
        logger.info("going on after %d steps that %s keeps", int(found["steps"]), self.path)
        return int(found["steps"])

    def save_sometimes(self, steps: int, *, at_once: bool) -> None:
        """Write the file where the last time is long ago."""
        if self.path is None or not (at_once or time.monotonic() - self.saved > SAVE_SECONDS):
            return
        arrays: dict[str, Any] = {"key": np.array(self.key), "steps": np.array(steps)}
        for index, site in enumerate(self.learned):
            arrays |= {f"u{index}": site.u_D.detach().cpu().numpy(), f"c{index}": site.c_D.detach().cpu().numpy()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.path) as aside, aside.open("wb") as file:
            np.savez(file, **arrays)
        self.saved = time.monotonic()

    def remove(self) -> None:
        if self.path is not None:
            self.path.unlink(missing_ok=True)
