"""What a reader says of one image."""

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
"""How the names of images end; JPEG XL's too where its plugin is not installed, so that no image
comes or goes with the plugin."""


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


def image_path(folder: Path, name: str, listing: Path, *, inside: bool = True) -> str:
    """The path of the image that a `listing` calls `name`, below `folder`.

    Backslashes and the Unicode form are those of the disk. Raises UserError for a name that a
    file cannot have and, where it must be `inside`, for one that leads out of `folder`.
    """
    plain = name.replace("\\", "/")
    if inside and (plain.startswith("/") or ".." in plain.split("/")):
        raise UserError(f"{listing}: the image {plain!r} lies outside {folder}; correct the list")
    check_utf8(name, listing)
    return on_disk(folder / slashes(name, folder)).as_posix()


def check_utf8(name: str, listing: Path | str) -> None:
    """Raise UserError for a name that tables could not hold, as JSON can spell it."""
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{listing}: {name!r} is not valid UTF-8; correct the list") from error


def pattern_of(relative: str, patterns: Sequence[str]) -> str | None:
    """The first of the patterns that excludes a path, or a folder that it is in; None: no one does.

    `*` stands for any characters, also `/`, `?` for one. A pattern with a `/` is compared with the
    path relative to the data set's root, any other with the name of the file and of each folder.
    """
    names = relative.split("/")
    paths = ["/".join(names[:end]) for end in range(1, len(names) + 1)]
    for pattern in patterns:
        plain = pattern.strip("/")
        if any(fnmatchcase(text, plain) for text in (paths if "/" in plain else names)):
            return pattern
    return None
