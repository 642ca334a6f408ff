"""Do the intervals of `cdul check` contain the truth? Simulated reviewers on data with known truth.

    python experiments/checks.py --scores pseudo_labels.parquet --images images.parquet
    python experiments/checks.py --vectors vectors.parquet
    python experiments/checks.py --scores A.parquet --images images.parquet --held-out B.parquet

Every reviewer answers a different sample. As on the page, a question is asked again if its answer
contradicts the score. The tables, in Markdown, go to stdout: how many looks the answers took on
average, how many of 100 intervals of 90 % contain the true value, in how many the value lies below
or above, and, in points, the mean width of the intervals, the mean error of their middle, and its
standard deviation.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from calibrations import read_vectors

from cdul_steps.data.tables import read_scores
from cdul_steps.data.truth import Truth
from cdul_steps.method.aggregation import CONSTRUCTIONS
from cdul_steps.method.calibration import find_bias, rescale
from cdul_steps.method.checking import (
    Measures,
    cells_of_class,
    draw_positives,
    fit_chances,
    make_cells,
    measure,
)
from cdul_steps.method.metrics import average_precision, mean_average_precision
from cdul_steps.method.sampling import band_shifts, design, permanent_numbers
from cdul_steps.method.similarity import scores as scores_of
from cdul_steps.tools.check import (
    FEW,
    FEW_FOR_AP,
    FEW_FOR_MAP,
    FEW_NAMED,
    FEW_YES,
    Answers,
    Population,
    choose,
)

NAMES = ("precision", "recall", "f1", "ap")
FREQUENT = 2
DRAWS = 200
LOOKS = 9
"""Most looks at a question."""


@dataclass(frozen=True)
class Scored:
    """Scores (N, C) with their truth, and the true measures as `Measures`, (C + 1,)."""

    scores: np.ndarray
    truth: np.ndarray
    threshold: np.ndarray

    def measures(self) -> Measures:
        named = self.scores >= self.threshold
        sums = [
            np.append(part.sum(axis=0), part.sum())
            for part in (self.truth & named, named, self.truth)
        ]
        hits, said, there = (part.astype(float) for part in sums)
        ap = [
            average_precision(t, s) if t.any() else np.nan
            for t, s in zip(self.truth.T, self.scores.T, strict=True)
        ]
        counted = np.ones_like(self.truth)
        ap.append((mean_average_precision(self.truth, counted, self.scores) or np.nan) / 100)
        with np.errstate(invalid="ignore"):
            return Measures(hits / said, hits / there, 2 * hits / (said + there), np.array(ap))


def look(
    truth: np.ndarray, named: np.ndarray, wrong: float, random: np.random.Generator
) -> tuple[np.ndarray, int]:
    """The answers to all entries, and how many looks they take.

    As the page asks; see `again` in cdul_steps/check/check.js.
    """
    looks = truth ^ (random.random((LOOKS, len(truth))) < wrong)
    lead = np.where(looks, 1, -1).cumsum(axis=0) - np.where(named, 0, 1)
    decided = np.where(named, (looks[0] == 1) | (abs(lead) >= 2), abs(lead) >= 2)
    decided[-1] = True
    last = decided.argmax(axis=0)
    return lead[last, np.arange(len(truth))] > 0, int((last + 1).sum())


def simulate(data: Scored, size: int, wrong: float, reviewers: int) -> list[Sequence[object]]:
    """Rows of a table: the intervals of several reviewers with `size` answers each."""
    true = data.measures()
    classes = [str(c) for c in range(data.scores.shape[1])]
    ids = [str(i) for i in range(len(data.scores))]
    everything = np.ones(data.scores.shape, bool)
    cells = make_cells(data.scores, everything, data.threshold)
    frequent = np.argsort(-data.truth.sum(axis=0), kind="stable")[:FREQUENT]
    found: dict[tuple[int, str], list[np.ndarray]] = {}
    needed = []
    for seed in range(reviewers):
        random = np.random.default_rng(seed)
        plan = design(
            data.scores,
            permanent_numbers(seed, ids, classes),
            band_shifts(seed, classes),
            data.threshold,
            everything,
        )
        rows, columns = plan.sample(size)
        named = data.scores[rows, columns] >= data.threshold[columns]
        yes, looks = look(data.truth[rows, columns], named, wrong, random)
        needed.append(looks)
        answered = cells.of[rows, columns]
        chances = fit_chances(cells, answered, yes, data.threshold, random, DRAWS)
        positives = draw_positives(cells, chances, answered, yes, random)
        draws = measure(cells, positives, data.threshold)
        for name, values in zip(NAMES, draws, strict=True):
            if name == "ap" and size < FEW_FOR_MAP:
                continue
            found.setdefault((-1, name), []).append(np.nanquantile(values[-1], [0.05, 0.5, 0.95]))
        for column in frequent:
            own = columns == column
            said, yeses = (own & named).sum(), yes[own].sum()
            some = own.sum() >= FEW and yeses >= FEW_YES
            enough = {
                "precision": said >= FEW_NAMED,
                "recall": some,
                "ap": some and own.sum() >= FEW_FOR_AP,
            }
            if not any(enough.values()):
                continue
            alone, limit = cells_of_class(cells, column), data.threshold[[column]]
            answers = alone.of[rows[own], 0], yes[own]
            chances = fit_chances(alone, *answers, limit, random, DRAWS)
            draws = draw_positives(alone, chances, *answers, random)
            of_class = measure(alone, draws, limit)
            for name in (name for name, given in enough.items() if given):
                values = np.nanquantile(getattr(of_class, name)[0], [0.05, 0.5, 0.95])
                found.setdefault((int(column), name), []).append(values)
    rows_ = []
    for (column, name), values in sorted(found.items()):
        low, middle, high = np.array(values).T
        value = getattr(true, name)[column]
        what = "all" if column < 0 else f"class {column}"
        rows_.append(
            [
                f"{np.mean(needed):.0f}",
                what,
                name,
                f"{100 * value:.1f}",
                len(low),
                f"{100 * np.mean((low <= value) & (value <= high)):.0f}",
                f"{100 * np.mean(value < low):.0f}/{100 * np.mean(value > high):.0f}",
                f"{100 * np.mean(high - low):.1f}",
                f"{100 * (np.mean(middle) - value):+.1f}",
                f"{100 * np.std(middle):.1f}",
            ]
        )
    return rows_


def held_out(
    data: Scored, other: Scored, size: int, reviewers: int, precision: float | None
) -> list[object]:
    """A row of a table: the mean quality of thresholds from these answers on other images."""
    count, classes = data.scores.shape
    ids, names = [str(i) for i in range(count)], [str(c) for c in range(classes)]
    table = pa.table({"image_id": ids})
    open_ = np.ones(data.scores.shape, bool)
    cells = make_cells(data.scores, open_, data.threshold)
    found = []
    for seed in range(reviewers):
        population = Population(table, names, data.scores, open_, data.threshold, {"seed": seed})
        rows, columns = population.design().sample(size)
        answers = Answers(
            population,
            cells,
            rows,
            columns,
            data.truth[rows, columns],
            np.ones(size),
            0,
            size,
        )
        chosen = choose(answers, precision)
        if chosen is None:
            continue
        limits = np.array([row["threshold"] for row in chosen["classes"].values()])
        true = Scored(other.scores, other.truth, limits).measures()
        low, _, high = chosen["all"]["precision"]
        own = sum(row["own"] for row in chosen["classes"].values())
        inside, below = low <= true.precision[-1] <= high, true.precision[-1] < low
        found.append([true.precision[-1], true.recall[-1], true.f1[-1], inside, below, own])
    share = 100 * np.array(found, dtype=float)
    plain = other.measures()
    return [
        size,
        "best F1" if precision is None else f"precision {precision:g}",
        len(found),
        *(f"{value:.1f}" for value in share[:, :3].mean(axis=0)),
        f"{share[:, 3].mean():.0f}",
        f"{share[:, 4].mean():.0f}",
        f"{share[:, 5].mean() / 100:.1f}",
        *(f"{100 * value[-1]:.1f}" for value in plain[:3]),
    ]


def show_held_out(data: Scored, other: Scored, reviewers: int) -> None:
    header = ["answers", "goal", "reviewers", "precision", "recall", "F1", "in the interval"]
    header += ["below it", "own thresholds", "at 0.5: precision", "recall", "F1"]
    print(f"| {' | '.join(header)} |\n|{'---|' * len(header)}")
    for precision in (0.8, 0.9, None):
        row = held_out(data, other, 300, reviewers, precision)
        print(f"| {' | '.join(map(str, row))} |", flush=True)


def read(arguments: argparse.Namespace, path: Path | None = None) -> Scored:
    if arguments.vectors:
        cosines, truth, _, tau = read_vectors(arguments.vectors, "negative")
        made = CONSTRUCTIONS["final"](scores_of(cosines.astype(np.float32), 2 * tau), 0.05, 0.0)
        scores = rescale(made, find_bias(made, 1.5, 2), 2)
    else:
        table, classes, scores = read_scores(path or arguments.scores)
        ids = table["image_id"].to_pylist()
        of = Truth.of(arguments.images, ids, classes, "negative")
        scores, truth = scores[of.places], of.present
    if arguments.drop:
        truth = truth.copy()
        truth[:, arguments.drop] = False
    return Scored(scores.astype(float), truth, np.full(scores.shape[1], arguments.threshold))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scores", type=Path)
    parser.add_argument("--images", type=Path)
    parser.add_argument("--vectors", type=Path)
    parser.add_argument("--held-out", type=Path, help="Scores to test thresholds on.")
    parser.add_argument("--threshold", type=float, default=0.5)
    parser.add_argument(
        "--drop", type=int, nargs="*", default=[], help="Classes without positives."
    )
    parser.add_argument("--sizes", type=int, nargs="*", default=[100, 200, 400])
    parser.add_argument("--wrong", type=float, nargs="*", default=[0.0, 0.03])
    parser.add_argument("--reviewers", type=int, default=500)
    arguments = parser.parse_args()
    data = read(arguments)
    if arguments.held_out:
        show_held_out(data, read(arguments, arguments.held_out), arguments.reviewers)
        return
    header = ["answers", "wrong", "looks", "of", "measure", "true", "given", "held", "low/high"]
    header += ["width", "bias", "spread"]
    print(f"| {' | '.join(header)} |\n|{'---|' * len(header)}")
    for wrong in arguments.wrong:
        for size in arguments.sizes:
            for row in simulate(data, size, wrong, arguments.reviewers):
                print(f"| {size} | {wrong:g} | {' | '.join(map(str, row))} |", flush=True)


if __name__ == "__main__":
    main()
