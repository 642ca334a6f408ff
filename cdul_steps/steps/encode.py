"""Stage encode: the views of a shard to embeddings, and the class table to its own."""

import time
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa

from cdul_steps.config import Encoder
from cdul_steps.data.classes import load_classes, same_prompts
from cdul_steps.data.files import digest
from cdul_steps.data.manifest import read_shard
from cdul_steps.data.outcomes import outcome_table
from cdul_steps.data.stores import shard_file, write_shard
from cdul_steps.data.tables import describe, write_table
from cdul_steps.errors import UserError
from cdul_steps.method.similarity import class_embedding
from cdul_steps.models.device import Machine
from cdul_steps.models.embedding import BatchedEncoder, encode_shard_images
from cdul_steps.models.encoder import (
    ImageEncoder,
    TextEncoder,
    load_clip,
    logit_scale,
)
from cdul_steps.models.engine import choose_engine
from cdul_steps.models.recipe import assumed
from cdul_steps.progress import Progress, note
from cdul_steps.provenance import versions

PROMPTS = 128
"""Prompts in a forward pass of the text tower, about; more are no faster on a CPU."""
SOFTWARE = ("torch", "onnxruntime", "open_clip_torch", "timm", "zarr", "pillow")


def encode_shard(
    *,
    manifest: Path,
    store: Path,
    table: Path,
    encoder: Encoder,
    max_pixels: int,
    machine: Machine,
) -> None:
    """Encode the views of one shard's manifest.

    Writes the shard's object of `store`, float16 unit vectors (shard_size, 1+S, D) with NaN for
    images that cannot be used, and last `table`, a row an image: `image_id, row, status, error,
    seconds`. `choose_engine` says what the machine's engine and batch size are. Raises UserError
    where the model cannot be loaded.
    """
    facts, images, boxes = read_shard(manifest)
    target, workers = machine.set_up(cpu_workers=0)
    start = time.monotonic()
    network = load_clip(
        encoder.model,
        encoder.pretrained,
        precision=encoder.precision,
        resize_mode=encoder.resize_mode,
        device=target,
    )
    tower = ImageEncoder(network, encoder.precision, target)
    loaded = time.monotonic() - start
    views = boxes.shape[1]
    choice = choose_engine(
        tower,
        machine.engine,
        machine.batch_size,
        views=views,
        work=len(images) * views / max(1, workers),
    )
    encode = BatchedEncoder(choice.encoder, choice.batch_size)
    note(
        f"encode: {encoder.model} in {encoder.precision} on {target}, loaded in {loaded:.1f} s; "
        f"{len(images)} images x {views} views by {choice.engine} in batches of "
        f"{choice.batch_size}, {workers} workers"
    )
    if words := assumed(encoder.model, encoder.pretrained):
        note(f"encode: {encoder.model}: {words}")
    shard = facts["shard"]
    rows, outcome, seconds = encode_shard_images(
        (facts, images, boxes), encode, tower, np.float16, workers, max_pixels
    )
    write_shard(store, shard, rows, facts["shard_size"])
    failed = sum(status != "ok" for status, _, _ in outcome)
    described = describe(
        outcome_table(images, outcome),
        "encode",
        shard=shard,
        model=encoder.model,
        pretrained=encoder.pretrained,
        precision=encoder.precision,
        resize_mode=encoder.resize_mode,
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


def encode_text(*, classes: Path, encoder: Encoder, output: Path) -> None:
    """Embed the class table: `output` gets a row a class, `class`, the `aliases` that its prompts
    used, and `embedding` (float32, D).

    Always fp32 and on the CPU. The model's `logit_scale` goes into the table's facts.
    """
    table = load_classes(classes)
    prompted = table.aliases if encoder.aliases else [names[:1] for names in table.aliases]
    for group in same_prompts(table.names, prompted):
        note(
            f"encode: {', '.join(group)} have the same prompts, so nothing tells these classes "
            "apart; give them other names or aliases"
        )
    network = load_clip(encoder.model, encoder.pretrained)
    if words := assumed(encoder.model, encoder.pretrained):
        note(f"encode: {encoder.model}: {words}")
    prompts = [
        [template.replace("{}", name) for template in encoder.templates for name in names]
        for names in prompted
    ]
    at_once = max(1, PROMPTS // len(encoder.templates))
    vectors = _embed_classes(TextEncoder(network, encoder.model), prompts, at_once)
    scale = logit_scale(network)
    if not np.isfinite(vectors).all() or not 0 < scale < np.inf:
        raise UserError(
            f"encoder {encoder.model}: its text embeddings or logit_scale ({scale}) are not "
            "finite; are these the right weights?"
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
        model=encoder.model,
        pretrained=encoder.pretrained,
        templates=encoder.templates,
        logit_scale=scale,
        software=versions(*SOFTWARE),
    )
    write_table(described, output)
    note(f"encode: {len(table.names)} classes x {len(encoder.templates)} templates")


def _embed_classes(
    embed: TextEncoder, prompts: list[list[str]], classes_at_once: int
) -> list[np.ndarray]:
    """The embedding of each class, a unit vector (D,), from its own prompts."""
    vectors: list[np.ndarray] = []
    with Progress("encode", sum(map(len, prompts)), "prompts") as progress:
        for start in range(0, len(prompts), classes_at_once):
            some = prompts[start : start + classes_at_once]
            embedded = embed(list(chain.from_iterable(some)))
            ends = np.cumsum([len(of_class) for of_class in some])[:-1]
            vectors += map(class_embedding, np.split(embedded, ends))
            progress.update(len(embedded))
    return vectors
