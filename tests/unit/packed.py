"""Images packed into archives: WebDataset's tars, and Hugging Face's Parquet files."""

import io
import json
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

HF_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def write_tar(path: Path, members: Mapping[str, bytes] | Iterable[tuple[str, bytes]], **options):
    """A tar of these members; `options` are tarfile's."""
    pairs = members.items() if isinstance(members, Mapping) else members
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as tar:
        for name, data in pairs:
            tar.addfile(member(name, size=len(data)), io.BytesIO(data))
    return path


def member(name: str, **fields) -> tarfile.TarInfo:
    """A header, as tarfile writes it."""
    info = tarfile.TarInfo(name)
    for key, value in fields.items():
        setattr(info, key, value)
    return info


def write_parquet(path: Path, images: list[bytes | None], group: int = 2, names=None, **columns):
    """Images in the column `image`, `group` images per row group, and further columns.

    `names` maps columns to the names that Hugging Face's metadata gives their numbers.
    """
    cells = [None if data is None else {"bytes": data, "path": None} for data in images]
    table = pa.table({"image": pa.array(cells, HF_IMAGE), **columns})
    if names:
        features = {
            column: {"_type": "List", "feature": {"names": classes, "_type": "ClassLabel"}}
            if pa.types.is_list(table[column].type)
            else {"names": classes, "_type": "ClassLabel"}
            for column, classes in names.items()
        }
        table = table.replace_schema_metadata(
            {"huggingface": json.dumps({"info": {"features": features}})}
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=group)
    return path
