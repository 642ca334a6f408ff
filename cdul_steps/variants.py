"""The table of an ablation: variants of a training, one per row."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import yaml

from cdul_steps.config import NAME, Ablation, Training, load
from cdul_steps.errors import UserError, first_line, nearest

COLUMNS = ("variant", "against", "labels")
"""Columns that are not keys of a training: name, variant to compare with, labels."""


@dataclass(frozen=True)
class Variant:
    """One training of an ablation; `labels` names its training labels."""

    name: str
    labels: str
    settings: Training


def read_rows(table: Path) -> pd.DataFrame:
    """The rows of a table of variants as text; "" is an empty cell, `#` starts a comment.

    Raises UserError if the file cannot be read or has no rows, a name is missing, duplicate or not
    a valid folder name, or `against` does not name a variant.
    """
    if not table.is_file():
        raise UserError(f"ablation.table: {table}: no such file")
    try:
        rows = pd.read_csv(
            table,
            sep="\t" if table.suffix == ".tsv" else ",",
            comment="#",
            dtype=str,
            keep_default_na=False,
        )
    except (ValueError, pd.errors.ParserError) as error:
        raise UserError(f"{table}: not a readable table: {first_line(error)}") from error
    # If a row has too many cells, pandas takes the first for an index.
    if not isinstance(rows.index, pd.RangeIndex):
        raise UserError(f"{table}: its rows have more cells than its first line")
    rows = rows.fillna("").map(str.strip)
    if "variant" not in rows or not len(rows):
        raise UserError(f"{table}: needs a column 'variant' and one row per variant")
    seen = set()
    for name in rows["variant"]:
        if not re.match(NAME, name):
            raise UserError(
                f"{table}: {name!r} is not a usable variant name: letters, digits, '.', '_' and "
                "'-' only, because it names a folder"
            )
        if name in seen:
            raise UserError(f"{table}: the variant {name!r} occurs twice")
        seen.add(name)
    for name in rows.get("against", ()):
        if name and name not in seen:
            raise UserError(f"{table}: 'against' names {name!r}{nearest(name, list(seen))}")
    return rows


def read_variants(
    ablation: Ablation, trainings: Mapping[str, Training], labels: Iterable[str], default: str
) -> list[Variant]:
    """All trainings of an ablation: every row of its table with every seed.

    A cell changes one key of the training that the ablation names; an empty cell leaves the key
    unchanged. A row without `labels` (one of the names in `labels`) uses `default`, and a row's
    own `seed` replaces the ablation's seeds. Raises UserError as `read_rows` does, for a key that
    no training has, and for an invalid value.
    """
    if ablation.training not in trainings:
        raise UserError(
            f"config: ablation.training names {ablation.training!r}, which is not under "
            f"'trainings'{nearest(ablation.training, list(trainings))}"
        )
    table = Path(ablation.table)
    variants = []
    for row in read_rows(table).to_dict("records"):
        cells = {key: value for key, value in row.items() if value}
        name, own_labels = cells["variant"], cells.get("labels", default)
        if own_labels not in labels:
            raise UserError(
                f"{table}: {name}: 'labels' names {own_labels!r}{nearest(own_labels, list(labels))}"
            )
        for seed in [cells["seed"]] if "seed" in cells else ablation.seeds:
            values = trainings[ablation.training].model_dump(mode="json", by_alias=True)
            for key, value in {**cells, "seed": seed}.items():
                if key not in COLUMNS:
                    _set(values, key, _untyped(table, name, key, value))
            variants.append(Variant(name, own_labels, _training(table, name, values)))
    return variants


def _untyped(table: Path, name: str, key: str, value: object) -> object:
    """The cell, unchanged except for model arguments, whose types the config does not know."""
    if not key.startswith("model_args."):
        return value
    try:
        return yaml.safe_load(str(value))
    except yaml.YAMLError as error:
        raise UserError(f"{table}: {name}: {key}: {first_line(error)}") from error


def _set(values: dict, key: str, value: object) -> None:
    """Set the value of a dotted key."""
    *sections, last = key.split(".")
    for section in sections:
        if not isinstance(values.get(section), dict):
            values[section] = {}
        values = values[section]
    values[last] = value


def _training(table: Path, name: str, values: dict) -> Training:
    try:
        return load({"trainings": {name: values}}, check_run=False).trainings[name]
    except UserError as error:
        raise UserError(f"{table}: {str(error).removeprefix('config: ')}") from error
