"""Stage label: cosines to pseudo-labels."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import zarr

from cdul_steps.data.corrections import COLUMN, apply_corrections, read_corrections
from cdul_steps.data.manifest import check_classes, check_rows, read_split
from cdul_steps.data.stores import open_similarity, read_blocks
from cdul_steps.data.tables import describe, read_facts, score_table, write_table
from cdul_steps.errors import UserError
from cdul_steps.method.aggregation import build_labels, finish
from cdul_steps.method.calibration import ClassStatistics, class_statistics, find_bias
from cdul_steps.method.similarity import temperature
from cdul_steps.method.snippets import Grid, as_grids, grid_views
from cdul_steps.progress import Progress, note
from cdul_steps.provenance import versions


def views_of(images: Path, grid: Grid | None) -> np.ndarray | slice:
    """The views of a single grid of the manifest `images`, or without `grid` all views.

    Raises UserError where the manifest has no such grid.
    """
    if grid is None:
        return slice(None)
    layout = read_facts(images).get("layout", {})
    if "grid" not in layout:
        raise UserError(f"{images}: does not say which grids there are; leave --grid out")
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
    """Cosines of some views in blocks: `(first image, (n, V, C))`."""
    return ((first, block[:, views]) for first, block in read_blocks(similarity, array))


def learn_statistics(
    similarity: Path, array: zarr.Array, rows: np.ndarray, views: np.ndarray | slice
) -> ClassStatistics:
    """Statistics of the classes over some rows of a store, in a pass over its cosines.

    Raises UserError where none of them has any.
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
    constructions: Sequence[str],
    grid: Grid | None,
    **settings: Any,
) -> dict[str, np.ndarray]:
    """Labels (len(rows), C) of some rows of a store by each construction; see `build_labels`."""
    blocks = read_views(similarity, array, views_of(images, grid)) if len(rows) else ()
    shape = (array.shape[0] if len(rows) else 0, array.shape[2])
    built = build_labels(blocks, shape, constructions, **settings)
    return {name: values[rows] for name, values in built.items()}


def labels_like(
    facts: dict[str, Any], similarity: Path, array: zarr.Array, images: Path, rows: np.ndarray
) -> np.ndarray:
    """Labels (len(rows), C) of some rows of a store, made as the table with these `facts` was.

    With that table's statistics, bias and slope, so another split is judged by the same measure.
    """
    construction = facts["construction"]
    labels = build_rows(
        similarity,
        array,
        images,
        rows,
        [construction],
        facts["grid"],
        tau=facts["tau"],
        zeta=facts["zeta"],
        lam=facts["lambda"],
        statistics=facts["statistics"] and ClassStatistics(**facts["statistics"]),
    )[construction]
    finish(labels, **{key: facts[key] for key in ("bias", "slope", "threshold", "top_k")})
    return labels


def make_labels(
    *,
    similarity: Path,
    images: Path,
    split: str,
    construction: str,
    tau: float | None,
    zeta: float,
    lam: float,
    grid: Grid | None = None,
    standardise: bool = False,
    positives: float | None = None,
    threshold: float | None = None,
    top_k: int | None = None,
    output: Path,
    corrections: Path | None = None,
) -> None:
    """Write the pseudo-labels of a split: `image_id, path`, a float32 column a class.

    One row an image that has an embedding, in the order of `images`. With `positives` the labels
    sum to it, and have the sharpness of the model's own temperature whatever `tau` is. With
    `corrections`, the entries that they name have their value, and the column `corrected` lists
    them. Settings, class table and what was learnt from the split (the statistics of the classes,
    the bias) go into the schema's metadata. Raises UserError for input that does not fit together,
    and for a correction of an image or class that is not there.
    """
    array, classes, scale = open_similarity(similarity, tau)
    check_classes(images, classes, similarity)
    check_rows(images, split, similarity, array.shape[0])
    tau = temperature(scale) if tau is None else tau
    views = views_of(images, grid)
    table = read_split(images, split, ["image_id", "path", "row"])
    rows = table["row"].to_numpy()
    beyond = rows[(rows < 0) | (rows >= array.shape[0])]
    if len(beyond):
        raise UserError(
            f"{images}: row {beyond[0]} of split {split!r} is beyond the {array.shape[0]} rows "
            f"of {similarity}"
        )
    statistics = learn_statistics(similarity, array, rows, views) if standardise else None
    shape = (array.shape[0], len(classes))
    with Progress("label", shape[0], "images") as progress:
        blocks = progress.watch(read_views(similarity, array, views))
        labels = build_labels(
            blocks, shape, [construction], tau=tau, zeta=zeta, lam=lam, statistics=statistics
        )[construction]
    usable = np.isfinite(labels).all(axis=1)[rows]
    if not usable.any():
        raise UserError(f"{similarity}: no image of split {split!r} has a similarity")
    table = table.filter(pa.array(usable))
    # Class by class, as they lie in memory and go to the file.
    labels = np.take(labels.T, rows[usable], axis=1).T
    bias, slope = None, 1.0
    if positives is not None:
        own = array.attrs.get("logit_scale")
        if not (isinstance(own, int | float) and own > 0):
            raise UserError(f"{similarity}: has no attribute 'logit_scale', which positives needs")
        slope = tau / temperature(own)
        try:
            bias = find_bias(labels, positives, slope)
        except ValueError as error:
            raise UserError(
                f"positives: no bias makes the labels of an image sum to {positives:g}: {error}"
            ) from error
    finish(labels, bias=bias, slope=slope, threshold=threshold, top_k=top_k)
    facts = {}
    if corrections:
        entries = read_corrections(corrections)
        ids = table["image_id"].to_pylist()
        corrected = apply_corrections(labels, ids, classes, entries, corrections)
        facts = {"corrections": len(entries)}
    result = score_table(table["image_id"], table["path"], classes, labels)
    if corrections:
        result = result.append_column(COLUMN, corrected)
    described = describe(
        result,
        "scores",
        classes=classes,
        split=split,
        construction=construction,
        tau=tau,
        zeta=zeta,
        **{"lambda": lam, **facts},
        grid=grid,
        statistics=statistics and {k: v.tolist() for k, v in statistics._asdict().items()},
        positives=positives,
        bias=bias,
        slope=slope,
        threshold=threshold,
        top_k=top_k,
        similarity={k: v for k, v in array.attrs.items() if k != "classes"},
        software=versions("numpy", "pyarrow", "zarr"),
    )
    write_table(described, output)
    note(f"label: {len(result)} of {len(rows)} images labelled ({construction}, tau {tau:g})")
