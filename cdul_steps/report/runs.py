"""What the report is of: the files of one combination of data set, encoder, labels, training."""

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
"""Columns of `history.parquet` that are shown; the second need not be there."""


def read_if_there(path: Path) -> dict[str, Any]:
    """A JSON file; empty where there is none. Raises UserError as `read_json` does."""
    return read_json(path) if path.is_file() else {}


@dataclass(frozen=True)
class Run:
    """A labels folder among the results and, once there is one, a training in it.

    What has not been made is empty.
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
        """Where this run lies among the results."""
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
        """The split that the classifier is measured on: test, where there is one."""
        return measured_split(self.splits)

    def encode_tables(self, *splits: str) -> list[Path]:
        """The encode jobs' tables of some splits, or of all, by the shards of the manifest."""
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

        It is the model's own where labels of other software do not say theirs.
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
        """What the pseudo-labels are called in `quality`: there by their construction, and by
        another name where something was done to them after it."""
        own = "pseudo_labels"
        here = self.quality_on(self.measured_split)
        return own if own in here else self.label_facts.construction or own

    @cached_property
    def metrics(self) -> dict[str, Any]:
        """Measures of the classifier."""
        return read_if_there(self.place.path(METRICS)) if self.training else {}

    @cached_property
    def history(self) -> dict[str, list]:
        """The training's columns, a value an epoch."""
        if not self.training:
            return {}
        return read_table(self.place.path(HISTORY), *COLUMNS).to_pydict()

    @cached_property
    def card(self) -> dict[str, Any]:
        """The classifier's card."""
        return read_if_there(self.place.path(CARD)) if self.training else {}

    @property
    def provenance(self) -> dict[str, Any]:
        """What the classifier's card says of how it was made."""
        return self.card.get("provenance", {})

    def truth(self, image_ids: list[str], classes: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """`(truth, counted)` bool (N, C) of images, as it was measured by.

        Images without known truth are not counted.
        """
        convention = self.quality.get("definition", {}).get("difficult", "ignore")
        known = Truth.of(self.images, image_ids, classes, convention)
        truth, counted = np.zeros((2, len(image_ids), len(classes)), dtype=bool)
        truth[known.places], counted[known.places] = known.present, known.counted
        return truth, counted

    def facts(self) -> Iterator[dict[str, Any]]:
        """What the files say of themselves."""
        yield from (self.quality, self.metrics, self.provenance)
        tables = [self.place.path(TEXT), *self.encode_tables()]
        if self.training:
            tables += [self.place.path(PREDICTIONS, split=split) for split in self.splits]
        tables.append(self.place.path(PSEUDO_LABELS))
        yield from (read_facts(table) for table in tables if table.is_file())


def find_runs(folders: Sequence[Path]) -> list[Run]:
    """The labels and trainings that folders of results, of labels or of trainings hold.

    Raises UserError for a folder that is none of these.
    """
    runs: list[Run] = []
    for folder in folders:
        place = folder.absolute()
        if (place / "history.parquet").is_file():
            runs.append(Run(place.parent, place))
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
                f"{folder}: neither a folder of results, nor of labels, nor of a training; "
                "run snakemake first"
            )
        for labels in found:
            trainings = sorted(file.parent for file in labels.glob("*/history.parquet"))
            runs += [Run(labels, training) for training in trainings] or [Run(labels)]
    return list(dict.fromkeys(runs))


def once(runs: Iterable[Run]) -> Iterator[tuple[Run, int]]:
    """Each data set, encoder, labels and training of the runs once, with its depth (1 to 4)."""
    seen = set()
    for run in runs:
        for depth in range(1, len(run.names) + 1):
            if run.names[:depth] not in seen:
                seen.add(run.names[:depth])
                yield run, depth


@dataclass(frozen=True)
class Scored:
    """The classifier's predictions on a split, and the truth of the same images.

    `images` has `image_id` and `path`, `scores` are float32 (N, C), `truth` and `counted` bool
    of the same shape, `threshold` (C,) is that of each class.
    """

    split: str
    images: pa.Table
    classes: list[str]
    scores: np.ndarray
    threshold: np.ndarray
    truth: np.ndarray
    counted: np.ndarray

    @classmethod
    def read(cls, run: Run, split: str) -> "Scored | None":
        """None where the split is not predicted, or none of its images could be."""
        path = run.place.path(PREDICTIONS, split=split)
        if not path.is_file():
            return None
        images, classes, scores = read_scores(path)
        if not len(images):
            return None
        truth = run.truth(images["image_id"].to_pylist(), classes)
        limits = thresholds_of(read_facts(path), classes)
        return cls(split, images, classes, scores, limits, *truth)
