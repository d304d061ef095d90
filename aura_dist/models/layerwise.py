"""A model that runs layer by layer: all batches of a *wave* go through one decoder layer before any reaches the next.

So weights are read once a wave, whatever the batches. How a model calls its layers is recorded, not assumed: for each
batch the model's own forward runs with a recorder in place of every layer. It computes embeddings, masks and positions;
each recorder keeps its call and returns tensors without data. Then each real layer is called with what its recorder
kept, and with the outputs of the layers before in place of those tensors. A model that computes something between its
layers, or shares an object among them, would get wrong values, so it is refused.
"""

import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from aura_dist.errors import AuraError, ModelError, brief
from aura_dist.models.layer_reader import LayerReader
from aura_dist.models.waiting import Waiting
from aura_dist.ranks.team import Team, Unit
from aura_dist.ranks.torch_adapter import tree_leaves, tree_map, tree_structure
from aura_dist.sites.find import decoder_layers_name

# what may be in a layer's call beside tensors; another object may carry values from layer to layer
_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device, torch.Size)
_CHECK_ROWS = 2
# a wave computes so many times as long as its weights take to read: what is read unhidden, such as the first layer, or
# more slowly than at first, then costs little
_COMPUTE_PER_READ = 32
_CHECK_LAYERS = 2


@dataclass(frozen=True)
class Link:
    """Stands for the tensor at `place` among the outputs of `layer`; −1 is what enters the first layer."""

    layer: int
    place: int


Call = tuple[tuple[Any, ...], dict[str, Any]]  # positional and named arguments, with links
Inputs = Mapping[str, Tensor]


class _ForwardEndsError(Exception):
    """Ends a forward of which no more is needed."""


class _Recorder(nn.Module):
    """Takes a decoder layer's place; a model may read the layer's attributes from it."""

    def __init__(self, layer: nn.Module, call: Callable[..., Any]) -> None:
        super().__init__()
        self._stands_for = (layer,)  # in a tuple, because torch would take it for a child
        self._make_call = call

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_stands_for"][0], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._make_call(args, kwargs)


class _Wave(nn.Module):
    """Its call is one forward of the whole model for all batches of a wave: hooks of whole forwards go here."""

    def forward(self, run: Callable[[], Any]) -> Any:
        return run()


class Layerwise:
    """Runs the batches of a wave through `model`, whose layers are loaded by `reader`; one a model.

    `prepare` it once. Then a batch is known by a key: `record` it, `run` it through every layer in order, and `finish`
    or `drop` it.
    """

    def __init__(
        self, model: PreTrainedModel, reader: LayerReader, waiting: Waiting, *, wave_tokens: int | None = None
    ) -> None:
        self.model, self.reader, self.waiting = model, reader, waiting
        self.wave_tokens = wave_tokens  # of a wave, if the user says it
        self.wave = _Wave()
        layers = model.get_submodule(decoder_layers_name(model))
        assert isinstance(layers, nn.ModuleList)
        self._layers = layers
        self._calls: dict[Hashable, list[Call]] = {}
        self._last_use: dict[Link, int] = {}  # of each output → the layer that takes it last
        self._form: Any = None  # of a layer's output, with tensors without data
        self._tokens_per_second = 0.0  # of one layer

    @torch.no_grad()
    def prepare(self, inputs: Inputs) -> None:
        """Check, with two rows of the first batch, that the layers can be called one by one; measure how fast they are.

        Later calls do nothing.

        ModelError if the model's layers exchange more than tensors, or do not give the bits of an ordinary forward.
        """
        if self._form is not None:
            return
        self._check({name: value[:_CHECK_ROWS] for name, value in inputs.items()})

    def tokens_of_a_wave(self) -> int:
        """Tokens for which reading the weights takes a small part of the time, also where nothing hides it."""
        if self.wave_tokens is not None:
            return self.wave_tokens
        return ceil(_COMPUTE_PER_READ * self.reader.seconds_per_layer * self._tokens_per_second)

    def claim(
        self,
        team: Team,
        key: str,
        units: Sequence[Unit],
        num_tokens: Callable[[Unit], int],
        before: Callable[[], int | None],
    ) -> list[Unit]:
        """The units of this rank's next wave; none at the end. Ranks claim units one by one, as in `Team.claimed`.

        No rank claims more than its even share of the units that were left when this turn of waves began. The ranks of
        a host begin their waves together, so that they go through the layers at about the same time, and the page cache
        need not hold many of them.
        """
        turn = team.turn(f"waves/{key}")
        # units are counted in the turn first, so that what was left is never taken for less than it was
        left = len(units) - team.add(f"units/{key}", 0) + team.add(f"units/{key}/{turn}", 0)
        most, most_tokens = ceil(left / team.world.layout.world_size), self.tokens_of_a_wave()
        wave, tokens = list[Unit](), 0
        while len(wave) < most and (tokens < most_tokens or not wave):
            team.keep_step(before())
            unit = team.claim(key, units)
            if unit is None:
                break
            team.add(f"units/{key}/{turn}", 1)
            team.add(f"units/{key}", 1)
            wave.append(unit)
            tokens += num_tokens(unit)
        team.keep_abreast(f"waves/{key}", before, leaves=not wave)
        if not wave:
            team.meet(f"claimed/{key}", before)
        return wave

    def note_wave(self, num_tokens: int, seconds: float, waited: float) -> None:
        """Take how long a wave took, of which it `waited` for weights, for the size of the next one."""
        self._tokens_per_second = self.num_layers * num_tokens / max(seconds - waited, 1e-9)

    @property
    def num_layers(self) -> int:
        return len(self._layers)

    def layers(self, num_layers: int | None = None) -> Iterator[int]:
        """The layers in order, or the first ones, each loaded while it is current; the next one comes meanwhile."""
        stop = self.num_layers if num_layers is None else num_layers
        for index in range(stop):
            self.reader.take(index)
            if index + 1 < stop:
                self.reader.start(index + 1)
            yield index
            self.reader.drop(index)

    @torch.no_grad()
    def record(self, key: Hashable, inputs: Inputs) -> None:
        """Begin a batch; `inputs` are the arguments of the model's forward. `prepare` comes first."""
        self.reader.start(0)
        self._record(key, inputs)

    @torch.no_grad()
    def rehearse(self, index: int, key: Hashable) -> None:
        """Run a batch through a layer that is loaded, for its hooks alone; the batch can run through it again."""
        self._through(index, key, Tensor.clone)

    @torch.no_grad()
    def run(self, index: int, key: Hashable) -> None:
        """Run a batch through a layer that is loaded; what is needed of its output waits."""
        output = self._through(index, key, lambda hidden: hidden)
        leaves, expected = tree_leaves(output), tree_leaves(self._form)
        alike = [isinstance(leaf, Tensor) for leaf in leaves] == [isinstance(leaf, Tensor) for leaf in expected]
        if not alike or tree_structure(output) != tree_structure(self._form):
            raise self._refusal(f"layer {index} returns something else than the first layer")
        for link, last in self._last_use.items():
            if last == index:
                self.waiting.drop(key, link)
        for place, leaf in enumerate(leaves):
            if self._last_use.get(Link(index, place), -1) > index:
                self.waiting.put(key, Link(index, place), leaf)

    @torch.no_grad()
    def finish(self, key: Hashable, inputs: Inputs) -> Any:
        """What the model returns for a batch that has run through all layers; the batch is dropped."""
        last = self.num_layers - 1
        hidden = self.waiting.get(key, Link(last, 0))

        def call(index: int, args: Any, kwargs: Any) -> Any:
            if index < last:
                return self._like(_hidden(args, kwargs))
            leaves = iter([hidden, *tree_leaves(self._form)[1:]])
            return tree_map(lambda _: next(leaves), self._form)

        with self._replaced(call):
            output = self.model(**inputs, use_cache=False)
        self.drop(key)
        return output

    def drop(self, key: Hashable) -> None:
        """Forget a batch."""
        self._calls.pop(key, None)
        self.waiting.drop_batch(key)

    def close(self) -> None:
        self.reader.close()
        self.waiting.close()

    def _through(self, index: int, key: Hashable, taken: Callable[[Tensor], Tensor]) -> Any:
        """What a layer that is loaded returns for a batch; it gets `taken` of each tensor that waits."""
        args, kwargs = tree_map(
            lambda leaf: taken(self.waiting.get(key, leaf)) if isinstance(leaf, Link) else leaf,
            self._calls[key][index],
        )
        return self._layers[index](*args, **kwargs)

    def _record(self, key: Hashable, inputs: Inputs) -> None:
        """Run the model's forward with a recorder in place of every layer, and keep the layers' calls."""
        calls: list[Call] = []
        links: dict[int, Link] = {}  # identity of a tensor → what it stands for
        alive: list[Any] = []  # as long as identities count

        def linked(leaf: Any) -> Any:
            if isinstance(leaf, Tensor):
                if id(leaf) in links:
                    return links[id(leaf)]
                if leaf.is_meta:
                    raise self._refusal("it computes something from the hidden states between its layers")
            elif not isinstance(leaf, _PLAIN):
                raise self._refusal(f"its layers share an object ({type(leaf).__name__})")
            return leaf

        def call(index: int, args: Any, kwargs: Any) -> Any:
            if index != len(calls):
                raise self._refusal(f"it calls layer {index} where layer {len(calls)} was expected")
            hidden = _hidden(args, kwargs)
            if index == 0 and isinstance(hidden, Tensor):
                links[id(hidden)] = Link(-1, 0)
                self.waiting.put(key, Link(-1, 0), hidden)
            if links.get(id(hidden)) != Link(index - 1, 0):
                raise self._refusal("it changes the hidden states between its layers")
            values, named = tree_map(linked, (args, tuple(kwargs.items())), is_leaf=_may_be_shared)
            calls.append((values, dict(named)))
            output = self._like(hidden)
            links.update({id(t): Link(index, i) for i, t in enumerate(tree_leaves(output)) if isinstance(t, Tensor)})
            alive.extend((hidden, output))
            if index + 1 == self.num_layers:
                raise _ForwardEndsError
            return output

        with self._replaced(call):
            self._forward(inputs)
        if len(calls) < self.num_layers:
            raise self._refusal(f"its forward calls {len(calls)} of {self.num_layers} layers")
        self._calls[key] = calls
        self._last_use = {
            leaf: index for index, made in enumerate(calls) for leaf in tree_leaves(made) if isinstance(leaf, Link)
        }
        self._last_use[Link(self.num_layers - 1, 0)] = self.num_layers

    def _forward(self, inputs: Inputs) -> None:
        """The model's forward up to the last layer that is called; what it raises with recorders is a refusal."""
        try:
            self.model(**inputs, use_cache=False)
        except _ForwardEndsError:
            pass
        except (AuraError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # tensors without data fail in many ways
            raise self._refusal(f"it needs values between its layers ({brief(error, 120)})") from error

    def _check(self, inputs: Inputs) -> None:
        """Compare the first layers, called one by one, with an ordinary forward; learn the form of their output.

        The second layer borrows the first one's weights if they fit, because nothing hides the time of reading its own.
        The layers' speed is the second run's, because on a GPU the first one loads libraries.
        """
        with ExitStack() as opened:
            others = range(1, min(_CHECK_LAYERS, self.num_layers))
            first = [self.reader.take(0)]
            self._compare(first + [opened.enter_context(self.reader.lent(0, to)) for to in others], inputs)

    def _compare(self, first: Sequence[nn.Module], inputs: Inputs) -> None:
        """`_check`, with the first layers, which are loaded."""
        num, outputs = len(first), list[Any]()

        def stop(index: int, args: Any, kwargs: Any) -> Any:
            raise _ForwardEndsError

        with ExitStack() as hooks:
            for layer in first:
                hooks.callback(layer.register_forward_hook(lambda m, a, output: outputs.append(output)).remove)
            with self._replaced(stop, num):
                self._forward(inputs)
            if not outputs or not isinstance(tree_leaves(outputs[0])[0], Tensor):
                raise self._refusal("its first layer returns no hidden states first")
            self._form = tree_map(lambda t: t.to("meta") if isinstance(t, Tensor) else t, outputs[0])
            begun = time.perf_counter()
            self._record(self, inputs)
            for index in range(num):
                self.run(index, self)
        self.drop(self)
        expected, found = (tree_leaves(outputs[i])[0] for i in (num - 1, -1))
        if len(outputs) != 2 * num or not torch.allclose(expected, found, rtol=0, atol=0, equal_nan=True):
            raise self._refusal("its layers give other values when they are called one by one")
        # the comparison has waited until the device was ready
        tokens = next(iter(inputs.values())).numel()
        self._tokens_per_second = num * tokens / (time.perf_counter() - begun)

    def _like(self, hidden: Tensor) -> Any:
        """What a layer returns for `hidden`, with tensors without data."""
        first = tree_leaves(self._form)[0]
        return tree_map(
            lambda t: (
                torch.empty(hidden.shape if t is first else t.shape, dtype=t.dtype, device="meta")
                if isinstance(t, Tensor)
                else t
            ),
            self._form,
        )

    @contextmanager
    def _replaced(self, call: Callable[[int, Any, Any], Any], start: int = 0) -> Iterator[None]:
        """Within the context, layers from `start` on are recorders that make `call(index, args, kwargs)`."""
        layers = list(self._layers)
        try:
            for index in range(start, len(layers)):
                self._layers[index] = _Recorder(layers[index], partial(call, index))
            yield
        finally:
            for index, layer in enumerate(layers):
                self._layers[index] = layer

    def _refusal(self, why: str) -> ModelError:
        return ModelError(
            f"--sharding layers: {type(self.model).__name__} cannot run layer by layer, because {why}: expected layers "
            "that exchange tensors alone, through their calls; use --sharding dispatch, fsdp or zero3"
        )


def executor_of(model: nn.Module) -> Layerwise | None:
    """What runs `model` layer by layer; None if it runs in the ordinary way."""
    kept = getattr(model, "_layerwise", ())
    return kept[0] if kept else None


@contextmanager
def closing(model: nn.Module) -> Iterator[None]:
    """Context at whose end what loads the layers of `model` is closed, if it runs layer by layer."""
    try:
        yield
    finally:
        executor = executor_of(model)
        if executor is not None:
            executor.close()


def whole_forwards(model: PreTrainedModel) -> set[nn.Module]:
    """Modules whose call is a whole forward of `model`; some models call parts of their base model, never the whole."""
    executor = executor_of(model)
    return {model, model.base_model} if executor is None else {executor.wave}


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The hidden states in a layer's call."""
    return args[0] if args else kwargs.get("hidden_states")


def _may_be_shared(value: Any) -> bool:
    """Whether layers can leave values for later ones in `value`: a cache, or a container that is empty so far."""
    return isinstance(value, Cache) or (isinstance(value, dict | list) and not value)
