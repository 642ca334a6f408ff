"""NUS-WIDE: the official lists, and the two re-crawled versions that papers use instead."""

import ast
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from cdul_steps.data.foreign import (
    ClassNames,
    Tell,
    as_id,
    as_number,
    ignore,
    read_text,
)
from cdul_steps.data.readers.record import ImageRecord, image_path
from cdul_steps.data.readers.table import (
    our_splits,
    table_errors,
    table_header,
    table_rows,
    tell_other_splits,
)
from cdul_steps.errors import UserError, first_line, nearest

OFFICIAL = ("Train", "Test")

_Rows = Iterator[tuple[str, tuple[int, ...]]]


def read_nuswide(
    root: Path, splits: Mapping[str, str], classes: Sequence[str], tell: Tell = ignore
) -> list[ImageRecord]:
    """Read NUS-WIDE in one of three formats.

    - Official: `root` is the folder; the value of a split is `Train` or `Test`. The images are
      listed in `ImageList/{value}Imagelist.txt`, below `Flickr`; the truth is in
      `Groundtruth/TrainTestLabels/Labels_{concept}_{value}.txt`, one 0 or 1 per line in that order.
    - Formatted (by "Multi-Label Learning from Single Positive Labels"): `root` is the folder; the
      value is, for example, `formatted_train`. `{value}_images.npy` has the paths below `Flickr`;
      `{value}_labels.npy` has one row per image and one column per concept, in the order of
      `Concepts81.txt` (in `root` or in `ConceptsList`).
    - Listed (by ASL): `root` is the file `nus_wid_data.csv`, with the columns path (relative to
      the file's folder), label (a list such as "['clouds', 'sky']") and split, in this order.

    The id is the path that the data set uses, with forward slashes. Image files are not checked.

    Raises UserError.
    """
    names = ClassNames(classes)
    by_split: Mapping[str, _Rows | list]
    if root.suffix.lower() == ".csv":
        top, by_split = root.parent, _listed(root, splits, names, tell)
    else:
        top = root / "Flickr"
        if not top.is_dir():
            raise UserError(
                f"{top}: no such folder; 'root' must be the folder that contains Flickr, or the "
                "file nus_wid_data.csv"
            )
        by_split = {
            split: (_official if own in OFFICIAL else _formatted)(root, own, names)
            for split, own in splits.items()
        }
    records = [
        ImageRecord(image_id, split, image_path(top, image_id, root), positive)
        for split, rows in by_split.items()
        for image_id, positive in rows
    ]
    names.tell(root, tell)
    return records


def _official(root: Path, own: str, names: ClassNames) -> _Rows:
    listing = root / "ImageList" / f"{own}Imagelist.txt"
    images = [_slashes(line) for line in _text(listing).splitlines() if line.strip()]
    if not images:
        raise UserError(f"{listing}: lists no image; download it again")
    labels = np.zeros((len(images), len(names.names)), bool)
    folder = root / "Groundtruth" / "TrainTestLabels"
    known = [
        p.name.removeprefix("Labels_").removesuffix(f"_{own}.txt")
        for p in sorted(folder.glob(f"Labels_*_{own}.txt"))
    ]
    concepts = names.choose(known, folder)
    for column, name in enumerate(names.names):
        path = folder / f"Labels_{concepts.get(column, name)}_{own}.txt"
        if known and column not in concepts:
            raise UserError(f"{path}: no such file{nearest(name, known)}")
        lines = _text(path).split()
        values = {line: _binary(line) for line in dict.fromkeys(lines)}
        odd = [line for line, value in values.items() if value is None]
        if len(lines) != len(images) or odd:
            raise UserError(
                f"{path}: expected one line with 0 or 1 for each of the {len(images)} images of "
                f"{listing}, found {len(lines)} lines"
                f"{f', one of them {odd[0][:40]!r}' if odd else ''}; download it again"
            )
        labels[:, column] = [values[line] for line in lines]
    return zip(images, _positive(labels), strict=True)


def _formatted(root: Path, own: str, names: ClassNames) -> _Rows:
    images, labels = _array(root, f"{own}_images.npy"), _array(root, f"{own}_labels.npy")
    concepts = root / "Concepts81.txt"
    if not concepts.is_file():
        concepts = root / "ConceptsList" / "Concepts81.txt"
    known = _text(concepts).split()
    if len(set(known)) < len(known):
        raise UserError(f"{concepts}: a concept is listed twice; download it again")
    if (images.dtype.kind, images.ndim) != ("U", 1) or labels.shape != (len(images), len(known)):
        raise UserError(
            f"{root / own}_images.npy is {images.dtype} {images.shape} and {own}_labels.npy "
            f"{labels.dtype} {labels.shape}; expected N paths, and N rows with one column for each "
            f"of the {len(known)} names of {concepts}"
        )
    if labels.dtype.kind not in "buif" or not np.isin(labels, (0, 1)).all():
        raise UserError(f"{root / own}_labels.npy: a label is neither 0 nor 1")
    chosen = names.choose(known, concepts)
    for column, name in enumerate(names.names):
        if column not in chosen:
            raise UserError(f"{concepts}: no concept is called {name!r}{nearest(name, known)}")
    columns = [known.index(chosen[column]) for column in range(len(names.names))]
    return zip(map(_slashes, images.tolist()), _positive(labels[:, columns]), strict=True)


def _listed(
    root: Path, splits: Mapping[str, str], names: ClassNames, tell: Tell
) -> dict[str, list]:
    if not root.is_file():
        raise UserError(f"{root}: no such file; docs/datasets.md states where to get it")
    by_split: dict[str, list] = {split: [] for split in splits}
    asked, others = our_splits(splits), Counter[str]()
    labels, seen = set(), set()
    with table_errors(root):
        header = table_header(root)
    if not len(header) == len(set(header)) == 3 or header[1] != "label":
        raise UserError(
            f"{root}: expected the columns path, label and split, found {', '.join(header)}"
        )
    for place, row in table_rows(root, header):
        image_id, text, own = map(str, row.values())
        shown = {label: names.find(label) for label in _labels(text, f"{root}, {place}")}
        labels |= {label for label, index in shown.items() if index is None}
        positive = tuple(sorted({index for index in shown.values() if index is not None}))
        seen |= set(positive)
        own = as_id(own)
        others[own] += 1
        for split in asked.get(own, ()):
            by_split[split].append((_slashes(image_id), positive))
    for own in asked:
        if own not in others:
            raise UserError(f"{root}: no split is called {own!r}{nearest(own, others)}")
        del others[own]
    tell_other_splits(root, others, tell)
    # A small part of the data set may lack a class, but then it has no unknown label either.
    for index, name in enumerate(names.names):
        if labels and index not in seen:
            raise UserError(f"{root}: no image has the label {name!r}{nearest(name, labels)}")
    return by_split


# Without commas, as NumPy prints lists, Python would join all names into one.
_ITEM = r"""u?(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")"""
_LIST = re.compile(rf"\s*\[\s*(?:{_ITEM}(?:\s*,\s*{_ITEM})*\s*,?)?\s*\]\s*")


def _labels(text: str, where: str) -> set[str]:
    try:
        labels = ast.literal_eval(text)
        if _LIST.fullmatch(text) and all(isinstance(x, str) and x for x in labels):
            return set(labels)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        pass
    raise UserError(
        f"{where}: expected a label such as ['clouds', 'sky'], with its commas, found {text[:80]!r}"
    )


def _binary(text: str) -> bool | None:
    """A label of 0 or 1; None for anything else."""
    try:
        number = as_number(text)
        return bool(number) if number in (0, 1) else None
    except ValueError:
        return None


def _positive(labels: np.ndarray) -> Iterator[tuple[int, ...]]:
    return (tuple(np.flatnonzero(row).tolist()) for row in labels)


def _slashes(path: str) -> str:
    """A path with forward slashes: the lists were written on Windows."""
    return path.strip().replace("\\", "/")


def _text(path: Path) -> str:
    try:
        return read_text(path)
    except (OSError, UnicodeError) as error:
        raise UserError(
            f"{path}: cannot be read: {first_line(error)}; docs/datasets.md states where to get it"
        ) from error


def _array(root: Path, name: str) -> np.ndarray:
    path = root / name
    try:
        # Not np.load, which also accepts other files and gives other advice for them.
        with path.open("rb") as file:
            return np.lib.format.read_array(file, allow_pickle=False)
    except FileNotFoundError as error:
        known = [own for own in OFFICIAL if (root / f"ImageList/{own}Imagelist.txt").is_file()]
        known += sorted(p.name.removesuffix("_images.npy") for p in root.glob("*_images.npy"))
        raise UserError(
            f"{path}: no such file; the available splits are: {', '.join(known) or 'none'}"
        ) from error
    except Exception as error:  # a damaged header can raise anything, such as MemoryError
        raise UserError(
            f"{path}: not a complete NumPy array file ({first_line(error)}); download it again"
        ) from error
