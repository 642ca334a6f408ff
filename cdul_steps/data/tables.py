"""Parquet tables that say what they are."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cdul_steps.data.files import replacing
from cdul_steps.errors import UserError, first_line

SCHEMA_VERSION = 1
KEY = b"cdul"


def describe(table: pa.Table, kind: str, **facts: Any) -> pa.Table:
    """Attach to the table's metadata its kind, the schema's version and `facts` (JSON values)."""
    text = json.dumps({"kind": kind, "schema_version": SCHEMA_VERSION, **facts}, ensure_ascii=False)
    return table.replace_schema_metadata({**(table.schema.metadata or {}), KEY: text.encode()})


def to_bytes(table: pa.Table) -> bytes:
    """The Parquet file of a table; the same table gives the same bytes."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue().to_pybytes()


def write_table(table: pa.Table, path: Path) -> None:
    """Write a table whole."""
    with replacing(path) as part:
        pq.write_table(table, part, compression="zstd")


def read_facts(path: Path) -> dict[str, Any]:
    """The facts written by `describe`; empty for a table from elsewhere.

    Raises UserError for a file that is missing, not Parquet, or of a newer schema.
    """
    try:
        metadata = pq.read_schema(path).metadata or {}
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path}: not a readable Parquet file ({first_line(error)})") from error
    facts = json.loads(metadata.get(KEY, b"{}"))
    if facts.get("schema_version", 0) > SCHEMA_VERSION:
        raise UserError(
            f"{path}: written by a newer version (schema {facts['schema_version']}, this one "
            f"reads {SCHEMA_VERSION}); update this software or make the file again"
        )
    return facts


def read_table(path: Path, columns: Sequence[str], optional: Sequence[str] = ()) -> pa.Table:
    """Read the named columns, and those of `optional` that are there.

    Raises UserError naming the file and the first missing column.
    """
    read_facts(path)
    names = pq.read_schema(path).names
    for column in columns:
        if column not in names:
            raise UserError(f"{path}: no column {column!r}; it has {', '.join(names[:8])}")
    return pq.read_table(path, columns=[*columns, *(c for c in optional if c in names)])


def score_table(
    image_ids: pa.Array | pa.ChunkedArray,
    paths: pa.Array | pa.ChunkedArray,
    classes: Sequence[str],
    scores: np.ndarray,
) -> pa.Table:
    """A table of scores: `image_id`, `path`, and a float32 column a class; scores are (N, C)."""
    columns = np.ascontiguousarray(scores.T, dtype=np.float32)
    return pa.table(
        [image_ids, paths, *(pa.array(column) for column in columns)],
        names=["image_id", "path", *classes],
    )


def read_scores(path: Path) -> tuple[pa.Table, list[str], np.ndarray]:
    """Read a table of scores: `(image_id and path, classes in order, float32 (N, C))`.

    The classes are those that the table's facts list, for a table from elsewhere all columns but
    `image_id` and `path`. The first table also has the column `corrected`, where there is one. Rows
    without scores are left out. Raises UserError where a column is
    missing, is no number, or stands in another order than the facts say.
    """
    facts = read_facts(path)
    names = [n for n in pq.read_schema(path).names if n not in ("image_id", "path")]
    classes = facts.get("classes", names)
    if [n for n in names if n in set(classes)] != classes or not classes:
        raise UserError(
            f"{path}: its class columns ({', '.join(names[:5])}, ...) are not the classes that its "
            f"metadata lists ({', '.join(classes[:5])}, ...)"
        )
    table = read_table(path, ["image_id", *classes], ["path", "corrected"])
    try:
        scores = np.stack([table[n].to_numpy().astype(np.float32) for n in classes], axis=1)
    except (ValueError, TypeError, pa.ArrowInvalid) as error:
        raise UserError(f"{path}: a class column does not hold numbers") from error
    scored = np.isfinite(scores).all(axis=1)
    return table.drop_columns(classes).filter(pa.array(scored)), classes, scores[scored]
