"""Stage encode: embed the views of a shard, and the class table."""

import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cdul_steps.config import Encoder
from cdul_steps.data.classes import (
    ClassTable,
    ContextList,
    check_choice,
    load_names,
    same_prompts,
)
from cdul_steps.data.files import digest
from cdul_steps.data.manifest import read_shard
from cdul_steps.data.outcomes import outcome_table
from cdul_steps.data.stores import check_store, shard_file, write_shard
from cdul_steps.data.tables import describe, write_table
from cdul_steps.errors import UserError
from cdul_steps.method.context import REFERENCE, Near, centred_cosine, find_near
from cdul_steps.method.similarity import class_embedding
from cdul_steps.models.dense import load_tower, passes
from cdul_steps.models.device import Machine
from cdul_steps.models.embedding import BatchedEncoder, encode_shard_images
from cdul_steps.models.encoder import TextEncoder, load_clip, logit_facts
from cdul_steps.models.engine import choose_engine
from cdul_steps.models.recipe import assumed
from cdul_steps.progress import Progress, note
from cdul_steps.provenance import versions

PROMPTS = 128
"""Approximate number of prompts per forward pass of the text tower; more are no faster on a CPU."""
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
    images that cannot be used, and finally `table`, one row per image: `image_id, row, status,
    error, seconds`. For the machine's engine and batch size, see `choose_engine`. Raises UserError
    if the model cannot be loaded, or does not support dense views.
    """
    check_store(store, "embeddings")
    facts, images, boxes = read_shard(manifest)
    target, workers = machine.set_up(cpu_workers=0)
    start = time.monotonic()
    network, tower = load_tower(encoder, target, facts["grid"], facts["overlap"])
    views = boxes.shape[1]
    each, together = passes(encoder, views)
    loaded = time.monotonic() - start
    choice = choose_engine(
        tower,
        machine.engine,
        machine.batch_size,
        views=each * together,
        work=len(images) * each / max(1, workers),
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
        (facts, images, boxes[:, :each]),
        encode,
        tower,
        np.float16,
        workers,
        max_pixels,
        together,
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
        views=encoder.views,
        **logit_facts(network),
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


def encode_text(
    *, classes: Path, encoder: Encoder, output: Path, context: ContextList | None = None
) -> None:
    """Embed the class table: `output` gets one row per class: `class`, the `aliases` used in its
    prompts, and `embedding` (float32, D).

    With `context`, its names follow the classes as rows marked in the column `context`; names that
    mean a class are left out. This always runs in fp32 on the CPU. The table's facts record the
    model's `logit_facts` and the names that were left out. Raises UserError for weights that do not
    give finite vectors, for lists that cannot be read, and if only one name remains.
    """
    table, listed = load_names(classes, *((context.path, context.keep) if context else (None,)))
    names = list(table.names)
    prompted = [list(of if encoder.aliases else of[:1]) for of in table.aliases]
    for group in same_prompts(table.names, prompted):
        note(
            f"encode: {', '.join(group)} have the same prompts, so these classes cannot be told "
            "apart; give them other names or aliases"
        )
    network = load_clip(encoder.model, encoder.pretrained)
    if words := assumed(encoder.model, encoder.pretrained):
        note(f"encode: {encoder.model}: {words}")
    embed = partial(_embed_names, TextEncoder(network, encoder.model), encoder.templates)
    vectors = embed(prompted)
    further: dict[str, pa.Array] = {}
    facts: dict[str, Any] = {}
    if context:
        of_context = embed(listed.aliases)
        near = _find_near(table, listed, of_context, context, embed)
        stays = np.flatnonzero(~np.isin(listed.names, [n.name for n in near]))
        check_choice(names, stays, context.path)
        names += [listed.names[i] for i in stays]
        prompted += [list(listed.aliases[i]) for i in stays]
        vectors = np.concatenate([vectors, of_context[stays]])
        further = {"context": pa.array(np.arange(len(names)) >= len(table.names))}
        facts = {"context": len(stays), "nearness": context.nearness}
        facts["left_out"] = [n._asdict() for n in near]
    own = logit_facts(network)
    finite = np.isfinite(vectors).all() and np.isfinite([*own.values()]).all()
    if not finite or not own["logit_scale"] > 0:
        told = "".join(f" or {name} ({value})" for name, value in own.items())
        raise UserError(
            f"encoder {encoder.model}: its text embeddings{told} are not finite; are these the "
            "right weights?"
        )
    result = pa.table(
        {
            "class": pa.array(names),
            "aliases": pa.array(prompted),
            "embedding": pa.array([v.tolist() for v in vectors], pa.list_(pa.float32())),
            **further,
        }
    )
    described = describe(
        result,
        "text",
        model=encoder.model,
        pretrained=encoder.pretrained,
        templates=encoder.templates,
        **own,
        **facts,
        software=versions(*SOFTWARE),
    )
    write_table(described, output)
    note(f"encode: {len(table.names)} classes x {len(encoder.templates)} templates")


def _embed_names(
    embed: TextEncoder, templates: Sequence[str], names: Sequence[Sequence[str]]
) -> np.ndarray:
    """Embeddings of classes from all names in all templates: unit vectors (len(names), D)."""
    prompts = [[t.replace("{}", name) for t in templates for name in of] for of in names]
    at_once = max(1, PROMPTS // len(templates))
    vectors: list[np.ndarray] = []
    with Progress("encode", sum(map(len, prompts)), "prompts") as progress:
        for start in range(0, len(prompts), at_once):
            some = prompts[start : start + at_once]
            embedded = embed(list(chain.from_iterable(some)))
            ends = np.cumsum([len(of_class) for of_class in some])[:-1]
            vectors += map(class_embedding, np.split(embedded, ends))
            progress.update(len(embedded))
    return np.stack(vectors)


def _find_near(
    classes: ClassTable,
    listed: ClassTable,
    vectors: np.ndarray,
    context: ContextList,
    embed: Callable[[Sequence[Sequence[str]]], np.ndarray],
) -> list[Near]:
    """The context names that mean a class and are left out; reported in one line.

    `vectors` are the embeddings of the list's names. Every name of a class means the class, even
    if its prompts do not use the name.
    """
    centre = embed([[word] for word in REFERENCE]).mean(axis=0)
    cosines = centred_cosine(vectors, embed([[n] for of in classes.aliases for n in of]), centre)
    first = np.cumsum([0, *(len(of) for of in classes.aliases)])[:-1]
    near = find_near(
        [(name, *of) for name, of in zip(listed.names, listed.aliases, strict=True)],
        [(name, *of) for name, of in zip(classes.names, classes.aliases, strict=True)],
        np.maximum.reduceat(cosines, first, axis=1),
        context.nearness,
    )
    near = [n for n in near if n.name not in context.keep]
    by_class: dict[str, list[str]] = {}
    for n in near:
        text = n.name if n.nearness is None else f"{n.name} {n.nearness:.2f}"
        by_class.setdefault(n.of, []).append(text)
    told = "; ".join(f"to {name}: {', '.join(which)}" for name, which in by_class.items())
    stay = len(listed.names) - len(near)
    note(
        f"context: {stay} of the {len(listed.names)} names of {context.path} stay; "
        + (f"left out, too near {told}" if told else "none is too near to a class")
    )
    return near
