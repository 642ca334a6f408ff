"""Corrections: entries of the pseudo-labels that a person has decided."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from cdul_steps.data.files import replacing
from cdul_steps.errors import UserError, first_line

UNKNOWN = 0.5
"""The label of an entry that the person could not decide."""
VALUES = {"1": 1.0, "0": 0.0, "unknown": UNKNOWN}
COLUMN = "corrected"
"""Column of a table of scores: the names of the classes that are corrected in an image."""
_COLUMNS = ("image_id", "class", "value")

Corrections = dict[tuple[str, str], float]
"""`(image_id, class)` to 1, 0, or UNKNOWN."""


def read_corrections(path: Path) -> Corrections:
    """Read a CSV (with commas, UTF-8) with the columns `image_id`, `class` and `value`.

    The value is 1, 0 or unknown; a row without one is no correction, and other columns are
    ignored. Raises UserError for a file that is not such a table, naming the line.
    """
    corrections: Corrections = {}
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            missing = [name for name in _COLUMNS if name not in (reader.fieldnames or ())]
            if missing:
                raise UserError(
                    f"{path}: no column {missing[0]!r}; corrections have the columns "
                    f"{', '.join(_COLUMNS)}"
                )
            for row in reader:
                where = f"{path}, line {reader.line_num}"
                text = (row["value"] or "").strip().lower()
                if not text:
                    continue
                if text not in VALUES:
                    raise UserError(f"{where}: the value is {text!r}; give 1, 0 or unknown")
                entry, value = (row["image_id"], row["class"]), VALUES[text]
                if corrections.setdefault(entry, value) != value:
                    raise UserError(
                        f"{where}: {entry[1]!r} of image {entry[0]!r} has another value further up"
                    )
    except (OSError, ValueError, csv.Error) as error:
        problem = getattr(error, "strerror", None) or first_line(error)
        raise UserError(f"{path}: the corrections cannot be read: {problem}") from error
    return corrections


def write_corrections(path: Path, corrections: Mapping[tuple[str, str], float]) -> None:
    """Write a table that `read_corrections` reads, in the order of its entries."""
    names = {value: name for name, value in VALUES.items()}
    with replacing(path) as part, part.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(_COLUMNS)
        writer.writerows((*entry, names[corrections[entry]]) for entry in sorted(corrections))


def apply_corrections(
    labels: np.ndarray,
    image_ids: Sequence[str],
    classes: Sequence[str],
    corrections: Mapping[tuple[str, str], float],
    origin: Path,
) -> pa.Array:
    """Put corrections into labels (N, C); returns the column of the classes corrected, a list each.

    Raises UserError where an image or class is not there.
    """
    row = {name: i for i, name in enumerate(image_ids)}
    column = {name: i for i, name in enumerate(classes)}
    corrected: list[list[str]] = [[] for _ in image_ids]
    for (image_id, name), value in corrections.items():
        if image_id not in row:
            raise UserError(
                f"{origin}: corrects {image_id!r}, which is none of the {len(row)} labelled images"
            )
        if name not in column:
            raise UserError(
                f"{origin}: corrects {name!r} of {image_id!r}, which is none of the classes; they "
                f"are {', '.join(classes)}"
            )
        labels[row[image_id], column[name]] = value
        corrected[row[image_id]].append(name)
    return pa.array(corrected, pa.list_(pa.string()))


def corrected_entries(table: pa.Table, classes: Sequence[str]) -> np.ndarray:
    """Which entries of a table of scores are corrected: bool (N, C)."""
    mask = np.zeros((len(table), len(classes)), dtype=bool)
    if COLUMN in table.column_names:
        column = {name: i for i, name in enumerate(classes)}
        for row, names in enumerate(table[COLUMN].to_pylist()):
            mask[row, [column[name] for name in names or ()]] = True
    return mask
