"""Corrections: entries of the pseudo-labels that a person has decided by hand."""

import csv
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa

from cdul_steps.data.files import replacing
from cdul_steps.data.foreign import ClassNames, as_number, open_text, same_image
from cdul_steps.errors import UserError, first_line

UNKNOWN = 0.5
"""The label of an entry that the person could not decide."""
NAMES = {1.0: "1", 0.0: "0", UNKNOWN: "unknown"}
"""The spelling of the values in a corrections file."""
COLUMN = "corrected"
"""Column of a score table: the names of an image's corrected classes."""
_COLUMNS = ("image_id", "class", "value")

Corrections = dict[tuple[str, str], float]
"""`(image_id, class)` to 1, 0, or UNKNOWN."""


def read_corrections(path: Path) -> Corrections:
    """Read a CSV in UTF-8 with the columns `image_id`, `class` and `value`.

    The value is 1 or true, 0 or false, or unknown; a row without a value is not a correction, and
    other columns are ignored. Columns are separated by commas, semicolons or tabs. Raises UserError
    for a file that is not such a table, with the line.
    """
    corrections: Corrections = {}
    try:
        with open_text(path, newline="") as file:
            # In many locales spreadsheets write semicolons.
            delimiter = max(",;\t", key=file.readline().count)
            file.seek(0)
            reader = csv.DictReader(file, strict=True, delimiter=delimiter)
            missing = [name for name in _COLUMNS if name not in (reader.fieldnames or ())]
            if missing:
                raise UserError(
                    f"{path}: no column {missing[0]!r}; corrections have the columns "
                    f"{', '.join(_COLUMNS)}"
                )
            for row in reader:
                where = f"{path}, line {reader.line_num}"
                value = _value(row["value"] or "", where)
                if value is None:
                    continue
                entry = (row["image_id"], row["class"])
                if corrections.setdefault(entry, value) != value:
                    raise UserError(
                        f"{where}: {entry[1]!r} of image {entry[0]!r} has another value further up"
                    )
    except UnicodeError as error:
        raise UserError(f"{path}: not in UTF-8; save it as CSV in UTF-8") from error
    except (OSError, ValueError, csv.Error) as error:
        problem = getattr(error, "strerror", None) or first_line(error)
        raise UserError(f"{path}: cannot be read: {problem}") from error
    return corrections


def _value(text: str, where: str) -> float | None:
    if text.strip().casefold() == NAMES[UNKNOWN]:
        return UNKNOWN
    with suppress(ValueError):
        if (value := as_number(text)) in (None, 0, 1):
            return value
    raise UserError(f"{where}: the value is {text.strip()!r}; give 1, 0 or unknown")


def write_corrections(path: Path, corrections: Mapping[tuple[str, str], float]) -> None:
    """Write a table that `read_corrections` reads, in the order of its entries."""
    with replacing(path) as part, part.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(_COLUMNS)
        writer.writerows((*entry, NAMES[corrections[entry]]) for entry in sorted(corrections))


def apply_corrections(
    labels: np.ndarray,
    image_ids: Sequence[str],
    classes: Sequence[str],
    corrections: Mapping[tuple[str, str], float],
    origin: Path,
) -> pa.Array:
    """Set the corrected entries of labels, float (N, C), in place.

    Returns a column with the list of each image's corrected classes. Images and classes are matched
    by `same_image` and `same`. Raises UserError if one does not exist, or if two entries for the
    same label have different values.
    """
    row = {same_image(name): i for i, name in enumerate(image_ids)}
    row |= {name: i for i, name in enumerate(image_ids)}
    names = ClassNames(classes)
    corrected: list[dict[str, float]] = [{} for _ in image_ids]
    for (image_id, name), value in corrections.items():
        image = row.get(image_id, row.get(same_image(image_id)))
        if image is None:
            raise UserError(
                f"{origin}: corrects {image_id!r}, which is not one of the {len(image_ids)} "
                "labelled images"
            )
        if (column := names.find(name)) is None:
            raise UserError(
                f"{origin}: corrects {name!r} of {image_id!r}, which is not one of the classes; "
                f"they are {', '.join(classes)}"
            )
        labels[image, column] = value
        if corrected[image].setdefault(classes[column], value) != value:
            raise UserError(
                f"{origin}: corrects {classes[column]!r} of {image_ids[image]!r} to two values; "
                "remove one"
            )
    return pa.array([list(values) for values in corrected], pa.list_(pa.string()))


def corrected_entries(table: pa.Table, classes: Sequence[str]) -> np.ndarray:
    """Which entries of a score table are corrected: bool (N, C)."""
    mask = np.zeros((len(table), len(classes)), dtype=bool)
    if COLUMN in table.column_names:
        column = {name: i for i, name in enumerate(classes)}
        for row, names in enumerate(table[COLUMN].to_pylist()):
            mask[row, [column[name] for name in names or ()]] = True
    return mask
