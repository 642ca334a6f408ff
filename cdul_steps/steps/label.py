"""Stage label: cosines to pseudo-labels."""

from pathlib import Path

import numpy as np
import pyarrow as pa

from cdul_steps.data.corrections import COLUMN, apply_corrections, read_corrections
from cdul_steps.data.labels import learn_statistics, read_views, views_of
from cdul_steps.data.manifest import check_classes, check_rows, read_split
from cdul_steps.data.stores import open_similarity
from cdul_steps.data.tables import describe, score_table, write_table
from cdul_steps.errors import UserError
from cdul_steps.method.aggregation import build_labels, finish
from cdul_steps.method.calibration import find_bias
from cdul_steps.method.similarity import temperature
from cdul_steps.method.snippets import Grid
from cdul_steps.progress import Progress, note
from cdul_steps.provenance import versions


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
