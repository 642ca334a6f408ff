"""Command check: estimate the quality of scores from yes/no answers on a sample of them."""

import hashlib
import json
import shutil
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cdul_steps.data.corrections import (
    UNKNOWN,
    apply_corrections,
    corrected_entries,
    read_corrections,
)
from cdul_steps.data.files import check_replaceable, digest, read_json, replacing, write_json
from cdul_steps.data.foreign import ClassNames
from cdul_steps.data.pages import copy_page, page_files
from cdul_steps.data.tables import (
    describe,
    read_facts,
    read_scores,
    read_table,
    require,
    score_table,
    write_table,
)
from cdul_steps.data.thumbnails import write_thumbnails
from cdul_steps.data.truth import match_images, thresholds_of
from cdul_steps.errors import UserError
from cdul_steps.limits import MAX_PIXELS
from cdul_steps.method.checking import (
    LEVEL,
    STEPS,
    Cells,
    Chances,
    ChosenThreshold,
    cells_of_class,
    draw_positives,
    find_threshold,
    fit_chances,
    interval,
    make_cells,
    measure,
    measure_at,
)
from cdul_steps.method.sampling import (
    Design,
    band_shifts,
    design,
    horvitz_thompson,
    permanent_numbers,
)
from cdul_steps.progress import note
from cdul_steps.report.words import estimate_in_words, estimate_table, percent
from cdul_steps.results import CARD as CARD_PATTERN
from cdul_steps.results import WEIGHTS as WEIGHTS_PATTERN

CARD, WEIGHTS = Path(CARD_PATTERN).name, Path(WEIGHTS_PATTERN).name
SCORES, SAMPLE = "scores.parquet", "sample.parquet"
KIND = "check"
HOLDS = (
    *(SCORES, SAMPLE, "data/*.js", "images/*.webp", "*.csv"),
    *(file.name for file in page_files("check")),
)
"""The files of a check; CSV files are the user's and are kept."""
SIDE = 1024
"""Longer side of a photograph on the page, in pixels."""
REFINED = "refined_labels.parquet"
FEW_NAMED, FEW, FEW_YES = 12, 40, 8
"""Minimum answers for an estimate: on named entries for precision; in total and yes for recall."""
FEW_FOR_AP, FEW_FOR_MAP = 60, 150
"""Minimum answers on a class for its average precision, and in total for mAP."""


# -- draw ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Population:
    """The scores to check: `scores` (N, C) of the rows of `table` (image_id, path).

    `open` bool (N, C): entries that nobody has decided. `threshold` (C,): the score from which a
    class counts as named.
    """

    table: pa.Table
    classes: list[str]
    scores: np.ndarray
    open: np.ndarray
    threshold: np.ndarray
    facts: dict[str, Any]

    @cached_property
    def ids(self) -> list[str]:
        return self.table["image_id"].to_pylist()

    def design(self) -> Design:
        seed = self.facts["seed"]
        return design(
            self.scores,
            permanent_numbers(seed, self.ids, self.classes),
            band_shifts(seed, self.classes),
            self.threshold,
            self.open,
        )


def draw_sample(
    *,
    scores: Path,
    output: Path,
    number: int,
    seed: int,
    threshold: float | None,
    only: Sequence[str],
    corrections: Path | None,
) -> None:
    """Write a check of a table of scores: the folder `output` with the page for the answers.

    `number` entries are drawn. If `output` is an earlier check of the same scores, the sample
    grows: it contains the earlier one, and CSV files in the folder are kept. Entries that a person
    has decided are left out: those marked as corrected in the table, those marked as corrected in
    the refined labels next to predictions, and those of `corrections`. Raises UserError for scores
    that cannot be read, and for a folder that is something else or a check of other scores.
    """
    check_replaceable(output, HOLDS)
    population = _read_population(scores, only, threshold, corrections, seed)
    _check_same(output, population)
    drawing = population.design()
    rows, columns = drawing.sample(number)
    if not len(rows):
        raise UserError(f"{scores}: all entries are corrected, so there is nothing left to check")
    asked, place = np.unique(rows, return_inverse=True)
    paths = population.table["path"].take(pa.array(asked)).to_pylist()
    with replacing(output, HOLDS) as part:
        copy_page("check", part)
        for file in output.glob("*.csv"):
            shutil.copy2(file, part)
        shown = write_thumbnails(
            paths,
            part / "images",
            side=SIDE,
            quality=80,
            max_pixels=MAX_PIXELS,
            what="check, images",
        )
        if not all(shown):
            note(f"check: images skipped because they cannot be read: {shown.count(False)}")
        readable = np.array(shown)[place]
        _write_population(population, part / SCORES)
        ids = [population.ids[row] for row in rows]
        sample = pa.table(
            {
                "image_id": ids,
                "class": [population.classes[column] for column in columns],
                "probability": drawing.inclusion(number)[rows, columns],
                # Images may disappear after their questions have been answered.
                "asked": readable,
            }
        )
        write_table(describe(sample, KIND, **population.facts, number=number), part / SAMPLE)
        named = population.scores[rows, columns] >= population.threshold[columns]
        lists = (ids, columns.tolist(), place.tolist(), named.tolist())
        questions = [q for q, can in zip(zip(*lists, strict=True), readable, strict=True) if can]
        index = {
            "id": population.facts["id"],
            "title": population.facts["title"],
            "classes": population.classes,
            "questions": questions,
        }
        (part / "data").mkdir()
        text = f"part({json.dumps(index, separators=(',', ':'))});\n"
        (part / "data/index.js").write_text(text, encoding="ascii")
    if len(questions) < number:
        note(
            f"check: {len(questions)} of {number}: there are no more entries, or images cannot be "
            "read"
        )
    page = output / "index.html"
    note(f"check: {len(questions)} questions about {sum(shown)} images; open {page}")


def _read_population(
    path: Path,
    only: Sequence[str],
    threshold: float | None,
    corrections: Path | None,
    seed: int,
) -> Population:
    table, classes, scores = read_scores(path)
    if "path" not in table.column_names:
        raise UserError(f"{path}: no column 'path', so the images cannot be shown")
    if not scores.size:
        raise UserError(f"{path}: no image has scores")
    if not ((scores >= 0) & (scores <= 1)).all():
        raise UserError(f"{path}: contains scores outside 0..1, which cannot be checked")
    facts = read_facts(path)
    decided = corrected_entries(table, classes)
    ids = table["image_id"].to_pylist()
    beside = path.parent.parent / REFINED
    if path.parent.name == "predictions" and beside.is_file():
        known, names, _ = read_scores(beside)
        if names == classes:
            places = match_images(ids, known["image_id"].to_pylist())
            decided[places >= 0] |= corrected_entries(known, classes)[places[places >= 0]]
    if corrections:
        given = read_corrections(corrections)
        names = list(dict.fromkeys(name for name, _ in given))
        here = {n for n, i in zip(names, match_images(names, ids), strict=True) if i >= 0}
        if elsewhere := len(names) - len(here):
            note(f"check: corrections of images that are not in {path}: {elsewhere}")
        given = {entry: value for entry, value in given.items() if entry[0] in here}
        scratch = np.full(scores.shape, np.nan, np.float32)
        apply_corrections(scratch, ids, classes, given, corrections)
        decided |= np.isfinite(scratch)
    columns = _columns(path, classes, only)
    classes = [classes[column] for column in columns]
    scores, decided = scores[:, columns], decided[:, columns]
    if decided.any():
        note(f"check: left out entries that a person has decided: {np.count_nonzero(decided)}")
    limits = _limits(facts, classes, threshold)
    of = hashlib.blake2b("\n".join([digest(path), *classes]).encode(), digest_size=6).hexdigest()
    return Population(
        table.select(["image_id", "path"]),
        classes,
        scores.astype(np.float64),
        ~decided,
        limits,
        {
            "classes": classes,
            "id": f"{of}-{seed}",
            "title": str(Path(*path.parts[-4:])),
            "seed": seed,
            "thresholds": dict(zip(classes, limits.tolist(), strict=True)),
            "weights": facts.get("weights"),
        },
    )


def _columns(path: Path, classes: list[str], only: Sequence[str]) -> list[int]:
    """The indices of the requested classes; of all classes if none is given."""
    names, found = ClassNames(classes), []
    for name in only:
        if (column := names.find(name)) is None:
            raise UserError(f"{path}: has no class {name!r}; the classes are {', '.join(classes)}")
        found.append(column)
    return sorted(set(found)) or list(range(len(classes)))


def _limits(facts: dict[str, Any], classes: list[str], threshold: float | None) -> np.ndarray:
    """The thresholds (C,) in use: the given one, else those of predictions, else THRESHOLD."""
    if threshold is not None:
        return np.full(len(classes), threshold)
    # The threshold in the facts of labels is the one for making them hard.
    return thresholds_of(facts if "weights" in facts else {}, classes)


def _check_same(output: Path, population: Population) -> None:
    """Raise UserError if `output` is a check of something else."""
    if not (output / SAMPLE).is_file():
        return
    earlier = require(output / SAMPLE, read_facts(output / SAMPLE), "id", "thresholds")
    if earlier["id"] != population.facts["id"]:
        raise UserError(
            f"{output}: is a check of other scores, or with another seed; give a new folder, and "
            "the earlier check stays unchanged"
        )
    if earlier["thresholds"] != population.facts["thresholds"]:
        raise UserError(f"{output}: is a check with other thresholds; give a new folder")


def _write_population(population: Population, path: Path) -> None:
    """Save the scores as drawn from, so that later changes do not affect the estimate."""
    scores = score_table(
        population.table["image_id"],
        population.table["path"],
        population.classes,
        population.scores,
    )
    left_out = pa.array(
        [[population.classes[c] for c in np.flatnonzero(~row)] for row in population.open],
        pa.list_(pa.string()),
    )
    scores = scores.append_column("corrected", left_out)
    write_table(describe(scores, "scores", **population.facts), path)


# -- estimate --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answers:
    """A person's answers to a check: rows and columns of the entries with a yes or no, and which.

    `probability` is the probability with which an entry was drawn. `unknown` counts the entries
    that could not be decided, `asked` all entries of the sample.
    """

    population: Population
    cells: Cells
    rows: np.ndarray
    columns: np.ndarray
    yes: np.ndarray
    probability: np.ndarray
    unknown: int
    asked: int

    @cached_property
    def positives(self) -> np.ndarray:
        """Draws of the number of true entries of each cell, (J, draws)."""
        return self._draw(len(self.yes))

    @cached_property
    def elsewhere(self) -> np.ndarray:
        """The same for as many other images with the same scores."""
        return self._draw(0)

    def _draw(self, known: int) -> np.ndarray:
        """Draws of positives, of which the first `known` answers are certain."""
        chances, random = self._chances
        answered = self.cells.of[self.rows, self.columns][:known]
        return draw_positives(self.cells, chances, answered, self.yes[:known], deepcopy(random))

    @cached_property
    def _chances(self) -> tuple[Chances, np.random.Generator]:
        """What the answers say, and the generator to go on with."""
        answered = self.cells.of[self.rows, self.columns]
        random = np.random.default_rng(self.population.facts["seed"])
        limits = self.population.threshold
        return fit_chances(self.cells, answered, self.yes, limits, random), random

    @property
    def enough(self) -> bool:
        """Whether there are enough answers for recall and for a threshold."""
        return len(self.yes) >= FEW and self.yes.sum() >= FEW_YES

    def of_class(self, column: int) -> "Answers":
        """The answers for a class, without the other classes."""
        of, own = self.population, self.columns == column
        population = replace(
            of,
            classes=[of.classes[column]],
            scores=of.scores[:, [column]],
            open=of.open[:, [column]],
            threshold=of.threshold[[column]],
        )
        return replace(
            self,
            population=population,
            cells=cells_of_class(self.cells, column),
            rows=self.rows[own],
            columns=np.zeros(own.sum(), int),
            yes=self.yes[own],
            probability=self.probability[own],
        )


def read_answers(answers: Path, check: Path) -> Answers:
    """The answers in a corrections file to the questions of the folder `check`.

    Raises UserError for an invalid file, and for an answer to an entry that was not asked.
    """
    facts = read_facts(check / SAMPLE)
    if facts.get("kind") != KIND:
        raise UserError(f"{check}: not a folder written by 'cdul check draw'")
    require(check / SAMPLE, facts, "classes", "thresholds", "seed")
    table, classes, scores = read_scores(check / SCORES)
    limits = thresholds_of(facts, classes)
    population = Population(
        table, classes, scores.astype(np.float64), ~corrected_entries(table, classes), limits, facts
    )
    if not answers.is_file():
        raise UserError(f"{answers}: no such file; 'Download answers.csv' on the page saves it")
    given = np.full(scores.shape, np.nan, np.float32)
    apply_corrections(given, population.ids, classes, read_corrections(answers), answers)
    sample = read_table(check / SAMPLE, ["image_id", "class", "probability", "asked"])
    column = {name: i for i, name in enumerate(classes)}
    probability = np.zeros(scores.shape)
    rows = match_images(sample["image_id"].to_pylist(), population.ids)
    of_class = [column[name] for name in sample["class"].to_pylist()]
    probability[rows, of_class] = sample["probability"].to_numpy()
    others = np.argwhere(np.isfinite(given) & (probability == 0))
    if len(others):
        row, place = others[0]
        raise UserError(
            f"{answers}: {len(others)} answers, the first for {classes[place]!r} of "
            f"{population.ids[row]!r}, were not asked by {check}; give only answers to that check"
        )
    told = np.isfinite(given) & (given != UNKNOWN)
    if not told.any():
        raise UserError(f"{answers}: contains no yes or no to the questions of {check}")
    rows, columns = np.nonzero(told)
    return Answers(
        population,
        make_cells(population.scores, population.open, limits),
        rows,
        columns,
        given[rows, columns] == 1,
        probability[rows, columns],
        int((given == UNKNOWN).sum()),
        int(sample["asked"].to_numpy().sum()),
    )


def estimate_scores(answers: Path, check: Path) -> dict[str, Any]:
    """Estimates, from the answers, for the scores that a check was drawn from; values in 0..1.

    A measure is `[low, middle, high]`, or null if there are too few answers.
    """
    found = read_answers(answers, check)
    over_all, names = _estimate(found, "mAP"), found.population.classes
    spread = [
        found.positives[found.cells.column == column].sum(axis=0).std()
        for column in range(len(names))
    ]
    least_known = [names[column] for column in np.argsort(spread)[::-1][:3]]
    return {
        "answers": len(found.yes),
        "unknown": found.unknown,
        "asked": found.asked,
        "scores": found.population.facts["title"],
        "level": LEVEL,
        "all": over_all,
        "by_design": _by_design(found),
        "classes": {
            name: _estimate(found.of_class(column), "AP")
            | {"threshold": float(found.population.threshold[column])}
            for column, name in enumerate(names)
        },
        "next": least_known,
    }


def _row(values: dict[str, np.ndarray], enough: dict[str, bool]) -> dict[str, list[float] | None]:
    found = {name: interval(draws) if enough[name] else None for name, draws in values.items()}
    return {name: None if value is None else list(value) for name, value in found.items()}


def _estimate(found: Answers, ap: str) -> dict[str, Any]:
    """Measures over all classes of the population; `ap` is the name of average precision."""
    population = found.population
    named = population.scores >= population.threshold
    said = int(named[found.rows, found.columns].sum())
    few_for_ap = FEW_FOR_AP if len(population.classes) == 1 else FEW_FOR_MAP
    enough = {
        "precision": said >= FEW_NAMED,
        "recall": found.enough,
        "f1": found.enough and said >= FEW_NAMED,
        ap: found.enough and len(found.yes) >= few_for_ap,
    }
    counts = {
        "answers": len(found.yes),
        "yes": int(found.yes.sum()),
        "named": int((named & population.open).sum()),
    }
    if not any(enough.values()):
        return counts | dict.fromkeys((*enough, "curve"))
    measures = measure(found.cells, found.positives, population.threshold)
    values = {name: draws[-1] for name, draws in zip(enough, measures, strict=True)}
    return {**counts, **_row(values, enough), "curve": _curve(found)}


def _by_design(found: Answers) -> dict[str, float | None]:
    """Precision and recall as ratios of Horvitz-Thompson totals, which use no model.

    For comparison; their variance is larger.
    """
    named = (found.population.scores >= found.population.threshold)[found.rows, found.columns]
    hits, said, there = (
        horvitz_thompson(part, found.probability) for part in (found.yes & named, named, found.yes)
    )
    return {
        "precision": hits / said if said else None,
        "recall": hits / there if there else None,
    }


def _curve(found: Answers) -> list[dict[str, Any]]:
    """Precision and recall over all classes for each of STEPS as their common threshold."""
    curve = measure_at(found.cells, found.positives, np.array(STEPS))
    answered = found.population.scores[found.rows, found.columns]
    return [
        {"threshold": step}
        | _row(
            {"precision": curve.precision[place], "recall": curve.recall[place]},
            {"precision": int((answered >= step).sum()) >= FEW_NAMED, "recall": found.enough},
        )
        for place, step in enumerate(STEPS)
    ]


def describe_estimate(found: dict[str, Any]) -> str:
    """An estimate as a table for people, in percent."""
    header, body = estimate_table(found)
    rows = [["", *header[1:]], *([str(cell) for cell in row] for row in body)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    lines = [
        "  ".join(
            cell.rjust(width) if 0 < i < 4 else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([*lines, "", *estimate_in_words(found)])


# -- thresholds ------------------------------------------------------------------------------------


def choose_thresholds(
    answers: Path, check: Path, *, precision: float | None, model: Path | None
) -> dict[str, Any]:
    """Thresholds of the classes for a requested `precision`, or for the best F1: see `choose`.

    With a `model`, they are written into its card, together with the estimates from the answers.
    Raises UserError for too few answers, if no threshold reaches the precision, and if the check is
    not of this model.
    """
    found = read_answers(answers, check)
    if model:
        _check_model(model, found)
    if not found.enough:
        raise UserError(
            f"{answers}: too few answers for thresholds: {len(found.yes)}, of which "
            f"{found.yes.sum()} yes; at least {FEW} are needed, of which {FEW_YES} yes"
        )
    result = choose(found, precision)
    if result is None and precision is None:
        raise UserError(f"{check}: no score reaches {STEPS[0]}, the lowest threshold")
    if result is None:
        raise UserError(
            f"{answers}: with these answers, no threshold reaches a precision of {precision:g}; "
            "request a lower precision, or answer more questions on high scores"
        )
    if model:
        thresholds = {name: row["threshold"] for name, row in result["classes"].items()}
        checked = {"answers": result["answers"], "goal": result["goal"], **result["all"]}
        card = read_json(model / CARD)
        card |= {"threshold": result["threshold"], "thresholds": thresholds, "checked": checked}
        write_json(model / CARD, card)
        note(f"check: wrote the thresholds into {model / CARD}; run 'cdul run' again to use them")
    return result


def choose(found: Answers, precision: float | None) -> dict[str, Any] | None:
    """Thresholds from the answers; None if no threshold reaches the `precision`.

    A class with enough answers gets its own threshold; the others share a common one. The measures
    at these thresholds are for other images with the same scores, for which thresholds are used.
    """
    positives, names = found.positives, found.population.classes
    own = [_own_choice(found.of_class(column), precision) for column in range(len(names))]
    # The common threshold is for the classes that need it, if there are any.
    left = np.array([choice is None for choice in own]) | all(own)
    here = left[found.cells.column]
    rest = Cells(found.cells.of, *(part[here] for part in found.cells[1:]))
    common = find_threshold(rest, positives[here], precision, np.array(STEPS))
    if common is None:
        return None
    classes = {
        name: {"threshold": (choice or common).threshold, "own": choice is not None}
        for name, choice in zip(names, own, strict=True)
    }
    chosen = np.array([row["threshold"] for row in classes.values()])
    measures = measure(found.cells, found.elsewhere, chosen)
    values = {"precision": measures.precision[-1], "recall": measures.recall[-1]}
    return {
        "answers": len(found.yes),
        "goal": {"f1": "best"} if precision is None else {"precision": precision},
        "threshold": common.threshold,
        "all": _row(values, dict.fromkeys(values, True)),
        "classes": classes,
    }


def _own_choice(found: Answers, precision: float | None) -> ChosenThreshold | None:
    """The threshold from a class's own answers; None if there are too few."""
    if not found.enough:
        return None
    return find_threshold(found.cells, found.positives, precision, found.cells.lowest)


def _check_model(model: Path, found: Answers) -> None:
    """Raise UserError if a check is not of the predictions of a model."""
    if not (model / WEIGHTS).is_file():
        raise UserError(f"{model}: not a model folder, {WEIGHTS} is missing")
    if found.population.facts.get("weights") != digest(model / WEIGHTS):
        raise UserError(
            f"{model}: the check is not of this model's predictions; draw one from its "
            "predictions/SPLIT.parquet"
        )


def describe_thresholds(found: dict[str, Any]) -> str:
    """Thresholds as a table for people."""
    width = max(len(name) for name in ("class", *found["classes"]))
    lines = [f"{'class':{width}}  threshold  from"]
    for name, row in found["classes"].items():
        source = "its own answers" if row["own"] else "all classes' answers"
        lines.append(f"{name:{width}}  {row['threshold']:9.3f}  {source}")
    bounds = " and ".join(
        f"{name} {percent(found['all'][name])}" for name in ("precision", "recall")
    )
    lines += [
        "",
        f"With these thresholds, over all classes: {bounds} percent, from {found['answers']} "
        "answers, on as many other images like these.",
    ]
    return "\n".join(lines)
