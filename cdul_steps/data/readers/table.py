"""A CSV or Parquet table with one row per image."""

import csv
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

from cdul_steps.data.foreign import (
    ClassNames,
    Tell,
    as_id,
    as_number,
    ignore,
    listed,
    open_text,
)
from cdul_steps.data.readers.record import ImageRecord, image_path
from cdul_steps.data.remote import check_protocol, is_url
from cdul_steps.errors import UserError, first_line

_OWN = ("path", "image_id", "split")


def read_table(
    root: Path, splits: Mapping[str, str], classes: Sequence[str], tell: Tell = ignore
) -> list[ImageRecord]:
    """Read a CSV (with commas, UTF-8) or Parquet file with one row per image.

    root: the file, `.csv` or `.parquet`. Its columns are

    - path: the image file, absolute or relative to the table's folder; or a URL of
      `cdul_steps.data.remote`;
    - image_id (optional): by default the path, with forward slashes;
    - split (optional): the data set's own name of the split; rows of splits that are not in
      `splits` are left out and reported. Without it, all rows belong to the only split requested;
    - one column per class: 1 or true, 0 or false, or blank in the whole row if its truth is
      unknown. Without any class column, all truth is unknown.

    Columns are matched by `same`; other columns are ignored and reported.

    Raises UserError.
    """
    with table_errors(root):
        header = table_header(root)
    wanted = ClassNames((*_OWN, *classes))
    chosen = wanted.choose(header, root)
    column = {name: chosen[i] for i, name in enumerate(wanted.names) if i in chosen}
    if "path" not in column:
        found = ", ".join(islice(header, 8)) or "none"
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
    wanted.tell(root, tell, "columns")
    asked, others = our_splits(splits), Counter[str]()
    by_split: dict[str, list[ImageRecord]] = {split: [] for split in splits}
    for place, row in table_rows(root, list(column.values())):
        cells = {name: row[raw] for name, raw in column.items()}
        own = as_id(cells["split"]) if "split" in cells else None
        ours = splits if own is None else asked.get(own, ())
        if own is not None and not ours:
            others[own] += 1
            continue
        path = _text(cells["path"])
        image_id = _text(cells["image_id"]) if "image_id" in cells else path.replace("\\", "/")
        for name, text in (("path", path), ("image_id", image_id)):
            if not text.strip():
                raise UserError(f"{root}, {place}: the column '{name}' is blank; fill it in")
        positive = None if missing else truth_of_row(cells, classes, f"{root}, {place}")
        check_protocol(path, f"{root}, {place}: the column 'path'")
        file = path if is_url(path) else image_path(root.parent, path, root, inside=False)
        for split in ours:
            by_split[split].append(ImageRecord(image_id, split, file, positive))
    tell_other_splits(root, others, tell)
    return [record for records in by_split.values() for record in records]


def our_splits(splits: Mapping[str, str]) -> dict[str, list[str]]:
    """Our names of the splits by the data set's own."""
    ours: dict[str, list[str]] = {}
    for split, own in splits.items():
        ours.setdefault(own.strip(), []).append(split)
    return ours


def tell_other_splits(root: Path, rows: Counter[str], tell: Tell) -> None:
    """Report rows of splits that were not requested."""
    if rows:
        number = rows.total()
        tell(f"{root}: left out {number} row{'s' * (number > 1)} of other splits: {listed(rows)}")


def table_header(root: Path) -> list[str]:
    if root.suffix.lower() == ".csv":
        with open_text(root, newline="") as file:
            return next(csv.reader(file, strict=True), [])
    if root.suffix.lower() == ".parquet":
        import pyarrow.parquet as pq

        return pq.read_schema(root).names
    raise UserError(f"{root}: a table must be a .csv or a .parquet file")


def table_rows(root: Path, columns: list[str]) -> Iterator[tuple[str, dict[str, object]]]:
    """For each row its location in words and the cells of at least these columns."""
    with table_errors(root):
        if root.suffix.lower() == ".csv":
            with open_text(root, newline="") as file:
                reader = csv.reader(file, strict=True)
                header = next(reader)
                for row in reader:
                    if len(row) not in (0, len(header)):
                        raise UserError(
                            f"{root}, line {reader.line_num}: {len(row)} cells, but the header "
                            f"has {len(header)}; put text that contains a comma in quotes"
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


def truth_of_row(
    cells: Mapping[str, object], classes: Sequence[str], where: str
) -> tuple[int, ...] | None:
    """The classes that 1/0 cells mark as present; None if all cells are blank.

    Raises UserError, which begins with `where`, for any other cell, and if only some are blank.
    """
    labels = []
    for name in classes:
        try:
            labels.append({None: None, 0.0: False, 1.0: True}[as_number(cells[name])])
        except (ValueError, KeyError) as error:
            text = _text(cells[name]).strip()
            raise UserError(
                f"{where}: column '{name}' contains '{text}'; expected 1, 0 or blank"
            ) from error
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
    """A cell as written; numbers as formatted by `as_id`."""
    return cell if isinstance(cell, str) else as_id(cell)
