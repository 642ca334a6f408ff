"""Stage similarity: the cosines of embeddings and class embeddings."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cdul_steps.data.files import digest
from cdul_steps.data.manifest import check_classes, check_rows
from cdul_steps.data.outcomes import check_failures
from cdul_steps.data.stores import (
    new_store,
    open_store,
    read_blocks,
    read_logit_bias,
    shard_file,
    shard_rows,
    write_metadata,
)
from cdul_steps.data.tables import read_facts, read_table, require
from cdul_steps.errors import UserError
from cdul_steps.method.similarity import cosine, unit
from cdul_steps.progress import Progress, note
from cdul_steps.provenance import versions

# The model's parameter is the logarithm, and timm's towers are rounded with all their weights.
ROUNDING = {"fp16": 2.0**-10, "bf16": 2.0**-7}


def write_store(*, images: Path, split: str, text: Path, store: Path) -> None:
    """Write the `zarr.json` of a split's embeddings: float16 (N, 1+S, D); the encode jobs write the
    shards."""
    facts = read_facts(images)
    dimension = read_text(text)[2].shape[1]
    try:
        layout, rows = facts["layout"], facts["rows"][split]
        views = layout["views"]
    except (KeyError, IndexError, TypeError) as error:
        raise UserError(
            f"{images}: its metadata has no {error}; make it with 'cdul manifest'"
        ) from error
    shape = (rows, views, dimension)
    write_metadata(store, shape, layout["shard_size"], "float16", {"kind": "embeddings"})


def check_shards(store: Path, text: Path, tables: Sequence[Path]) -> None:
    """Raise UserError for a shard that differs from what its encode job wrote.

    A missing shard would read as NaN, and one from another run as valid data. The job's table
    records the shard's digest, and the model's `logit_scale` and `logit_bias`, which must match
    those of `text`.
    """
    of_text = read_facts(text)
    scale, bias = of_text["logit_scale"], read_logit_bias(of_text, text)
    if not (isinstance(scale, int | float) and 0 < scale < math.inf):
        raise UserError(f"{text}: its logit_scale is {scale!r}; run 'cdul encode-text' again")
    for table in tables:
        facts = read_facts(table)
        if "digest" not in facts:  # a table from elsewhere
            continue
        require(table, facts, "shard")
        shard = shard_file(store, facts["shard"])
        if not shard.is_file() or digest(shard) != facts["digest"]:
            raise UserError(
                f"{shard}: missing, corrupt or from another run: it differs from what {table} "
                "records; delete that table and run 'cdul run' again"
            )
        rounding = ROUNDING.get(facts.get("precision", ""), 0)
        tolerance = max(1e-3, abs(math.log(scale)) * rounding)
        if not math.isclose(facts.get("logit_scale", scale), scale, rel_tol=tolerance):
            raise UserError(
                f"{table} is from a model with logit_scale {facts['logit_scale']:g} and {text} "
                f"from one with {scale:g}: not the same weights; make both with one model"
            )
        other, tolerance = read_logit_bias(facts, table), max(1e-3, rounding)
        if other is not None and not (
            bias is not None and math.isclose(other, bias, rel_tol=tolerance)
        ):
            raise UserError(
                f"{table} is from a model with logit_bias {other:g} and {text} from one with "
                f"{bias}: not the same weights; make both with one model"
            )


def read_text(text: Path) -> tuple[list[str], list[str], np.ndarray]:
    """Names of the classes, names of the context, and unit embeddings, float32 (C+M, D).

    Raises UserError if an embedding is not a finite vector of the same length as the others.
    """
    table = read_table(text, ["class", "embedding"], ["context"])
    names, vectors = table["class"].to_pylist(), table["embedding"].to_pylist()
    classes = len(names)
    if "context" in table.column_names:
        classes -= table["context"].to_pylist().count(True)
    for name, vector in zip(names, vectors, strict=True):
        if len(vector) != len(vectors[0]) or not np.isfinite(unit(np.array(vector, "f4"))).all():
            raise UserError(
                f"{text}: the embedding of class {name!r} is not a finite vector of "
                f"{len(vectors[0])} values; run 'cdul encode-text' again, with the right weights"
            )
    return names[:classes], names[classes:], unit(np.array(vectors, np.float32))


def make_similarity(
    *,
    store: Path,
    text: Path,
    images: Path,
    split: str,
    tables: Sequence[Path],
    max_failed_share: float,
    output: Path,
) -> None:
    """Write float32 cosines (N, 1+S, C+M) with attributes `classes` and `logit_scale`, and
    `logit_bias` if the model has one.

    The M columns after the classes are the context's, named by the attribute `context`. Rows
    without an embedding stay NaN. Raises UserError if too many images failed, or if store, class
    embeddings, manifest and the encode jobs' tables do not belong together.
    """
    facts = require(text, read_facts(text), "logit_scale", "model", "pretrained", "templates")
    names, context, embeddings = read_text(text)
    check_classes(images, names, text)
    failed = check_failures(images, split, tables, max_failed_share)
    if len(failed):
        note(f"similarity: {split}: {len(failed)} images cannot be used and are left out")
    array = open_store(store)
    check_rows(images, split, store, array.shape[0])
    if embeddings.shape[1] != array.shape[2]:
        raise UserError(
            f"{store} contains vectors of {array.shape[2]} values and {text} of "
            f"{embeddings.shape[1]}; they are from different encoders"
        )
    check_shards(store, text, tables)
    attributes = {
        "kind": "similarity",
        "classes": names,
        **({"context": context} if context else {}),
        "logit_scale": facts["logit_scale"],
        **({"logit_bias": facts["logit_bias"]} if "logit_bias" in facts else {}),
        "model": facts["model"],
        "pretrained": facts["pretrained"],
        "templates": facts["templates"],
        "second_views": read_facts(images).get("layout", {}).get("reader") == "boxes",
        "software": versions("numpy", "zarr"),
    }
    shape = (array.shape[0], array.shape[1], len(embeddings))
    size = shard_rows(array)
    with (
        new_store(output, shape, size, "float32", attributes) as similarity,
        Progress("similarity", shape[0], "images") as progress,
    ):
        for first, rows in read_blocks(store, array):
            similarity[first : first + len(rows)] = cosine(rows, embeddings)
            progress.update(len(rows))
