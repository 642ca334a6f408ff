"""Parquet tables that describe themselves in their metadata."""

import csv
import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cdul_steps.data.classes import RESERVED_NAMES
from cdul_steps.data.files import SCHEMA_VERSION, check_version, replacing
from cdul_steps.errors import UserError, first_line

if TYPE_CHECKING:
    import pandas as pd

KEY = b"cdul"
# Scores and names hardly repeat, so trying a dictionary first only triples the time.
PARQUET: dict[str, Any] = {"compression": "zstd", "use_dictionary": False}
_TEXT, _WHOLE, _INDICES = pa.string(), pa.int64(), pa.list_(pa.int32())
_ROW_GROUP = 1 << 17
"""Rows of a score table that are written together."""
TYPES = {
    **dict.fromkeys(("image_id", "path", "split", "status", "class"), _TEXT),
    **dict.fromkeys(("row", "shard", "width", "height", "x0", "y0", "x1", "y1"), _WHOLE),
    **dict.fromkeys(("positive", "difficult"), _INDICES),
    "known": pa.bool_(),
    "embedding": pa.list_(pa.float32()),
}
"""Types of columns used for joins and counts; other software may write other widths."""


def describe(table: pa.Table, kind: str, **facts: Any) -> pa.Table:
    """Add to the table's metadata its kind, the schema version and `facts` (JSON values)."""
    text = json.dumps({"kind": kind, "schema_version": SCHEMA_VERSION, **facts}, ensure_ascii=False)
    return table.replace_schema_metadata({**(table.schema.metadata or {}), KEY: text.encode()})


def to_bytes(table: pa.Table) -> bytes:
    """The Parquet file of a table; the same table gives the same bytes."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, **PARQUET)
    return sink.getvalue().to_pybytes()


def write_csv(frame: "pd.DataFrame", file: Path) -> None:
    """Write a CSV with a header; all text is quoted if some contains a carriage return.

    Before 3.13, Python's own writer quotes text with other line breaks, but not with this one.
    """
    texts = frame.select_dtypes(exclude="number").astype(str)
    returns = any(texts[name].str.contains("\r", regex=False).any() for name in texts)
    frame.to_csv(file, index=False, quoting=csv.QUOTE_NONNUMERIC if returns else csv.QUOTE_MINIMAL)


def write_table(table: pa.Table, path: Path) -> None:
    """Write a table atomically."""
    with replacing(path) as part:
        pq.write_table(table, part, **PARQUET)


def read_facts(path: Path) -> dict[str, Any]:
    """The facts written by `describe`; empty for a table from elsewhere.

    Raises UserError for a file that is missing, not Parquet, or of another schema version.
    """
    try:
        metadata = pq.read_schema(path).metadata or {}
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except (pa.ArrowException, ValueError, OSError) as error:
        if path.suffix in (".csv", ".json"):
            raise UserError(f"{path}: a {path.suffix[1:].upper()} file; give a .parquet") from error
        raise UserError(f"{path}: not a readable Parquet file ({first_line(error)})") from error
    try:
        facts = dict(json.loads(metadata.get(KEY, b"{}")))
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: its metadata {KEY.decode()!r} is not a JSON mapping") from error
    check_version(path, facts)
    classes = facts.get("classes", [])
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise UserError(f"{path}: its metadata's 'classes' are not a list of names")
    return facts


def require(path: Path, facts: dict[str, Any], *names: str) -> dict[str, Any]:
    """The facts, unchanged; raises UserError for the first of `names` that is missing."""
    for name in names:
        if name not in facts:
            raise UserError(f"{path}: its metadata has no {name!r}; make the file again")
    return facts


def read_table(
    path: Path,
    columns: Sequence[str],
    optional: Sequence[str] = (),
    where: Mapping[str, Any] | None = None,
) -> pa.Table:
    """Read the named columns, and those of `optional` that exist.

    `where` gives the values that columns have in the rows to read; default: all rows. Known columns
    are converted to their TYPES. Raises UserError with the file and the first column that is
    missing or has the wrong type.
    """
    read_facts(path)
    names = pq.read_schema(path).names
    for column in columns:
        if column not in names:
            raise UserError(f"{path}: no column {column!r}; it has {', '.join(names[:8])}")
    try:
        table = pq.read_table(
            path,
            columns=[*columns, *(c for c in optional if c in names)],
            filters=[(name, "=", value) for name, value in where.items()] if where else None,
        )
    except (pa.ArrowException, ValueError, OSError) as error:
        raise UserError(f"{path}: corrupt ({first_line(error)}); make it again") from error
    for place, (name, column) in enumerate(zip(table.column_names, table.columns, strict=True)):
        if name not in TYPES:
            continue
        try:
            table = table.set_column(place, name, column.cast(TYPES[name]))
        except (pa.ArrowException, NotImplementedError) as error:
            raise UserError(
                f"{path}: column {name!r} contains {column.type}, expected {TYPES[name]}"
            ) from error
        try:
            table[place].validate(full=pa.types.is_string(table[place].type))
        except pa.ArrowException as error:
            damage = first_line(error)
            raise UserError(f"{path}: corrupt ({damage}); make it again") from error
        if name in columns and column.null_count:
            raise UserError(f"{path}: column {name!r} has blanks")
    return table


def score_table(
    image_ids: pa.Array | pa.ChunkedArray,
    paths: pa.Array | pa.ChunkedArray,
    classes: Sequence[str],
    scores: np.ndarray,
) -> pa.Table:
    """A score table: `image_id`, `path`, one float32 column per class; scores are (N, C)."""
    columns = np.ascontiguousarray(scores.T, dtype=np.float32)
    return pa.table(
        [image_ids, paths, *(pa.array(column) for column in columns)],
        names=["image_id", "path", *classes],
    )


def write_scores(
    images: pa.Table, classes: Sequence[str], scores: np.ndarray, path: Path, **facts: Any
) -> None:
    """Write a score table with these facts atomically, one row group at a time.

    `images` has `image_id`, `path`, and further columns, which follow those of the classes; scores
    are (N, C).
    """
    with replacing(path) as part, ExitStack() as stack:
        writer = None
        for first in range(0, max(1, len(images)), _ROW_GROUP):
            some, group = images.slice(first, _ROW_GROUP), scores[first : first + _ROW_GROUP]
            table = score_table(some["image_id"], some["path"], classes, group)
            for name in images.column_names[2:]:
                table = table.append_column(name, some[name])
            table = describe(table, "scores", classes=list(classes), **facts)
            writer = writer or stack.enter_context(pq.ParquetWriter(part, table.schema, **PARQUET))
            writer.write_table(table)


def read_scores(path: Path) -> tuple[pa.Table, list[str], np.ndarray]:
    """Read a score table: `(image_id and path, classes in order, float32 (N, C))`.

    The classes are those listed in the table's facts; in a table of other software, all columns
    with names that are not reserved. The first table also has the column `corrected`, if it exists.
    Rows without scores are left out. Raises UserError if a column is missing or not numeric, or if
    the order differs from the facts.
    """
    facts = read_facts(path)
    names = [n for n in pq.read_schema(path).names if n not in RESERVED_NAMES]
    classes = facts.get("classes", names)
    if (
        not isinstance(classes, list)
        or not classes
        or [n for n in names if n in classes] != classes
    ):
        raise UserError(
            f"{path}: its class columns ({', '.join(names[:5])}, ...) are not the classes that its "
            f"metadata lists ({', '.join(map(str, list(classes)[:5]))}, ...)"
        )
    table = read_table(path, ["image_id", *classes], ["path", "corrected"])
    columns = []
    for name in classes:
        try:
            columns.append(table[name].to_numpy().astype(np.float32))
        except (ValueError, TypeError, pa.ArrowInvalid) as error:
            raise UserError(
                f"{path}: a class column does not contain numbers: {name!r} contains "
                f"{table[name].type}; remove it if it is not a class"
            ) from error
    scores = np.stack(columns, axis=1)
    scored = np.isfinite(scores).all(axis=1)
    return table.drop_columns(classes).filter(pa.array(scored)), classes, scores[scored]
