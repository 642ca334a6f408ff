"""Retry images that failed earlier and can be read now."""

from functools import cache
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from cdul_steps.data.images import ImageError, decode
from cdul_steps.data.manifest import read_present
from cdul_steps.data.outcomes import RETRIED
from cdul_steps.data.tables import read_facts, read_table
from cdul_steps.errors import UserError
from cdul_steps.limits import MAX_PIXELS
from cdul_steps.progress import note
from cdul_steps.results import APPLIED, ENCODED, FEATURE_TABLE, IMAGES, SHARD, Place


def _readable(path: str, max_pixels: int) -> bool:
    try:
        decode(path, max_pixels=max_pixels)
    except ImageError:
        return False
    return True


def retry_failed(results: Path) -> int:
    """Delete the tables of shards with a failed image that can be decoded now.

    They are the tables of encode, features and apply_shard, and for second views the shard's boxes.
    Snakemake then remakes only those shards. This is not needed for a replaced file, because the
    manifest tracks sizes and times, but for a file whose permissions or disk were restored. Paths
    are used as in the manifest, relative to the working directory. Returns the number of images
    that can be read now. Raises UserError if no such table is found.
    """
    tables = [
        (shard, shard.path(pattern))
        for pattern in (ENCODED, FEATURE_TABLE, APPLIED)
        for shard in Place(results).find(pattern)
    ]
    if not tables:
        raise UserError(
            f"{results}: no tables of encode, features or apply_shard found; is this the results "
            "folder?"
        )
    readable, failing = set[str](), set[str]()
    is_readable = cache(_readable)
    for shard, table in tables:
        outcome = read_table(table, ["image_id", "status"])
        failed = outcome.filter(pc.is_in(outcome["status"], pa.array(RETRIED)))
        # The manifest of second views is missing if their boxes are to be made again.
        if not len(failed) or not shard.path(SHARD).exists():
            continue
        layout = read_facts(shard.path(IMAGES)).get("layout", {})
        facts, images = read_present(shard.path(SHARD), shard.path(IMAGES))
        paths = dict(zip(*(images[n].to_pylist() for n in ("image_id", "path")), strict=True))
        asked = [paths[name] for name in failed["image_id"].to_pylist() if name in paths]
        now = [path for path in asked if is_readable(path, layout.get("max_pixels", MAX_PIXELS))]
        failing.update(asked)
        readable.update(now)
        if now:
            # An image that could not be read has no boxes to encode.
            remade = shard.path(SHARD) if "boxes" in facts else table
            remade.unlink(missing_ok=True)
            note(f"retry-failed: {remade}: {len(now)} of {len(failed)} can be read now: {now[0]}")
    note(f"retry-failed: {len(readable)} of {len(failing)} failed images can be read now")
    return len(readable)
