"""A logistic regression that tells texts with the concept from others by one site's responses, for a gate of tokens.

N texts, D units. Imports scikit-learn when it fits.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aura_dist.errors import InputError
from aura_dist.interventions.gates import Gate

NUM_FOLDS = 5
# inverse strengths of the L2 penalty on weights of standardised units, from which cross-validation chooses
STRENGTHS_C = tuple(10.0**power for power in range(-5, 2))
NUM_WORSE = 2  # after so many weaker penalties without a smaller loss, no more are tried
# a unit whose responses differ by less, relative to their size, counts as constant: float32 rounds them
LEAST_SPREAD = 1e-6
_BLOCK = 4096  # columns that are widened to float64 at a time


@dataclass(frozen=True)
class Separation:
    """What a site's regression found."""

    gate: Gate  # of tokens, with the logit of the regression
    accuracy: float  # balanced over both classes, of texts that were held out
    inverse_strength: float  # of the penalty, as cross-validation chose it


def separate(responses_ND: NDArray[Any], is_positive_N: NDArray[np.bool_]) -> Separation | None:
    """Fit the regression; None where a response is NaN or infinite, or where all are the same.

    Both classes weigh alike. The penalty is the one with the least loss of held-out texts, each class again weighing
    alike, so the scale of the logit is chosen with it. `accuracy` is of the same held-out texts, and so a little high.

    Where there are more units than texts, the regression runs in the span of the texts, which holds its solution.

    InputError if a class has fewer than two texts.
    """
    fewest = min(int(is_positive_N.sum()), int((~is_positive_N).sum()))
    if fewest < 2:
        raise InputError(
            f"--gate tokens: expected two texts or more of each class, got {int(is_positive_N.sum())} with the concept "
            f"and {int((~is_positive_N).sum())} without; collect more"
        )
    if not all(np.isfinite(block).all() for _, block in _blocks(responses_ND)):
        return None
    mean_D, inverse_D = _standardising(responses_ND)
    if not inverse_D.any():
        return None
    within_span = responses_ND.shape[1] > len(responses_ND)
    if within_span:
        features, back = _span(responses_ND, mean_D, inverse_D)
    else:
        features = np.concatenate([(x - mean_D[at]) * inverse_D[at] for at, x in _blocks(responses_ND)], axis=1)
    best, accuracy = _cross_validate(features, is_positive_N, min(NUM_FOLDS, fewest))
    found = _regression(best).fit(features, is_positive_N)
    weight_D = found.coef_[0]
    if within_span:
        along_N = back @ weight_D
        weight_D = np.concatenate([((x - mean_D[at]) * inverse_D[at]).T @ along_N for at, x in _blocks(responses_ND)])
    weight_D = (weight_D * inverse_D).astype(np.float32)
    bias = np.array([found.intercept_[0] - weight_D.astype(np.float64) @ mean_D], dtype=np.float32)
    return Separation(Gate("tokens", {"weight": weight_D, "bias": bias}), accuracy, best)


def site_bytes(num_texts: int, width: int, item_bytes: int) -> int:
    """Bytes that `separate` takes at its peak, its input among them."""
    stored = num_texts * width * item_bytes
    if width <= num_texts:
        return stored + 4 * num_texts * width * 8
    return stored + 6 * num_texts * num_texts * 8 + 3 * num_texts * min(width, _BLOCK) * 8


def _blocks(responses_ND: NDArray[Any]) -> Iterator[tuple[slice, NDArray[np.float64]]]:
    for start in range(0, responses_ND.shape[1], _BLOCK):
        at = slice(start, min(start + _BLOCK, responses_ND.shape[1]))
        yield at, responses_ND[:, at].astype(np.float64)


def _standardising(responses_ND: NDArray[Any]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """[D] means, and one over the standard deviations, 0 where a unit is constant."""
    means, inverses = [], []
    for _, x in _blocks(responses_ND):
        spread = x.std(axis=0)
        varies = spread > LEAST_SPREAD * np.abs(x).max(axis=0)
        means.append(x.mean(axis=0))
        inverses.append(np.where(varies, 1 / np.where(varies, spread, 1.0), 0.0))
    return np.concatenate(means), np.concatenate(inverses)


def _span(
    responses_ND: NDArray[Any], mean_D: NDArray[np.float64], inverse_D: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The standardised texts in an orthonormal basis of their span, [N, R], and what makes weights there those of rows.

    With X Xᵀ = U S² Uᵀ the texts are U S, and weights v in this basis are Xᵀ (U S⁻¹ v) in the units. The penalty of
    both is the same, because the basis is orthonormal.
    """
    gram_NN = np.zeros((len(responses_ND), len(responses_ND)))
    for at, x in _blocks(responses_ND):
        z = (x - mean_D[at]) * inverse_D[at]
        gram_NN += z @ z.T
    values, vectors = np.linalg.eigh(gram_NN)
    kept = values > 1e-10 * max(values[-1], 1e-300)
    root = np.sqrt(values[kept])
    return vectors[:, kept] * root, vectors[:, kept] / root


def _regression(inverse_strength: float) -> Any:
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(
        C=inverse_strength, class_weight="balanced", max_iter=2000, tol=1e-5, warm_start=True
    )  # lbfgs with an L2 penalty


def _cross_validate(
    features: NDArray[np.float64], is_positive_N: NDArray[np.bool_], num_folds: int
) -> tuple[float, float]:
    """The inverse strength with the least held-out loss, and the balanced accuracy at it."""
    fold_N = np.empty(len(is_positive_N), dtype=np.int64)
    rng = np.random.default_rng(0)
    for rows in (np.flatnonzero(is_positive_N), np.flatnonzero(~is_positive_N)):
        fold_N[rng.permutation(rows)] = np.arange(len(rows)) % num_folds
    regressions = [_regression(STRENGTHS_C[0]) for _ in range(num_folds)]
    losses: list[float] = []
    accuracies: list[float] = []
    for inverse_strength in STRENGTHS_C:
        signed_N = np.empty(len(is_positive_N))
        for fold, regression in enumerate(regressions):  # each starts at its solution for the last penalty
            held = fold_N == fold
            regression.C = inverse_strength
            logits = regression.fit(features[~held], is_positive_N[~held]).decision_function(features[held])
            signed_N[held] = np.where(is_positive_N[held], logits, -logits)
        losses.append(_balanced(np.logaddexp(0, -signed_N), is_positive_N))
        accuracies.append(_balanced((signed_N > 0).astype(np.float64), is_positive_N))
        if len(losses) - int(np.argmin(losses)) > NUM_WORSE:  # weaker penalties take longest, and overfit more
            break
    best = int(np.argmin(losses))
    return STRENGTHS_C[best], accuracies[best]


def _balanced(values_N: NDArray[np.float64], is_positive_N: NDArray[np.bool_]) -> float:
    return float((values_N[is_positive_N].mean() + values_N[~is_positive_N].mean()) / 2)
