"""The ground truth of images, matched to scores by `image_id`, and the measures of scores."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cdul_steps.data.foreign import same_image
from cdul_steps.data.manifest import read_truth
from cdul_steps.data.tables import read_scores, read_table
from cdul_steps.errors import UserError
from cdul_steps.method import metrics
from cdul_steps.method.choices import AveragePrecision, Difficult
from cdul_steps.method.metrics import mean_average_precision, truth_table

AP: dict[AveragePrecision, Callable[[np.ndarray, np.ndarray], float]] = {
    "all": metrics.average_precision,
    "voc07": metrics.average_precision_voc07,
}
TOP_K = 3
THRESHOLD = 0.5
DEFINITION = {
    "mAP": "mean over classes with a positive of the average precision, in percent",
    "all": "AP over all points: sum of (recall step x precision), no interpolation",
    "voc07": "AP over 11 points: mean of the best precision at recall >= 0, 0.1, ..., 1",
    "ignore": "images with only difficult objects of a class are left out for that class",
    "negative": "images with only difficult objects of a class count as without it",
    "positive": "images with only difficult objects of a class count as with it",
    "at_threshold": f"a label is predicted if its score is at least {THRESHOLD}",
    "top_k": f"the {TOP_K} highest scores of each image are predicted, whatever their value",
    "CF1, OF1": "harmonic means of CP and CR (means over classes), OP and OR (over all labels)",
}


def thresholds_of(facts: Mapping[str, Any], classes: Sequence[str]) -> np.ndarray:
    """The threshold of each class, float64 (C,), from the facts of predictions.

    `thresholds` has those of single classes; `threshold`, or THRESHOLD, applies to the others.
    """
    own = facts.get("thresholds") or {}
    common = facts.get("threshold", THRESHOLD)
    return np.array([own.get(name, common) for name in classes], dtype=np.float64)


def match_images(image_ids: list[str], known: list[str]) -> np.ndarray:
    """The index of each image among the `known`, compared by `same_image`; -1 for none: (N,)."""
    place = {name: i for i, name in enumerate(known)}
    if not place.keys() >= set(image_ids):
        place = {same_image(name): i for name, i in place.items()} | place
    found = (place.get(name, place.get(same_image(name), -1)) for name in image_ids)
    return np.fromiter(found, np.int64, len(image_ids))


@dataclass(frozen=True)
class Truth:
    """The truth of those images in a list of N for which it is known.

    `places` int (n,): their indices in the list. `present` and `counted` bool (n, C): whether an
    image shows a class, and whether that entry is measured.
    """

    places: np.ndarray
    present: np.ndarray
    counted: np.ndarray

    @classmethod
    def of(
        cls, images: Path, image_ids: list[str], classes: list[str], difficult: Difficult
    ) -> "Truth":
        """Read it from `images.parquet`; UserError if the class tables differ."""
        table = read_truth(images, classes)
        rows = match_images(image_ids, table["image_id"].to_pylist())
        places = np.flatnonzero(rows >= 0)
        table = table.take(pa.array(rows[places]))
        positive, hard = (
            [entry or [] for entry in table[name].to_pylist()] for name in ("positive", "difficult")
        )
        try:
            present, counted = truth_table(positive, hard, len(classes), difficult)
        except IndexError as error:
            raise UserError(
                f"{images}: names a class beyond the {len(classes)} scored: {error}"
            ) from error
        return cls(places, present, counted)

    def mean_average_precision(self, scores: np.ndarray) -> float | None:
        """mAP in percent of scores (N, C), NaN counting as 0; None if nothing is known."""
        known = np.nan_to_num(scores[self.places])
        return mean_average_precision(self.present, self.counted, known)


def measure(
    scores: np.ndarray, truth: Truth, classes: list[str], ap: AveragePrecision
) -> dict[str, Any]:
    """All measures for the images with known truth; values in percent.

    `scores` float (N, C) without NaN have the rows of the list that `truth` was made for.
    A class without positives has AP null, is listed, and is left out of the mean.
    """
    scores, present, counted = scores[truth.places], truth.present, truth.counted
    per_class = {}
    for c, name in enumerate(classes):
        here = counted[:, c]
        positives = int(present[here, c].sum())
        value = AP[ap](present[here, c], scores[here, c]) if positives else None
        per_class[name] = {
            "AP": None if value is None else 100 * value,
            "positives": positives,
            "images": int(here.sum()),
        }
    values = [c["AP"] for c in per_class.values() if c["AP"] is not None]
    at_threshold = metrics.precision_recall_f1(present, counted, scores >= THRESHOLD)
    at_top_k = metrics.precision_recall_f1(present, counted, metrics.is_top_k(scores, TOP_K))
    return {
        "mAP": float(np.mean(values)) if values else None,
        "at_threshold": _percent(at_threshold),
        "top_k": _percent(at_top_k),
        "images": len(scores),
        "positives": int((present & counted).sum()),
        "classes_without_positives": [n for n, c in per_class.items() if not c["positives"]],
        "per_class": per_class,
    }


def measure_table(
    scores: Path, images: Path, difficult: Difficult, ap: AveragePrecision
) -> dict[str, Any]:
    """All measures of a table of scores, as by `measure`.

    Images are matched by `image_id`; those without scores or known truth are left out and counted
    in `left_out`. Raises UserError if classes differ, an image occurs twice, or no image is in
    `images`.
    """
    table, classes, values = read_scores(scores)
    image_ids = table["image_id"].to_pylist()
    if len(set(image_ids)) != len(image_ids):
        raise UserError(f"{scores}: image_id occurs in more than one row")
    truth = Truth.of(images, image_ids, classes, difficult)
    known = read_table(images, ["image_id"])["image_id"].to_pylist()
    found = int((match_images(image_ids, known) >= 0).sum())
    if image_ids and not found:
        raise UserError(
            f"{scores}: none of its {len(image_ids)} images is in {images}: an image_id here is "
            f"{image_ids[0]!r}, and there {(known or ['none'])[0]!r}; give the table of the "
            "same data set"
        )
    return measure(values, truth, classes, ap) | {
        "left_out": {
            "without_scores": pq.read_metadata(scores).num_rows - len(image_ids),
            "not_in_images": len(image_ids) - found,
            "truth_unknown": found - len(truth.places),
        }
    }


def _percent(values: dict[str, float | None]) -> dict[str, float | None]:
    return {name: None if value is None else 100 * value for name, value in values.items()}


def definition(difficult: Difficult, ap: AveragePrecision) -> dict[str, Any]:
    """How the measures are defined, in words, for `metrics.json`."""
    return {
        "difficult": difficult,
        "ap": ap,
        "threshold": THRESHOLD,
        "k": TOP_K,
        "meaning": {
            k: v
            for k, v in DEFINITION.items()
            if k not in {*AP, "ignore", "negative", "positive"} or k in (ap, difficult)
        },
    }
