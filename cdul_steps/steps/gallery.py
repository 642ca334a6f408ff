"""A static web page of images with their scores, which works offline without a server."""

import json
import os
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np
import pyarrow as pa

from cdul_steps.data.corrections import NAMES, corrected_entries
from cdul_steps.data.files import check_replaceable, replacing
from cdul_steps.data.labels import labels_like
from cdul_steps.data.manifest import read_shard, read_split, read_truth
from cdul_steps.data.pages import copy_page, page_files
from cdul_steps.data.remote import is_url, is_web
from cdul_steps.data.sources import is_in_archive
from cdul_steps.data.stores import context_of, open_similarity, read_blocks
from cdul_steps.data.tables import read_facts, read_scores
from cdul_steps.data.thumbnails import write_thumbnails
from cdul_steps.data.truth import thresholds_of
from cdul_steps.errors import UserError
from cdul_steps.method.context import largest_context
from cdul_steps.progress import Progress, note
from cdul_steps.report.runs import RunFolder
from cdul_steps.report.words import labels_in_words
from cdul_steps.results import PREDICTIONS, PSEUDO_LABELS, SHARD, Place
from cdul_steps.results import REFINED as REFINED_LABELS

GALLERY = (
    *("data/index.js", "data/*.js", "thumbnails/*.webp"),
    *(file.name for file in page_files("gallery")),
)
"""The files of a gallery."""
THUMBNAIL = 256
"""Longer side of a thumbnail in pixels."""
PAGE_SIZE = 50
"""Images per data file: a page sorted by score needs about as many files as it shows images."""
CLIP, REFINED, CLASSIFIER = "CLIP", "refined", "classifier"
SHOWN_CONTEXT = 3
"""Number of context names shown per image."""


def make_gallery(*, folder: Path, split: str, output: Path) -> None:
    """Write the gallery of a split of a training's results to the folder `output`.

    `folder` is `{dataset}/{encoder}/{labels}/{training}` below the results, or its
    `{dataset}/{encoder}/{labels}` before any training. The scores are CLIP's labels, for the train
    split the refined labels, and the classifier's predictions, as far as they exist. An earlier
    gallery at `output` is replaced. Raises UserError if there is nothing to show, tables do not
    match, or `output` is something else.
    """
    check_replaceable(output, GALLERY)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give results/DATASET/ENCODER/LABELS/TRAINING")
    folder = folder.resolve()
    labels = folder if (folder / "pseudo_labels.parquet").is_file() else folder.parent
    if not (labels / "pseudo_labels.parquet").is_file():
        raise UserError(
            f"{folder}: no pseudo_labels.parquet here or in the folder above; "
            "give results/DATASET/ENCODER/LABELS/TRAINING"
        )
    run = RunFolder(labels, None if folder == labels else folder)
    columns = ["image_id", "path", "width", "height", "shard", "row"]
    table = read_split(run.images, split, columns)
    classes, kinds, corrections = _read_kinds(run, table, split)
    views, boxes = _read_views(run, classes, table, split), _read_boxes(run.place, split)
    some = np.isfinite(np.stack(list(kinds.values()))).all(axis=2).any(axis=0)
    if not some.any():
        raise UserError(f"{folder}: no image of split {split!r} has a score")
    if not some.all():
        note(f"gallery: images without any score, left out: {np.count_nonzero(~some)}")
    table = table.filter(pa.array(some))
    scores = np.stack([kind[some] for kind in kinds.values()])
    views = _Views(views.names, *(values[some] for values in views[1:]))
    truth = {i["image_id"]: i for i in read_truth(run.images, classes).to_pylist()}
    max_pixels = read_facts(run.images)["layout"]["max_pixels"]

    with replacing(output, GALLERY) as part:
        copy_page("gallery", part)
        drawn = write_thumbnails(
            table["path"].to_pylist(),
            part / "thumbnails",
            side=THUMBNAIL,
            quality=75,
            max_pixels=max_pixels,
            what="gallery, thumbnails",
        )
        if not all(drawn):
            note(f"gallery: unreadable files, shown without thumbnail: {drawn.count(False)}")
        images = [
            {
                "id": image["image_id"],
                "link": _link(image["path"], output),
                "size": [max(1, image["width"]), max(1, image["height"])],
                "thumbnail": drawn[i],
                "positive": truth.get(image["image_id"], {}).get("positive"),
                "difficult": truth.get(image["image_id"], {}).get("difficult") or [],
                "scores": _thousandths(scores[:, i]),
                **_seen_by_clip(views, i, boxes.get(image["image_id"], [])),
            }
            for i, image in enumerate(table.to_pylist())
        ]
        index = {
            "title": " / ".join(run.names),
            "split": split,
            "classes": classes,
            "names": views.names,
            "kinds": list(kinds),
            "thresholds": [_thousandths(_thresholds(run, split, kind, classes)) for kind in kinds],
            "labels": labels_in_words(run.label_facts),
            "truth": any(image["positive"] is not None for image in images),
        }
        if corrections is not None:
            index["corrections"] = corrections
        _write_data(part / "data", index, images, _measures(scores, list(kinds)))
    note(f"gallery: {len(images)} images; open {output / 'index.html'}")


def _read_kinds(
    run: RunFolder, table: pa.Table, split: str
) -> tuple[list[str], dict[str, np.ndarray], list[list[str]] | None]:
    """The classes; each kind of score by name, float32 (images, C), NaN where missing; and the
    corrections of the pseudo-labels, None if those are not of this split."""
    files = {CLIP: run.place.path(PSEUDO_LABELS)}
    if run.training:
        files[REFINED] = run.place.path(REFINED_LABELS)
        files[CLASSIFIER] = run.place.path(PREDICTIONS, split=split)
    if run.label_facts.split not in (None, split):
        files = {kind: file for kind, file in files.items() if kind == CLASSIFIER}
    found: dict[str, tuple[list[str], np.ndarray]] = {}
    if CLIP not in files:
        made = _labels_again(run, table, split)
        if made is not None:
            found[CLIP] = made
    corrections = None
    for kind, file in files.items():
        if file.is_file():
            scored, names, values = read_scores(file)
            found[kind] = names, _in_order(table, scored, values)
            if kind == CLIP:
                corrections = _corrections(scored, names, values)
    if not found:
        raise UserError(f"{run.folder}: no scores of split {split!r}; run 'cdul run' first")
    first, (classes, _) = next(iter(found.items()))
    for kind, (other, _) in found.items():
        if other != classes:
            raise UserError(
                f"{run.folder}: the scores of {first} and {kind} have different class tables; run "
                "'cdul run' again"
            )
    return classes, {kind: values for kind, (_, values) in found.items()}, corrections


def _labels_again(
    run: RunFolder, table: pa.Table, split: str
) -> tuple[list[str], np.ndarray] | None:
    """CLIP's labels for a split without any, made in the same way as the pseudo-labels."""
    facts, similarity = run.label_facts, run.similarity(split)
    if facts.recipe is None:
        note("gallery: CLIP's labels for this split cannot be made here and are left out")
        return None
    array, classes, _ = open_similarity(similarity, facts.tau)
    return classes, labels_like(facts, similarity, array, run.images, table["row"].to_numpy())


def _corrections(table: pa.Table, classes: list[str], labels: np.ndarray) -> list[list[str]]:
    """What people have corrected: `[image_id, class, value]`, as a corrections file spells them."""
    ids = table["image_id"].to_pylist()
    return [
        [ids[row], classes[c], NAMES[float(labels[row, c])]]
        for row, c in np.argwhere(corrected_entries(table, classes))
    ]


def _in_order(images: pa.Table, scored: pa.Table, values: np.ndarray) -> np.ndarray:
    """The scores (n, C) of the images `scored`, in the order of all `images`; NaN where missing."""
    place = {image_id: i for i, image_id in enumerate(scored["image_id"].to_pylist())}
    rows = [place.get(image_id, len(values)) for image_id in images["image_id"].to_pylist()]
    absent = np.full((1, values.shape[1]), np.nan, np.float32)
    return np.concatenate([values, absent])[np.array(rows, np.int64)]


def _thresholds(run: RunFolder, split: str, kind: str, classes: list[str]) -> np.ndarray:
    """The threshold of each class, float64 (C,)."""
    predictions = run.place.path(PREDICTIONS, split=split) if kind == CLASSIFIER else None
    return thresholds_of(read_facts(predictions) if predictions else {}, classes)


class _Views(NamedTuple):
    """CLIP's scores of the views of images, by indices in `names`: the classes, then the context.

    tops, top_scores: the best name of each view and its score, int and float32 (images, 1+S).
    share: the context's share of the whole image, float32 (images,). context, context_scores: the
    names with the largest shares, int and float32 (images, up to SHOWN_CONTEXT).
    """

    names: list[str]
    tops: np.ndarray
    top_scores: np.ndarray
    share: np.ndarray
    context: np.ndarray
    context_scores: np.ndarray


def _read_views(run: RunFolder, classes: list[str], table: pa.Table, split: str) -> _Views:
    """CLIP's scores of the images of `table`, with the scoring of the labels."""
    similarity = run.similarity(split)
    array, names, scoring = run.open_similarity(split)
    if names != classes:
        raise UserError(
            f"{similarity}: its classes differ from those of the scores; run 'cdul run'"
        )
    context = context_of(array) if scoring.logit_bias is None else []
    found = []
    with Progress("gallery, snippets", array.shape[0], "images") as progress:
        for _, cosines in progress.watch(read_blocks(similarity, array)):
            scores = scoring(cosines, len(classes))
            largest = largest_context(scores[:, 0], len(classes), SHOWN_CONTEXT)
            found.append((scores.argmax(axis=2), scores.max(axis=2), *largest))
    rows = table["row"].to_numpy()
    columns = (np.concatenate(column)[rows] for column in zip(*found, strict=True))
    return _Views([*classes, *context], *columns)


def _seen_by_clip(views: _Views, image: int, boxes: list[list[int]]) -> dict[str, Any]:
    """The scores of an image's views and their boxes, for the page; empty without scores."""
    seen = bool(np.isfinite(views.top_scores[image]).all())
    return {
        # The whole image comes first, then its snippets.
        "top": views.tops[image].tolist() if seen else [],
        "top_scores": _thousandths(views.top_scores[image]) if seen else [],
        "context": _thousandths(views.share[image]) if seen else -1,
        "context_top": views.context[image].tolist() if seen else [],
        "context_scores": _thousandths(views.context_scores[image]) if seen else [],
        "boxes": boxes if seen else [],
    }


def _read_boxes(dataset: Place, split: str) -> dict[str, list[list[int]]]:
    """The boxes of snippets by image id: left, top, width, height in thousandths of the image."""
    found: dict[str, list[list[int]]] = {}
    for shard in dataset.find(SHARD, split=split):
        _, images, views = read_shard(shard.path(SHARD))
        x0, y0, x1, y1 = np.moveaxis(views[:, 1:].astype(float), 2, 0)
        sizes = np.maximum(views[:, :1, 2:], 1)
        boxes = np.stack([x0, y0, x1 - x0, y1 - y0], axis=2) / np.tile(sizes, 2)
        found.update(zip(images["image_id"].to_pylist(), _thousandths(boxes), strict=True))
    return found


def _measures(scores: np.ndarray, kinds: list[str]) -> dict[str, np.ndarray]:
    """The measures for selecting and sorting images, from scores (kinds, N, C).

    `score` and `uncertainty` 1 - |2 s - 1| are (kinds, N, C); `disagreement` of CLIP and
    classifier and `change` by the refinement are absolute differences, (N, C) if both exist.
    """
    of = dict(zip(kinds, scores, strict=True))
    found = {"scores": scores, "uncertainty": 1 - np.abs(2 * scores - 1)}
    for name, kind in (("disagreement", CLASSIFIER), ("change", REFINED)):
        if CLIP in of and kind in of:
            found[name] = np.abs(of[kind] - of[CLIP])
    return found


def _link(path: str, output: Path) -> str | None:
    """URL of an image's file, relative to the page; None for one that a browser cannot open."""
    if is_web(path):
        return path
    if is_in_archive(path) or is_url(path):
        return None
    return quote(os.path.relpath(Path(path).resolve(), output.resolve()))


def _thousandths(values: np.ndarray | float) -> Any:
    """Values in thousandths as integers in nested lists, for JSON; -1 for NaN."""
    values = np.asarray(values, dtype=np.float64)
    return np.where(np.isnan(values), -1, np.rint(1000 * values)).astype(int).tolist()


def _write_data(
    folder: Path,
    index: dict[str, Any],
    images: list[dict[str, Any]],
    measures: dict[str, np.ndarray],
) -> None:
    """Write the data files: `index`, `page-N` of the images, and `class-N` of the measures.

    They are scripts, because a page opened from a disk may not read other files.
    """
    folder.mkdir()
    over_classes = {name: np.mean if name == "uncertainty" else np.max for name in measures}
    any_class = {name: over_classes[name](values, axis=-1) for name, values in measures.items()}
    parts: dict[str, Any] = {
        "index": {
            **index,
            "images": len(images),
            "page_size": PAGE_SIZE,
            "any": {name: _thousandths(values) for name, values in any_class.items()},
        }
    }
    for first in range(0, len(images), PAGE_SIZE):
        parts[f"page-{first // PAGE_SIZE}"] = images[first : first + PAGE_SIZE]
    for c in range(len(index["classes"])):
        of_class = {name: _thousandths(values[..., c]) for name, values in measures.items()}
        parts[f"class-{c}"] = of_class
    for name, value in parts.items():
        text = f"part({json.dumps(name)},{json.dumps(value, separators=(',', ':'))});\n"
        (folder / f"{name}.js").write_text(text, encoding="ascii")
