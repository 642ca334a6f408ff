"""The table of an ablation: variants of a training, a row each."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import yaml

from cdul_steps.config import NAME, Ablation, Training, load
from cdul_steps.errors import UserError, first_line, nearest

COLUMNS = ("variant", "against", "labels")
"""Columns that are no keys of a training: its name, the variant to compare with, its labels."""


@dataclass(frozen=True)
class Variant:
    """One training of an ablation; `labels` names the labels that it learns from."""

    name: str
    labels: str
    settings: Training


def read_rows(table: Path) -> pd.DataFrame:
    """The rows of a table of variants as text; "" is an empty cell, `#` begins a comment.

    Raises UserError where the file cannot be read, has no rows, a name is missing, twice there or
    no name of a folder, or `against` names no variant.
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
    # Pandas takes the first of too many cells for an index.
    if not isinstance(rows.index, pd.RangeIndex):
        raise UserError(f"{table}: its rows have more cells than its first line")
    rows = rows.fillna("").map(str.strip)
    if "variant" not in rows or not len(rows):
        raise UserError(f"{table}: needs a column 'variant' and a row for each")
    seen = set()
    for name in rows["variant"]:
        if not re.match(NAME, name):
            raise UserError(
                f"{table}: {name!r} is not a usable name of a variant: letters, digits, '.', '_' "
                "and '-' only, since it names a folder"
            )
        if name in seen:
            raise UserError(f"{table}: the variant {name!r} is there twice")
        seen.add(name)
    for name in rows.get("against", ()):
        if name and name not in seen:
            raise UserError(f"{table}: 'against' names {name!r}{nearest(name, list(seen))}")
    return rows


def read_variants(
    ablation: Ablation, trainings: Mapping[str, Training], labels: Iterable[str], default: str
) -> list[Variant]:
    """All trainings of an ablation: every row of its table with every seed.

    A cell changes one key of the training that the ablation names; an empty one leaves it. Where
    a row has no `labels` (of those named in `labels`) it learns from `default`, and a `seed` of
    its own takes the place of the ablation's. Raises UserError as `read_rows` does, for a key
    that no training has, and for a value that it cannot have.
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
    """A cell as it is, but for the model's own arguments, whose types the config does not know."""
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
