"""COCO: one year's instances, as JSON."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Generic, TypeVar

import msgspec

from cdul_steps.data.foreign import ClassNames, Tell, as_id, ignore, read_json
from cdul_steps.data.readers.record import ImageRecord, image_path
from cdul_steps.errors import UserError, first_line, nearest

Id = int | float | str
"""Compared by `as_id`: some software writes text, or numbers with a decimal point."""


class Image(msgspec.Struct, gc=False):
    id: Id
    file_name: str


class Category(msgspec.Struct, gc=False):
    id: Id
    name: str


class Annotation(msgspec.Struct, gc=False):
    image_id: Id
    category_id: Id


Some = TypeVar("Some", bound=Annotation)


class Instances(msgspec.Struct, Generic[Some]):
    images: list[Image]
    categories: list[Category]
    annotations: list[Some] | None = None


def read_coco(
    root: Path, splits: Mapping[str, str], classes: Sequence[str], tell: Tell = ignore
) -> list[ImageRecord]:
    """Read a data set in the layout of COCO.

    root: the folder with `annotations` and a folder of images for each split.
    splits: the value names both: `annotations/instances_{value}.json` and `{value}/`.

    The id is the image's number in the file, and the order is that of the file. A class is present
    if its category has any annotation, including crowds; categories that are not classes are left
    out and reported. Without annotations the truth is unknown. Image files are not checked.

    Raises UserError.
    """
    names = ClassNames(classes)
    records = []
    for split, own in splits.items():
        path = root / "annotations" / f"instances_{own}.json"
        instances = _read(path)
        if not (root / own).is_dir():
            raise UserError(f"{root / own}: no such folder; it must contain the images of {path}")
        positive = _truth(instances, names, path)
        for image in instances.images:
            file = image_path(root / own, image.file_name, path)
            image_id = as_id(image.id)
            known = tuple(sorted(positive[image_id])) if positive is not None else None
            records.append(ImageRecord(image_id, split, file, known))
    names.tell(root, tell)
    return records


def links(instances: Instances[Some], path: Path) -> Iterator[tuple[str, str, Some]]:
    """Each annotation with the ids of its image and its category, as text.

    Raises UserError if the file does not list one of them.
    """
    images = {as_id(image.id) for image in instances.images}
    categories = {as_id(category.id) for category in instances.categories}
    for annotation in instances.annotations or ():
        image, category = as_id(annotation.image_id), as_id(annotation.category_id)
        if image not in images or category not in categories:
            what = f"category {category}" if image in images else f"image {image}"
            raise UserError(
                f"{path}: an annotation is for {what}, which the file does not list; correct it"
            )
        yield image, category, annotation


def labels_of(instances: Instances, path: Path) -> dict[str, str]:
    """The name of each category by its id; UserError if two have the same id."""
    labels: dict[str, str] = {}
    for category in instances.categories:
        key = as_id(category.id)
        if key in labels:
            raise UserError(
                f"{path}: two categories have the same id {key}, {labels[key]!r} and "
                f"{category.name!r}; correct it"
            )
        labels[key] = category.name
    return labels


def _read(path: Path) -> Instances[Annotation]:
    try:
        # Only these fields are decoded: polygons, nine tenths of the file, are skipped.
        return read_json(path, Instances[Annotation])
    except FileNotFoundError as error:
        known = sorted(
            p.stem.removeprefix("instances_") for p in path.parent.glob("instances_*.json")
        )
        raise UserError(
            f"{path}: no such file; 'root' must be the folder that contains 'annotations'; the "
            f"available splits are: {', '.join(known) or 'none'}"
        ) from error
    except (OSError, ValueError, RecursionError) as error:  # ValueError: msgspec's, an empty file's
        raise UserError(f"{path}: not a COCO instances file: {first_line(error)}") from error


def _truth(instances: Instances, names: ClassNames, path: Path) -> dict[str, set[int]] | None:
    """The indices of the classes present, by image id; None if nothing is known."""
    labels = labels_of(instances, path)
    annotated = [(image, category) for image, category, _ in links(instances, path)]
    index = _indices(labels, names, {category for _, category in annotated}, path)
    if instances.annotations is None:
        return None
    positive: dict[str, set[int]] = {as_id(image.id): set() for image in instances.images}
    for image, category in annotated:
        number = index[category]
        if number is None:
            names.find(labels[category])
        else:
            positive[image].add(number)
    return positive


def _indices(
    labels: dict[str, str], names: ClassNames, annotated: set[str], path: Path
) -> dict[str, int | None]:
    """The class of each category id.

    Several categories may have the name of a class if at most one of them is annotated: exporters
    add a root category with the name of its only child and without annotations.
    """
    index: dict[str, int | None] = {}
    used: dict[int, str] = {}
    for key, label in labels.items():
        number = index[key] = names.find(label, 0)
        if number is None or key not in annotated:
            continue
        other = used.setdefault(number, key)
        if other != key:
            raise UserError(
                f"{path}: two categories have the same name, {labels[other]!r} (id {other}) and "
                f"{label!r} (id {key}), and both have annotations; rename one, or merge them"
            )
    for number, name in enumerate(names.names):
        if number not in index.values():
            known = labels.values()
            raise UserError(f"{path}: no category is called {name!r}{nearest(name, known)}")
    return index
