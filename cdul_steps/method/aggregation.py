"""The global-local aggregator: pseudo-labels from CLIP's scores."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from cdul_steps.method.calibration import ClassStatistics, pieces, rescale, standardise
from cdul_steps.method.choices import Construction
from cdul_steps.method.metrics import is_top_k
from cdul_steps.method.scoring import Scoring


def global_scores(scores: np.ndarray) -> np.ndarray:
    """The whole image's scores `g[i,c] = S[i,0,c]`: (N, 1+S, C) to (N, C)."""
    return scores[:, 0]


def local_scores(scores: np.ndarray) -> np.ndarray:
    """The snippets' scores `S[i,1..S,c]`: (N, 1+S, C) to (N, S, C)."""
    return scores[:, 1:]


def aggregate(local: np.ndarray, zeta: float) -> np.ndarray:
    """Combine the snippets (N, S, C) of an image into one score per class, float32 (N, C).

    `alpha = max_v`, `beta = min_v`, `gamma = [alpha >= zeta]`, and
    `a = gamma * alpha + (1 - gamma) * beta` (CDUL's aggregator, section 3.1): a class that some
    snippet shows clearly gets its best score, any other class its worst. `zeta` is in 0..1; 0 is
    the maximum.
    """
    alpha, beta = local.max(axis=1), local.min(axis=1)
    return np.where(alpha >= np.float32(zeta), alpha, beta)


def combine(global_: np.ndarray, aggregated: np.ndarray, lambda_: float = 0.0) -> np.ndarray:
    """Combine global and aggregated scores, both (N, C): `y0 = (g + a + lambda_ * |g - a|) / 2`.

    `lambda_` 0 is the mean (CDUL, section 3.1), 1 the larger, -1 the smaller (CDUL's supplement).
    """
    half = np.float32(0.5)
    mean = half * (global_ + aggregated)
    if lambda_ == 0:
        return mean
    return mean + half * np.float32(lambda_) * np.abs(global_ - aggregated)


CONSTRUCTIONS: dict[Construction, Callable[[np.ndarray, float, float], np.ndarray]] = {
    "global": lambda scores, zeta, lambda_: global_scores(scores),
    "local_mean": lambda scores, zeta, lambda_: local_scores(scores).mean(axis=1),
    "local_max": lambda scores, zeta, lambda_: local_scores(scores).max(axis=1),
    "aggregate": lambda scores, zeta, lambda_: aggregate(local_scores(scores), zeta),
    "final": lambda scores, zeta, lambda_: combine(
        global_scores(scores), aggregate(local_scores(scores), zeta), lambda_
    ),
}
"""Label constructions by name: scores (N, 1+S, C), zeta and lambda to labels (N, C) in 0..1."""


def label_blocks(
    blocks: Iterable[tuple[int, np.ndarray]],
    class_count: int,
    constructions: Sequence[Construction],
    *,
    scoring: Scoring,
    zeta: float,
    lambda_: float,
    statistics: ClassStatistics | None = None,
) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """Labels by each of the named constructions, in blocks: `(first image, float32 (n, C))`.

    `blocks` gives `(first image, cosines (n, 1+S, C+M))`, so that the data set need not fit in
    memory. The M columns after the `class_count` (C) classes are context, which gets no labels.
    With `statistics` the cosines are standardised first. Images with NaN cosines get NaN labels.
    """
    for first, cosines in blocks:
        for piece in pieces(cosines):
            comparable = standardise(piece, statistics) if statistics else piece
            scores = scoring(comparable, class_count)[..., :class_count]
            yield (
                first,
                {name: CONSTRUCTIONS[name](scores, zeta, lambda_) for name in constructions},
            )
            first += len(scores)


def build_labels(
    blocks: Iterable[tuple[int, np.ndarray]],
    shape: tuple[int, int],
    constructions: Sequence[Construction],
    **settings: Any,
) -> dict[str, np.ndarray]:
    """Labels as `label_blocks` makes them, with its `settings`, of all images.

    Each is float32 of `shape` (N, C), stored by column, with NaN for images that are in no block.
    """
    labels: dict[str, np.ndarray] = {
        name: np.full(shape[::-1], np.nan, np.float32).T for name in constructions
    }
    for first, made in label_blocks(blocks, shape[1], constructions, **settings):
        for name, values in made.items():
            labels[name][first : first + len(values)] = values
    return labels


def seen_whole(labels: dict[str, np.ndarray]) -> np.ndarray:
    """Which images have no NaN in any view, bool (N,), from the result of `build_labels`.

    `labels` must have "global" and "local_mean", which together cover all views of an image.
    """
    return np.isfinite(labels["global"] + labels["local_mean"]).all(axis=1)


def harden(
    labels: np.ndarray, *, threshold: float | None = None, top_k: int | None = None
) -> np.ndarray:
    """Hard labels, 0 or 1, float32 (N, C): 1 if a label (N, C) is at least `threshold`, or one of
    the `top_k` largest of its image (ties go to the first class)."""
    hard = labels >= np.float32(threshold) if top_k is None else is_top_k(labels, top_k)
    return hard.astype(np.float32)


def rescale_and_harden(
    labels: np.ndarray,
    *,
    bias: float | None = None,
    slope: float = 1.0,
    threshold: float | None = None,
    top_k: int | None = None,
) -> None:
    """Rescale labels if `bias` is given, then harden them if `threshold` or `top_k` is, in place.

    `labels` are finite float32 (N, C) in 0..1.
    """
    for piece in pieces(labels):
        if bias is not None:
            piece[:] = rescale(piece, bias, slope)
        if threshold is not None or top_k is not None:
            piece[:] = harden(piece, threshold=threshold, top_k=top_k)
