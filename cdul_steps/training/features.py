"""Features of a frozen trunk as training data."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cdul_steps.data.stores import open_store, read_blocks
from cdul_steps.errors import UserError


def read_features(store: Path, rows: np.ndarray) -> np.ndarray:
    """Features of some rows of a store, float32 (len(rows), D), NaN for unusable images.

    They are read in blocks, so that only the result is in memory. Raises UserError if the store
    cannot be read or has no such row.
    """
    array = open_store(store)
    if len(rows) and rows.max() >= array.shape[0]:
        raise UserError(f"{store}: has {array.shape[0]} rows, no row {rows.max()}; run snakemake")
    order = np.argsort(rows, kind="stable")
    ordered = rows[order]
    features = np.empty((len(rows), array.shape[2]), np.float32)
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
        usable = features[np.isfinite(features).all(axis=1)]
        if not len(usable):
            raise UserError("training: no training image has features")
        mean = usable.mean(axis=0, dtype=np.float64)
        deviation = usable.std(axis=0, dtype=np.float64)
        # A constant feature carries no information.
        scale = np.divide(1, deviation, out=np.zeros_like(deviation), where=deviation > 1e-6)
        self.mean, self.scale = (torch.from_numpy(v).float() for v in (mean, scale))

    def __call__(self, features: np.ndarray) -> Tensor:
        """Standardised features, float32 (N, D / poolings)."""
        standardised = (torch.from_numpy(features) - self.mean) * self.scale
        return standardised.reshape(len(features), self.poolings, -1).mean(dim=1)

    def fold(self, head: torch.nn.Linear, onto: torch.nn.Linear) -> None:
        """Set the weights of the layer `onto` so that it maps features to what `head` makes of
        standardised features."""
        with torch.no_grad():
            weight = head.weight.repeat(1, self.poolings) / self.poolings * self.scale
            onto.weight.copy_(weight)
            onto.bias.copy_(head.bias - weight @ self.mean)


class FeatureLoader:
    """Yields batches of features, as `Loader` does of images."""

    def __init__(self, features: Tensor) -> None:
        self._features = features
        self._usable = features.isfinite().all(dim=1)

    def epoch(self, epoch: int, plan: list[list[int]]) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of `plan`, lists of image indices, as `(index (B,), features (B, D))`.

        Unusable images are left out, so B may be 0. The features are the same in each `epoch`.
        """
        for batch in plan:
            index = torch.tensor(batch, dtype=torch.int64)
            index = index[self._usable[index]]
            yield index, self._features[index]
