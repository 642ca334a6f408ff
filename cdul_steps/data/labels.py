"""Labels of a similarity store's images: by a construction, or made in the way of a table."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from cdul_steps.data.stores import read_blocks
from cdul_steps.data.tables import read_facts
from cdul_steps.errors import UserError
from cdul_steps.method.aggregation import build_labels, finish
from cdul_steps.method.calibration import ClassStatistics, class_statistics
from cdul_steps.method.snippets import Grid, as_grids, grid_views
from cdul_steps.progress import Progress


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
