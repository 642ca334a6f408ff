"""Embed the images of a shard: decode them, cut them into views, and encode these in batches."""

import os
import time
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image
from torch.utils.data import DataLoader, Dataset, default_convert

from cdul_steps.data.images import ImageError, decode
from cdul_steps.method.similarity import unit
from cdul_steps.models.device import InBatches, stop_without
from cdul_steps.models.encoder import ImageEncoder, Preprocess
from cdul_steps.models.engine import Encoder
from cdul_steps.progress import Progress

MAX_ASPECT = 100
"""Views with a larger aspect ratio are rejected: resizing them would exhaust the memory."""


class BatchedEncoder(InBatches):
    """Embeds views in batches, which become smaller after running out of GPU memory."""

    def __init__(self, encoder: Encoder, batch_size: int) -> None:
        super().__init__(encoder, batch_size, "encode")

    def __call__(self, views: np.ndarray) -> np.ndarray:
        """Embed uint8 views (B, 3, H, W): float32 unit vectors (B, ..., D), NaN where it failed."""
        return unit(super().__call__(views))


Item = tuple[int, np.ndarray | None, str, str, float]
"""`(index, array, status, error, seconds)` of an image. The array is float32 vectors (V, D), or
(1, V, D) for dense views, or uint8 views (V, 3, H, W), or None for an unusable image; `seconds` is
the time for decoding and cutting.
"""


class ImageViews(Dataset):
    """Images, each decoded once and cut into its preprocessed views.

    With `encode`, the views are also embedded here: on a CPU every worker process runs the tower on
    one thread, which is more efficient than threads that wait for each other at every layer, and
    makes the vectors independent of the number of threads.
    """

    def __init__(
        self,
        paths: pa.Array,
        boxes: np.ndarray | None,
        preprocess: Preprocess,
        max_pixels: int,
        encode: InBatches | None,
    ) -> None:
        """`boxes` int (N, V, 4) are the views in pixels; None: one view, the whole image."""
        self.paths, self.boxes = paths, boxes
        self.preprocess, self.max_pixels = preprocess, max_pixels
        self.encode = encode

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Item:
        """One image: its vectors with `encode`, otherwise its views."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[Item]:
        """Several images, whose views are embedded together."""
        items = [self._views(index) for index in indices]
        views = [array for _, array, *_ in items if array is not None]
        if not (self.encode and views):
            return items
        vectors = self.encode(np.concatenate(views))
        parts = iter(np.split(vectors, np.cumsum([len(array) for array in views])[:-1]))
        return [
            (index, None if array is None else next(parts), status, detail, seconds)
            for index, array, status, detail, seconds in items
        ]

    def _views(self, index: int) -> Item:
        start = time.perf_counter()
        try:
            image = decode(self.paths[index].as_py(), max_pixels=self.max_pixels)
        except ImageError as error:
            return index, None, str(error.status), error.detail, time.perf_counter() - start
        if self.boxes is None:
            views = self.preprocess.views(image, np.array([[0, 0, *image.size]]))
            return index, views, "ok", "", time.perf_counter() - start
        boxes = self.boxes[index]
        if tuple(boxes[0]) != (0, 0, *image.size):
            text = f"is {image.width}x{image.height} pixels, unlike in the manifest"
            return index, None, "changed", text, time.perf_counter() - start
        sides = boxes[:, 2:] - boxes[:, :2]
        if (sides.max(axis=1) > MAX_ASPECT * sides.min(axis=1)).any():
            text = f"{image.width}x{image.height} pixels, aspect ratio over {MAX_ASPECT}"
            return index, None, "bad_shape", text, time.perf_counter() - start
        try:
            views = self.preprocess.views(image, boxes)
        except MemoryError:
            text = "not enough memory to cut it into views"
            return index, None, "too_large", text, time.perf_counter() - start
        return index, views, "ok", "", time.perf_counter() - start


Outcome = tuple[str, str, float]
"""An image's status, error message, and seconds for decoding and cutting."""


def encode_images(
    images: ImageViews,
    encode: InBatches,
    encoder: ImageEncoder,
    rows: np.ndarray,
    places: np.ndarray,
    workers: int,
    together: int = 1,
) -> tuple[list[Outcome], float]:
    """Encode images into `rows` (N, V, D), image i at `places[i]`; failed images' rows do not
    change.

    On a CPU, `images` encode themselves, `together` at a time. Returns the outcome of each image
    and the total seconds.
    """
    in_workers = images.encode is not None
    loader = DataLoader(
        images,
        batch_size=together if in_workers else 1,
        collate_fn=default_convert,
        num_workers=workers,
        prefetch_factor=8 if workers else None,
        worker_init_fn=partial(stop_without, os.getpid()),
    )
    outcome: list[Outcome] = [("", "", 0.0)] * len(images)
    waiting: dict[int, np.ndarray] = {}
    start = time.monotonic()

    def keep(index: int, vectors: np.ndarray) -> None:
        if np.isfinite(vectors).all():
            rows[places[index]] = vectors
        else:
            text = f"the model's embedding is not a finite vector in {encoder.dtype}"
            outcome[index] = ("not_finite", text, outcome[index][2])

    def flush() -> None:
        vectors = encode(np.concatenate(list(waiting.values())))
        for index, of_image in zip(waiting, vectors.reshape(-1, *rows.shape[1:]), strict=True):
            keep(index, of_image)
        waiting.clear()

    with Progress(encode.stage, len(images), "images") as progress:
        for index, array, status, error, seconds in chain.from_iterable(loader):
            outcome[index] = (status, error, seconds)
            if array is not None and in_workers:
                keep(index, np.asarray(array))
            elif array is not None:
                waiting[index] = np.asarray(array)
                if (len(waiting) + 1) * len(array) > encode.batch_size:
                    flush()
            progress.update()
        if waiting:
            flush()
    return outcome, time.monotonic() - start


def encode_shard_images(
    manifest: tuple[dict[str, Any], pa.Table, np.ndarray],
    encode: InBatches,
    encoder: ImageEncoder,
    dtype: type,
    workers: int,
    max_pixels: int,
    together: int = 1,
) -> tuple[np.ndarray, list[Outcome], float]:
    """Rows (shard_size, V, D) of a shard as returned by `read_shard`, NaN for failed images.

    Also returns the outcome of each image, and the total seconds.
    """
    facts, images, boxes = manifest
    blank = encoder.preprocess.views(Image.new("RGB", (8, 8)), np.array([[0, 0, 8, 8]]))
    vectors = encode(np.repeat(blank, boxes.shape[1], axis=0))
    of_image = vectors.reshape(-1, vectors.shape[-1]).shape
    rows = np.full((facts["shard_size"], *of_image), np.nan, dtype)
    shard_images = ImageViews(
        images["path"].combine_chunks(),
        boxes,
        encoder.preprocess,
        max_pixels,
        encode if encoder.device.type == "cpu" else None,
    )
    places = images["row"].to_numpy() - facts["shard"] * facts["shard_size"]
    outcome, seconds = encode_images(shard_images, encode, encoder, rows, places, workers, together)
    return rows, outcome, seconds
