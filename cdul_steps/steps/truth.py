"""The ground truth of images, matched to their scores by `image_id`; only measuring reads it."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from cdul_steps.data.manifest import read_truth
from cdul_steps.errors import UserError
from cdul_steps.method.metrics import Difficult, mean_average_precision, truth_table


@dataclass(frozen=True)
class Truth:
    """The truth of those images, of a list of N, of which it is known.

    `places` int (n,): where they stand in the list. `present` and `counted` bool (n, C): whether
    an image shows a class, and whether that entry is measured.
    """

    places: np.ndarray
    present: np.ndarray
    counted: np.ndarray

    @classmethod
    def of(
        cls, images: Path, image_ids: list[str], classes: list[str], difficult: Difficult
    ) -> "Truth":
        """Read it from `images.parquet`; UserError where the class tables differ."""
        table = read_truth(images, classes)
        known = {name: i for i, name in enumerate(table["image_id"].to_pylist())}
        places = [i for i, name in enumerate(image_ids) if name in known]
        table = table.take(pa.array([known[image_ids[i]] for i in places], pa.int64()))
        lists = [[entry or [] for entry in table[n].to_pylist()] for n in ("positive", "difficult")]
        try:
            present, counted = truth_table(*lists, len(classes), difficult)
        except IndexError as error:
            raise UserError(
                f"{images}: names a class beyond the {len(classes)} scored: {error}"
            ) from error
        return cls(np.array(places, dtype=int), present, counted)

    def mean_average_precision(self, scores: np.ndarray) -> float | None:
        """mAP in percent of scores (N, C), NaN counting as 0; None where nothing is known."""
        known = np.nan_to_num(scores[self.places])
        return mean_average_precision(self.present, self.counted, known)
