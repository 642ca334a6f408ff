"""Labels of a similarity store's images: by a construction, or made as a given table was."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import pyarrow as pa
import zarr
from pydantic import TypeAdapter, ValidationError

from cdul_steps.config import Labels
from cdul_steps.data.stores import context_of, read_blocks
from cdul_steps.data.tables import read_facts, write_scores
from cdul_steps.errors import UserError
from cdul_steps.method.aggregation import build_labels, rescale_and_harden
from cdul_steps.method.calibration import ClassStatistics, class_statistics
from cdul_steps.method.choices import WEIGHT, Construction
from cdul_steps.method.scoring import Scoring
from cdul_steps.method.snippets import Grid, as_grids, grid_views
from cdul_steps.progress import Progress


class LabelRecipe(NamedTuple):
    """How labels are made from cosines, before any further processing."""

    construction: Construction
    scoring: Scoring
    zeta: float
    lambda_: float


@dataclass(frozen=True)
class LabelFacts:
    """How a table of pseudo-labels was made: the settings, and what was learnt from the split.

    `classes` are in the table's order. `logit_bias` is the bias of the sigmoid that made the
    scores, None for a softmax. `statistics` were used to standardise cosines. Labels with
    `positives` were rescaled by `slope` and `bias`. `joined` describes the tables that were
    averaged. `corrections` counts entries corrected by hand. `similarity` names the model of the
    cosines and the context names, which count as at most `context_weight` names. Facts missing
    from a table of other software or an older release have the defaults here; `whole` is false if
    the facts do not suffice to make such labels again.
    """

    classes: list[str] = field(default_factory=list)
    split: str | None = None
    construction: Construction | None = None
    tau: float | None = None
    zeta: float | None = None
    lambda_: float | None = None
    logit_bias: float | None = None
    context_weight: float = WEIGHT
    grid: Grid | None = None
    statistics: dict[str, list[list[float]]] | None = None
    positives: float | None = None
    bias: float | None = None
    slope: float = 1.0
    threshold: float | None = None
    top_k: int | None = None
    joined: list[dict[str, Any]] = field(default_factory=list)
    corrections: int = 0
    similarity: dict[str, Any] = field(default_factory=dict)
    software: dict[str, str] = field(default_factory=dict)
    whole: bool = True

    @property
    def scoring(self) -> Scoring | None:
        """The scoring; None if the table does not record the temperature."""
        if self.tau is None:
            return None
        return Scoring(self.tau, self.logit_bias, self.context_weight)

    @property
    def recipe(self) -> LabelRecipe | None:
        """How to make such labels again; None if the table does not record everything."""
        if not self.whole or None in (self.construction, self.tau, self.zeta, self.lambda_):
            return None
        return LabelRecipe(self.construction, self.scoring, self.zeta, self.lambda_)  # type: ignore[arg-type]

    @property
    def changed(self) -> bool:
        """Whether the labels were changed after their construction."""
        changes = (self.statistics, self.bias, self.threshold, self.top_k)
        return any(change is not None for change in changes)

    @property
    def class_statistics(self) -> ClassStatistics | None:
        """The statistics as arrays."""
        if self.statistics is None:
            return None
        return ClassStatistics(*(np.array(self.statistics[key]) for key in ClassStatistics._fields))

    @property
    def context(self) -> list[str]:
        """The context names that were used: none if a sigmoid made the scores."""
        return [] if self.logit_bias is not None else self.similarity.get("context", [])

    @classmethod
    def of(cls, facts: Mapping[str, Any], source: Path) -> Self:
        """From a table's metadata, or a copy of it in a model card.

        Raises UserError, naming the `source`, for a value of the wrong type.
        """
        keys = {key.name: key.name.rstrip("_") for key in fields(cls) if key.name != "whole"}
        given = {name: facts[key] for name, key in keys.items() if facts.get(key) is not None}
        try:
            found = TypeAdapter(cls).validate_python(given)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise UserError(
                f"{source}: its value of {place!r} for the labels is not valid: {first['msg']}"
            ) from error
        return replace(found, whole=all(key in facts for key in RECIPE_KEYS))

    @classmethod
    def read(cls, path: Path) -> Self:
        """From the metadata of a table; raises UserError as `read_facts` does."""
        return cls.of(read_facts(path), path)

    def write(self, images: pa.Table, labels: np.ndarray, path: Path) -> None:
        """Write a table of labels (N, C) with these facts in its metadata; see `write_scores`."""
        values = {key.name.rstrip("_"): getattr(self, key.name) for key in fields(self)}
        del values["whole"]
        if self.logit_bias is None:
            del values["logit_bias"]
        for key in ("corrections", "joined"):
            if not values[key]:
                del values[key]
        if not self.context:
            del values["context_weight"]
        write_scores(images, values.pop("classes"), labels, path, **values)


RECIPE_KEYS = (
    *("construction", "tau", "zeta", "lambda", "grid", "statistics"),
    *("bias", "slope", "threshold", "top_k"),
)
"""Metadata keys that are needed to make such labels again."""


def choose_bias(settings: Labels, logit_bias: float | None, source: object) -> float | None:
    """The bias of the sigmoid that makes the scores; None for a softmax.

    `settings.scores` decides, or else the model: a sigmoid if it has a `logit_bias`. Raises
    UserError, naming the `source`, for a sigmoid without a bias or with standardised cosines.
    """
    if settings.scores == "sigmoid" and logit_bias is None:
        raise UserError(
            f"{source}: the model has no logit_bias, which 'scores: sigmoid' of the labels needs; "
            "leave out 'scores'"
        )
    if settings.scores == "softmax" or logit_bias is None:
        return None
    if settings.standardise:
        raise UserError(
            f"{source}: 'standardise' removes each class's mean cosine, for which the model's "
            "logit_bias was trained; leave it out, or set 'scores: softmax' of the labels"
        )
    return logit_bias


def views_of(images: Path, grid: Grid | None) -> np.ndarray | slice:
    """The indices (S,) of one grid's views in the manifest `images`; a slice of all without `grid`.

    Raises UserError if the manifest has no such grid.
    """
    if grid is None:
        return slice(None)
    layout = read_facts(images).get("layout", {})
    if "grid" not in layout:
        raise UserError(f"{images}: does not record its grids; leave out the labels' grid")
    known = as_grids(layout["grid"])
    try:
        return grid_views(known, grid)
    except ValueError as error:
        names = ", ".join(f"{rows} x {columns}" for rows, columns in known)
        raise UserError(
            f"{images}: has no grid of {grid[0]} x {grid[1]} snippets, only {names}"
        ) from error


def read_views(
    similarity: Path, array: zarr.Array, views: np.ndarray | slice
) -> Iterator[tuple[int, np.ndarray]]:
    """Cosines of some views in blocks: `(first image, float32 (n, V, C))`; see `read_blocks`."""
    return ((first, block[:, views]) for first, block in read_blocks(similarity, array))


def learn_statistics(
    similarity: Path, array: zarr.Array, rows: np.ndarray, views: np.ndarray | slice
) -> ClassStatistics:
    """Statistics of the classes over some rows of a store, in one pass over its cosines.

    Raises UserError if none of the rows has cosines.
    """
    member = np.zeros(array.shape[0], bool)
    member[rows] = True
    with Progress("statistics", array.shape[0], "images") as progress:
        blocks = progress.watch(read_views(similarity, array, views))
        try:
            return class_statistics(block[member[i : i + len(block)]] for i, block in blocks)
        except ValueError as error:
            raise UserError(f"{similarity}: {error}") from error


def build_rows(
    similarity: Path,
    array: zarr.Array,
    images: Path,
    rows: np.ndarray,
    constructions: Sequence[Construction],
    grid: Grid | None,
    **settings: Any,
) -> dict[str, np.ndarray]:
    """Labels (len(rows), C) of some rows of a store by each construction; see `build_labels`."""
    blocks = read_views(similarity, array, views_of(images, grid)) if len(rows) else ()
    class_count = array.shape[2] - len(context_of(array))
    shape = (array.shape[0] if len(rows) else 0, class_count)
    built = build_labels(blocks, shape, constructions, **settings)
    return {name: values[rows] for name, values in built.items()}


def labels_like(
    facts: LabelFacts, similarity: Path, array: zarr.Array, images: Path, rows: np.ndarray
) -> np.ndarray:
    """Labels of some rows of a store, made as the table with these `facts`: float32 (len(rows), C).

    They use that table's statistics, bias and slope, so that splits are comparable. Raises
    UserError if the context names differ, the facts do not say how the labels were made, or the
    manifest does not have their grid.
    """
    if facts.logit_bias is None and facts.context != context_of(array):
        raise UserError(
            f"{similarity}: its context names are not those of the labels; run 'cdul run', or "
            "'cdul label', again"
        )
    recipe = facts.recipe
    if recipe is None:
        raise UserError("the labels do not record how they were made; use 'cdul label'")
    construction, scoring, zeta, lambda_ = recipe
    labels = build_rows(
        similarity,
        array,
        images,
        rows,
        [construction],
        facts.grid,
        scoring=scoring,
        zeta=zeta,
        lambda_=lambda_,
        statistics=facts.class_statistics,
    )[construction]
    rescale_and_harden(
        labels,
        bias=facts.bias,
        slope=facts.slope,
        threshold=facts.threshold,
        top_k=facts.top_k,
    )
    return labels
