"""Stage similarity: embeddings and class embeddings to cosines."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cdul_steps.data.stores import new_store, open_store, read_blocks, shard_rows, write_metadata
from cdul_steps.data.tables import read_facts, read_table
from cdul_steps.errors import UserError
from cdul_steps.method.similarity import cosine, unit
from cdul_steps.progress import Progress, note
from cdul_steps.provenance import versions


def write_store(*, images: Path, split: str, text: Path, store: Path) -> None:
    """Write the `zarr.json` of a split's embeddings: float16 (N, 1+S, D), its shards being
    the encode jobs' business."""
    facts = read_facts(images)
    layout = facts["layout"]
    dimension = len(read_table(text, ["embedding"])["embedding"][0])
    shape = (facts["rows"][split], layout["views"], dimension)
    write_metadata(store, shape, layout["shard_size"], "float16", {"kind": "embeddings"})


def check_failures(
    images: Path, split: str, tables: Sequence[Path], max_failed_share: float
) -> pa.Table:
    """The failed images of a split: `image_id, status, error`.

    Raises UserError naming the first ten where they are more than `max_failed_share` of it.
    """
    members = read_table(images, ["image_id", "split", "row"])
    members = members.filter(pc.equal(members["split"], split))
    outcome = pa.concat_tables([read_table(t, ["row", "status", "error"]) for t in tables])
    joined = members.join(outcome, "row", join_type="left outer").sort_by("row")
    status = pc.fill_null(joined["status"], "absent")
    joined = joined.set_column(joined.column_names.index("status"), "status", status)
    failed = joined.filter(pc.not_equal(status, "ok")).select(["image_id", "status", "error"])
    if len(failed) > max_failed_share * len(members):
        first = "; ".join(f"{f['image_id']}: {f['status']}" for f in failed[:10].to_pylist())
        raise UserError(
            f"{split}: {len(failed)} of {len(members)} images cannot be used, more than "
            f"max_failed_share = {max_failed_share:g} allows: {first}"
        )
    return failed


def make_similarity(
    *,
    store: Path,
    text: Path,
    images: Path,
    split: str,
    tables: Sequence[Path],
    max_failed_share: float,
    output: Path,
) -> None:
    """Write float32 cosines (N, 1+S, C) with attributes `classes` and `logit_scale`.

    Rows without an embedding stay NaN. Raises UserError where too many images failed, or where
    embeddings and class embeddings are of different sizes.
    """
    failed = check_failures(images, split, tables, max_failed_share)
    if len(failed):
        note(f"similarity: {split}: {len(failed)} images cannot be used and are left out")
    array = open_store(store)
    facts = read_facts(text)
    table = read_table(text, ["class", "embedding"])
    classes = unit(np.stack(table["embedding"].to_numpy()))
    if classes.shape[1] != array.shape[2]:
        raise UserError(
            f"{store} holds vectors of {array.shape[2]} values and {text} of {classes.shape[1]}; "
            "they are of different encoders"
        )
    attributes = {
        "kind": "similarity",
        "classes": table["class"].to_pylist(),
        "logit_scale": facts["logit_scale"],
        "model": facts["model"],
        "pretrained": facts["pretrained"],
        "templates": facts["templates"],
        "software": versions("numpy", "zarr"),
    }
    shape = (*array.shape[:2], len(classes))
    size = shard_rows(array)
    with (
        new_store(output, shape, size, "float32", attributes) as similarity,
        Progress("similarity", shape[0], "images") as progress,
    ):
        for first, rows in read_blocks(store, array):
            similarity[first : first + len(rows)] = cosine(rows, classes)
            progress.update(len(rows))
