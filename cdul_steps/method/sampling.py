"""Which entries of a table of scores a person should look at: samples of known probability."""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

EDGES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.97)
"""Scores at which a band of scores begins, besides the threshold in use."""
NAMED_SHARE = 0.35
"""Share of a sample that goes to entries at or above the threshold, which precision is made of."""
FLOOR = 0.2
"""Smallest chance of a yes that the design reckons with, as a share of the mean score."""


class Design(NamedTuple):
    """A sample for every size: the entries of the n smallest keys are the sample of n.

    All are float64 (N, C). `key` is infinite for entries that are not to be drawn; `weight` is
    proportional to the inclusion probability, and 0 for them.
    """

    key: np.ndarray
    weight: np.ndarray

    def sample(self, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows and columns of the entries of a sample, in the order in which they are drawn."""
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
        # The largest weights are certain; the others share what is left in proportion.
        rest = weights[::-1].cumsum()[::-1]
        taken = np.arange(len(weights))
        certain = np.argmax(weights * (size - taken) < rest)
        return np.minimum(1, self.weight * (size - certain) / rest[certain])


def permanent_numbers(seed: int, image_ids: Sequence[str], classes: Sequence[str]) -> np.ndarray:
    """A number in 0..1 of every pair of image and class, float64 (N, C), uniform and for ever.

    It depends on the seed and on the two names alone, so images and classes may come and go.
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
    """A stratified sample of entries, whatever its size will be.

    `scores` and `numbers` (N, C), where `open_` says which entries may be drawn; `threshold` (C,)
    the score from which a class counts as named; `shifts` (C, bands) a number in 0..1 for each
    stratum, which is a class in a band of scores. Of a stratum of n entries of weight w, the one of
    the r-th smallest number has the key `(r - shift) / (n w)`. So a sample of any size has in every
    stratum the number of entries that is expected there, rounded at random, contains every smaller
    sample, and takes an entry with the probability `min(1, k w)`, k being the limit of the keys
    (sequential Poisson sampling with permanent random numbers: Ohlsson, 1998).

    Weights follow Neyman: the deviation of an answer, `sqrt(p (1 - p))`, with the score as a guess
    of p that is never below FLOOR of the mean score. NAMED_SHARE goes to named entries.
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
"""Bands of scores, below the threshold and above."""


def band_shifts(seed: int, classes: Sequence[str]) -> np.ndarray:
    """The `shifts` of `design`: float64 (C, BANDS), by the names of the classes alone."""
    return permanent_numbers(seed, [f"band {k}" for k in range(BANDS)], classes).T


def horvitz_thompson(values: np.ndarray, inclusion: np.ndarray) -> float:
    """The total of a population, from a sample's values and inclusion probabilities, both (n,).

    `sum(y / pi)`, without bias whatever the design (Horvitz and Thompson, 1952).
    """
    return float((values / inclusion).sum())
