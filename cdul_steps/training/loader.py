"""Batches of training images: decoded and augmented by worker processes, epoch after epoch."""

import os
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cdul_steps.config import Training
from cdul_steps.data.images import ImageError, decode
from cdul_steps.models.device import stop_without


class TrainImages(Dataset):
    """Images with their augmentation, which depends only on seed, epoch and image."""

    def __init__(
        self,
        paths: pa.Array,
        resize: Callable[..., np.ndarray],
        settings: Training,
        max_pixels: int,
    ) -> None:
        """`resize` converts an image, and optionally a box of it, to uint8 (3, H, W)."""
        self.paths, self.resize, self.max_pixels = paths, resize, max_pixels
        self.settings = settings

    def __getitem__(self, key: tuple[int, int]) -> tuple[int, np.ndarray] | None:
        """`(index, uint8 (3, H, W))` of image `index` in `epoch`; None if it is unusable.

        There is no augmentation in epoch -1.
        """
        epoch, index = key
        try:
            image = decode(self.paths[index].as_py(), max_pixels=self.max_pixels)
        except ImageError:
            return None
        if epoch < 0:
            return index, self.resize(image)
        random = np.random.default_rng((self.settings.seed, epoch, index))
        pixels = self.resize(image, self._crop(image.size, random))
        if self.settings.flip and random.random() < 0.5:
            pixels = np.ascontiguousarray(pixels[:, :, ::-1])
        return index, pixels

    def _crop(self, size: tuple[int, int], random: np.random.Generator) -> tuple[float, ...] | None:
        """A box of the image's own shape with a share of its area in crop_scale..1."""
        if self.settings.crop_scale == 1:
            return None
        side = random.uniform(self.settings.crop_scale, 1) ** 0.5
        width, height = size[0] * side, size[1] * side
        x, y = random.uniform(0, size[0] - width), random.uniform(0, size[1] - height)
        return x, y, x + width, y + height


def _collate(items: list[tuple[int, np.ndarray] | None]) -> tuple[Tensor, Tensor]:
    usable = [item for item in items if item is not None]
    if not usable:
        return torch.empty(0, dtype=torch.int64), torch.empty((0, 3, 1, 1), dtype=torch.uint8)
    index, pixels = zip(*usable, strict=True)
    return torch.tensor(index), torch.from_numpy(np.stack(pixels))


def batches(order: np.ndarray, batch_size: int) -> list[list[int]]:
    """Cut an order into batches; a last batch of one joins the previous one, for batch norm."""
    cut = [order[i : i + batch_size].tolist() for i in range(0, len(order), batch_size)]
    if len(cut) > 1 and len(cut[-1]) == 1:
        last = cut.pop()
        cut[-1] = cut[-1] + last
    return cut


class Loader:
    """Yields batches of images, epoch after epoch, from the same worker processes."""

    def __init__(self, images: TrainImages, workers: int, device: torch.device) -> None:
        self._plan: list[list[tuple[int, int]]] = []
        self._loader = DataLoader(
            images,
            batch_sampler=self._plan,
            num_workers=workers,
            collate_fn=_collate,
            worker_init_fn=partial(stop_without, os.getpid()),
            persistent_workers=workers > 0,
            pin_memory=device.type == "cuda",
            # A separate generator, so that dropout depends neither on workers nor on resuming.
            generator=torch.Generator(),
        )

    def epoch(self, epoch: int, plan: list[list[int]]) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of `plan`, lists of image indices, as `(index (B,), uint8 images)`.

        Unusable images are left out, so B may be 0.
        """
        self._plan[:] = [[(epoch, index) for index in batch] for batch in plan]
        return iter(self._loader)
