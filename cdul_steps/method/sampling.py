"""Selects the entries of a score table for a person to check: samples with known probability."""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

EDGES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.97)
"""Scores at which score bands start, in addition to the threshold in use."""
NAMED_SHARE = 0.35
"""Share of a sample for entries at or above the threshold, which determine precision."""
FLOOR = 0.2
"""Lowest probability of a yes that the design assumes, as a share of the mean score."""


class Design(NamedTuple):
    """Samples of every size: the entries with the n smallest keys are the sample of size n.

    All are float64 (N, C). `key` is infinite for entries that must not be drawn; `weight` is
    proportional to the inclusion probability, and 0 for these entries.
    """

    key: np.ndarray
    weight: np.ndarray

    def sample(self, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows and columns of the entries in a sample, int (n,) each, in the order of drawing."""
        size = min(size, int(np.isfinite(self.key).sum()))
        flat = self.key.ravel()
        first = np.argpartition(flat, size - 1)[:size] if size else np.empty(0, int)
        rows, columns = np.unravel_index(first[np.argsort(flat[first])], self.key.shape)
        return rows, columns

    def inclusion(self, size: int) -> np.ndarray:
        """Inclusion probability of every entry in a sample of `size`: float64 (N, C)."""
        weights = np.sort(self.weight[self.weight > 0])[::-1]
        if size >= len(weights):
            return (self.weight > 0).astype(float)
        # The largest weights are certain; the others share the rest in proportion.
        rest = weights[::-1].cumsum()[::-1]
        taken = np.arange(len(weights))
        certain = np.argmax(weights * (size - taken) < rest)
        return np.minimum(1, self.weight * (size - certain) / rest[certain])


def permanent_numbers(seed: int, image_ids: Sequence[str], classes: Sequence[str]) -> np.ndarray:
    """A permanent uniform number in 0..1 for every pair of image and class, float64 (N, C).

    It depends only on the seed and the two names, so images and classes may be added or removed.
    """
    rows, columns = (
        np.array([_hash(f"{seed}\n{kind}\n{name}") for name in names], np.uint64)
        for kind, names in (("image", image_ids), ("class", classes))
    )
    return _uniform(rows[:, None] ^ columns)


def _hash(text: str) -> int:
    data = text.encode(errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest())


def _uniform(value: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele et al., 2014), as a float64 in 0..1."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        value = (value ^ (value >> np.uint64(shift))) * np.uint64(factor)
    value ^= value >> np.uint64(31)
    return ((value >> np.uint64(11)).astype(float) + 0.5) / 2**53


def design(
    scores: np.ndarray,
    numbers: np.ndarray,
    shifts: np.ndarray,
    threshold: np.ndarray,
    open_: np.ndarray,
) -> Design:
    """A stratified sample of entries, for any sample size.

    `scores` and `numbers` are float (N, C) in 0..1, without NaN; `open_` bool (N, C) marks the
    entries that may be drawn; `threshold` (C,) is the score from which a class counts as named;
    `shifts` (C, bands) is a number in 0..1 for each stratum, which is a class in a score band. In a
    stratum of n entries with weight w, the entry with the r-th smallest number has the key
    `(r - shift) / (n w)`. So a sample of any size has the expected number of entries in every
    stratum, rounded at random, contains every smaller sample, and includes an entry with
    probability `min(1, k w)`, where k is the limit of the keys (sequential Poisson sampling with
    permanent random numbers: Ohlsson, 1998).

    Weights follow Neyman: the deviation of an answer, `sqrt(p (1 - p))`, with the score as an
    estimate of p that is never below FLOOR times the mean score. NAMED_SHARE is for named entries.
    """
    named = scores >= threshold
    band = np.searchsorted(EDGES, scores, side="right")
    weight = np.zeros(scores.shape)
    # 0..B-1 below the threshold, B..2B-1 above.
    band = band + named * (len(EDGES) + 1)
    floor = FLOOR * float(np.mean(scores[open_])) if open_.any() else 0.0
    for of in np.unique(band[open_]):
        here = open_ & (band == of)
        chance = np.clip(np.mean(scores[here]), max(floor, 1e-4), 0.9)
        weight[here] = np.sqrt(chance * (1 - chance))
    total = [weight[named].sum(), weight[~named].sum()]
    if min(total) > 0:
        weight *= np.where(named, NAMED_SHARE / total[0], (1 - NAMED_SHARE) / total[1])
    key = np.full(scores.shape, np.inf)
    for column in range(scores.shape[1]):
        for of in np.unique(band[open_[:, column], column]):
            here = np.flatnonzero(open_[:, column] & (band[:, column] == of))
            order = here[np.argsort(numbers[here, column], kind="stable")]
            rank = np.arange(1, len(order) + 1) - shifts[column, of]
            key[order, column] = rank / (len(order) * weight[order, column])
    return Design(key, weight)


BANDS = 2 * (len(EDGES) + 1)
"""Number of score bands, below the threshold and above."""


def band_shifts(seed: int, classes: Sequence[str]) -> np.ndarray:
    """The `shifts` of `design`: float64 (C, BANDS), which depend only on class names and seed."""
    return permanent_numbers(seed, [f"band {k}" for k in range(BANDS)], classes).T


def horvitz_thompson(values: np.ndarray, inclusion: np.ndarray) -> float:
    """The total of a population, from a sample's values and inclusion probabilities, both (n,).

    `sum(y / pi)`, which is unbiased for any design (Horvitz and Thompson, 1952).
    """
    return float((values / inclusion).sum())
