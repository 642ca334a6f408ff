"""PASCAL VOC: one year's folder of the devkit."""

import glob
import unicodedata
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from pathlib import Path

from cdul_steps.data.foreign import ClassNames, Tell, as_number, ignore, on_disk, read_text
from cdul_steps.data.readers.record import IMAGE_SUFFIXES, ImageRecord
from cdul_steps.errors import UserError, first_line


def read_voc(
    root: Path, splits: Mapping[str, str], classes: Sequence[str], tell: Tell = ignore
) -> list[ImageRecord]:
    """Read a data set in the layout of PASCAL VOC.

    root: the folder of one year, with `JPEGImages`, `ImageSets/Main` and optionally `Annotations`.
    splits: the value is the name of an image list, `ImageSets/Main/{value}.txt`.

    The truth comes from the lists `ImageSets/Main/{class}_{value}.txt` (1 present, 0 only difficult
    objects, -1 absent) if there are any, or else from `Annotations/{id}.xml`; without either it is
    unknown. Images are `JPEGImages/{id}.jpg`, or another of IMAGE_SUFFIXES if there is no such
    file.

    Raises UserError.
    """
    lists = root / "ImageSets" / "Main"
    for name in (*splits.values(), *classes):
        _check_name(name, "split or class")
    for folder in (root / "JPEGImages", lists):
        if not folder.is_dir():
            raise UserError(
                f"{folder} is not a folder; 'root' must be the folder of one VOC year that "
                "contains JPEGImages and ImageSets/Main, such as VOCdevkit/VOC2007"
            )
    names, files = ClassNames(classes), _image_files(root / "JPEGImages")
    records = []
    for split, own in splits.items():
        ids: dict[str, int] = {}  # id: line number; a dict keeps the order
        for number, fields in _read_list(lists / f"{own}.txt", columns=1):
            _check_name(fields[0], f"{lists / own}.txt, line {number}: image id")
            if fields[0] in ids:
                raise UserError(
                    f"{lists / own}.txt, line {number}: image id '{fields[0]}' is used twice, "
                    f"first on line {ids[fields[0]]}; remove one"
                )
            ids[fields[0]] = number
        truth = _truth_of_lists(lists, own, ids, names)
        for image_id in ids:
            if truth is None:
                annotation = on_disk(root / "Annotations" / f"{image_id}.xml")
                positive, difficult = _truth_of_annotation(annotation, names)
            else:
                positive, difficult = (tuple(found) for found in truth[image_id])
            name = files.get(_composed(image_id), f"{image_id}.jpg")
            path = (root / "JPEGImages" / name).as_posix()
            records.append(ImageRecord(image_id, split, path, positive, difficult))
    names.tell(root, tell)
    return records


def _image_files(folder: Path) -> dict[str, str]:
    """File names by image id; if an id has several files, IMAGE_SUFFIXES sets the priority."""
    found: dict[str, tuple[int, str]] = {}
    for name in sorted(path.name for path in folder.iterdir()):
        stem, dot, suffix = name.rpartition(".")
        if dot and f".{suffix.lower()}" in IMAGE_SUFFIXES:
            rank = (IMAGE_SUFFIXES.index(f".{suffix.lower()}"), name)
            key = _composed(stem)
            found[key] = min(found.get(key, rank), rank)
    return {key: name for key, (_, name) in found.items()}


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _check_name(name: str, what: str) -> None:
    """Raise UserError for a name that would lead to files outside the data set's own folders."""
    if "/" in name:
        raise UserError(f"{what} '{name}' must not contain '/': in VOC's layout it names a file")


def _read_list(path: Path, columns: int) -> list[tuple[int, list[str]]]:
    """The non-blank lines of a VOC list: number and fields."""
    try:
        lines = read_text(path).splitlines()
    except FileNotFoundError as error:
        known = sorted(p.stem for p in path.parent.glob("*.txt") if "_" not in p.stem)
        raise UserError(
            f"{path}: no such image list; the available splits are: {', '.join(known) or 'none'}"
        ) from error
    except (OSError, UnicodeError) as error:
        raise UserError(f"{path}: cannot be read: {first_line(error)}") from error
    rows = [(number, line.split()) for number, line in enumerate(lines, 1) if line.strip()]
    for number, fields in rows:
        if len(fields) != columns:
            expected = "an image id" if columns == 1 else "an image id and 1, 0 or -1"
            raise UserError(
                f"{path}, line {number}: expected {expected}, found '{' '.join(fields)}'"
            )
    return rows


def _truth_of_lists(
    lists: Path, own: str, ids: Mapping[str, int], names: ClassNames
) -> dict[str, tuple[list[int], list[int]]] | None:
    """For each id the classes present, and those with only difficult objects; None: no lists."""
    known = [
        path.name.removesuffix(f"_{own}.txt")
        for path in sorted(lists.glob(f"*_{glob.escape(own)}.txt"))
    ]
    chosen = names.choose(known, lists)
    if not chosen:
        return None
    paths = [lists / f"{chosen.get(i, name)}_{own}.txt" for i, name in enumerate(names.names)]
    if len(chosen) < len(paths):
        missing = next(path for i, path in enumerate(paths) if i not in chosen)
        raise UserError(
            f"{missing}: no such class list, although other classes have one; "
            "add it, or check the spelling of the class"
        )
    truth: dict[str, tuple[list[int], list[int]]] = {image_id: ([], []) for image_id in ids}
    for index, path in enumerate(paths):
        seen = set()
        for number, (image_id, text) in _read_list(path, columns=2):
            value = _value(text)
            if image_id not in ids:
                problem = f"image id '{image_id}' is not in {own}.txt"
            elif image_id in seen:
                problem = f"image id '{image_id}' is listed twice"
            elif value not in (1, 0, -1):
                problem = f"expected 1, 0 or -1, found '{text}'"
            else:
                problem = None
            if problem:
                raise UserError(f"{path}, line {number}: {problem}; correct the list")
            seen.add(image_id)
            if value != -1:
                truth[image_id][0 if value == 1 else 1].append(index)
        for image_id, number in ids.items():
            if image_id not in seen:
                raise UserError(
                    f"{path}: image id '{image_id}' of {own}.txt, line {number}, is missing here; "
                    "correct the list"
                )
    return truth


def _value(text: str) -> float | None:
    """A number in a list; true and false are not accepted, as they could mean 0 or -1."""
    try:
        return float(text)
    except ValueError:
        return None


def _truth_of_annotation(
    path: Path, names: ClassNames
) -> tuple[tuple[int, ...] | None, tuple[int, ...]]:
    try:
        top = ET.parse(path).getroot()
    except FileNotFoundError:
        return None, ()
    except (OSError, ET.ParseError, ValueError, LookupError) as error:
        raise UserError(
            f"{path}: cannot be read as an annotation: {first_line(error)}; "
            "repair the file, or remove it if the truth is unknown"
        ) from error
    if top.tag != "annotation":
        raise UserError(
            f"{path}: is not an annotation but a file of <{top.tag}>; download it again, or remove "
            "it if the truth is unknown"
        )
    easy: set[int] = set()
    difficult: set[int] = set()
    for item in top.findall("object"):
        name, flag = item.findtext("name") or "", item.findtext("difficult") or ""
        try:
            value = as_number(flag)
        except ValueError:
            value = -1
        if not name.strip() or value not in (None, 0, 1):
            raise UserError(
                f"{path}: an object needs a name, and 0 or 1 as difficult; "
                f"found name '{name.strip()}', difficult '{flag.strip()}'"
            )
        if (index := names.find(name.strip())) is not None:
            (difficult if value else easy).add(index)
    return tuple(sorted(easy)), tuple(sorted(difficult - easy))
