"""The files of one combination of data set, encoder, labels and training."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import zarr

from cdul_steps.data.files import read_json
from cdul_steps.data.labels import LabelFacts
from cdul_steps.data.stores import open_similarity, read_logit_bias
from cdul_steps.data.tables import read_facts, read_scores, read_table
from cdul_steps.data.truth import Truth, thresholds_of
from cdul_steps.errors import UserError
from cdul_steps.method.scoring import Scoring
from cdul_steps.method.similarity import temperature
from cdul_steps.results import (
    CARD,
    ENCODED,
    HISTORY,
    IMAGES,
    METRICS,
    PREDICTIONS,
    PSEUDO_LABELS,
    QUALITY,
    SHARD,
    SIMILARITY,
    TEXT,
    Place,
    measured_split,
)

COLUMNS = (
    ["epoch", "loss", "label_movement", "label_mAP", "images_per_second"],
    ["train_mAP", "test_mAP"],
)
"""Columns of `history.parquet` that are shown; those in the second list may be missing."""


def read_if_there(path: Path) -> dict[str, Any]:
    """A JSON file; empty if there is none. Raises UserError like `read_json`."""
    return read_json(path) if path.is_file() else {}


def read_estimate(path: Path) -> dict[str, Any]:
    """The output of `cdul check estimate --json`. Raises UserError for any other file."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or not {"all", "classes", "next"} <= found.keys():
        raise UserError(
            f"{path}: not an estimate; give the output of 'cdul check estimate ANSWERS --check "
            "FOLDER --json'"
        )
    return found


@dataclass(frozen=True)
class RunFolder:
    """A labels folder in the results and, if there is one, a training in it.

    Missing results are empty.
    """

    labels: Path
    training: Path | None = None

    @property
    def encoder(self) -> Path:
        return self.labels.parent

    @property
    def dataset(self) -> Path:
        return self.encoder.parent

    @property
    def results(self) -> Path:
        return self.dataset.parent

    @property
    def folder(self) -> Path:
        return self.training or self.labels

    @property
    def names(self) -> tuple[str, ...]:
        """The names of data set, encoder, labels and training."""
        return self.folder.relative_to(self.results).parts

    @cached_property
    def place(self) -> Place:
        """The place of this run in the results."""
        names = zip(("dataset", "encoder", "labels", "training"), self.names, strict=False)
        return Place(self.results, dict(names))

    @property
    def images(self) -> Path:
        return self.place.path(IMAGES)

    @cached_property
    def splits(self) -> list[str]:
        return list(read_facts(self.images)["layout"]["splits"])

    @property
    def measured_split(self) -> str:
        """The split that the classifier is evaluated on: test, if there is one."""
        return measured_split(self.splits)

    def encode_tables(self, *splits: str) -> list[Path]:
        """The encode jobs' tables of some or all splits, for the shards of the manifest."""
        tables = [
            shard.path(ENCODED)
            for split in splits or self.splits
            for shard in self.place.find(SHARD, split=split)
        ]
        return [table for table in tables if table.is_file()]

    def similarity(self, split: str) -> Path:
        return self.place.path(SIMILARITY, split=split)

    def open_similarity(self, split: str) -> tuple[zarr.Array, list[str], Scoring]:
        """The cosines of a split, the classes, and the scoring of the labels.

        The temperature is the model's own if labels of other software do not state theirs.
        """
        store, scoring = self.similarity(split), self.label_facts.scoring
        array, classes, scale = open_similarity(store, self.label_facts.tau)
        if scoring is None:
            scoring = Scoring(temperature(scale), read_logit_bias(array.attrs, store))
        return array, classes, scoring

    @cached_property
    def label_facts(self) -> LabelFacts:
        """How the pseudo-labels were made."""
        return LabelFacts.read(self.place.path(PSEUDO_LABELS))

    @cached_property
    def quality(self) -> dict[str, Any]:
        """Measures of every label construction, by split."""
        return read_if_there(self.place.path(QUALITY))

    def quality_on(self, split: str) -> dict[str, Any]:
        return self.quality.get("splits", {}).get(split, {})

    @property
    def labels_name(self) -> str:
        """The key of the pseudo-labels in `quality`: the construction, or another name if an
        operation followed the construction."""
        own = "pseudo_labels"
        here = self.quality_on(self.measured_split)
        return own if own in here else self.label_facts.construction or own

    @cached_property
    def metrics(self) -> dict[str, Any]:
        """Measures of the classifier."""
        return read_if_there(self.place.path(METRICS)) if self.training else {}

    @cached_property
    def history(self) -> dict[str, list]:
        """The training's columns, with one value per epoch."""
        if not self.training:
            return {}
        return read_table(self.place.path(HISTORY), *COLUMNS).to_pydict()

    @cached_property
    def card(self) -> dict[str, Any]:
        """The classifier's card."""
        return read_if_there(self.place.path(CARD)) if self.training else {}

    @property
    def provenance(self) -> dict[str, Any]:
        """The provenance in the classifier's card."""
        return self.card.get("provenance", {})

    def truth(self, image_ids: list[str], classes: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """`(truth, counted)` bool (N, C) of images, as used for the measures.

        Images without known ground truth are not counted.
        """
        convention = self.quality.get("definition", {}).get("difficult", "ignore")
        known = Truth.of(self.images, image_ids, classes, convention)
        truth, counted = np.zeros((2, len(image_ids), len(classes)), dtype=bool)
        truth[known.places], counted[known.places] = known.present, known.counted
        return truth, counted

    def facts(self) -> Iterator[dict[str, Any]]:
        """The facts stored in the files."""
        yield from (self.quality, self.metrics, self.provenance)
        tables = [self.place.path(TEXT), *self.encode_tables()]
        if self.training:
            tables += [self.place.path(PREDICTIONS, split=split) for split in self.splits]
        tables.append(self.place.path(PSEUDO_LABELS))
        yield from (read_facts(table) for table in tables if table.is_file())


def find_runs(folders: Sequence[Path]) -> list[RunFolder]:
    """The labels and trainings in folders of results, of labels or of trainings.

    Raises UserError for any other folder.
    """
    runs: list[RunFolder] = []
    for folder in folders:
        place = folder.absolute()
        if (place / "history.parquet").is_file():
            runs.append(RunFolder(place.parent, place))
            continue
        found = [
            file.parent
            for file in (
                place / "pseudo_labels.parquet",
                *(labels.path(PSEUDO_LABELS) for labels in Place(place).find(PSEUDO_LABELS)),
            )
            if file.is_file()
        ]
        if not found:
            raise UserError(
                f"{folder}: not a folder of results, of labels or of a training; "
                "run 'cdul run' first"
            )
        for labels in found:
            trainings = sorted(file.parent for file in labels.glob("*/history.parquet"))
            runs += [RunFolder(labels, training) for training in trainings] or [RunFolder(labels)]
    return list(dict.fromkeys(runs))


def unique_levels(runs: Iterable[RunFolder]) -> Iterator[tuple[RunFolder, int]]:
    """Each data set, encoder, labels and training of the runs once, with its depth (1 to 4)."""
    seen = set()
    for run in runs:
        for depth in range(1, len(run.names) + 1):
            if run.names[:depth] not in seen:
                seen.add(run.names[:depth])
                yield run, depth


@dataclass(frozen=True)
class Scored:
    """The classifier's predictions on a split, and the ground truth of the same images.

    `images` has `image_id` and `path`, `scores` are float32 (N, C), `truth` and `counted` are bool
    of the same shape, `threshold` (C,) contains the threshold of each class.
    """

    split: str
    images: pa.Table
    classes: list[str]
    scores: np.ndarray
    threshold: np.ndarray
    truth: np.ndarray
    counted: np.ndarray

    @classmethod
    def read(cls, run: RunFolder, split: str) -> "Scored | None":
        """None if there are no predictions for the split or for any of its images."""
        path = run.place.path(PREDICTIONS, split=split)
        if not path.is_file():
            return None
        images, classes, scores = read_scores(path)
        if not len(images):
            return None
        truth = run.truth(images["image_id"].to_pylist(), classes)
        limits = thresholds_of(read_facts(path), classes)
        return cls(split, images, classes, scores, limits, *truth)
