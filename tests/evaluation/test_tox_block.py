"""tox-block's network in torch, against loops of NumPy on a package of the test's own, and on real comments."""

import csv
import pickle
import sys
import types
from importlib.util import find_spec

import numpy as np
import pytest

from aura_dist.errors import ConfigError
from aura_dist.evaluation.scorers import load_scorer
from aura_dist.scoring.columns import auroc

h5py = pytest.importorskip("h5py", reason="the extra `evaluation` is not installed")

WORDS = {"good": 1, "bad": 2, "very": 3, "rare": 20_000}
WIDTH, UNITS, LABELS = 5, 4, 6


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package with tox-block's files: random weights, a vocabulary of four words; its module does not run."""
    place = tmp_path / "tox_block" / "trained_models"
    place.mkdir(parents=True)
    (place.parent / "__init__.py").write_text("raise RuntimeError('it would import TensorFlow')")
    rng = np.random.default_rng(0)
    weights = {"embedding/embedding/embeddings:0": rng.normal(size=(20_000, WIDTH))}
    for direction in ("forward", "backward"):
        for part, shape in (
            ("kernel", (WIDTH, 4 * UNITS)),
            ("recurrent_kernel", (UNITS, 4 * UNITS)),
            ("bias", (4 * UNITS,)),
        ):
            weights[f"bidirectional/bidirectional/{direction}_lstm/{part}:0"] = rng.normal(size=shape)
    for name, (rows, columns) in (("dense", (2 * UNITS, 3)), ("dense_1", (3, LABELS))):
        weights |= {
            f"{name}/{name}/kernel:0": rng.normal(size=(rows, columns)),
            f"{name}/{name}/bias:0": np.ones(columns),
        }
    weights = {name: values.astype(np.float32) for name, values in weights.items()}
    with h5py.File(place / "lstm_model_0.1.2.h5", "w") as file:
        for name, values in weights.items():
            file[f"model_weights/{name}"] = values
    keras = types.ModuleType("keras_preprocessing")
    for name in ("Tokenizer", "TokenSequencer"):
        setattr(keras, name, type(name, (), {"__module__": "keras_preprocessing"}))
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "keras_preprocessing", keras)
        encoder, encoder.tokenizer = (one := keras.TokenSequencer()), keras.Tokenizer()
        one.tokenizer.word_index = WORDS
        (place / "encoder_0.1.2.pkl").write_bytes(pickle.dumps(one))
    monkeypatch.syspath_prepend(tmp_path)
    return place, weights


def by_loops(text, weights):
    """P(the first label), a word at a time, by the equations of an LSTM with Keras's order of gates: i, f, c, o."""

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    ids = [WORDS[word] for word in text if WORDS.get(word, 20_000) < 20_000][-100:]
    words = weights["embedding/embedding/embeddings:0"][[0] * (100 - len(ids)) + ids]
    sides = []
    for direction, order in (("forward", 1), ("backward", -1)):
        kernel, recurrent, bias = (
            weights[f"bidirectional/bidirectional/{direction}_lstm/{part}:0"]
            for part in ("kernel", "recurrent_kernel", "bias")
        )
        hidden, cell, outputs = np.zeros(UNITS), np.zeros(UNITS), []
        for word in words[::order]:
            i, f, c, o = np.split(word @ kernel + hidden @ recurrent + bias, 4)
            cell = sigmoid(f) * cell + sigmoid(i) * np.tanh(c)
            hidden = sigmoid(o) * np.tanh(cell)
            outputs.append(hidden)
        sides.append(np.max(outputs, axis=0))
    hidden = np.concatenate(sides)
    for name in ("dense", "dense_1"):
        hidden = hidden @ weights[f"{name}/{name}/kernel:0"] + weights[f"{name}/{name}/bias:0"]
        hidden = np.maximum(hidden, 0) if name == "dense" else sigmoid(hidden)
    return hidden[0]


def test_equals_loops(package):
    texts = ["good", "Very,BAD!", "rare good\tunknown", "", "bad " * 70 + "good " * 60]
    words = [["good"], ["very", "bad"], ["good"], [], ["bad"] * 70 + ["good"] * 60]
    found = load_scorer("tox-block", None, "cpu").score(texts)
    np.testing.assert_allclose(found, [by_loops(text, package[1]) for text in words], atol=1e-6)
    assert len(set(found.round(6))) == 4  # the rare word is left out, so that the third is the first


def test_refuses_what_is_not_the_package(package, monkeypatch):
    place, _ = package
    (place / "encoder_0.1.2.pkl").write_bytes(pickle.dumps(print))
    with pytest.raises(ConfigError, match="print is not part of tox-block's encoder"):
        load_scorer("tox-block", None, "cpu")
    (place / "encoder_0.1.2.pkl").unlink()
    with pytest.raises(ConfigError, match=r"expected the package tox-block 0\.1\.2, got another version: pip install"):
        load_scorer("tox-block", None, "cpu")
    with pytest.raises(ConfigError, match="--toxic-label: expected it with a classifier"):
        load_scorer("tox-block", "toxic", "cpu")


@pytest.mark.skipif(find_spec("tox_block") is None, reason="pip install --no-deps tox-block")
def test_tells_real_comments_apart(jigsaw_csv):
    with open(jigsaw_csv, newline="") as file:
        rows = list(csv.DictReader(file))[:600]
    scores = load_scorer("tox-block", None, "cpu").score([row["text"] for row in rows])
    labels = np.array([int(row["toxic"]) for row in rows])
    assert auroc(scores[:, None], labels)[0] >= 0.95
