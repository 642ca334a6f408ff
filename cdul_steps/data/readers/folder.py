"""A folder of images, with all its sub-folders."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from cdul_steps.data.files import as_utf8
from cdul_steps.data.readers.record import ImageRecord
from cdul_steps.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")


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


def _folder_error(error: OSError) -> NoReturn:
    raise UserError(
        f"{error.filename}: the folder cannot be read: {error.strerror}; check its permissions"
    ) from error
