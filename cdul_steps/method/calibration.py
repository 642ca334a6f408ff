"""Label-free calibration: comparable classes, and labels that sum to the number of objects."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

ROUNDING = 1e-6
"""Deviation of cosines that counts as zero: far below any meaningful one."""


class ClassStatistics(NamedTuple):
    """Mean and deviation of each class's cosines, float64 (2, C): for whole images and snippets."""

    mean: np.ndarray
    deviation: np.ndarray


def class_statistics(blocks: Iterable[np.ndarray]) -> ClassStatistics:
    """Statistics of cosines given in blocks (n, 1+S, C); images with a NaN are left out.

    Raises ValueError if no image is left.
    """
    count: np.ndarray | int = 0
    total: np.ndarray | float = 0.0
    squares: np.ndarray | float = 0.0
    for piece in (piece for block in blocks for piece in pieces(block)):
        known = piece[np.isfinite(piece).all(axis=(1, 2))].astype(np.float64)
        views = [known[:, :1], known[:, 1:]]
        count = count + np.array([[v.shape[0] * v.shape[1]] for v in views])
        total = total + np.stack([v.sum(axis=(0, 1)) for v in views])
        squares = squares + np.stack([np.einsum("ivc,ivc->c", v, v) for v in views])
    if not np.all(count):
        raise ValueError("no image has cosines")
    mean = np.asarray(total / count)
    return ClassStatistics(mean, np.sqrt(np.maximum(squares / count - mean**2, 0)))


def standardise(cosines: np.ndarray, statistics: ClassStatistics) -> np.ndarray:
    """Give all classes the same mean and deviation: cosines (N, 1+S, C) to float32 (N, 1+S, C).

    `p'[i,v,c] = (p[i,v,c] - mean[k,c]) * mean_c(deviation[k,c]) / deviation[k,c]`, where `k` is the
    kind of view, whole image or snippet. A class whose name is close to every image no longer
    dominates the others. The mean deviation over the classes preserves the unit, and thus the
    meaning of `tau`. A class that is constant up to rounding becomes 0. Based on SPARC (Miller et
    al., CVPR 2025), which standardises scores per class over the images.
    """
    mean, deviation = (np.asarray(s, dtype=np.float64) for s in statistics)
    scale = np.zeros_like(deviation)
    unit = deviation.mean(axis=1, keepdims=True)
    np.divide(unit, deviation, out=scale, where=deviation > ROUNDING)
    result = np.empty(cosines.shape, np.float32)
    for kind, views in enumerate((slice(0, 1), slice(1, None))):
        part = result[:, views]
        np.subtract(cosines[:, views], mean[kind].astype(np.float32), out=part)
        part *= scale[kind].astype(np.float32)
    return result


def odds_against(labels: np.ndarray, slope: float = 1.0) -> np.ndarray:
    """`((1 - y) / y) ** slope` of labels in 0..1, float32 of the same shape; infinite for 0."""
    with np.errstate(divide="ignore", over="ignore"):
        odds = (1 - labels) / labels
        return odds if slope == 1 else odds ** np.float32(slope)


def rescale(labels: np.ndarray, bias: float, slope: float = 1.0) -> np.ndarray:
    """Scale and shift the logit of each label: `sigmoid(slope * logit(y) + bias)`, float32 (N, C).

    A softmax is already a sigmoid: `S[c] = sigmoid(l[c] - log(sum_{j != c} exp(l[j])))`. So a bias
    turns labels that divide one object among the classes exactly into independent labels, and a
    slope of `tau / (the model's tau)` gives labels of a warmer softmax the sharpness that the model
    was trained with. The order of the images within a class is preserved, as are 0 and 1.
    """
    # Infinite odds make the label 0.
    with np.errstate(over="ignore"):
        return 1 / (1 + np.float32(np.exp(-bias)) * odds_against(labels, slope))


def find_bias(
    labels: np.ndarray,
    positives: float,
    slope: float = 1.0,
    *,
    scratch: np.ndarray | None = None,
) -> float:
    """The `bias` for which rescaled labels (N, C) sum to `positives` per image on average.

    Found by bisection in -50..50. `scratch` is an array like the labels, for example on disk, whose
    values are replaced; without it one is made in memory. Raises ValueError if there is no such
    bias: `positives` must be above the mean number of labels per image that are 1, and below that
    of labels that are not 0.
    """
    lowest = sum((piece == 1).sum() for piece in pieces(labels)) / len(labels)
    highest = sum((piece > 0).sum() for piece in pieces(labels)) / len(labels)
    if not lowest < positives < highest:
        raise ValueError(f"{positives:g} is not in {lowest:g}..{highest:g}")
    against = np.empty_like(labels) if scratch is None else scratch
    for part, piece in zip(pieces(against), pieces(labels), strict=True):
        part[:] = odds_against(piece, slope)
    low, high = -50.0, 50.0
    for _ in range(40):
        bias = (low + high) / 2
        factor = np.float32(np.exp(-bias))
        mean = sum((1 / (1 + factor * piece)).sum(dtype=np.float64) for piece in pieces(against))
        low, high = (bias, high) if mean < positives * len(labels) else (low, bias)
    return (low + high) / 2


NAMED = 0.5
"""Lowest label, or probability, with which a class counts as named."""
STEEPEST = 10.0
"""Largest slope of `match_labels` times the logits' deviation; labels of 0 and 1 need more."""


def match_labels(logits: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """`(slope, bias)` for which `sigmoid(slope * logits + bias)` names as much as the labels.

    `logits` float (N, C) are finite, and `labels` float (N, C) in 0..1. As many probabilities as
    labels are at least NAMED; with that threshold fixed, the slope minimises the cross-entropy
    against the labels. The order of the images within a class is preserved, and no truth is needed.
    Labels that name nothing give probabilities that name nothing.
    """
    named = int((labels >= NAMED).sum())
    logits = logits.astype(np.float64)
    ordered, deviation = np.sort(logits, axis=None), max(float(logits.std()), 1e-12)
    # Halfway between the last logit that is named and the first that is not.
    above = ordered[len(ordered) - named] if named else ordered[-1] + 2 * deviation
    below = ordered[len(ordered) - named - 1] if named < len(ordered) else above - 2 * deviation
    threshold = (above + below) / 2
    distance = logits - threshold
    low, high = 0.0, STEEPEST / deviation
    for _ in range(50):
        slope = (low + high) / 2
        # The derivative of the cross-entropy, which is convex.
        gradient = ((1 / (1 + np.exp(-slope * distance)) - labels) * distance).sum()
        low, high = (low, slope) if gradient > 0 else (slope, high)
    slope = max(slope, 1e-3 / deviation)
    return slope, -slope * threshold


def pieces(array: np.ndarray, size: int = 1 << 20) -> Iterable[np.ndarray]:
    """Cut an array along its first axis into views of about `size` bytes, which fit into a cache.

    NumPy reads its input once per operation; small pieces stay in the cache meanwhile.
    """
    rows = max(1, size // max(1, array[:1].nbytes))
    return (array[first : first + rows] for first in range(0, len(array), rows))
