"""Stage review: pseudo-labels to people's tools, and what people corrected back."""

import json
import xml.etree.ElementTree as ET
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
    Corrections,
    corrected_entries,
    read_corrections,
    write_corrections,
)
from cdul_steps.data.files import replacing, write_text
from cdul_steps.data.tables import (
    describe,
    read_facts,
    read_scores,
    read_table,
    score_table,
    write_table,
)
from cdul_steps.errors import UserError, first_line
from cdul_steps.progress import note

PROPOSAL = "proposal.parquet"
KIND = "review"
SERVED = "/data/local-files/?d="
"""Where Label Studio serves the files of its own machine."""


@dataclass(frozen=True)
class Review:
    """What is proposed: a row an image in `table` (image_id, path), `scores` and `state` (N, C).

    The state of an entry is 1 or 0 as proposed, UNKNOWN where a person could not decide earlier.
    `decided` (N,) says how far the least decided label of an image is from 0.5, in 0..1.
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
        """An image with its scores and its states (C,)."""
        return zip(self.table.to_pylist(), self.scores, self.state, strict=True)

    def named(self, chosen: np.ndarray) -> list[str]:
        """The names of the classes chosen by bool (C,)."""
        return [name for name, here in zip(self.classes, chosen, strict=True) if here]


Reviewed = Iterator[tuple[str, set[str], set[str]]]
"""An image as a tool names it, its classes, and the classes that the person could not decide."""


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
    """Write pseudo-labels as a folder `output` that a tool for people reads: see FORMATS.

    A class is proposed from `threshold` on. With `limit`, only so many images, the least decided
    first. `images` is the manifest, for the sizes that COCO wants; `root` the folder below which
    the tool finds the images. `proposal.parquet` keeps what was proposed: 1, 0, or 0.5 where a
    person could not decide earlier. Raises UserError for labels that cannot be read and an image
    outside `root`.
    """
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise UserError(
            f"{output}: is there already, perhaps with answers of people; give a new folder"
        )
    table, classes, scores = read_scores(labels)
    if "path" not in table.column_names:
        raise UserError(f"{labels}: no column 'path', so no tool would find the images")
    corrected = corrected_entries(table, classes)
    # What a person has looked at is as decided as it can be.
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
    """Turn what people made of an exported folder `review` into the corrections file `output`.

    `file` is what the tool gave back. An entry that differs from the proposal is a correction;
    with `confirm` so is every entry of an image in the file. Corrections that `output` holds
    already stay, unless there is a new one. Raises UserError for a file of another form and for
    an image or class that was not in the review.
    """
    facts = read_facts(review / PROPOSAL)
    if facts.get("kind") != KIND:
        raise UserError(f"{review}: not a folder of 'cdul review export'")
    proposal, classes, state = read_scores(review / PROPOSAL)
    place = _places(proposal)
    ids = proposal["image_id"].to_pylist()
    # What stands in the CSV was written there by a person.
    confirm = confirm or facts["format"] == "csv"
    found: Corrections = {}
    for name, values in _answers(file, facts["format"], classes):
        if (row := place.get(name)) is None:
            problem = "is more than one" if name in place else "is none"
            raise UserError(f"{file}: image {name!r} {problem} of those in {review}")
        for label, value in values.items():
            if label not in classes:
                raise UserError(
                    f"{file}: class {label!r} of image {name!r} is none of those in {review}"
                )
            if confirm or value != state[row, classes.index(label)]:
                found[ids[row], label] = value
    earlier = read_corrections(output) if output.is_file() else {}
    write_corrections(output, earlier | found)
    note(f"review: {len(found)} corrections; {output} now has {len(earlier | found)}")


def _answers(
    file: Path, format_: str, classes: list[str]
) -> Iterator[tuple[str, dict[str, float]]]:
    """What a person said of each image: the values of classes, by the image's name in the tool."""
    if format_ == "csv":
        for (image_id, name), value in read_corrections(file).items():
            yield image_id, {name: value}
        return
    read = FORMATS[format_][1]
    try:
        reviewed = list(read(json.loads(file.read_text(encoding="utf-8"))))
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from error
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise UserError(
            f"{file}: not what {format_} gives back ({type(error).__name__}: {first_line(error)}); "
            "docs/review.md says how to export it there"
        ) from error
    for name, present, unknown in reviewed:
        values = dict.fromkeys(classes, 0.0) | dict.fromkeys(present, 1.0)
        yield name, values | dict.fromkeys(unknown, UNKNOWN)


def _places(proposal: pa.Table) -> dict[str, int | None]:
    """Rows by every name that a tool may give an image; None for a name of several.

    Tools keep the path, or its end, with or without the file's suffix.
    """
    place: dict[str, int | None] = {}
    for row, path in enumerate(proposal["path"].to_pylist()):
        parts = Path(path).absolute().parts
        ends = {Path(*parts[first:]) for first in range(len(parts))}
        for name in {str(p) for end in ends for p in (end, end.with_suffix(""))} - {path}:
            place[name] = None if name in place else row
    for name in ("path", "image_id"):
        place |= {text: row for row, text in enumerate(proposal[name].to_pylist())}
    return place


def _below(path: str, root: Path) -> str:
    try:
        return Path(path).absolute().relative_to(root.absolute()).as_posix()
    except ValueError as error:
        raise UserError(f"{path} is not below --root {root}, so the tool cannot find it") from error


def _write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def _write_csv(review: Review, output: Path) -> None:
    """A row an entry; the person fills in the column `value`."""
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
        frame.to_csv(part, index=False)


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


def _read_label_studio(tasks: Any) -> Reviewed:
    """Label Studio's JSON export; tasks that nobody submitted are left out."""
    for task in tasks:
        submitted = [a for a in task["annotations"] if not a.get("was_cancelled")]
        if not submitted:
            continue
        chosen: dict[str, set[str]] = {"present": set(), "unknown": set()}
        for item in submitted[-1]["result"]:
            chosen[item["from_name"]] |= set(item["value"]["choices"])
        yield task["data"]["image_id"], chosen["present"], chosen["unknown"]


def _write_coco(review: Review, output: Path) -> None:
    """`annotations.json`: a class of an image is a box around all of the image."""
    if review.sizes is None:
        raise UserError("review: coco needs the sizes of the images; give --images images.parquet")
    manifest = read_table(review.sizes, ["image_id", "width", "height"]).to_pylist()
    sizes = {image["image_id"]: (image["width"], image["height"]) for image in manifest}
    images, annotations = [], []
    for number, (image, scores, state) in enumerate(review.rows(), 1):
        if image["image_id"] not in sizes:
            raise UserError(f"{review.sizes}: image {image['image_id']!r} is not in it")
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
    info = {"description": "CDUL pseudo-labels; a box around the whole image is a class of it"}
    _write_json(
        output / "annotations.json",
        {"info": info, "images": images, "categories": categories, "annotations": annotations},
    )


def _read_coco(coco: Any) -> Reviewed:
    names = {category["id"]: category["name"] for category in coco["categories"]}
    images = {image["id"]: (image["file_name"], set(), set()) for image in coco["images"]}
    for annotation in coco["annotations"]:
        _, present, unknown = images[annotation["image_id"]]
        is_unknown = _is_set(annotation.get("attributes") or annotation)
        (unknown if is_unknown else present).add(names[annotation["category_id"]])
    yield from images.values()


def _is_set(attributes: dict[str, Any]) -> bool:
    return str(attributes.get("unknown", False)).lower() in ("true", "1")


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


def _read_fiftyone(content: Any) -> Reviewed:
    classes = content.get("classes")
    for path, labels in content["labels"].items():
        present: set[str] = set()
        unknown: set[str] = set()
        # FiftyOne writes null for an image without any label.
        for label in labels or ():
            label = label if isinstance(label, dict) else {"label": label}
            name = label["label"]
            name = classes[name] if isinstance(name, int) else name
            (unknown if _is_set(label.get("attributes", {})) else present).add(name)
        yield path, present, unknown


FORMATS: dict[str, tuple[Callable, Callable | None]] = {
    "csv": (_write_csv, None),
    "label-studio": (_write_label_studio, _read_label_studio),
    "coco": (_write_coco, _read_coco),
    "fiftyone": (_write_fiftyone, _read_fiftyone),
}
"""Formats by name: what writes the tool's files, and what reads the tool's answer."""
