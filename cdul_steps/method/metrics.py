"""Measures of multi-label scores against the ground truth."""

from collections.abc import Callable
from itertools import chain

import numpy as np

from cdul_steps.method.choices import Difficult


def truth_table(
    positive: list, difficult: list, class_count: int, convention: Difficult
) -> tuple[np.ndarray, np.ndarray]:
    """Turn lists of class indices, one list per image, into tables (N, C) of bool.

    Returns `(truth, counted)`. `difficult` has the classes of which an image shows only difficult
    objects: "ignore" leaves those entries out of `counted`, "negative" and "positive" set their
    truth. Raises IndexError for an index outside the class table.
    """
    for index in chain(*positive, *difficult):
        if not 0 <= index < class_count:
            raise IndexError(f"class index {index} is not in 0..{class_count - 1}")
    truth = np.zeros((len(positive), class_count), dtype=bool)
    counted = np.ones_like(truth)
    for row, present in enumerate(positive):
        truth[row, list(present)] = True
    if convention != "negative":
        for row, only_difficult in enumerate(difficult):
            if convention == "positive":
                truth[row, list(only_difficult)] = True
            else:
                counted[row, list(only_difficult)] = False
    return truth, counted


def _precision_recall(truth: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Precision and recall at the score of each positive, from the lowest score up: (P,), (P,).

    Recall changes only there, and in between precision only falls. Images with the same score are
    predicted together.
    """
    every, positive = np.sort(scores), np.sort(scores[truth])
    said = len(every) - np.searchsorted(every, positive)
    hits = len(positive) - np.searchsorted(positive, positive)
    return hits / said, hits / len(positive)


def average_precision(truth: np.ndarray, scores: np.ndarray) -> float:
    """Area under the precision-recall curve over all points, without interpolation, in 0..1.

    `truth` bool (N,) with at least one True, `scores` float (N,) without NaN. The definition is
    that of scikit-learn's `average_precision_score`; each positive adds the same step of recall, so
    this is the mean precision over the positives.
    """
    return float(_precision_recall(truth, scores)[0].mean())


def average_precision_voc07(truth: np.ndarray, scores: np.ndarray) -> float:
    """Mean of the best precision at recall >= 0, 0.1, ..., 1 (VOC2007's 11 points), in 0..1.

    The arguments are those of `average_precision`.
    """
    precision, recall = _precision_recall(truth, scores)
    # A recall of exactly a tenth must count as reached despite rounding.
    points = np.linspace(0, 1, 11)
    return float(np.mean([precision[recall >= point - 1e-9].max() for point in points]))


def mean_average_precision(
    truth: np.ndarray,
    counted: np.ndarray,
    scores: np.ndarray,
    ap: Callable[[np.ndarray, np.ndarray], float] = average_precision,
) -> float | None:
    """mAP in percent over the classes with a positive; None without any.

    `truth` and `counted` are bool (N, C), `scores` float (N, C) without NaN. Entries that are not
    `counted` are left out. Raises ValueError if the numbers of classes differ.
    """
    columns = zip(truth.T, scores.T, counted.T, strict=True)
    values = [ap(shown[here], said[here]) for shown, said, here in columns if shown[here].any()]
    return 100 * float(np.mean(values)) if values else None


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.zeros(np.shape(part)), where=np.asarray(whole) > 0)


def precision_recall_f1(
    truth: np.ndarray, counted: np.ndarray, predicted: np.ndarray
) -> dict[str, float | None]:
    """CP, CR, CF1 (means over classes) and OP, OR, OF1 (over all entries), in 0..1.

    Three bool tables (N, C). Classes without positives are left out of the means; a class that is
    never predicted has precision 0. CF1 is the harmonic mean of CP and CR, as usual. All are None
    if no class has a positive.
    """
    hit = (truth & predicted & counted).sum(axis=0)
    said = (predicted & counted).sum(axis=0)
    there = (truth & counted).sum(axis=0)
    has = there > 0
    if not has.any():
        return dict.fromkeys(("CP", "CR", "CF1", "OP", "OR", "OF1"))
    cp, cr = _share(hit, said)[has].mean(), _share(hit, there)[has].mean()
    op, or_ = _share(hit.sum(), said.sum()), _share(hit.sum(), there.sum())
    pairs = {"C": (cp, cr), "O": (op, or_)}
    return {
        name: float(value)
        for letter, (p, r) in pairs.items()
        for name, value in (
            (f"{letter}P", p),
            (f"{letter}R", r),
            (f"{letter}F1", _share(2 * p * r, p + r)),
        )
    }


def is_top_k(scores: np.ndarray, k: int) -> np.ndarray:
    """Bool (N, C): the `k` classes with the highest scores of each image; ties go to the first."""
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    chosen = np.zeros(scores.shape, dtype=bool)
    np.put_along_axis(chosen, order, True, axis=1)
    return chosen
