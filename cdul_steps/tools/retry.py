"""Retry images that failed earlier and can be read now."""

from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from cdul_steps.data.images import ImageError, decode
from cdul_steps.data.manifest import read_shard
from cdul_steps.data.outcomes import RETRIED
from cdul_steps.data.tables import read_facts, read_table
from cdul_steps.errors import UserError
from cdul_steps.limits import MAX_PIXELS
from cdul_steps.progress import note
from cdul_steps.results import ENCODED, IMAGES, SHARD, Place


def _readable(path: str, max_pixels: int) -> bool:
    try:
        decode(path, max_pixels=max_pixels)
    except ImageError:
        return False
    return True


def retry_failed(results: Path) -> int:
    """Delete the encode tables of shards with a failed image that can be decoded now.

    Snakemake then remakes only those shards. This is not needed for a replaced file, because the
    manifest tracks sizes and times, but for a file whose permissions or disk were restored. Paths
    are used as in the manifest, relative to the working directory. Returns the number of images
    that can be read now. Raises UserError if no encode table is found.
    """
    shards = list(Place(results).find(ENCODED))
    if not shards:
        raise UserError(
            f"{results}: no tables of the stage encode found; is this the results folder?"
        )
    readable = failing = 0
    for shard in shards:
        table = shard.path(ENCODED)
        outcome = read_table(table, ["image_id", "status"])
        failed = outcome.filter(pc.is_in(outcome["status"], pa.array(RETRIED)))
        if not len(failed):
            continue
        layout = read_facts(shard.path(IMAGES)).get("layout", {})
        _, images, _ = read_shard(shard.path(SHARD))
        paths = dict(zip(*(images[n].to_pylist() for n in ("image_id", "path")), strict=True))
        now = [
            image_id
            for image_id in failed["image_id"].to_pylist()
            if image_id in paths
            and _readable(paths[image_id], layout.get("max_pixels", MAX_PIXELS))
        ]
        failing += len(failed)
        readable += len(now)
        if now:
            table.unlink()
            note(f"retry-failed: {table}: {len(now)} of {len(failed)} can be read now: {now[0]}")
    note(f"retry-failed: {readable} of {failing} failed images can be read now")
    return readable
