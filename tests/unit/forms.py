"""Every format of every reader with labels, in miniature."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pandas as pd
import pytest
from layouts import (
    write,
    write_coco,
    write_nuswide,
    write_nuswide_formatted,
    write_nuswide_listed,
    write_voc,
)

from cdul_steps.data.readers import read_dataset

CLASSES = ("caf\u00e9", "dog", "owl")
SHOWN = {"1": [0], "2": [1, 2], "3": []}
"""Images, and the indices of the classes that they show."""
Shown = Mapping[str, Sequence[str]]


def _voc_lists(root: Path, images: Shown, labels: Sequence[str]) -> Path:
    write_voc(root, {"a": images}, labels)
    return root


def write_annotations(root: Path, images: Shown, labels: Sequence[str]) -> Path:
    write_voc(root, {"a": images}, ())
    for image, shown in images.items():
        objects = "".join(f"<object><name>{name}</name></object>" for name in shown)
        write(root / f"Annotations/{image}.xml", f"<annotation>{objects}</annotation>")
    return root


def _coco(root: Path, images: Shown, labels: Sequence[str]) -> Path:
    write_coco(root, {"a": images}, labels)
    return root


def _official(root: Path, images: Shown, labels: Sequence[str]) -> Path:
    write_nuswide(root, {"Train": images}, labels)
    return root


def _formatted(root: Path, images: Shown, labels: Sequence[str]) -> Path:
    write_nuswide_formatted(root, {"a": images}, labels)
    return root


def _listed(root: Path, images: Shown, labels: Sequence[str]) -> Path:
    write_nuswide_listed(root / "nus_wid_data.csv", {"a": images})
    return root / "nus_wid_data.csv"


def _frame(images: Shown, labels: Sequence[str]) -> pd.DataFrame:
    rows = [[image, *(int(name in shown) for name in labels)] for image, shown in images.items()]
    return pd.DataFrame(rows, columns=["path", *labels])


def _csv(root: Path, images: Shown, labels: Sequence[str]) -> Path:
    _frame(images, labels).to_csv(root / "t.csv", index=False)
    return root / "t.csv"


def _parquet(root: Path, images: Shown, labels: Sequence[str]) -> Path:
    _frame(images, labels).to_parquet(root / "t.parquet")
    return root / "t.parquet"


Writer = Callable[[Path, Shown, Sequence[str]], Path]
FORMS: dict[str, tuple[str, str, Writer]] = {
    "voc, lists": ("voc", "a", _voc_lists),
    "voc, annotations": ("voc", "a", write_annotations),
    "coco": ("coco", "a", _coco),
    "nuswide, official": ("nuswide", "Train", _official),
    "nuswide, formatted": ("nuswide", "a", _formatted),
    "nuswide, listed": ("nuswide", "a", _listed),
    "table, csv": ("table", "a", _csv),
    "table, parquet": ("table", "a", _parquet),
}
"""Every format with labels: its reader, its name of the split, and the function that writes it."""
every_form = pytest.mark.parametrize("form", FORMS)


def write_form(root: Path, form: str, labels: Sequence[str] = CLASSES, images=SHOWN) -> Path:
    root.mkdir(exist_ok=True)
    shown = {image: [labels[place] for place in places] for image, places in images.items()}
    return FORMS[form][2](root, shown, labels)


def read_form(root: Path, form: str, **changes) -> dict[str, tuple[int, ...] | None]:
    """The classes of each image, as a format's reader returns them."""
    reader, own, _ = FORMS[form]
    records = read_dataset(reader, root, {"train": own}, CLASSES, **changes)
    return {record.image_id: record.positive for record in records}
