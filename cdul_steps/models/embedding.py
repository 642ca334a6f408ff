"""Images of a shard to embeddings: decoded, cut into views, and encoded in batches."""

import time
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from cdul_steps.data.images import ImageError, decode
from cdul_steps.method.similarity import unit
from cdul_steps.models.device import InBatches
from cdul_steps.models.encoder import (
    ImageEncoder,
    Preprocess,
)
from cdul_steps.models.engine import Encoder
from cdul_steps.progress import Progress

MAX_ASPECT = 100
"""Views longer than so many times their width are refused: resized, they would fill the memory."""


class BatchedEncoder(InBatches):
    """Embeds views in batches, smaller ones after running out of GPU memory."""

    def __init__(self, encoder: Encoder, batch_size: int) -> None:
        super().__init__(encoder, batch_size, "encode")

    def __call__(self, views: np.ndarray) -> np.ndarray:
        """Embed uint8 views (B, 3, H, W): float32 unit vectors (B, D), NaN where it failed."""
        return unit(super().__call__(views))


class ShardImages(Dataset):
    """The images of a shard, each decoded once and cut into its preprocessed views.

    With `encode`, the views are embedded here too: on a CPU every worker process runs the tower
    on one thread, which wastes less than many threads that wait for each other at every layer,
    and makes the vectors independent of how many there are.
    """

    def __init__(
        self,
        paths: pa.Array,
        boxes: np.ndarray,
        preprocess: Preprocess,
        max_pixels: int,
        encode: BatchedEncoder | None,
    ) -> None:
        self.paths, self.boxes = paths, boxes
        self.preprocess, self.max_pixels = preprocess, max_pixels
        self.encode = encode

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[int, np.ndarray | None, str, str, float]:
        """`(index, array, status, error, seconds)` of an image.

        The array is float32 vectors (V, D) with `encode`, else uint8 views (V, 3, H, W), and None
        for an unusable image; the seconds are those of decoding and cutting.
        """
        start = time.perf_counter()
        try:
            image = decode(Path(self.paths[index].as_py()), max_pixels=self.max_pixels)
        except ImageError as error:
            return index, None, str(error.status), error.detail, time.perf_counter() - start
        boxes = self.boxes[index]
        if tuple(boxes[0]) != (0, 0, *image.size):
            text = f"is {image.width}x{image.height} pixels, the manifest says otherwise"
            return index, None, "changed", text, time.perf_counter() - start
        sides = boxes[:, 2:] - boxes[:, :2]
        if (sides.max(axis=1) > MAX_ASPECT * sides.min(axis=1)).any():
            text = f"{image.width}x{image.height} pixels, a side is over {MAX_ASPECT} of the other"
            return index, None, "bad_shape", text, time.perf_counter() - start
        try:
            views = self.preprocess.views(image, boxes)
        except MemoryError:
            text = "not enough memory to cut it into views"
            return index, None, "too_large", text, time.perf_counter() - start
        seconds = time.perf_counter() - start
        return index, self.encode(views) if self.encode else views, "ok", "", seconds


def encode_images(
    encode: BatchedEncoder,
    encoder: ImageEncoder,
    paths: pa.ChunkedArray,
    boxes: np.ndarray,
    places: np.ndarray,
    shard_size: int,
    workers: int,
    max_pixels: int,
) -> tuple[np.ndarray, list[tuple[str, str, float]], float]:
    """Rows of the shard, `(status, error, seconds)` an image, and the seconds it all took."""
    in_workers = encoder.device.type == "cpu"
    blank = encoder.preprocess.views(Image.new("RGB", (8, 8)), np.array([[0, 0, 8, 8]]))
    dimension = encode(blank).shape[1]
    loader = DataLoader(
        ShardImages(
            paths.combine_chunks(),
            boxes,
            encoder.preprocess,
            max_pixels,
            encode if in_workers else None,
        ),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=8 if workers else None,
    )
    rows = np.full((shard_size, boxes.shape[1], dimension), np.nan, np.float16)
    outcome: list[tuple[str, str, float]] = [("", "", 0.0)] * len(paths)
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

    with Progress("encode", len(paths), "images") as progress:
        for index, array, status, error, seconds in loader:
            outcome[index] = (status, error, seconds)
            if array is not None and in_workers:
                keep(index, np.asarray(array))
            elif array is not None:
                waiting[index] = np.asarray(array)
                if (len(waiting) + 1) * boxes.shape[1] > encode.batch_size:
                    flush()
            progress.update()
        if waiting:
            flush()
    return rows, outcome, time.monotonic() - start
