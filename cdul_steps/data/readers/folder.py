"""A folder of images, including all sub-folders."""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from cdul_steps.data.files import check_names
from cdul_steps.data.foreign import Tell, ignore, listed
from cdul_steps.data.images import begins_as_image
from cdul_steps.data.readers.record import IMAGE_SUFFIXES, ImageRecord, pattern_of
from cdul_steps.errors import UserError

SERVICE_FOLDERS = (
    *("@eadir", "@recycle", "@recently-snapshot", "@sharebin", "@tmp", "#recycle", "#snapshot"),
    *("$recycle.bin", "recycler", "system volume information", "lost+found", "__macosx"),
)
"""Folders in which network disks and systems keep thumbnails, snapshots, and deleted files."""


def read_folder(
    root: Path,
    splits: Mapping[str, str],
    classes: Sequence[str],
    tell: Tell = ignore,
    exclude: Sequence[str] = (),
) -> list[ImageRecord]:
    """Read a folder of images, including all sub-folders; the truth is unknown.

    splits: the value is a sub-folder of `root`, or "." for `root` itself. If the folder of one
    split is inside that of another, its images belong only to the inner split.

    Images are files with one of IMAGE_SUFFIXES in any case, and files without a suffix that start
    like an image; the id is the path relative to `root`, and the order is that of the ids. Names
    with a leading dot, SERVICE_FOLDERS, anything that matches a pattern of `exclude` (see
    `pattern_of`) and files with other suffixes are left out and reported. Links are followed,
    except to a folder that is read anyway.

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
    walk = _Walk(root, list(tops.values()), exclude)
    records = []
    for split, top in tops.items():
        ids = sorted(walk.images(top))
        check_names(ids, root)
        records += [ImageRecord(i, split, (root / i).as_posix(), None) for i in ids]
    for why, names in walk.left_out.items():
        number = names.total()
        what = why.format(s="s" * (number > 1))
        tell(f"{root}: left out {number} {what}: {listed(names)}")
    return records


class _Walk:
    """Walks through folders and counts what it leaves out, by reason and by name."""

    def __init__(self, root: Path, tops: list[Path], exclude: Sequence[str]) -> None:
        self.root, self.tops, self.exclude = root, tops, exclude
        self.entered = {top.resolve() for top in tops}
        self.left_out: dict[str, Counter[str]] = {}

    def images(self, top: Path) -> list[str]:
        """The ids of the images below `top`, one of the tops."""
        ids = []
        for folder, subfolders, files in os.walk(top, onerror=_folder_error, followlinks=True):
            here = Path(folder)
            subfolders[:] = [name for name in sorted(subfolders) if self._is_entered(here / name)]
            ids += [self._relative(here / name) for name in files if self._is_image(here / name)]
        return ids

    def _relative(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()

    def _leave(self, why: str, name: str) -> bool:
        self.left_out.setdefault(why, Counter())[name] += 1
        return False

    def _is_entered(self, folder: Path) -> bool:
        if folder in self.tops:
            return False
        if folder.name.startswith("."):
            return self._leave("hidden folder{s}", folder.name)
        if folder.name.casefold() in SERVICE_FOLDERS:
            return self._leave("folder{s} of the system", folder.name)
        if self.exclude and (pattern := pattern_of(self._relative(folder), self.exclude)):
            return self._leave("folder{s} by 'exclude'", pattern)
        if folder.is_symlink():
            target = folder.resolve()
            if any(target.is_relative_to(e) or e.is_relative_to(target) for e in self.entered):
                return self._leave("link{s} back into the data set", folder.name)
            self.entered.add(target)
        return True

    def _is_image(self, file: Path) -> bool:
        if file.name.startswith("."):
            return self._leave("hidden file{s}", file.name)
        suffix = file.suffix.lower()
        if suffix not in IMAGE_SUFFIXES and (suffix or not begins_as_image(file)):
            return self._leave("file{s} without the name of an image", suffix or "no suffix")
        if pattern := pattern_of(self._relative(file), self.exclude):
            return self._leave("image{s} by 'exclude'", pattern)
        return True


def _folder_error(error: OSError) -> NoReturn:
    raise UserError(
        f"{error.filename}: the folder cannot be read: {error.strerror}; check its permissions"
    ) from error
