"""Features of a frozen trunk as training data."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cdul_steps.data.stores import on_disk, open_store, read_blocks
from cdul_steps.errors import UserError
from cdul_steps.method.calibration import pieces

_ROWS = 1024
"""Images of a block of features that are in memory at a time."""


def read_features(store: Path, rows: np.ndarray, scratch: Path) -> np.ndarray:
    """Features of some rows of a store, float32 (len(rows), D), NaN for unusable images.

    They are read in blocks into a nameless file in the folder `scratch`. Raises UserError if the
    store cannot be read or has no such row.
    """
    array = open_store(store)
    if len(rows) and rows.max() >= array.shape[0]:
        raise UserError(f"{store}: has {array.shape[0]} rows, no row {rows.max()}; run 'cdul run'")
    order = np.argsort(rows, kind="stable")
    ordered = rows[order]
    features = on_disk((len(rows), array.shape[2]), scratch)
    for first, block in read_blocks(store, array):
        low, high = np.searchsorted(ordered, (first, first + len(block)))
        features[order[low:high]] = block[ordered[low:high] - first, 0]
    return features


class Standardised:
    """Features with mean 0 and deviation 1 over the training images.

    If a trunk concatenates several kinds of pooling in its features, the standardised results are
    averaged: they are similar, and their mean has less noise. `fold` transfers a head trained on
    such features to the trunk.
    """

    def __init__(self, features: np.ndarray, poolings: int = 1) -> None:
        """`features` (N, D) of the training images; D is a multiple of `poolings`.

        Raises UserError if no image has features.
        """
        self.poolings = poolings
        count = sum(len(piece) for piece in _usable(features))
        if not count:
            raise UserError("training: no training image has features")
        mean = _sum(_usable(features)) / count
        deviation = np.sqrt(_sum((piece - mean) ** 2 for piece in _usable(features)) / count)
        # A constant feature carries no information.
        scale = np.divide(1, deviation, out=np.zeros_like(deviation), where=deviation > 1e-6)
        self.mean, self.scale = (torch.from_numpy(v).float() for v in (mean, scale))

    def __call__(self, features: np.ndarray, scratch: Path) -> Tensor:
        """Standardised features, float32 (N, D / poolings), in a nameless file in `scratch`."""
        shape = (len(features), features.shape[1] // self.poolings)
        result = torch.from_numpy(on_disk(shape, scratch))
        blocks = torch.from_numpy(features).split(_ROWS)
        for part, block in zip(result.split(_ROWS), blocks, strict=True):
            standardised = (block - self.mean) * self.scale
            part[:] = standardised.reshape(len(block), self.poolings, -1).mean(dim=1)
        return result

    def fold(self, head: torch.nn.Linear, onto: torch.nn.Linear) -> None:
        """Set the weights of the layer `onto` so that it maps features to what `head` makes of
        standardised features."""
        with torch.no_grad():
            weight = head.weight.repeat(1, self.poolings) / self.poolings * self.scale
            onto.weight.copy_(weight)
            onto.bias.copy_(head.bias - weight @ self.mean)


def _usable(features: np.ndarray) -> Iterator[np.ndarray]:
    """The rows without NaN, in blocks."""
    return (piece[np.isfinite(piece).all(axis=1)] for piece in pieces(features))


def _sum(blocks: Iterable[np.ndarray]) -> np.ndarray:
    """The sum of rows (n, D) in blocks, float64 (D,), in the order in which NumPy sums a column."""
    total: np.ndarray | None = None
    for block in blocks:
        before = [] if total is None else [total[None]]
        total = np.concatenate([*before, block]).sum(axis=0, dtype=np.float64)
    assert total is not None
    return total


class FeatureLoader:
    """Yields batches of features, as `Loader` does of images."""

    def __init__(self, features: Tensor) -> None:
        self._features = features
        self._usable = torch.cat([part.isfinite().all(dim=1) for part in features.split(_ROWS)])

    def epoch(self, epoch: int, plan: list[list[int]]) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of `plan`, lists of image indices, as `(index (B,), features (B, D))`.

        Unusable images are left out, so B may be 0. The features are the same in each `epoch`.
        """
        for batch in plan:
            index = torch.tensor(batch, dtype=torch.int64)
            index = index[self._usable[index]]
            yield index, self._features[index]
