"""Parquet files that contain the images themselves, as Hugging Face's data sets do."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cdul_steps.data.foreign import ClassNames, Tell, ignore
from cdul_steps.data.readers.archives import archives_of, positives
from cdul_steps.data.readers.record import ImageRecord
from cdul_steps.data.readers.table import truth_of_row
from cdul_steps.data.sources import in_parquet
from cdul_steps.errors import UserError, first_line

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

IMAGE_NAMES = ("image", "images", "img", "picture", "photo", "jpg", "jpeg", "png", "webp", "bytes")
"""Names that mark the images among several columns of bytes."""
_LABELS = ("label", "labels")
_Truth = tuple[int, ...] | None


def read_parquet(
    root: Path,
    splits: Mapping[str, str],
    classes: Sequence[str],
    tell: Tell = ignore,
    exclude: Sequence[str] = (),
) -> list[ImageRecord]:
    """Read Parquet files with one image per row.

    root, splits, exclude: the files, as for `archives_of`; their names end in `.parquet`.

    The images are in the only column of bytes, or of structs with a field `bytes`; if there are
    several, in the one named by IMAGE_NAMES. The id is the file's name below the top folder, a
    slash and the number of the row from 0; the order is that of files and rows. The truth is in one
    1/0 column per class, as for `read_table`, or in a column `label` or `labels` of names or
    numbers, or lists of them; see `positives`. If a file names its numbers, as Hugging Face's do,
    these names are used; its number -1, like null, means that the truth is unknown. Other columns
    are ignored and reported.

    Raises UserError.
    """
    import pyarrow.parquet as pq

    names, columns = ClassNames(classes), ClassNames(classes)
    records = []
    for split, name, path in archives_of(root, splits, ".parquet", exclude, tell):
        with _errors(path), pq.ParquetFile(path, pre_buffer=False) as file:
            images = image_column(file.schema_arrow, path)
            places = (
                in_parquet(path.as_posix(), images, group, row)
                for group in range(file.num_row_groups)
                for row in range(file.metadata.row_group(group).num_rows)
            )
            truth = _truth(file, images, names, columns, path)
            for number, (place, positive) in enumerate(zip(places, truth, strict=True)):
                records.append(ImageRecord(f"{name}/{number}", split, place, positive))
    columns.tell(root, tell, "columns")
    names.tell(root, tell)
    return records


def image_column(schema: "pa.Schema", path: Path) -> str:
    """The name of the image column. Raises UserError if there is none, or it is ambiguous."""
    found = [field.name for field in schema if _holds_bytes(field.type)]
    named = [name for name in found if name.casefold() in IMAGE_NAMES]
    chosen = found if len(found) == 1 else named
    if len(chosen) == 1:
        return chosen[0]
    what = "several columns may be the images" if found else "no column of images"
    raise UserError(
        f"{path}: {what}; exactly one of {', '.join(found or schema.names) or 'none'} must contain "
        f"bytes, or structs with a field 'bytes', and be called one of {', '.join(IMAGE_NAMES)}"
    )


def _holds_bytes(kind: "pa.DataType") -> bool:
    import pyarrow as pa

    if pa.types.is_struct(kind):
        place = kind.get_field_index("bytes")
        return place >= 0 and _is_bytes(kind.field(place).type)
    return _is_bytes(kind)


def _is_bytes(kind: "pa.DataType") -> bool:
    import pyarrow as pa

    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _truth(
    file: "pq.ParquetFile", images: str, names: ClassNames, columns: ClassNames, path: Path
) -> Iterable[_Truth]:
    """The truth of each row; `names` and `columns` remember what is not a class."""
    if not names.names:
        return repeat(None, file.metadata.num_rows)
    others = [name for name in file.schema_arrow.names if name != images]
    labels = [name for name in others if name.casefold() in _LABELS]
    chosen = columns.choose([name for name in others if name not in labels], path)
    if chosen:
        if missing := [name for i, name in enumerate(names.names) if i not in chosen]:
            raise UserError(
                f"{path}: no column for the classes {', '.join(missing)}; give every class a "
                "column, or none"
            )
        return _of_columns(file, [chosen[i] for i in range(len(names.names))], names, path)
    if len(labels) > 1:
        raise UserError(f"{path}: has the columns {' and '.join(labels)}; rename or remove one")
    if labels:
        return _of_labels(file, labels[0], names, path)
    return repeat(None, file.metadata.num_rows)


def _rows(
    file: "pq.ParquetFile", columns: list[str], path: Path
) -> Iterator[tuple[str, dict[str, Any]]]:
    """For each row its location in words, and its cells in these columns."""
    batches = file.iter_batches(columns=columns, use_threads=False)
    for number, row in enumerate(row for batch in batches for row in batch.to_pylist()):
        yield f"{path}, row {number}", row


def _of_columns(
    file: "pq.ParquetFile", chosen: list[str], names: ClassNames, path: Path
) -> Iterator[_Truth]:
    """The truth in 1/0 columns, in the order of the classes."""
    for where, row in _rows(file, chosen, path):
        cells = {name: row[raw] for name, raw in zip(names.names, chosen, strict=True)}
        yield truth_of_row(cells, names.names, where)


def _of_labels(
    file: "pq.ParquetFile", column: str, names: ClassNames, path: Path
) -> Iterator[_Truth]:
    """The truth in one column of names or numbers, or lists of them."""
    own = _own_names(file.schema_arrow, column)
    for where, row in _rows(file, [column], path):
        value = row[column]
        if value is None or value == -1:
            yield None
            continue
        labels = value if isinstance(value, list) else [value]
        if own:
            labels = [own.get(n, f"number {n}") if type(n) is int else n for n in labels]
        yield positives(labels, names, where)


def _own_names(schema: "pa.Schema", column: str) -> dict[int, str]:
    """The names of a column's numbers in Hugging Face's metadata; empty if there are none."""
    try:
        feature = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"][column]
        while "names" not in feature:  # a list of them
            feature = feature["feature"]
        return dict(enumerate(map(str, feature["names"])))
    except (KeyError, TypeError, ValueError, RecursionError):
        return {}


@contextmanager
def _errors(path: Path) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except (OSError, ValueError, pa.ArrowException) as error:
        raise UserError(
            f"{path}: cannot be read as Parquet: {first_line(error)}; download it again, or leave "
            "it out with 'exclude'"
        ) from error
