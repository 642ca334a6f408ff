"""Embed the images of a shard: decode them, cut them into views, and encode these in batches."""

import math
import os
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import chain, islice
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, default_convert

from cdul_steps.data.images import ImageError, decode
from cdul_steps.errors import UserError, first_line
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


class Item(NamedTuple):
    """An image: its `array` is float32 vectors (V, D), or (1, V, D) for dense views, or uint8 views
    (V, 3, H, W), or None for an unusable image and for views in shared memory.

    `seconds` is the time for decoding and cutting.
    """

    number: int
    array: np.ndarray | None
    status: str
    error: str
    seconds: float


class ImageViews(Dataset):
    """Images, each decoded once and cut into its preprocessed views.

    With `encode`, the views are also embedded here: on a CPU every worker process runs the tower on
    one thread, which is more efficient than threads that wait for each other at every layer, and
    makes the vectors independent of the number of threads.

    With `shared`, uint8 (slots, V, 3, H, W), the views of image i are written to slot i modulo
    their number: handing over a tensor per image takes longer than a GPU needs for its views.
    """

    shared: torch.Tensor | None = None

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
        if self.shared is not None:
            return [self._share(item, self.shared) for item in items]
        views = [item.array for item in items if item.array is not None]
        if not (self.encode and views):
            return items
        vectors = self.encode(np.concatenate(views))
        parts = iter(np.split(vectors, np.cumsum([len(array) for array in views])[:-1]))
        return [item if item.array is None else item._replace(array=next(parts)) for item in items]

    @staticmethod
    def _share(item: Item, shared: torch.Tensor) -> Item:
        if item.array is not None:
            shared[item.number % len(shared)] = torch.from_numpy(item.array)
        return item._replace(array=None)

    def _views(self, index: int) -> Item:
        start = time.perf_counter()
        array, status, error = self._cut(index)
        return Item(index, array, status, error, time.perf_counter() - start)

    def _cut(self, index: int) -> tuple[np.ndarray | None, str, str]:
        """An image's views, its status, and an error message."""
        try:
            image = decode(self.paths[index].as_py(), max_pixels=self.max_pixels)
        except ImageError as error:
            return None, str(error.status), error.detail
        if self.boxes is None:
            return self.preprocess.views(image, np.array([[0, 0, *image.size]])), "ok", ""
        boxes = self.boxes[index]
        if not boxes.any():
            return None, "changed", "could not be read earlier; run 'cdul retry-failed'"
        if tuple(boxes[0]) != (0, 0, *image.size):
            text = f"is {image.width}x{image.height} pixels, unlike in the manifest"
            return None, "changed", text
        sides = boxes[:, 2:] - boxes[:, :2]
        if (sides.max(axis=1) > MAX_ASPECT * sides.min(axis=1)).any():
            text = f"{image.width}x{image.height} pixels, aspect ratio over {MAX_ASPECT}"
            return None, "bad_shape", text
        try:
            return self.preprocess.views(image, boxes), "ok", ""
        except MemoryError:
            return None, "too_large", "not enough memory to cut it into views"


def embed_images(
    images: ImageViews, encode: InBatches, workers: int, together: int = 1
) -> Iterator[Item]:
    """The images in order, with their vectors.

    On a CPU, `images` encode themselves, `together` at a time. On a GPU, a batch is encoded while
    the next ones are decoded. Raises UserError if the memory for these batches cannot be shared.
    """
    prefetch = 8
    if images.encode is None:
        each = 1 if images.boxes is None else images.boxes.shape[1]
        at_once = max(1, min(encode.batch_size // each, len(images)))
        # Those being decoded, one batch being collected, and one being encoded.
        batches = 2 + -(-(workers * prefetch + 1) // at_once)
        images.shared = _shared((batches * at_once, each, 3, *images.preprocess.size))
    items: Iterator[Item] = chain.from_iterable(
        DataLoader(
            images,
            batch_size=1 if images.encode is None else together,
            collate_fn=default_convert,
            num_workers=workers,
            prefetch_factor=prefetch if workers else None,
            worker_init_fn=partial(stop_without, os.getpid()),
        )
    )
    if images.shared is None:
        yield from items
        return
    running: list[tuple[list[Item], Future[np.ndarray]]] = []
    with ThreadPoolExecutor(1) as background:
        while batch := list(islice(items, at_once)):
            slot = batch[0].number % len(images.shared)
            views = images.shared[slot : slot + len(batch)].flatten(0, 1)
            running.append((batch, background.submit(encode, views.numpy())))
            if len(running) > 1:
                yield from _with_vectors(*running.pop(0))
        for last in running:
            yield from _with_vectors(*last)


def _shared(shape: tuple[int, ...]) -> torch.Tensor:
    try:
        return torch.empty(shape, dtype=torch.uint8).share_memory_()
    except RuntimeError as error:
        raise UserError(
            f"{math.prod(shape) / 2**20:.0f} MiB of shared memory for views cannot be allocated "
            f"({first_line(error)}); enlarge /dev/shm, in a container with --shm-size, or use a "
            "smaller batch size"
        ) from error


def _with_vectors(items: list[Item], vectors: Future[np.ndarray]) -> Iterator[Item]:
    found = vectors.result()
    rows = found.reshape(len(items), -1, found.shape[-1])
    for item, of_image in zip(items, rows, strict=True):
        yield item._replace(array=of_image if item.status == "ok" else None)


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

    For `together`, see `embed_images`. Returns the outcome of each image and the total seconds.
    """
    outcome: list[Outcome] = []
    start = time.monotonic()
    with Progress(encode.stage, len(images), "images") as progress:
        for item in embed_images(images, encode, workers, together):
            status, error = item.status, item.error
            if item.array is not None:
                vectors = np.asarray(item.array)
                if np.isfinite(vectors).all():
                    rows[places[item.number]] = vectors
                else:
                    status = "not_finite"
                    error = f"the model's embedding is not a finite vector in {encoder.dtype}"
            outcome.append((status, error, item.seconds))
            progress.update()
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
