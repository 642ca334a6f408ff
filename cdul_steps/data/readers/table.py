"""A CSV or Parquet table with a row an image."""

import csv
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

from cdul_steps.data.readers.record import ImageRecord
from cdul_steps.errors import UserError, first_line

_LABELS = {"1": True, "1.0": True, "true": True, "0": False, "0.0": False, "false": False, "": None}


def read_table(root: Path, splits: Mapping[str, str], classes: Sequence[str]) -> list[ImageRecord]:
    """Read a CSV (with commas, UTF-8) or Parquet file with one row an image.

    root: the file, `.csv` or `.parquet`. Its columns are

    - path: the image file, absolute or relative to the table's folder;
    - image_id (optional): by default the path as written;
    - split (optional): the data set's own name of the split; rows of splits that `splits` does not
      ask for are left out. Without it all rows belong to the one split asked for;
    - one for each class: 1 or true, 0 or false, or blank in a whole row whose truth is unknown.
      Without any of them all truth is unknown.

    Other columns are ignored.

    Raises UserError.
    """
    with table_errors(root):
        header = table_header(root)
    names = [unicodedata.normalize("NFC", name).strip() for name in header]
    wanted = ("path", "image_id", "split", *classes)
    for name in wanted:
        if names.count(name) > 1:
            raise UserError(f"{root}: column '{name}' is there twice; remove one")
    column = {name: header[names.index(name)] for name in wanted if name in names}
    if "path" not in column:
        found = ", ".join(islice(names, 8)) or "none"
        raise UserError(f"{root}: no column 'path'; its columns are: {found}")
    missing = [name for name in classes if name not in column]
    if missing and len(missing) < len(classes):
        raise UserError(
            f"{root}: no column for the classes {', '.join(missing)}; give every class a column, "
            "or none if no truth is known"
        )
    if "split" not in column and len(splits) != 1:
        raise UserError(
            f"{root}: no column 'split', which is needed to tell the splits "
            f"{', '.join(splits)} apart; add it, or ask for one split only"
        )
    our_splits: dict[str, list[str]] = {}
    for split, own in splits.items():
        our_splits.setdefault(own, []).append(split)
    by_split: dict[str, list[ImageRecord]] = {split: [] for split in splits}
    for place, row in table_rows(root, list(column.values())):
        cells = {name: row[raw] for name, raw in column.items()}
        asked = our_splits.get(_text(cells["split"]), ()) if "split" in cells else splits
        if not asked:
            continue
        path = _text(cells["path"])
        image_id = _text(cells.get("image_id", path))
        for name, text in (("path", path), ("image_id", image_id)):
            if not text.strip():
                raise UserError(f"{root}, {place}: the column '{name}' is blank; fill it in")
        positive = None if missing else _truth_of_row(cells, classes, f"{root}, {place}")
        for split in asked:
            record = ImageRecord(image_id, split, (root.parent / path).as_posix(), positive)
            by_split[split].append(record)
    return [record for records in by_split.values() for record in records]


def table_header(root: Path) -> list[str]:
    if root.suffix.lower() == ".csv":
        with root.open(encoding="utf-8-sig", newline="") as file:
            return next(csv.reader(file, strict=True), [])
    if root.suffix.lower() == ".parquet":
        import pyarrow.parquet as pq

        return pq.read_schema(root).names
    raise UserError(f"{root}: a table must be a .csv or a .parquet file")


def table_rows(root: Path, columns: list[str]) -> Iterator[tuple[str, dict[str, object]]]:
    """For each row its place in words and the cells of at least these columns."""
    with table_errors(root):
        if root.suffix.lower() == ".csv":
            with root.open(encoding="utf-8-sig", newline="") as file:
                reader = csv.reader(file, strict=True)
                header = next(reader)
                for row in reader:
                    if len(row) not in (0, len(header)):
                        raise UserError(
                            f"{root}, line {reader.line_num}: {len(row)} cells where the header "
                            f"has {len(header)}; put text that has a comma in it in quotes"
                        )
                    if row:
                        yield f"line {reader.line_num}", dict(zip(header, row, strict=True))
        else:
            import pyarrow.parquet as pq

            number = 0
            with pq.ParquetFile(root) as file:
                for batch in file.iter_batches(columns=columns):
                    for row in batch.to_pylist():
                        number += 1
                        yield f"row {number}", row


@contextmanager
def table_errors(root: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(
            f"{root}: no such file; 'root' must be a .csv or .parquet table with a column 'path'"
        ) from error
    except (OSError, ValueError, csv.Error) as error:  # ValueError: Arrow's errors, and UTF-8's
        raise UserError(f"{root}: the table cannot be read: {first_line(error)}") from error


def _truth_of_row(
    cells: Mapping[str, object], classes: Sequence[str], where: str
) -> tuple[int, ...] | None:
    labels = []
    for name in classes:
        text = _text(cells[name]).strip().lower()
        if text not in _LABELS:
            raise UserError(f"{where}: column '{name}' holds '{text}'; expected 1, 0 or blank")
        labels.append(_LABELS[text])
    blank = [name for name, label in zip(classes, labels, strict=True) if label is None]
    if len(blank) == len(classes):
        return None
    if blank:
        raise UserError(
            f"{where}: no label for {', '.join(blank)}; fill in every class, "
            "or leave all blank if the truth is unknown"
        )
    return tuple(index for index, label in enumerate(labels) if label)


def _text(cell: object) -> str:
    return "" if cell is None else str(cell)
