"""What a reader says of one image."""

from dataclasses import dataclass
from pathlib import Path

from cdul_steps.errors import UserError


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


def image_path(folder: Path, name: str, listing: Path) -> str:
    """The path of the image that a `listing` names; UserError if it lies outside `folder`."""
    if name.startswith("/") or ".." in name.split("/"):
        raise UserError(f"{listing}: the image {name!r} lies outside {folder}; correct the list")
    return (folder / name).as_posix()
