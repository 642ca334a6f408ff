"""Stage label: make pseudo-labels from cosines, or by joining other labels."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cdul_steps.config import Labels
from cdul_steps.data.corrections import COLUMN, apply_corrections, read_corrections
from cdul_steps.data.files import digest
from cdul_steps.data.labels import (
    LabelFacts,
    choose_bias,
    learn_statistics,
    read_views,
    views_of,
)
from cdul_steps.data.manifest import check_classes, check_rows, read_split
from cdul_steps.data.stores import context_of, on_disk, open_similarity, read_logit_bias
from cdul_steps.data.tables import read_facts, read_scores
from cdul_steps.errors import UserError
from cdul_steps.method.aggregation import label_blocks, rescale_and_harden
from cdul_steps.method.calibration import find_bias, pieces
from cdul_steps.method.scoring import Scoring
from cdul_steps.method.similarity import temperature
from cdul_steps.progress import Progress, note
from cdul_steps.provenance import versions

HINT = "set 'tau' among the settings of the labels"


def make_labels(
    *, similarity: Path, images: Path, split: str, settings: Labels, output: Path
) -> None:
    """Write the pseudo-labels of a split: `image_id, path`, one float32 column per class.

    There is one row per image with an embedding, in the order of `images`. With `positives`, the
    labels of an image sum to it on average, and have the sharpness of the model's own temperature
    whatever `tau` is. With `corrections`, the entries that they name get their values, and the
    column `corrected` lists them. The table's metadata is `LabelFacts`. Raises UserError for
    inconsistent input, and for a correction of an image or class that does not exist.
    """
    array, classes, scale = open_similarity(similarity, settings.tau, HINT)
    check_classes(images, classes, similarity)
    check_rows(images, split, similarity, array.shape[0])
    table = _read_rows(images, split, similarity, array.shape[0])
    rows = table["row"].to_numpy()
    tau = temperature(scale) if settings.tau is None else settings.tau
    logit_bias = choose_bias(settings, read_logit_bias(array.attrs, similarity), similarity)
    views, statistics = views_of(images, settings.grid), None
    if settings.standardise:
        statistics = learn_statistics(similarity, array, rows, views)
    # Class by class, which is their order in the file.
    of_rows = on_disk((len(classes), array.shape[0]), output.parent).T
    with Progress("label", array.shape[0], "images") as progress:
        for first, made in label_blocks(
            progress.watch(read_views(similarity, array, views)),
            len(classes),
            [settings.construction],
            scoring=Scoring(tau, logit_bias, settings.context_weight),
            zeta=settings.zeta,
            lambda_=settings.lambda_,
            statistics=statistics,
        ):
            values = made[settings.construction]
            of_rows[first : first + len(values)] = values
    usable = np.concatenate([np.isfinite(piece).all(axis=1) for piece in pieces(of_rows)])[rows]
    if not usable.any():
        raise UserError(f"{similarity}: no image of split {split!r} has a similarity")
    table, rows = table.filter(pa.array(usable)), rows[usable]
    labels = on_disk((len(classes), len(rows)), output.parent).T
    # In the mode "raise" NumPy makes a copy in memory.
    np.take(of_rows.T, rows, axis=1, out=labels.T, mode="clip")
    scratch = of_rows[: len(rows)]
    bias, slope = _calibrate(labels, settings.positives, tau, array.attrs, similarity, scratch)
    rescale_and_harden(labels, bias=bias, slope=slope, **settings.harden.model_dump())
    table, corrections = _corrected(table, classes, labels, settings.corrections)
    facts = LabelFacts(
        classes=classes,
        split=split,
        construction=settings.construction,
        tau=tau,
        zeta=settings.zeta,
        lambda_=settings.lambda_,
        logit_bias=logit_bias,
        context_weight=settings.context_weight,
        grid=settings.grid,
        statistics=statistics and {k: v.tolist() for k, v in statistics._asdict().items()},
        positives=settings.positives,
        bias=bias,
        slope=slope,
        threshold=settings.harden.threshold,
        top_k=settings.harden.top_k,
        corrections=corrections,
        similarity={k: v for k, v in array.attrs.items() if k != "classes"},
        software=versions("numpy", "pyarrow", "zarr"),
    )
    facts.write(table, labels, output)
    if logit_bias is not None and context_of(array):
        note("label: each class has its own sigmoid, so the context names are not used")
    note(
        f"label: {len(table)} of {len(usable)} images labelled ({settings.construction}, "
        f"{'softmax' if logit_bias is None else 'sigmoid'}, tau {tau:g})"
    )


def join_labels(*, tables: Sequence[Path], settings: Labels, output: Path) -> None:
    """Write the mean of several tables of pseudo-labels, for the images that all of them contain.

    The tables have the same split and classes, and come from different teachers or views; the rows
    are in the order of the first. Only `positives`, `harden` and `corrections` of the `settings`
    apply, as in `make_labels`. Raises UserError for tables that do not match, or were corrected.
    """
    read = [read_scores(table) for table in tables]
    # Refined labels record how the original labels were made.
    said = [facts.get("labels", facts) for facts in map(read_facts, tables)]
    parts = [LabelFacts.of(facts, table) for facts, table in zip(said, tables, strict=True)]
    images, classes, _ = read[0]
    for table, (of, names, _), part in zip(tables, read, parts, strict=True):
        if names != classes or part.split != parts[0].split:
            raise UserError(f"{table} and {tables[0]} do not have the same classes and split")
        if COLUMN in of.column_names:
            raise UserError(
                f"{table}: has corrections; join labels without them, and correct the result"
            )
    rows = [{name: i for i, name in enumerate(of["image_id"].to_pylist())} for of, *_ in read]
    common = [name for name in rows[0] if all(name in of for of in rows)]
    if not common:
        raise UserError(f"{tables[0]}: none of its images is in all of the other tables")
    images = images.take(pa.array([rows[0][name] for name in common]))
    places = [[of[name] for name in common] for of in rows]
    joined = np.mean([of[2][place] for of, place in zip(read, places, strict=True)], axis=0)
    bias = None if settings.positives is None else _bias(joined, settings.positives)
    rescale_and_harden(joined, bias=bias, **settings.harden.model_dump())
    images, corrections = _corrected(images, classes, joined, settings.corrections)
    facts = LabelFacts(
        classes=classes,
        split=parts[0].split,
        positives=settings.positives,
        bias=bias,
        threshold=settings.harden.threshold,
        top_k=settings.harden.top_k,
        joined=[
            {k: v for k, v in facts.items() if k not in ("classes", "software")}
            | {"digest": digest(table)}
            for facts, table in zip(said, tables, strict=True)
        ],
        corrections=corrections,
        similarity=parts[0].similarity,
        software=versions("numpy", "pyarrow"),
    )
    facts.write(images, joined, output)
    left_out = len(set().union(*rows)) - len(common)
    note(
        f"label: {len(images)} images labelled by {len(tables)} tables"
        + f"; {left_out} that are not in all of them are left out" * bool(left_out)
    )


def _read_rows(images: Path, split: str, similarity: Path, size: int) -> pa.Table:
    """`image_id, path, row` of a split; the store has `size` rows."""
    table = read_split(images, split, ["image_id", "path", "row"])
    rows = table["row"].to_numpy()
    beyond = rows[(rows < 0) | (rows >= size)]
    if len(beyond):
        raise UserError(
            f"{images}: row {beyond[0]} of split {split!r} is beyond the {size} rows of "
            f"{similarity}"
        )
    return table


def _calibrate(
    labels: np.ndarray,
    positives: float | None,
    tau: float,
    attributes: Mapping[str, Any],
    similarity: Path,
    scratch: np.ndarray,
) -> tuple[float | None, float]:
    """The bias (None without `positives`) and the slope that make labels (N, C) sum to it.

    `scratch` is an array of that shape, whose values are replaced.
    """
    if positives is None:
        return None, 1.0
    own = attributes.get("logit_scale")
    if not (isinstance(own, int | float) and own > 0):
        raise UserError(f"{similarity}: has no attribute 'logit_scale', which positives needs")
    slope = tau / temperature(own)
    return _bias(labels, positives, slope, scratch), slope


def _bias(
    labels: np.ndarray, positives: float, slope: float = 1.0, scratch: np.ndarray | None = None
) -> float:
    """The bias that makes labels (N, C) sum to `positives`; UserError if none does."""
    try:
        return find_bias(labels, positives, slope, scratch=scratch)
    except ValueError as error:
        raise UserError(
            f"positives: no bias makes the labels of an image sum to {positives:g}: {error}"
        ) from error


def _corrected(
    images: pa.Table, classes: list[str], labels: np.ndarray, corrections: str | None
) -> tuple[pa.Table, int]:
    """Apply corrections to labels (N, C): `image_id`, `path` and, if there are any, the corrected
    classes of the images; and the number of corrections."""
    images = images.select(["image_id", "path"])
    if not corrections:
        return images, 0
    entries = read_corrections(Path(corrections))
    ids = images["image_id"].to_pylist()
    corrected = apply_corrections(labels, ids, classes, entries, Path(corrections))
    return images.append_column(COLUMN, corrected), len(entries)
