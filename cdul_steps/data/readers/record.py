"""The record of one image that a reader returns."""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from cdul_steps.data.foreign import on_disk, slashes
from cdul_steps.errors import UserError

IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"),
    *(".heic", ".heif", ".hif", ".avif", ".jxl"),
)
"""Suffixes of image names, including JPEG XL's even if its plugin is not installed, so that the set
of images does not depend on the plugin."""


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """One image of a data set.

    image_id: unique in the data set.
    split: our name of the split, such as "train" or "test".
    path: where the image is; the data set's root joined with the relative path, not resolved.
    positive: indices of the classes that are present; None if the truth is not known.
    difficult: indices of the classes with only objects marked "difficult"; they are not in
        `positive`.
    """

    image_id: str
    split: str
    path: str
    positive: tuple[int, ...] | None
    difficult: tuple[int, ...] = ()


def image_path(folder: Path, name: str, listing: Path, *, inside: bool = True) -> str:
    """The path of the image that a `listing` calls `name`, below `folder`.

    Backslashes and the Unicode form are matched to the disk. Raises UserError for a name that a
    file cannot have and, with `inside`, for one that leads out of `folder`.
    """
    plain = name.replace("\\", "/")
    if inside and (plain.startswith("/") or ".." in plain.split("/")):
        raise UserError(f"{listing}: the image {plain!r} is outside {folder}; correct the list")
    check_utf8(name, listing)
    return on_disk(folder / slashes(name, folder)).as_posix()


def check_utf8(name: str, listing: Path | str) -> None:
    """Raise UserError for a name, possible in JSON, that tables cannot store."""
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{listing}: {name!r} is not valid UTF-8; correct the list") from error


def pattern_of(relative: str, patterns: Sequence[str]) -> str | None:
    """The first pattern that excludes a path, or a folder that contains it; None if none does.

    `*` matches any characters, including `/`; `?` matches one. A pattern with a `/` is compared
    with the path relative to the data set's root, any other with the name of the file and of each
    folder.
    """
    names = relative.split("/")
    paths = ["/".join(names[:end]) for end in range(1, len(names) + 1)]
    for pattern in patterns:
        plain = pattern.strip("/")
        if any(fnmatchcase(text, plain) for text in (paths if "/" in plain else names)):
            return pattern
    return None
