"""A folder of images, including all sub-folders."""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import NoReturn

from cdul_steps.data.files import check_names
from cdul_steps.data.foreign import Tell, ignore, listed
from cdul_steps.data.images import begins_as_image
from cdul_steps.data.readers.record import IMAGE_SUFFIXES, ImageRecord, pattern_of
from cdul_steps.data.remote import list_files
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
    if root.is_symlink() and not root.exists():
        raise UserError(f"{root}: is a link to {root.readlink()}, which does not exist")
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
    # Paths of pathlib would take most of the time for millions of files.
    before = (root / "x").as_posix().removesuffix("x")
    for split, top in tops.items():
        ids = sorted(walk.images(top))
        check_names(ids, root)
        records += [ImageRecord(i, split, before + i, None) for i in ids]
    walk.tell(root, tell)
    return records


def read_remote_folder(
    root: str, splits: Mapping[str, str], tell: Tell = ignore, exclude: Sequence[str] = ()
) -> list[ImageRecord]:
    """Read the images below a URL as `read_folder` reads a folder.

    Files without a suffix are left out, since their first bytes would have to be fetched. Raises
    UserError.
    """
    tops = {}
    for split, own in splits.items():
        parts = PurePosixPath(own).parts
        if own.startswith("/") or ".." in parts:
            raise UserError(
                f"split '{split}': '{own}' is not inside {root}; give a folder below 'root', or "
                "'.' for 'root' itself"
            )
        tops[split] = "".join(f"{part}/" for part in parts)
    rules = _Rules(exclude)
    ids: dict[str, list[str]] = {split: [] for split in splits}
    entered: dict[str, bool] = {}
    for name in list_files(root):
        inside = [split for split, top in tops.items() if name.startswith(top)]
        if not inside:
            continue
        split = max(inside, key=lambda split: len(tops[split]))
        *parents, last = name.removeprefix(tops[split]).split("/")
        for end in range(1, len(parents) + 1):
            folder = tops[split] + "/".join(parents[:end])
            if folder not in entered:
                entered[folder] = rules.enters(parents[end - 1], folder)
            if not entered[folder]:
                break
        else:
            if rules.takes(last, name):
                ids[split].append(name)
    check_names(name for names in ids.values() for name in names)
    rules.tell(root, tell)
    top = root.rstrip("/")
    return [
        ImageRecord(name, split, f"{top}/{name}", None)
        for split, names in ids.items()
        for name in names
    ]


class _Rules:
    """Decides which files are images and which folders to enter; counts the others by reason."""

    def __init__(self, exclude: Sequence[str]) -> None:
        self.exclude = exclude
        self.left_out: dict[str, Counter[str]] = {}

    def leave(self, why: str, name: str) -> bool:
        self.left_out.setdefault(why, Counter())[name] += 1
        return False

    def enters(self, name: str, relative: str) -> bool:
        if name.startswith("."):
            return self.leave("hidden folder{s}", name)
        if name.casefold() in SERVICE_FOLDERS:
            return self.leave("folder{s} of the system", name)
        if pattern := pattern_of(relative, self.exclude):
            return self.leave("folder{s} by 'exclude'", pattern)
        return True

    def takes(self, name: str, relative: str, folder: Path | None = None) -> bool:
        """Whether a file is an image; one without a suffix is opened if its `folder` is given."""
        if name.startswith("."):
            return self.leave("hidden file{s}", name)
        if not name.lower().endswith(IMAGE_SUFFIXES):
            suffix = PurePosixPath(name).suffix.lower()
            if suffix or not (folder and begins_as_image(folder / name)):
                return self.leave("non-image file{s}", suffix or "no suffix")
        if pattern := pattern_of(relative, self.exclude):
            return self.leave("image{s} by 'exclude'", pattern)
        return True

    def tell(self, root: Path | str, tell: Tell) -> None:
        for why, names in self.left_out.items():
            number = names.total()
            what = why.format(s="s" * (number > 1))
            tell(f"{root}: left out {number} {what}: {listed(names)}")


class _Walk(_Rules):
    """Walks through folders and counts what it leaves out, by reason and by name."""

    def __init__(self, root: Path, tops: list[Path], exclude: Sequence[str]) -> None:
        super().__init__(exclude)
        self.root, self.tops = root, tops
        self.entered = {top.resolve() for top in tops}

    def images(self, top: Path) -> list[str]:
        """The ids of the images below `top`, one of the tops."""
        ids = []
        for folder, subfolders, files in os.walk(top, onerror=_folder_error, followlinks=True):
            here = Path(folder)
            subfolders[:] = [name for name in sorted(subfolders) if self._is_entered(here / name)]
            inside = self._relative(here / "x").removesuffix("x")
            ids += [inside + name for name in files if self.takes(name, inside + name, here)]
        return ids

    def _relative(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()

    def _is_entered(self, folder: Path) -> bool:
        if folder in self.tops:
            return False
        if not self.enters(folder.name, self._relative(folder)):
            return False
        if folder.is_symlink():
            target = folder.resolve()
            if any(target.is_relative_to(e) or e.is_relative_to(target) for e in self.entered):
                return self.leave("link{s} back into the data set", folder.name)
            self.entered.add(target)
        return True


def _folder_error(error: OSError) -> NoReturn:
    raise UserError(
        f"{error.filename}: the folder cannot be read: {error.strerror}; check its permissions"
    ) from error
