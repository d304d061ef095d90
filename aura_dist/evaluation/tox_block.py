"""tox-block, a classifier of toxic comments that the Python package index carries with its weights.

A bidirectional LSTM over words, trained on Jigsaw's comments by the package's author. The package predicts by
TensorFlow; here torch computes the same from the package's files, because TensorFlow is large and little of it is
used. So it sees the order of words, offline and without a download from a hub:

    pip install --no-deps tox-block
"""

import pickle
from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from aura_dist.errors import ConfigError, MissingPackageError

TOX_BLOCK = "tox-block"
_FILES = ("encoder_0.1.2.pkl", "lstm_model_0.1.2.h5")
_NUM_WORDS = 20_000  # words of higher rank are skipped
_MAX_WORDS = 100  # the last of a text
_SEPARATORS = str.maketrans(dict.fromkeys('!"#$%&()*+,-./:;<=>?@[\\]^_`{|}~\t\n', " "))
_TEXTS_PER_BATCH = 256


class ToxBlock:
    """P(toxic) of a text by tox-block's network; of its six labels, the first."""

    name = TOX_BLOCK

    def __init__(self) -> None:
        encoder, weights = _installed()
        self._rank_of = _word_ranks(encoder)
        self._network = _Network(weights).eval()

    @torch.no_grad()
    def score(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """[N] probabilities, in order."""
        ids = torch.zeros((len(texts), _MAX_WORDS), dtype=torch.int64)  # 0, on the left, stands for no word
        for row, text in zip(ids, texts, strict=True):
            words = text.lower().translate(_SEPARATORS).split(" ")
            kept = [rank for word in words if (rank := self._rank_of.get(word, _NUM_WORDS)) < _NUM_WORDS][-_MAX_WORDS:]
            row[_MAX_WORDS - len(kept) :] = torch.tensor(kept, dtype=torch.int64)
        parts = [self._network(part) for part in torch.split(ids, _TEXTS_PER_BATCH)]
        return np.concatenate([np.empty(0), *(part.double().numpy() for part in parts)])


class _Network(nn.Module):
    """Word vectors, a bidirectional LSTM, the maximum over words, two dense layers."""

    def __init__(self, weights: Path) -> None:
        super().__init__()
        try:
            import h5py
        except ImportError as error:
            raise MissingPackageError(f"--scorer {TOX_BLOCK}", "h5py", "evaluation") from error
        with h5py.File(weights) as file:
            read = {name: torch.from_numpy(file["model_weights"][path][...]) for name, path in _PATHS.items()}
        num_words, width = read["vectors"].shape
        self.vectors = nn.Embedding(num_words, width, _weight=read["vectors"])
        num_units = len(read["forward recurrent_kernel"])
        self.lstm = nn.LSTM(width, num_units, batch_first=True, bidirectional=True)
        own = {}
        for direction, suffix in (("forward", ""), ("backward", "_reverse")):
            own[f"weight_ih_l0{suffix}"] = read[f"{direction} kernel"].T
            own[f"weight_hh_l0{suffix}"] = read[f"{direction} recurrent_kernel"].T
            own[f"bias_ih_l0{suffix}"] = read[f"{direction} bias"]
            own[f"bias_hh_l0{suffix}"] = torch.zeros(4 * num_units)  # torch has two biases, Keras one
        self.lstm.load_state_dict(own)
        self.dense = [(read["dense kernel"], read["dense bias"]), (read["labels kernel"], read["labels bias"])]

    def forward(self, ids_BT: Tensor) -> Tensor:
        """[B] probabilities of the first label."""
        hidden_BTD, _ = self.lstm(self.vectors(ids_BT))
        (kernel_1, bias_1), (kernel_2, bias_2) = self.dense
        hidden_BD = (hidden_BTD.amax(dim=1) @ kernel_1 + bias_1).relu()
        toxic_B: Tensor = (hidden_BD @ kernel_2[:, 0] + bias_2[0]).sigmoid()
        return toxic_B


_PATHS = {
    "vectors": "embedding/embedding/embeddings:0",
    **{
        f"{direction} {part}": f"bidirectional/bidirectional/{direction}_lstm/{part}:0"
        for direction in ("forward", "backward")
        for part in ("kernel", "recurrent_kernel", "bias")
    },
    **{f"dense {part}": f"dense/dense/{part}:0" for part in ("kernel", "bias")},
    **{f"labels {part}": f"dense_1/dense_1/{part}:0" for part in ("kernel", "bias")},
}


def _installed() -> tuple[Path, Path]:
    """The package's two files, found without importing it, because it imports TensorFlow; ConfigError without them."""
    spec = find_spec("tox_block")
    places = [] if spec is None else list(spec.submodule_search_locations or [])
    for place in places:
        encoder, weights = (Path(place) / "trained_models" / name for name in _FILES)
        if encoder.is_file() and weights.is_file():
            return encoder, weights
    raise ConfigError(
        f"--scorer {TOX_BLOCK}: expected the package tox-block 0.1.2, got "
        f"{'another version' if places else 'none'}: pip install --no-deps tox-block==0.1.2"
    )


class _Bare:
    """What stands in for a class of the package or of Keras: only its attributes are read."""

    word_index: dict[str, int]
    tokenizer: "_Bare"


class _Unpickler(pickle.Unpickler):
    """Reads plain containers, and classes of a few libraries as bare objects; it imports nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0] in ("keras", "keras_preprocessing", "tensorflow", "tox_block", "sklearn"):
            return _Bare
        known = {"OrderedDict": OrderedDict, "defaultdict": defaultdict, "int": int}
        if module in ("collections", "builtins") and name in known:
            return known[name]
        raise pickle.UnpicklingError(f"{module}.{name} is not part of tox-block's encoder")


def _word_ranks(encoder: Path) -> dict[str, int]:
    """Word → its rank by frequency, from 1."""
    try:
        with encoder.open("rb") as file:
            ranks = _Unpickler(file).load().tokenizer.word_index
    except (OSError, pickle.UnpicklingError, AttributeError, EOFError) as error:
        raise ConfigError(
            f"--scorer {TOX_BLOCK}: {str(encoder)!r} cannot be read: {error}; install it again"
        ) from error
    return {str(word): int(rank) for word, rank in ranks.items()}
