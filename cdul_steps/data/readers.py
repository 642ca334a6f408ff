"""Data set readers: which images a data set has, in which split, and what is known of them."""

import csv
import os
import unicodedata
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Literal, NoReturn

from cdul_steps.data.files import as_utf8
from cdul_steps.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")

_LABELS = {"1": True, "1.0": True, "true": True, "0": False, "0.0": False, "false": False, "": None}


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """One image of a data set.

    image_id: unique in the data set.
    split: our name of the split, such as "train" or "test".
    path: opens the image; the data set's root joined with the relative path, not resolved.
    positive: indices of the classes that are present; None where the truth is not known.
    difficult: indices of the classes of which only objects marked "difficult" are present;
        they are not in `positive`.
    """

    image_id: str
    split: str
    path: str
    positive: tuple[int, ...] | None
    difficult: tuple[int, ...] = ()


def read_dataset(
    reader: Literal["voc", "folder", "table"],
    root: Path,
    splits: Mapping[str, str],
    classes: Sequence[str],
) -> list[ImageRecord]:
    """Read a data set with the reader of that name: see `read_voc`, `read_folder`, `read_table`.

    splits: our names of the splits and, for each, the data set's own.

    Raises UserError where the data set is not as its reader expects it, a split has no images, or
    two images have one id.
    """
    read = {"voc": read_voc, "folder": read_folder, "table": read_table}[reader]
    as_utf8(str(root))
    records = read(root, splits, classes)
    filled = {record.split for record in records}
    for split, own in splits.items():
        if split not in filled:
            raise UserError(
                f"{root}: split '{split}' ('{own}') has no images; "
                "check the names under 'splits', or leave this split out"
            )
    by_id: dict[str, ImageRecord] = {}
    for record in records:
        other = by_id.setdefault(record.image_id, record)
        if other is not record:
            raise UserError(
                f"{root}: image id '{record.image_id}' is used twice: {other.path} "
                f"({other.split}) and {record.path} ({record.split}); ids must be unique in a "
                "data set and an image belongs to one split"
            )
    return records


def read_voc(root: Path, splits: Mapping[str, str], classes: Sequence[str]) -> list[ImageRecord]:
    """Read a data set in the layout of PASCAL VOC.

    root: the folder of one year, with `JPEGImages`, `ImageSets/Main` and perhaps `Annotations`.
    splits: the value is the name of an image list, `ImageSets/Main/{value}.txt`.

    The truth comes from the lists `ImageSets/Main/{class}_{value}.txt` (1 present, 0 only difficult
    objects, -1 absent) if there are any, else from `Annotations/{id}.xml`; of an image without
    either it is unknown. Image files are not looked for.

    Raises UserError.
    """
    lists = root / "ImageSets" / "Main"
    for name in (*splits.values(), *classes):
        _check_name(name, "split or class")
    for folder in (root / "JPEGImages", lists):
        if not folder.is_dir():
            raise UserError(
                f"{folder} is not a folder; 'root' must be the folder of one VOC year, with "
                "JPEGImages and ImageSets/Main in it, such as VOCdevkit/VOC2007"
            )
    records = []
    for split, own in splits.items():
        ids = {}  # id: line number; a dict keeps the order
        for number, fields in _read_list(lists / f"{own}.txt", columns=1):
            _check_name(fields[0], f"{lists / own}.txt, line {number}: image id")
            if fields[0] in ids:
                raise UserError(
                    f"{lists / own}.txt, line {number}: image id '{fields[0]}' is used twice, "
                    f"first in line {ids[fields[0]]}; remove one"
                )
            ids[fields[0]] = number
        truth = _truth_of_lists(lists, own, ids, classes)
        for image_id in ids:
            if truth is None:
                annotation = root / "Annotations" / f"{image_id}.xml"
                positive, difficult = _truth_of_annotation(annotation, classes)
            else:
                positive, difficult = (tuple(found) for found in truth[image_id])
            path = (root / "JPEGImages" / f"{image_id}.jpg").as_posix()
            records.append(ImageRecord(image_id, split, path, positive, difficult))
    return records


def read_folder(root: Path, splits: Mapping[str, str], classes: Sequence[str]) -> list[ImageRecord]:
    """Read a folder of images, with all its sub-folders; the truth is unknown.

    splits: the value is a sub-folder of `root`, "." for `root` itself. Where the folder of one
    split lies inside that of another, its images belong to the inner split only.

    Images are the files with one of IMAGE_SUFFIXES in any case; the id is the path relative to
    `root`, and the order is that of the ids. Names with a leading dot are skipped. Links to files
    are followed, links to folders inside a split are not (they could form a loop).

    Raises UserError.
    """
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; 'root' must be a folder of images")
    tops = {}
    for split, own in splits.items():
        tops[split] = root / own
        if Path(own).is_absolute() or ".." in Path(own).parts or not tops[split].is_dir():
            raise UserError(
                f"split '{split}': {tops[split]} is not a folder inside {root}; "
                "give a sub-folder of 'root', or '.' for 'root' itself"
            )
    records = []
    for split, top in tops.items():
        ids = []
        for folder, subfolders, files in os.walk(top, onerror=_folder_error):
            here = Path(folder)
            subfolders[:] = [
                name
                for name in subfolders
                if not name.startswith(".") and here / name not in tops.values()
            ]
            ids += [
                Path(as_utf8((here / name).as_posix())).relative_to(root).as_posix()
                for name in files
                if not name.startswith(".") and name.lower().endswith(IMAGE_SUFFIXES)
            ]
        records += [ImageRecord(i, split, (root / i).as_posix(), None) for i in sorted(ids)]
    return records


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
    with _table_errors(root):
        header = _table_header(root)
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
    for place, row in _table_rows(root, list(column.values())):
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


def fingerprint(records: Iterable[ImageRecord]) -> str:
    """32 hex digits that change with any field of any record, their order, and the size or
    modification time of any image file. A file that cannot be looked at counts as missing.
    """
    digest = blake2b(digest_size=16)
    for record in records:
        try:
            status = Path(record.path).stat()
            state = (status.st_size, status.st_mtime_ns)
        except (OSError, ValueError):
            state = None
        fields = (record.image_id, record.split, record.path, record.positive, record.difficult)
        digest.update(repr((fields, state)).encode())
    return digest.hexdigest()


def _read_list(path: Path, columns: int) -> list[tuple[int, list[str]]]:
    """The lines of a VOC list that are not blank: number, and fields."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError as error:
        known = sorted(p.stem for p in path.parent.glob("*.txt") if "_" not in p.stem)
        raise UserError(
            f"{path}: no such image list; the splits there are: {', '.join(known) or 'none'}"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {_first_line(error)}") from error
    rows = [(number, line.split()) for number, line in enumerate(lines, 1) if line.strip()]
    for number, fields in rows:
        if len(fields) != columns:
            expected = "an image id" if columns == 1 else "an image id and 1, 0 or -1"
            raise UserError(
                f"{path}, line {number}: expected {expected}, found '{' '.join(fields)}'"
            )
    return rows


def _truth_of_lists(
    lists: Path, own: str, ids: Mapping[str, int], classes: Sequence[str]
) -> dict[str, tuple[list[int], list[int]]] | None:
    """For each id the classes present and those with difficult objects only; None: no lists."""
    paths = [lists / f"{name}_{own}.txt" for name in classes]
    missing = [path for path in paths if not path.is_file()]
    if len(missing) == len(paths):
        return None
    if missing:
        raise UserError(
            f"{missing[0]}: no such class list, while other classes have one; "
            "add it, or check the spelling of the class"
        )
    truth: dict[str, tuple[list[int], list[int]]] = {image_id: ([], []) for image_id in ids}
    for index, path in enumerate(paths):
        seen = set()
        for number, (image_id, value) in _read_list(path, columns=2):
            if image_id not in ids:
                problem = f"image id '{image_id}' is not in {own}.txt"
            elif image_id in seen:
                problem = f"image id '{image_id}' is listed twice"
            elif value not in ("1", "0", "-1"):
                problem = f"expected 1, 0 or -1, found '{value}'"
            else:
                problem = None
            if problem:
                raise UserError(f"{path}, line {number}: {problem}; correct the list")
            seen.add(image_id)
            if value != "-1":
                truth[image_id][0 if value == "1" else 1].append(index)
        for image_id, number in ids.items():
            if image_id not in seen:
                raise UserError(
                    f"{path}: image id '{image_id}' of {own}.txt, line {number}, is missing here; "
                    "correct the list"
                )
    return truth


def _truth_of_annotation(
    path: Path, classes: Sequence[str]
) -> tuple[tuple[int, ...] | None, tuple[int, ...]]:
    try:
        objects = ET.parse(path).getroot().findall("object")
    except FileNotFoundError:
        return None, ()
    except (OSError, ET.ParseError, ValueError, LookupError) as error:
        raise UserError(
            f"{path}: cannot be read as an annotation: {_first_line(error)}; "
            "repair the file, or remove it if the truth is unknown"
        ) from error
    easy, difficult = set(), set()
    for item in objects:
        name = (item.findtext("name") or "").strip()
        flag = (item.findtext("difficult") or "0").strip()
        if not name or flag not in ("0", "1"):
            raise UserError(
                f"{path}: an object needs a name, and 0 or 1 as difficult; "
                f"found name '{name}', difficult '{flag}'"
            )
        (difficult if flag == "1" else easy).add(name)
    return (
        tuple(index for index, name in enumerate(classes) if name in easy),
        tuple(index for index, name in enumerate(classes) if name in difficult - easy),
    )


def _folder_error(error: OSError) -> NoReturn:
    raise UserError(
        f"{error.filename}: the folder cannot be read: {error.strerror}; check its permissions"
    ) from error


def _check_name(name: str, what: str) -> None:
    """Raise UserError for a name that would lead to files outside the data set's own folders."""
    if "/" in name:
        raise UserError(f"{what} '{name}' must not hold '/': in VOC's layout it names a file")


def _table_header(root: Path) -> list[str]:
    if root.suffix.lower() == ".csv":
        with root.open(encoding="utf-8-sig", newline="") as file:
            return next(csv.reader(file, strict=True), [])
    if root.suffix.lower() == ".parquet":
        import pyarrow.parquet as pq

        return pq.read_schema(root).names
    raise UserError(f"{root}: a table must be a .csv or a .parquet file")


def _table_rows(root: Path, columns: list[str]) -> Iterator[tuple[str, dict[str, object]]]:
    """For each row its place in words and the cells of at least these columns."""
    with _table_errors(root):
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
def _table_errors(root: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(
            f"{root}: no such file; 'root' must be a .csv or .parquet table with a column 'path'"
        ) from error
    except (OSError, ValueError, csv.Error) as error:  # ValueError: Arrow's errors, and UTF-8's
        raise UserError(f"{root}: the table cannot be read: {_first_line(error)}") from error


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


def _first_line(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error).partition("\n")[0]
