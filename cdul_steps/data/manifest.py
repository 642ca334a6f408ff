"""The manifest's tables: `images.parquet`, and the views of a shard."""

from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cdul_steps.data.foreign import same
from cdul_steps.data.tables import read_facts, read_table
from cdul_steps.errors import UserError

IMAGES_KIND = "images"
SHARD_KIND = "shard"
CORNERS = ("x0", "y0", "x1", "y1")
# Columns of a shard; a shard whose rows have not changed is not written again.
IMAGE_COLUMNS = ("image_id", "path", "row", "bytes", "modified", "width", "height")
IMAGE_SCHEMA = pa.schema(
    [(name, pa.string() if name in ("image_id", "path") else pa.int64()) for name in IMAGE_COLUMNS]
)


def read_split(images: Path, split: str, columns: list[str]) -> pa.Table:
    """Columns of `images.parquet` for one split, in its order; UserError if it is empty."""
    table = read_table(images, ["split", *columns])
    found = table.filter(pc.equal(table["split"], split)).drop_columns("split")
    if not len(found):
        splits = ", ".join(map(str, pc.unique(table["split"]).to_pylist()))
        raise UserError(f"{images}: no image of split {split!r}; it has {splits}")
    return found


def shards_of(facts: dict[str, Any], split: str) -> range:
    """The shards of a split, from the facts of `images.parquet`."""
    return range(-(-facts["rows"][split] // facts["layout"]["shard_size"]))


def check_classes(images: Path, classes: list[str], owner: object) -> None:
    """Raise UserError if `images.parquet` has other classes, or a different order."""
    named = read_facts(images).get("classes", classes)
    if [same(name) for name in named] == [same(name) for name in classes]:
        return
    known = {same(name) for name in named}
    if extra := [name for name in classes if same(name) not in known]:
        given = {same(name) for name in classes}
        missing = [name for name in named if same(name) not in given]
        raise UserError(
            f"{images} has no class {_shown(extra)}, which {owner} has"
            + f", and has {_shown(missing)} instead" * bool(missing)
            + ": not the same class table, or columns that are not classes"
        )
    place = next(i for i, pair in enumerate(zip_longest(named, classes)) if len({*pair}) > 1)
    mine, theirs = (", ".join(names[place : place + 5]) or "none" for names in (named, classes))
    raise UserError(
        f"{images} has {len(named)} classes and {owner} {len(classes)}, which differ from number "
        f"{place + 1} on: {mine}, ... and {theirs}, ...: not the same class table"
    )


def _shown(names: list[str]) -> str:
    return ", ".join([*map(repr, names[:5]), *["..."] * (len(names) > 5)])


def check_rows(images: Path, split: str, store: Path, rows: int) -> None:
    """Raise UserError if a store's number of rows is not the manifest's for the split."""
    given = read_facts(images).get("rows")
    expected = given.get(split, rows) if isinstance(given, dict) else rows
    if rows != expected:
        raise UserError(
            f"{store} has {rows} rows and {images} gives split {split!r} {expected}: they are not "
            "from the same data set, or one of them is out of date"
        )


def read_truth(images: Path, classes: list[str]) -> pa.Table:
    """Ground truth of the images for which it is known: `image_id, positive, difficult`.

    Images without a list of positives, or marked as not `known`, are left out; `difficult` may
    be null. Raises UserError if the table's own class names are not `classes`.
    """
    check_classes(images, classes, "the scores")
    table = read_table(images, ["image_id"], ["positive", "difficult", "known"])
    for name in ("positive", "difficult"):
        if name not in table.column_names:
            table = table.append_column(name, pa.nulls(len(table), pa.list_(pa.int32())))
    known = pc.is_valid(table["positive"])
    if "known" in table.column_names:
        known = pc.and_(known, pc.fill_null(table["known"], False))
    return table.filter(known).select(["image_id", "positive", "difficult"])


def read_shard(manifest: Path) -> tuple[dict[str, Any], pa.Table, np.ndarray]:
    """Read a shard's manifest: its facts, its images and their views.

    The images are `image_id, path, row`, in the order of their rows; the views are int32
    (images, 1+S, 4) as `x0, y0, x1, y1` in pixels. Raises UserError for another kind of file.
    """
    facts = read_facts(manifest)
    if facts.get("kind") != SHARD_KIND:
        raise UserError(f"{manifest}: not the manifest of a shard; make it with 'cdul manifest'")
    table = read_table(manifest, ["image_id", "path", "row", *CORNERS])
    try:
        views = facts["views"]
        shards = table["row"].to_numpy() // max(1, facts["shard_size"])
        whole = type(views) is int and views > 0 and len(table) % views == 0
        whole = whole and bool((shards == facts["shard"]).all())
    except (KeyError, IndexError, TypeError, ValueError, OverflowError):
        whole = False
    if not whole:
        raise UserError(
            f"{manifest}: its rows are not complete images of the shard that its metadata names "
            f"({facts.get('shard')!r}); run 'cdul run --forcerun manifest'"
        )
    boxes = np.stack([table[c].to_numpy() for c in CORNERS], axis=1).reshape(-1, views, 4)
    first_views = pa.array(np.arange(0, len(table), views))
    return facts, table.select(["image_id", "path", "row"]).take(first_views), boxes


def read_present(manifest: Path, images: Path) -> tuple[dict[str, Any], pa.Table]:
    """Read the facts of a shard's manifest, and its images that are still in `images.parquet`.

    The shard's manifest also keeps the rows of removed images. The images are `image_id, path,
    row`. Raises UserError as `read_shard` does.
    """
    facts, table, _ = read_shard(manifest)
    here = {"split": facts["split"], "shard": facts["shard"]}
    rows = read_table(images, ["row"], where=here)["row"]
    return facts, table.filter(pc.is_in(table["row"], rows.combine_chunks()))


def shard_table(images: list[dict[str, Any]], boxes: np.ndarray) -> pa.Table:
    """The table of a shard's manifest, without its facts: one row per view.

    `images` have IMAGE_COLUMNS; `boxes`, int32 (images, 1+S, 4), are their views.
    """
    views = boxes.shape[1]
    repeated = pa.array(np.repeat(np.arange(len(images)), views))
    table = pa.Table.from_pylist(images, IMAGE_SCHEMA).take(repeated)
    columns = [np.tile(np.arange(views, dtype=np.int32), len(images)), *boxes.reshape(-1, 4).T]
    for name, column in zip(("view", *CORNERS), columns, strict=True):
        table = table.append_column(name, pa.array(column))
    return table
