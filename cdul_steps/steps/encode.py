"""Stage encode: the views of a shard to embeddings, and the class table to its own."""

import time
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from cdul_steps.data.classes import load_classes
from cdul_steps.data.files import digest
from cdul_steps.data.images import ImageError, decode
from cdul_steps.data.manifest import read_shard
from cdul_steps.data.stores import shard_file, write_shard
from cdul_steps.data.tables import describe, write_table
from cdul_steps.errors import UserError
from cdul_steps.method.similarity import class_embedding, unit
from cdul_steps.models.device import InBatches, set_up
from cdul_steps.models.encoder import (
    ImageEncoder,
    Preprocess,
    embed_prompts,
    load_clip,
    logit_scale,
)
from cdul_steps.models.engine import Encoder, EngineName, choose_engine
from cdul_steps.progress import Progress, note
from cdul_steps.provenance import versions

SOFTWARE = ("torch", "onnxruntime", "open_clip_torch", "timm", "zarr", "pillow")
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


def encode_shard(
    *,
    manifest: Path,
    store: Path,
    table: Path,
    model: str,
    pretrained: str | None,
    precision: str,
    resize_mode: str | None,
    max_pixels: int,
    device: str,
    engine: EngineName = "auto",
    batch_size: int,
    workers: int,
    threads: int,
) -> None:
    """Encode the views of one shard's manifest.

    Writes the shard's object of `store`, float16 unit vectors (shard_size, 1+S, D) with NaN for
    images that cannot be used, and last `table`, a row an image: `image_id, row, status, error,
    seconds`. `engine` is what runs the tower on a CPU and `batch_size` counts views, 0 chooses:
    see `choose_engine`; `workers` processes decode, -1 chooses too. Raises UserError where the
    model cannot be loaded.
    """
    facts, images, boxes = read_shard(manifest)
    target, workers = set_up(device, threads, workers, cpu_workers=0)
    start = time.monotonic()
    network = load_clip(
        model, pretrained, precision=precision, resize_mode=resize_mode, device=target
    )
    encoder = ImageEncoder(network, precision, target)
    loaded = time.monotonic() - start
    views = boxes.shape[1]
    choice = choose_engine(
        encoder, engine, batch_size, views=views, work=len(images) * views / max(1, workers)
    )
    encode = BatchedEncoder(choice.encoder, choice.batch_size)
    note(
        f"encode: {model} in {precision} on {target}, loaded in {loaded:.1f} s; {len(images)} "
        f"images x {views} views by {choice.engine} in batches of {choice.batch_size}, {workers} "
        f"workers"
    )
    shard, shard_size = facts["shard"], facts["shard_size"]
    places = images["row"].to_numpy() - shard * shard_size
    rows, outcome, seconds = _encode_images(
        encode, encoder, images["path"], boxes, places, shard_size, workers, max_pixels
    )
    write_shard(store, shard, rows, shard_size)
    failed = sum(status != "ok" for status, _, _ in outcome)
    result = pa.table(
        {
            "image_id": images["image_id"],
            "row": images["row"],
            "status": pa.array([status for status, _, _ in outcome], pa.string()),
            "error": pa.array([error for _, error, _ in outcome], pa.string()),
            "seconds": pa.array([seconds for _, _, seconds in outcome], pa.float32()),
        }
    )
    described = describe(
        result,
        "encode",
        shard=shard,
        model=model,
        pretrained=pretrained,
        precision=precision,
        resize_mode=resize_mode,
        logit_scale=logit_scale(network),
        device=str(target),
        engine=choice.engine,
        batch_size=encode.batch_size,
        seconds=round(seconds, 3),
        images_per_second=round(len(images) / seconds, 2),
        views_per_second=round((len(images) - failed) * views / seconds, 2),
        digest=digest(shard_file(store, shard)),
        software=versions(*SOFTWARE),
    )
    write_table(described, table)
    note(
        f"encode: {len(images) - failed} images ok, {failed} failed, "
        f"{(len(images) - failed) * views / seconds:.1f} views/s"
    )


def _encode_images(
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


def encode_text(
    *,
    classes: Path,
    output: Path,
    model: str,
    pretrained: str | None,
    templates: list[str],
    aliases: bool = True,
) -> None:
    """Embed the class table: `output` gets a row a class, `class`, the `aliases` that its prompts
    used, and `embedding` (float32, D).

    Without `aliases` the prompts use only the first name of a class. Always fp32 and on the CPU:
    it is a few hundred prompts. The model's `logit_scale` goes into the table's facts.
    """
    table = load_classes(classes)
    prompted = table.aliases if aliases else [names[:1] for names in table.aliases]
    network = load_clip(model, pretrained)
    vectors = [
        class_embedding(
            embed_prompts(
                network, model, [t.replace("{}", name) for t in templates for name in names]
            )
        )
        for names in prompted
    ]
    scale = logit_scale(network)
    if not np.isfinite(vectors).all() or not 0 < scale < np.inf:
        raise UserError(
            f"encoder {model}: its text embeddings or logit_scale ({scale}) are not finite; are "
            "these the right weights?"
        )
    result = pa.table(
        {
            "class": pa.array(table.names),
            "aliases": pa.array([list(names) for names in prompted]),
            "embedding": pa.array([v.tolist() for v in vectors], pa.list_(pa.float32())),
        }
    )
    described = describe(
        result,
        "text",
        model=model,
        pretrained=pretrained,
        templates=templates,
        logit_scale=scale,
        software=versions(*SOFTWARE),
    )
    write_table(described, output)
    note(f"encode: {len(table.names)} classes x {len(templates)} templates")
