"""What a reader says of one image."""

from dataclasses import dataclass


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
