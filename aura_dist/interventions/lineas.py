"""LinEAS: scales and shifts of all sites, learned together (Rodríguez et al., arXiv 2503.10679, algorithm 1).

n texts with the concept run under the maps, n texts without it run once without them. At every site the loss compares
the two sets of responses, each the mean over a text's tokens, unit by unit: both are sorted, because that is the
optimal coupling in one dimension, and the squared differences are averaged over texts and summed over units. Gradient
descent on the sum over all sites moves the maps. The learning rate falls to 0 along a cosine. After each step the
proximal operator of the sparse group lasso moves ω − 1 and b to 0; a group is all units of a site.

A step that raises the loss above the least one so far is taken back, and the next ones are shorter. The paper has no
such rule. But the first layers of Gemma 3 270M move the later ones so much that each learning rate from 0.1 down to
0.00002 raised the loss. A share of it as large as the epsilon of the model's dtype counts as rounding, not as a rise (a
nonmonotone line search: Grippo, Lampariello and Lucidi, 1986). For in bfloat16 the least loss is partly luck, and
without this every step from the 200th of 1,000 on was taken back.

Responses of a site are divided by one number, the root mean square of those without the concept, so that one learning
rate serves all sites. b is learned in that unit too. The weights stay as they are and have no gradients.

The ranks of a launch share the texts of each class. Each has all responses, so each has the same loss; its gradient
goes through its own texts. The sum over ranks is the gradient of one process, and all ranks take the same step.
"""

import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from aura_dist.errors import ConfigError, InputError, ModelError, brief
from aura_dist.files import replacing
from aura_dist.interventions.methods import Scales, Shifts
from aura_dist.interventions.training import Training
from aura_dist.models.load import input_device
from aura_dist.ranks.rows import RowsOverRanks, from_first, summed
from aura_dist.sites.find import decoder_layers_name, tap_of
from aura_dist.sites.pooling import POOLINGS, TokenMask
from aura_dist.sites.routed import Routed
from aura_dist.sites.tap import Callback, Tap, attached
from aura_dist.store.grid import BATCH_OVERHEAD_TOKENS, make_batches
from aura_dist.text.tokens import TokenizedTexts

logger = logging.getLogger(__name__)

# tokens of one forward, padding included
_BATCH_TOKENS = 1024
# the state is saved, and the loss is logged, so often
_SAVE_EVERY = 25
_LOG_EVERY = 100
# what the learning rate grows by after a step that does not raise the loss, up to the one that was asked for
_FASTER = 1.2
# down to which share of it the learning rate falls: below it the loss would change by its rounding alone
_LEAST_SHARE = 2.0**-24
# of the file that a training under way is kept in
_STATE_VERSION = 3


def train(training: Training) -> tuple[Scales, Shifts]:
    """Site → [D] float32 ω, and site → [D] float32 b. InputError if a class has too few texts.

    ModelError if the loss of the model as it is, or a gradient, is infinite or NaN.
    """
    learner = _Learner(training)
    for step, loss in learner.steps():
        if step % _LOG_EVERY == 0:
            logger.info("lineas: loss %.6g after %d of %d steps", loss, step, training.options["steps"])
    return learner.maps()


class _Learner:
    """The parameters of all sites: ω and b / scale, [D] float32 each."""

    def __init__(self, training: Training) -> None:
        self._options = training.options
        self._team = training.team
        self._rounding = torch.finfo(training.model.dtype).eps
        with_concept, without = _chosen(training)
        self._taps = [tap_of(training.model, site) for site in training.sites]
        plain = _Forwards(training, without, self._taps)
        with torch.no_grad():
            self._targets = [z_ND.sort(dim=0).values for z_ND in plain.responses([])]
        self._units = [_root_mean_square(z_ND) for z_ND in self._targets]
        self._forwards = _Forwards(training, with_concept, self._taps, recompute=self._options["recompute"])
        device = input_device(training.model)
        self._scales = [torch.ones(tap.width, device=device, requires_grad=True) for tap in self._taps]
        self._shifts = [torch.zeros(tap.width, device=device, requires_grad=True) for tap in self._taps]
        self._state = _State(training.state if self._team.world.is_first else None, _key(training))

    def steps(self) -> Iterator[tuple[int, float]]:
        """Take all steps; yields how many were taken, and the loss, with the penalties, after them."""
        total, at = self._options["steps"], _Point.of([*self._scales, *self._shifts])
        for step in range(self._begin(at), total + 1 if total else 0):
            self._team.check()
            if step:
                annealed = (1 + math.cos(math.pi * (step - 1) / total)) / 2
                self._descend(at, self._options["learning_rate"] * annealed * at.share)
            loss = self._loss()
            value = self._value(loss)
            if at.accepts(value, self._rounding):
                at.move(self._parameters, value)
                if step < total:
                    at.lead(summed(self._team.world, self._gradients(loss, self._parameters)))
            elif not step:
                raise ModelError(f"lineas: expected a finite loss of the model as it is, got {value}; see its weights")
            else:
                at.stay(self._parameters)
            del loss  # its graph holds what each layer returned
            self._forwards.ends = []
            if step and step % _SAVE_EVERY == 0:
                self._state.save(step, at.tensors)
            yield step, at.value
        if at.num_taken_back:
            level = logging.WARNING if at.num_taken_back == total else logging.INFO
            logger.log(level, "lineas: %d of %d steps raised the loss and were taken back", at.num_taken_back, total)

    def _begin(self, at: "_Point") -> int:
        """Fill `at` on all ranks from rank 0's state; returns the next step."""
        taken = self._team.from_first("steps taken", lambda: self._state.load(at.tensors))
        with torch.no_grad():
            for mine, kept in zip(at.tensors, from_first(self._team.world, at.tensors), strict=True):
                mine.copy_(kept)
            for parameter, kept in zip(self._parameters, at.parameters, strict=True):
                parameter.copy_(kept)
        return int(taken) + 1 if taken else 0

    @property
    def _parameters(self) -> list[Tensor]:
        return [*self._scales, *self._shifts]

    def maps(self) -> tuple[Scales, Shifts]:
        """The maps as they are now."""
        scales = {tap.site: w.detach().cpu().numpy() for tap, w in zip(self._taps, self._scales, strict=True)}
        moved = [(u * b).detach().cpu().numpy() for u, b in zip(self._units, self._shifts, strict=True)]
        return scales, {tap.site: b for tap, b in zip(self._taps, moved, strict=True)}

    def _loss(self) -> Tensor:
        maps = [(w, u * b) for w, b, u in zip(self._scales, self._shifts, self._units, strict=True)]
        found = zip(self._forwards.responses(maps), self._targets, self._units, strict=True)
        distances = [((z_ND.sort(dim=0).values - y_ND) / u).square().mean(dim=0).sum() for z_ND, y_ND, u in found]
        return torch.stack(distances).sum()

    def _gradients(self, loss: Tensor, parameters: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Of the loss, by this rank's texts; the models' outputs take part with gradients of 0."""
        ends = self._forwards.ends
        return torch.autograd.grad([loss, *ends], parameters, [torch.ones_like(loss), *map(torch.zeros_like, ends)])

    @torch.no_grad()
    def _value(self, loss: Tensor) -> float:
        """The loss with the penalties, of rank 0 on all ranks, so that all take a step back together."""
        penalties = [
            self._options["sparsity"] * v_D.abs().sum()
            + self._options["group_sparsity"] * math.sqrt(len(v_D)) * v_D.norm()
            for v_D in (p - rest for p, rest in zip(self._parameters, self._at_rest, strict=True))
        ]
        return float(from_first(self._team.world, [torch.stack([loss.detach(), *penalties]).sum()])[0])

    @torch.no_grad()
    def _descend(self, at: "_Point", rate: float) -> None:
        l1, group = rate * self._options["sparsity"], rate * self._options["group_sparsity"]
        for parameter, kept, gradient, rest in zip(
            self._parameters, at.parameters, at.gradients, self._at_rest, strict=True
        ):
            parameter.copy_(rest + proximal(kept - rest - rate * gradient, l1, group))

    @property
    def _at_rest(self) -> list[int]:
        return [1] * len(self._scales) + [0] * len(self._shifts)


@dataclass(frozen=True)
class _Point:
    """Where the descent is: the parameters after the last step that was kept, and the gradient there."""

    parameters: list[Tensor]
    gradients: list[Tensor]
    # [4] float32: the loss, the share of the learning rate that steps take, how many were taken back, the least loss
    numbers: Tensor

    @classmethod
    def of(cls, parameters: Sequence[Tensor]) -> "_Point":
        kept = [parameter.detach().clone() for parameter in parameters]
        return cls(
            kept, [torch.zeros_like(p) for p in kept], torch.tensor([math.inf, 1, 0, math.inf], device=kept[0].device)
        )

    @property
    def tensors(self) -> list[Tensor]:
        return [*self.parameters, *self.gradients, self.numbers]

    value = property(lambda self: float(self.numbers[0]))
    share = property(lambda self: float(self.numbers[1]))
    num_taken_back = property(lambda self: int(self.numbers[2]))

    def accepts(self, value: float, rounding: float) -> bool:
        """Whether a step to a loss of `value` is kept: above the least one so far by a share of `rounding` at most."""
        return math.isfinite(value) and value <= float(self.numbers[3]) * (1 + rounding)

    @torch.no_grad()
    def move(self, parameters: Sequence[Tensor], value: float) -> None:
        """Keep `parameters`, whose loss is `value`; the next step is longer."""
        for kept, new in zip(self.parameters, parameters, strict=True):
            kept.copy_(new)
        self.numbers[0] = value
        self.numbers[3] = min(float(self.numbers[3]), value)
        self.numbers[1] = min(1.0, _FASTER * self.share)

    def lead(self, gradients: Sequence[Tensor]) -> None:
        """Keep the gradients, alike on all ranks; ModelError if they are not finite."""
        for kept, new in zip(self.gradients, gradients, strict=True):
            if not bool(new.isfinite().all()):
                raise ModelError(
                    f"lineas: expected finite gradients, got NaN or infinity at a loss of {self.value:g}; collect in "
                    "another --dtype, or leave out modules"
                )
            kept.copy_(new)

    @torch.no_grad()
    def stay(self, parameters: Sequence[Tensor]) -> None:
        """Put `parameters` back; the next step is half as long."""
        for parameter, kept in zip(parameters, self.parameters, strict=True):
            parameter.copy_(kept)
        self.numbers[1] = max(_LEAST_SHARE, self.share / 2)
        self.numbers[2] += 1


def proximal(values_D: Tensor, l1: float, group: float) -> Tensor:
    """[D] proximal operator of l1 ‖v‖₁ + group √D ‖v‖₂ (Simon et al., *A Sparse-Group Lasso*, 2013, section 2)."""
    soft_D: Tensor = values_D.sign() * (values_D.abs() - l1).clamp(min=0)
    norm = float(soft_D.norm())
    if group == 0 or norm == 0:
        return soft_D
    return soft_D * max(0.0, 1 - group * math.sqrt(len(values_D)) / norm)


def _root_mean_square(z_ND: Tensor) -> float:
    return float(z_ND.square().mean().sqrt()) or 1.0


def _chosen(training: Training) -> tuple[TokenizedTexts, TokenizedTexts]:
    """As many texts with the concept as without, drawn by the seed; the shortest first, which saves padding."""
    number, draw = training.options["texts_per_class"], np.random.default_rng(training.options["fit_seed"])
    classes = []
    for what, rows in (("with", training.is_positive), ("without", ~training.is_positive)):
        there = np.flatnonzero(rows)
        if len(there) < number:
            raise InputError(
                f"--texts-per-class: expected at most {len(there)}, the number of texts {what} the concept in the "
                f"store, got {number}"
            )
        taken = draw.permutation(there)[:number]
        classes.append(training.tokens.take(taken[np.argsort(training.tokens.num_tokens[taken], kind="stable")]))
    return classes[0], classes[1]


class _Forwards:
    """This rank's texts of a class, the shortest first, in batches of similar lengths."""

    def __init__(
        self, training: Training, texts: TokenizedTexts, taps: Sequence[Tap], *, recompute: bool = False
    ) -> None:
        device = input_device(training.model)
        self._model, self._taps, self._recompute = training.model, taps, recompute
        self._is_split = training.team.world.layout.fsdp > 1
        self.ends: list[Tensor] = []  # what the latest forwards returned, where weights are split
        lengths = texts.num_tokens
        cut = partial(make_batches, lengths.tolist(), tokens_per_batch=_BATCH_TOKENS)
        self._rows = RowsOverRanks(training.team.world, _costs(lengths, cut(slice(0, len(lengths)))))
        mine = cut(self._rows.mine)
        self._num_batches = len(mine)
        if self._is_split:  # forwards are collective: ranks with fewer ones run a text again, and nothing depends on it
            num_forwards = max(len(cut(share)) for share in self._rows.shares)
            first = self._rows.mine.start
            mine += [slice(first, first + 1)] * (num_forwards - len(mine))
        batches = [texts.batch(rows) for rows in mine]
        self._inputs = [
            (torch.from_numpy(b.input_ids).to(device), torch.from_numpy(b.attention_mask).to(device).long())
            for b in batches
        ]
        self._tokens = [TokenMask.build(b.pool_mask, device) for b in batches]

    def responses(self, maps: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """[N, D] float32 mean responses of each site to all texts, under (ω, b) of each, or under none."""
        pooled: list[dict[str, Tensor]] = []
        self.ends = []
        for (ids_BT, mask_BT), tokens in zip(self._inputs, self._tokens, strict=True):
            pooled.append({})
            callbacks = [
                (tap, _callback(tap, maps[i] if maps else None, tokens, pooled[-1])) for i, tap in enumerate(self._taps)
            ]
            again = _computed_again(self._model, callbacks, pooled[-1]) if self._recompute else nullcontext()
            with again, attached(self._model, callbacks):
                self._run(ids_BT, mask_BT)
        own = pooled[: self._num_batches]
        found = self._rows.whole([torch.cat([of[tap.site] for of in own]) for tap in self._taps])
        # a cycle otherwise: these hold the graph, which holds the callbacks of layers that are computed again
        for of in pooled:
            of.clear()
        return found

    def _run(self, ids_BT: Tensor, mask_BT: Tensor) -> None:
        """One forward, without the model's head where that is possible.

        Hooks of the whole model and of its layers gather weights that are split (FSDP2). In the backward pass they act
        when the gradient of what they returned comes, which the loss alone would not send to the last layers.
        """
        if not self._is_split:
            self._model.base_model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False)
            return
        can_be_short = "logits_to_keep" in signature(self._model.forward).parameters
        short = {"logits_to_keep": 1} if can_be_short else {}
        self.ends.append(self._model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False, **short).logits)


def _costs(num_tokens_N: NDArray[np.integer], batches: Sequence[slice]) -> NDArray[np.float64]:
    """[N] what each text costs in its batch: tokens with padding, and a part of what a batch costs beyond them."""
    each = [(b.stop - b.start, num_tokens_N[b.stop - 1]) for b in batches]
    return np.concatenate([np.full(num, longest + BATCH_OVERHEAD_TOKENS / num) for num, longest in each])


def _callback(tap: Tap, map_DD: tuple[Tensor, Tensor] | None, tokens: TokenMask, pooled: dict[str, Tensor]) -> Callback:
    """Changes what a site passes, and keeps the mean over the tokens of each text.

    A layer that is computed once more in the backward pass calls it again, and the same values come in place.
    """

    def change(values: Tensor, along: Callable[[Tensor], Tensor]) -> Tensor:
        assert map_DD is not None
        wide = values.to(torch.promote_types(values.dtype, torch.float32))
        return (wide * along(map_DD[0]) + along(map_DD[1])).to(values.dtype)

    def call(raw: object, alone: bool) -> Any:
        changed = raw if map_DD is None else tap.write(raw, tap.width, change)
        num_rows, num_tokens = tokens.counted_BT.shape
        passed = replace(raw, values_SI=changed) if isinstance(raw, Routed) and isinstance(changed, Tensor) else changed
        acts_BTD = tap.read(passed, tap.width, (num_rows, num_tokens))
        pooled[tap.site] = POOLINGS["mean"].pool(tokens, acts_BTD).float()
        return None if map_DD is None else changed

    return call


@contextmanager
def _computed_again(
    model: PreTrainedModel, callbacks: Sequence[tuple[Tap, Callback]], pooled: dict[str, Tensor]
) -> Iterator[None]:
    """Forwards within the context keep the inputs of decoder layers alone; the backward pass computes the rest again.

    The callbacks are attached within the context. The backward pass comes after it and attaches them once more; what
    they pool then is dropped.
    """
    is_forward = True

    def run(forward: Callable[..., Any], *args: Any, **options: Any) -> Any:
        if is_forward:
            return forward(*args, **options)
        try:
            with attached(model, callbacks):
                return forward(*args, **options)
        finally:
            pooled.clear()

    layers = list(model.get_submodule(decoder_layers_name(model)).children())
    for layer in layers:
        vars(layer)["forward"] = partial(checkpoint, partial(run, layer.forward), use_reentrant=False)
    try:
        yield
    finally:
        is_forward = False
        for layer in layers:
            del vars(layer)["forward"]


def _key(training: Training) -> str:
    """What fixes the parameters at each step."""
    options = {name: value for name, value in training.options.items() if name != "recompute"}
    sites = [(site.name, site.width) for site in training.sites]
    known = [_STATE_VERSION, training.identity, options, sites]
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class _State:
    """The point of a training under way, in a file; nothing where there is none."""

    path: Path | None
    key: str

    def load(self, parameters: Sequence[Tensor]) -> int:
        """Fill `parameters`, the tensors of a point; returns how many steps led there, 0 where no such file is kept."""
        if self.path is None or not self.path.is_file():
            return 0
        try:
            kept = load_file(self.path)
            key = bytes(kept["key"].tolist()).decode()
        except Exception as error:
            raise ConfigError(
                f"{str(self.path)!r} cannot be read ({brief(error)}); remove it to train from the beginning"
            ) from error
        if key != self.key:
            logger.warning("%s is of other settings: training starts from the beginning", self.path)
            return 0
        with torch.no_grad():
            for i, parameter in enumerate(parameters):
                parameter.copy_(kept[str(i)])
        logger.info("lineas: %d steps were taken before", int(kept["step"]))
        return int(kept["step"])

    def save(self, step: int, parameters: Sequence[Tensor]) -> None:
        """Replace the file in one step."""
        if self.path is None:
            return
        tensors = {str(i): parameter.detach().cpu() for i, parameter in enumerate(parameters)}
        named = {"step": torch.tensor(step), "key": torch.tensor(list(self.key.encode()), dtype=torch.uint8)}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.path) as aside:
            aside.write_bytes(save({**tensors, **named}))
