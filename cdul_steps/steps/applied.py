"""Stage applied: count the predictions of all shards of a split."""

from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq

from cdul_steps.data.files import SCHEMA_VERSION, write_json
from cdul_steps.data.manifest import shards_of
from cdul_steps.data.tables import read_facts, read_table, require
from cdul_steps.errors import UserError
from cdul_steps.progress import note


def count_applied(*, parts: Path, images: Path, split: str, output: Path) -> dict[str, Any]:
    """Count the images of a split, how many failed and how many have each label, as JSON.

    `parts` is the folder of the predictions, `{shard}.parquet`. Predictions of shards that the
    manifest `images` does not have are from an earlier manifest; they are deleted, so that the
    folder can be read as one table. Raises UserError for a split that the manifest does not have,
    if a shard has no predictions, and if a file contains something else.
    """
    facts = require(images, read_facts(images), "layout", "rows")
    if split not in facts["rows"]:
        raise UserError(f"{images}: no split {split!r}; it has {', '.join(facts['rows'])}")
    of_shards = [parts / f"{shard}.parquet" for shard in shards_of(facts, split)]
    status, labels = Counter[str](), Counter[str]()
    classes: list[str] = []
    for path in of_shards:
        table = read_table(path, ["status", "labels"])
        named = require(path, read_facts(path), "classes")["classes"]
        classes = classes or named
        if named != classes:
            raise UserError(f"{path}: has other classes than {of_shards[0]}; delete {parts}")
        for counter, column in (
            (status, table["status"]),
            (labels, pc.list_flatten(table["labels"])),
        ):
            for found in pc.value_counts(column).to_pylist():
                counter[found["values"]] += found["counts"]
    earlier = [
        path for path in parts.glob("*.parquet") if path.stem.isdecimal() and path not in of_shards
    ]
    for path in earlier:
        if not {"status", "labels"} <= {*pq.read_schema(path).names}:
            raise UserError(f"{path}: not the predictions of a shard; move it elsewhere")
    for path in earlier:
        path.unlink()
    result = {
        "schema_version": SCHEMA_VERSION,
        "images": status.total(),
        "failed": {name: n for name, n in sorted(status.items()) if name != "ok"},
        "labels": {name: labels[name] for name in classes},
        "shards": len(of_shards),
    }
    write_json(output, result)
    note(
        f"applied: {status.total()} images, {status.total() - status['ok']} failed"
        + f"; deleted {len(earlier)} files of an earlier manifest" * bool(earlier)
    )
    return result
