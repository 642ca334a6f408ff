"""Stage label: cosines to pseudo-labels."""

from pathlib import Path

import numpy as np
import pyarrow as pa

from cdul_steps.data.corrections import COLUMN, apply_corrections, read_corrections
from cdul_steps.data.manifest import read_split
from cdul_steps.data.stores import open_similarity, read_blocks
from cdul_steps.data.tables import describe, score_table, write_table
from cdul_steps.errors import UserError
from cdul_steps.method.aggregation import build_labels
from cdul_steps.method.similarity import temperature
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
    output: Path,
    corrections: Path | None = None,
) -> None:
    """Write the pseudo-labels of a split: `image_id, path`, a float32 column a class.

    One row an image that has an embedding, in the order of `images`. With `corrections`, the
    entries that they name have their value, and the column `corrected` lists them. Settings and
    class table go into the schema's metadata. Raises UserError for input that does not fit
    together, and for a correction of an image or class that is not there.
    """
    array, classes, scale = open_similarity(similarity, tau)
    tau = temperature(scale) if tau is None else tau
    table = read_split(images, split, ["image_id", "path", "row"])
    rows = table["row"].to_numpy()
    beyond = rows[(rows < 0) | (rows >= array.shape[0])]
    if len(beyond):
        raise UserError(
            f"{images}: row {beyond[0]} of split {split!r} is beyond the {array.shape[0]} rows "
            f"of {similarity}"
        )
    shape = (array.shape[0], len(classes))
    with Progress("label", shape[0], "images") as progress:
        blocks = progress.watch(read_blocks(similarity, array))
        labels = build_labels(blocks, shape, [construction], tau=tau, zeta=zeta, lam=lam)
    labels = labels[construction][rows]
    usable = np.isfinite(labels).all(axis=1)
    if not usable.any():
        raise UserError(f"{similarity}: no image of split {split!r} has a similarity")
    table = table.filter(pa.array(usable))
    labels, facts = labels[usable], {}
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
        similarity={k: v for k, v in array.attrs.items() if k != "classes"},
        software=versions("numpy", "pyarrow", "zarr"),
    )
    write_table(described, output)
    note(f"label: {len(result)} of {len(rows)} images labelled ({construction}, tau {tau:g})")
