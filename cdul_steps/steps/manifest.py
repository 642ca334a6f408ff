"""Stage manifest: find the images, assign each a row, and cut each into views."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cdul_steps.config import Dataset
from cdul_steps.data.classes import load_classes
from cdul_steps.data.files import write_if_changed
from cdul_steps.data.images import ImageError, read_size
from cdul_steps.data.manifest import IMAGE_COLUMNS, IMAGES_KIND, SHARD_KIND, shard_table
from cdul_steps.data.readers import check_files, check_headers, read_dataset
from cdul_steps.data.readers.record import ImageRecord
from cdul_steps.data.remote import is_url, list_folders
from cdul_steps.data.sources import state
from cdul_steps.data.tables import describe, read_facts, read_table, to_bytes, write_table
from cdul_steps.errors import UserError
from cdul_steps.method.snippets import view_boxes
from cdul_steps.progress import Progress, note

_TOGETHER = 10_000
"""Images whose headers are read together: each is a task of the threads until its turn."""


class _Known(NamedTuple):
    """An image of an earlier manifest."""

    path: str
    row: int
    bytes: int
    modified: int
    width: int
    height: int


def _size(path: str, max_pixels: int) -> tuple[int, int, str]:
    """Width, height and no error; or 0, 0 and the error that the encoder will also record."""
    try:
        return *read_size(path, max_pixels=max_pixels), ""
    except ImageError as error:
        return 0, 0, str(error)


def assign_rows(image_ids: Sequence[str], earlier: dict[str, int], used: int) -> tuple[list, int]:
    """Keep each image's earlier row, and give new images the rows after the `used` ones.

    Returns the rows and how many are used now. Rows of removed images stay empty, so that no other
    image moves.
    """
    rows = []
    for image_id in image_ids:
        row = earlier.get(image_id)
        if row is None:
            row, used = used, used + 1
        rows.append(row)
    return rows, used


def make_manifest(*, dataset: Dataset, output: Path) -> None:
    """Write `images.parquet`, one row per image, and next to it `{split}/{shard}.parquet`.

    An earlier `images.parquet` of the same layout keeps its rows: new images follow, and only
    shards whose rows changed are written. With `labelled_only`, images that are not known to show
    any class are left out; so are paths that match a pattern of `exclude`. What was left out is
    recorded. Raises UserError for a data set that cannot be read, a split without any image file,
    or if more than `max_failed_share` of a split's files are missing or not images by their
    headers.
    """
    root, names = dataset.root or "", load_classes(Path(dataset.classes)).names
    splits, shard_size, max_pixels = dataset.splits, dataset.shard_size, dataset.max_pixels
    told: list[str] = []
    records = read_dataset(
        dataset.reader,
        root,
        splits,  # type: ignore[arg-type]  # a mapping's keys are invariant
        names,
        labelled_only=dataset.labelled_only,
        exclude=dataset.exclude,
        tell=told.append,
    )
    for line in told:
        note(f"manifest: {line}")
    _note_unknown(records, names)
    layout = {
        "reader": dataset.reader,
        "root": str(root if is_url(root) else Path(root)),
        "splits": splits,
        "grid": [list(one) for one in dataset.grid],
        "overlap": dataset.overlap,
        "views": len(view_boxes(1, 1, dataset.grid)),
        "shard_size": shard_size,
        "max_pixels": max_pixels,
    }
    earlier, used = _earlier(output, layout)
    tables = []
    for split in splits:
        members = [r for r in records if r.split == split]
        known_rows = {i: old.row for i, old in earlier.get(split, {}).items()}
        rows, used[split] = assign_rows(
            [r.image_id for r in members], known_rows, used.get(split, 0)
        )
        table, failed = _image_table(members, rows, shard_size, earlier.get(split, {}), max_pixels)
        unknown = table.filter((pc.field("bytes") == 0) & (pc.field("modified") == 0))["path"]
        # A server may say neither size nor time; what it does not have is among the failed.
        absent = [path for path in unknown.to_pylist() if not is_url(path)]
        if problem := check_files(split, len(table), absent, dataset.max_failed_share):
            note(f"manifest: {problem}; they get the status missing")
        if problem := check_headers(split, len(table), failed, dataset.max_failed_share):
            note(f"manifest: {problem}")
        tables.append(table)
        folder = output.parent / split
        written = _write_shards(table, folder, used[split], layout, bool(earlier))
        shards = -(-used[split] // shard_size)
        note(f"manifest: {split}: {len(members)} images, {shards} shards, {written} written")
    images = pa.concat_tables(tables)
    facts = {"classes": list(names), "rows": used, "layout": layout, "left_out": told}
    write_table(describe(images, IMAGES_KIND, **facts), output)


def _note_unknown(records: list[ImageRecord], names: Sequence[str]) -> None:
    """Report gaps in the truth, if any of it is known.

    Classes that no image shows may be misspelt; images with unknown truth are not measured.
    """
    unknown = sum(record.positive is None for record in records)
    if unknown == len(records):
        return
    if unknown:
        note(f"manifest: the truth is not known for {unknown} of {len(records)} images")
    seen = {c for record in records for c in (*(record.positive or ()), *record.difficult)}
    if unseen := [name for c, name in enumerate(names) if c not in seen]:
        note(f"manifest: no image shows {', '.join(unseen)}; check the spelling of the classes")


def _earlier(
    output: Path, layout: dict[str, Any]
) -> tuple[dict[str, dict[str, _Known]], dict[str, int]]:
    """Images of an earlier manifest by split and id, and how many rows each split used."""
    if not output.is_file():
        return {}, {}
    facts = read_facts(output)
    if facts.get("layout") != layout or "rows" not in facts:
        return {}, {}
    found: dict[str, dict[str, _Known]] = {}
    table = read_table(output, ["split", "image_id", *_Known._fields])
    for split, image_id, *fields in zip(*map(_values, table.columns), strict=True):
        found.setdefault(split, {})[image_id] = _Known(*fields)
    return found, dict(facts["rows"])


def _values(column: pa.ChunkedArray) -> Iterator[Any]:
    """The values of a column, of which few at a time become Python objects."""
    return (value.as_py() for value in column)


def _image_table(
    members: list[ImageRecord],
    rows: list[int],
    shard_size: int,
    earlier: dict[str, _Known],
    max_pixels: int,
) -> tuple[pa.Table, dict[str, str]]:
    """The rows of a split, and the errors of images that cannot be read, by their paths."""
    list_folders(record.path for record in members if is_url(record.path))
    with ThreadPoolExecutor() as pool, Progress("manifest", len(members), "images") as progress:

        def measure(record: ImageRecord) -> tuple[int, int, int, int, str]:
            stat = state(record.path) or (0, 0)
            old = earlier.get(record.image_id)
            # An image without a size may have become readable with none of this changed.
            known = old and (old.path, old.bytes, old.modified)
            if old and known == (record.path, *stat) and old.width:
                return *stat, old.width, old.height, ""
            return *stat, *_size(record.path, max_pixels)

        measures = []
        for first in range(0, len(members), _TOGETHER):
            for measured in pool.map(measure, members[first : first + _TOGETHER]):
                measures.append(measured)
                progress.update()
    size, modified, width, height, errors = zip(*measures, strict=True)
    failed = {r.path: error for r, error in zip(members, errors, strict=True) if error}
    indices = pa.list_(pa.int32())
    table = pa.table(
        {
            "image_id": pa.array([r.image_id for r in members], pa.string()),
            "split": pa.array([r.split for r in members], pa.string()),
            "path": pa.array([r.path for r in members], pa.string()),
            "width": pa.array(width, pa.int32()),
            "height": pa.array(height, pa.int32()),
            "shard": pa.array([row // shard_size for row in rows], pa.int32()),
            "row": pa.array(rows, pa.int64()),
            "known": pa.array([r.positive is not None for r in members], pa.bool_()),
            "positive": pa.array([list(r.positive or ()) for r in members], indices),
            "difficult": pa.array([list(r.difficult) for r in members], indices),
            "bytes": pa.array(size, pa.int64()),
            "modified": pa.array(modified, pa.int64()),
        }
    )
    return table, failed


def _boxes(images: list[dict[str, Any]], layout: dict[str, Any]) -> np.ndarray:
    """The views of each image, int32 (images, 1+S, 4); of one without a size they are 0."""
    boxes = np.zeros((len(images), layout["views"], 4), np.int32)
    of_size: dict[tuple[int, int], np.ndarray] = {}
    for box, image in zip(boxes, images, strict=True):
        if size := image["width"] and (image["width"], image["height"]):
            if size not in of_size:
                of_size[size] = view_boxes(*size, layout["grid"], layout["overlap"])
            box[:] = of_size[size]
    return boxes


def _write_shards(
    table: pa.Table,
    folder: Path,
    used: int,
    layout: dict[str, Any],
    keep: bool,
) -> int:
    """Write the changed shards of a split, delete those beyond the last, and return the number
    written.

    With `keep`, images that are no longer in the data set keep their rows in a shard, so that the
    shard's file, and thus its embeddings, do not change.
    """
    for path in _shard_files(folder):
        if read_facts(path).get("kind") != SHARD_KIND:
            raise UserError(
                f"{path}: is not the manifest of a shard, and would be replaced; give an --output "
                "in a separate folder"
            )
    shards = -(-used // layout["shard_size"])
    of_shard = table["shard"].to_numpy()
    order = np.argsort(of_shard, kind="stable")
    ends = np.searchsorted(of_shard[order], np.arange(shards), side="right")
    table, written = table.select(IMAGE_COLUMNS), 0
    for shard, places in enumerate(np.split(order, ends[:-1])):
        path = folder / f"{shard}.parquet"
        images = table.take(pa.array(places)).to_pylist()
        if keep:
            images = sorted(images + _gone(path, images), key=lambda i: i["row"])
        facts = {"split": folder.name, "shard": shard}
        facts |= {name: layout[name] for name in ("shard_size", "views", "grid", "overlap")}
        views = shard_table(images, _boxes(images, layout))
        data = to_bytes(describe(views, SHARD_KIND, **facts))
        written += write_if_changed(path, data)
    for path in _shard_files(folder):
        if int(path.stem) >= shards:
            path.unlink()
    return written


def _shard_files(folder: Path) -> list[Path]:
    return [path for path in folder.glob("*.parquet") if path.stem.isdecimal()]


def _gone(path: Path, images: list[dict]) -> list[dict]:
    if not path.is_file():
        return []
    taken = {i["row"] for i in images}
    table = read_table(path, [*IMAGE_COLUMNS, "view"])
    return [
        {name: i[name] for name in IMAGE_COLUMNS}
        for i in table.to_pylist()
        if i["view"] == 0 and i["row"] not in taken
    ]
