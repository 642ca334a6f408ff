"""Command review: export pseudo-labels to annotation tools and import the corrections."""

import json
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pandas as pd
import pyarrow as pa

from cdul_steps.data.corrections import (
    UNKNOWN,
    corrected_entries,
    read_corrections,
    write_corrections,
)
from cdul_steps.data.files import replacing, write_text
from cdul_steps.data.foreign import ClassNames, as_id, as_number, listed, read_json, same_image
from cdul_steps.data.readers.coco import Annotation, Instances, labels_of, links
from cdul_steps.data.remote import is_url
from cdul_steps.data.sources import is_in_archive
from cdul_steps.data.tables import (
    describe,
    read_facts,
    read_scores,
    read_table,
    score_table,
    write_csv,
    write_table,
)
from cdul_steps.errors import UserError, first_line
from cdul_steps.progress import note

PROPOSAL = "proposal.parquet"
KIND = "review"
SERVED = "/data/local-files/?d="
"""Path at which Label Studio serves local files."""


@dataclass(frozen=True)
class Review:
    """The proposals: one row per image in `table` (image_id, path), `scores` and `state` (N, C).

    The state of an entry is 1 or 0 as proposed, or UNKNOWN if a person could not decide earlier.
    `decided` (N,) is the distance of an image's least decided label from 0.5, scaled to 0..1.
    """

    table: pa.Table
    classes: list[str]
    scores: np.ndarray
    state: np.ndarray
    decided: np.ndarray
    sizes: Path | None
    root: Path | None

    def take(self, rows: np.ndarray) -> "Review":
        """Only these rows, in this order."""
        arrays = {name: getattr(self, name)[rows] for name in ("scores", "state", "decided")}
        return replace(self, table=self.table.take(pa.array(rows)), **arrays)

    def rows(self) -> Iterator[tuple[dict[str, str], np.ndarray, np.ndarray]]:
        """Each image with its scores and its states (C,)."""
        return zip(self.table.to_pylist(), self.scores, self.state, strict=True)

    def named(self, chosen: np.ndarray) -> list[str]:
        """The names of the classes selected by bool (C,)."""
        return [name for name, here in zip(self.classes, chosen, strict=True) if here]


Reviewed = Iterator[tuple[str, set[str], set[str]]]
"""An image's name in the tool, its classes, and the classes that the person could not decide."""


def export_review(
    *,
    labels: Path,
    format_: str,
    output: Path,
    threshold: float,
    limit: int | None,
    images: Path | None,
    root: Path | None,
) -> None:
    """Write pseudo-labels as a folder `output` for an annotation tool: see FORMATS.

    A class is proposed if its label is at least `threshold`. `limit` is the maximum number of
    images, the least decided first. `images` is the manifest, for the sizes that COCO needs; `root`
    is the folder below which the tool finds the images. `proposal.parquet` records the proposals:
    1, 0, or 0.5 if a person could not decide earlier. Raises UserError for labels that cannot be
    read and for an image outside `root`.
    """
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise UserError(
            f"{output}: already exists and may contain people's answers; give a new folder"
        )
    table, classes, scores = read_scores(labels)
    if "path" not in table.column_names:
        raise UserError(f"{labels}: no column 'path', so the tool would not find the images")
    paths = table["path"].to_pylist()
    if format_ != "csv" and any(is_in_archive(path) or is_url(path) for path in paths):
        raise UserError(
            f"{labels}: its images are in archives or on remote storage, which {format_} does not "
            "open; export csv, or use 'cdul check'"
        )
    corrected = corrected_entries(table, classes)
    # An entry that a person has checked is fully decided.
    decided = np.where(corrected, 1, 2 * np.abs(scores - 0.5)).min(axis=1)
    state = np.where(corrected & (scores == UNKNOWN), UNKNOWN, scores >= threshold)
    review = Review(table, classes, scores, state.astype(np.float32), decided, images, root)
    if limit:
        review = review.take(np.argsort(decided, kind="stable")[:limit])
    FORMATS[format_][0](review, output)
    table = review.table
    proposal = score_table(table["image_id"], table["path"], classes, review.state)
    facts = {"classes": classes, "format": format_, "threshold": threshold}
    write_table(describe(proposal, KIND, **facts), output / PROPOSAL)
    note(f"review: {len(table)} images for {format_} in {output}")


def import_review(*, review: Path, file: Path, confirm: bool, output: Path) -> None:
    """Convert people's answers to an exported folder `review` into the corrections file `output`.

    `file` is the tool's export. An entry that differs from the proposal is a correction; with
    `confirm`, so is every entry of an image in the file. An entry with conflicting answers is
    unknown. Existing corrections in `output` are kept, unless there is a new value. Raises
    UserError for a file in another format and for an image or class that was not in the review.
    """
    facts = read_facts(review / PROPOSAL)
    if facts.get("kind") != KIND:
        raise UserError(f"{review}: not a folder written by 'cdul review export'")
    proposal, classes, state = read_scores(review / PROPOSAL)
    names, ids = ClassNames(classes), proposal["image_id"].to_pylist()
    # Every value in the CSV was entered by a person.
    confirm = confirm or facts["format"] == "csv"
    images = _Images(proposal, file, review)
    answers: dict[tuple[int, int], float] = {}
    differ = set()
    for name, values in _answers(file, facts["format"], classes):
        row = images.find(name)
        for label, value in values.items():
            if (column := names.find(label)) is None:
                raise UserError(f"{file}: class {label!r} of image {name!r} is not in {review}")
            if answers.setdefault((row, column), value) != value:
                differ.add((row, column))
    answers |= dict.fromkeys(differ, UNKNOWN)
    found = {
        (ids[row], classes[column]): value
        for (row, column), value in answers.items()
        if confirm or value != state[row, column]
    }
    if images.prefixes:
        shown = ", ".join(sorted(images.prefixes)[:3])
        note(f"review: images found after removing these prefixes of their names: {shown}")
    if differ:
        note(f"review: entries with conflicting answers, now set to unknown: {len(differ)}")
    earlier = read_corrections(output) if output.is_file() else {}
    write_corrections(output, earlier | found)
    note(f"review: {len(found)} corrections; {output} now has {len(earlier | found)}")


def _answers(
    file: Path, format_: str, classes: list[str]
) -> Iterator[tuple[str, dict[str, float]]]:
    """The answers for each image: the values of classes, by the image's name in the tool."""
    if format_ == "csv":
        for (image_id, name), value in read_corrections(file).items():
            yield image_id, {name: value}
        return
    read = FORMATS[format_][1]
    assert read is not None
    try:
        reviewed = list(read(file))
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{file}: not an export of {format_} ({type(error).__name__}: {first_line(error)}); "
            "docs/review.md explains how to export it"
        ) from error
    names = ClassNames(classes)
    for name, present, unknown in reviewed:
        given = {_own_name(names, label): 1.0 for label in present}
        given |= {_own_name(names, label): UNKNOWN for label in unknown}
        yield name, dict.fromkeys(classes, 0.0) | given


def _own_name(names: ClassNames, label: str) -> str:
    """The class name that a label refers to; the label unchanged if there is no such class."""
    index = names.find(label)
    return label if index is None else names.names[index]


class _Images:
    """Finds the images of a review by the names that a tool gives them.

    Tools keep the id, the path or its end, with or without the file's suffix. Some add their own
    folders in front; `prefixes` collects these.
    """

    def __init__(self, proposal: pa.Table, file: Path, review: Path) -> None:
        self.file, self.review = file, review
        self.prefixes: set[str] = set()
        self.found: dict[int, tuple[str, str]] = {}
        self.place: dict[str, int | None] = {}
        for row, path in enumerate(proposal["path"].to_pylist()):
            parts = Path(same_image(path)).absolute().parts
            ends = {Path(*parts[first:]) for first in range(len(parts))}
            for name in {str(p) for end in ends for p in (end, end.with_suffix(""))}:
                self.place[name] = None if name in self.place else row
        for column in ("path", "image_id"):
            texts = proposal[column].to_pylist()
            self.place |= {same_image(text): row for row, text in enumerate(texts)}
            self.place |= {text: row for row, text in enumerate(texts)}

    def find(self, name: str) -> int:
        """The row of an image.

        Raises UserError if no image or more than one matches, and if two names refer to the same
        image after a prefix was removed.
        """
        plain = same_image(name)
        parts = plain.split("/")
        ends = [name, *("/".join(parts[first:]) for first in range(len(parts)))]
        end = next((end for end in ends if end in self.place), None)
        row = self.place[end] if end is not None else None
        if row is None:
            problem = "is not in" if end is None else "matches several images in"
            raise UserError(f"{self.file}: image {name!r} {problem} {self.review}")
        prefix = "" if end in (None, name) else plain.removesuffix(end)
        self.prefixes |= {prefix} - {""}
        other, before = self.found.setdefault(row, (name, prefix))
        if other != name and (before or prefix):
            raise UserError(
                f"{self.file}: {other!r} and {name!r} both match the same image in {self.review}; "
                "use the names that the images have there"
            )
        return row


def _below(path: str, root: Path) -> str:
    try:
        return Path(path).absolute().relative_to(root.absolute()).as_posix()
    except ValueError as error:
        raise UserError(f"{path} is not below --root {root}, so the tool cannot find it") from error


def _write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def _write_csv(review: Review, output: Path) -> None:
    """One row per entry; the person fills in the column `value`."""
    count = len(review.classes)
    frame = pd.DataFrame(
        {
            "image_id": np.repeat(review.table["image_id"].to_pylist(), count),
            "path": np.repeat(review.table["path"].to_pylist(), count),
            "class": np.tile(review.classes, len(review.table)),
            "score": review.scores.reshape(-1).round(4),
            "proposed": np.char.mod("%g", review.state.reshape(-1)),
            "value": "",
        }
    )
    frame["proposed"] = frame["proposed"].replace(f"{UNKNOWN:g}", "unknown")
    with replacing(output / "review.csv") as part:
        write_csv(frame, part)


def _write_label_studio(review: Review, output: Path) -> None:
    """`tasks.json`, with predictions to correct, and the labelling config `labels.xml`."""
    view = ET.Element("View")
    ET.SubElement(view, "Image", name="image", value="$image")
    for name, title in (("present", "In the image"), ("unknown", "Cannot tell")):
        ET.SubElement(view, "Header", value=title)
        choices = ET.SubElement(view, "Choices", name=name, toName="image", choice="multiple")
        for value in review.classes:
            ET.SubElement(choices, "Choice", value=value)
    ET.indent(view)
    tasks = []
    for (image, _, state), decided in zip(review.rows(), review.decided, strict=True):
        chosen = {
            "present": review.named(state == 1),
            "unknown": review.named(state == UNKNOWN),
        }
        result = [
            {"from_name": name, "to_name": "image", "type": "choices", "value": {"choices": names}}
            for name, names in chosen.items()
            if names
        ]
        # Label Studio shows the tasks of the lowest score first.
        served = SERVED + quote(_below(image["path"], review.root or Path("/")))
        tasks.append(
            {
                "data": {"image": served, "image_id": image["image_id"]},
                "predictions": [
                    {"model_version": "cdul", "score": float(decided), "result": result}
                ],
            }
        )
    _write_json(output / "tasks.json", tasks)
    write_text(output / "labels.xml", ET.tostring(view, encoding="unicode") + "\n")


def _read_label_studio(file: Path) -> Reviewed:
    """Label Studio's JSON export; tasks that nobody submitted are left out.

    The last annotation of each person counts. Results of other controls, such as a comment, a
    relation or further choices, are left out and reported.
    """
    others: Counter[str] = Counter()
    ours = 0
    answers = []
    for task in read_json(file, list):
        submitted = [a for a in task["annotations"] if not a.get("was_cancelled")]
        submitted.sort(key=lambda a: str(a.get("updated_at") or a.get("created_at") or ""))
        by_person = {str(annotation.get("completed_by")): annotation for annotation in submitted}
        for annotation in by_person.values():
            chosen: dict[str, set[str]] = {"present": set(), "unknown": set()}
            for item in annotation["result"]:
                control = item.get("from_name") or item.get("type")
                if item.get("type") == "choices" and control in chosen:
                    chosen[control] |= set(item["value"]["choices"])
                    ours += 1
                else:
                    others[str(control)] += 1
            answers.append((task["data"]["image_id"], chosen["present"], chosen["unknown"]))
    if others and not ours:
        raise ValueError(
            f"no results of the controls present and unknown, only of {listed(others)}"
        )
    if others:
        note(f"review: left out results of other controls: {listed(others)}")
    yield from answers


def _write_coco(review: Review, output: Path) -> None:
    """`annotations.json`: each class of an image is a box around the whole image."""
    if review.sizes is None:
        raise UserError("review: coco needs the sizes of the images; give --images images.parquet")
    manifest = read_table(review.sizes, ["image_id", "width", "height"]).to_pylist()
    sizes = {image["image_id"]: (image["width"], image["height"]) for image in manifest}
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, (image, scores, state) in enumerate(review.rows(), 1):
        if image["image_id"] not in sizes:
            raise UserError(f"{review.sizes}: does not contain image {image['image_id']!r}")
        width, height = sizes[image["image_id"]]
        name = image["path"] if review.root is None else _below(image["path"], review.root)
        images.append({"id": number, "file_name": name, "width": width, "height": height})
        for c in np.flatnonzero(state):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": int(c) + 1,
                    "bbox": [0, 0, width, height],
                    "area": width * height,
                    "segmentation": [],
                    "iscrowd": 0,
                    "score": round(float(scores[c]), 4),
                    "attributes": {"unknown": bool(state[c] == UNKNOWN)},
                }
            )
    categories = [{"id": c, "name": name} for c, name in enumerate(review.classes, 1)]
    info = {
        "description": "CDUL pseudo-labels; a box around the whole image is a class of the image"
    }
    _write_json(
        output / "annotations.json",
        {"info": info, "images": images, "categories": categories, "annotations": annotations},
    )


class _Box(Annotation):
    """An annotation, which may state that a person could not decide."""

    attributes: dict[str, Any] | None = None
    unknown: Any = None


class _Reviewed(Instances[_Box]):
    """The export of a tool."""


def _read_coco(file: Path) -> Reviewed:
    coco = read_json(file, _Reviewed)
    names = labels_of(coco, file)
    images: dict[str, tuple[str, set[str], set[str]]] = {}
    for image in coco.images:
        if as_id(image.id) in images:
            raise ValueError(f"two images have the id {as_id(image.id)}")
        images[as_id(image.id)] = (image.file_name, set(), set())
    for image_id, category, box in links(coco, file):
        _, present, unknown = images[image_id]
        is_unknown = _is_set(box.attributes or {"unknown": box.unknown})
        (unknown if is_unknown else present).add(names[category])
    yield from images.values()


def _is_set(attributes: dict[str, Any]) -> bool:
    return as_number(attributes.get("unknown")) not in (None, 0)


def _write_fiftyone(review: Review, output: Path) -> None:
    """`labels.json` of FiftyOne's type FiftyOneImageClassificationDataset."""
    labels = {}
    for image, scores, state in review.rows():
        labels[str(Path(image["path"]).absolute())] = [
            {
                "label": review.classes[c],
                "confidence": round(float(scores[c]), 4),
                "attributes": {"unknown": bool(state[c] == UNKNOWN)},
            }
            for c in np.flatnonzero(state)
        ]
    _write_json(output / "labels.json", {"classes": review.classes, "labels": labels})


def _read_fiftyone(file: Path) -> Reviewed:
    content = read_json(file, dict)
    classes = content.get("classes")
    for path, labels in content["labels"].items():
        present: set[str] = set()
        unknown: set[str] = set()
        # FiftyOne writes null for an image without any label, and a single label without a list.
        labels = labels if isinstance(labels, list) else [labels] if labels is not None else []
        for label in labels:
            label = label if isinstance(label, dict) else {"label": label}
            name = _class_name(label["label"], classes)
            (unknown if _is_set(label.get("attributes", {})) else present).add(name)
        yield path, present, unknown


def _class_name(label: object, classes: list[str] | None) -> str:
    """The class name of a label, which is a name or an index into `classes`."""
    if isinstance(label, str):
        return label
    if isinstance(label, bool) or not isinstance(label, int):
        raise ValueError(f"a label is {label!r}, neither a name nor a number")
    if classes is None or not 0 <= label < len(classes):
        raise ValueError(f"a label is {label}, which is not an index into 'classes'")
    return classes[label]


FORMATS: dict[str, tuple[Callable, Callable | None]] = {
    "csv": (_write_csv, None),
    "label-studio": (_write_label_studio, _read_label_studio),
    "coco": (_write_coco, _read_coco),
    "fiftyone": (_write_fiftyone, _read_fiftyone),
}
"""Formats by name: the function that writes the tool's files, and the one that reads its export."""
