"""Counts of the predictions of all shards, and the files of earlier shards."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from messages import message_of

from cdul_steps.data.tables import describe, write_scores, write_table
from cdul_steps.steps.applied import count_applied

CLASSES = ["car", "cat"]


@pytest.fixture
def folder(tmp_path) -> Path:
    """The manifest of five images in shards of two, and the predictions of four shards."""
    layout = {"shard_size": 2, "splits": {"train": "."}}
    table = pa.table({"image_id": list("abcde")})
    described = describe(table, "images", rows={"train": 5}, layout=layout, classes=CLASSES)
    write_table(described, tmp_path / "images.parquet")
    for shard, size in enumerate([2, 2, 1, 1]):
        images = pa.table(
            {
                "image_id": [f"{shard}{i}" for i in range(size)],
                "path": ["x"] * size,
                "labels": pa.array([["cat"] * i for i in range(size)], pa.list_(pa.string())),
                "status": ["missing" if shard == 2 else "ok"] * size,
            }
        )
        scores = np.zeros((size, 2), np.float32)
        write_scores(images, CLASSES, scores, tmp_path / f"parts/{shard}.parquet")
    return tmp_path


def count(folder: Path, split: str = "train") -> dict:
    return count_applied(
        parts=folder / "parts",
        images=folder / "images.parquet",
        split=split,
        output=folder / "counts.json",
    )


def test_what_is_counted(folder):
    found = count(folder)
    assert found == json.loads((folder / "counts.json").read_text())
    assert found["images"] == 5 and found["shards"] == 3
    assert found["failed"] == {"missing": 1} and found["labels"] == {"car": 0, "cat": 2}
    assert sorted(p.name for p in (folder / "parts").iterdir()) == [
        f"{i}.parquet" for i in (0, 1, 2)
    ]


def test_what_is_not_of_a_shard_is_kept(folder):
    """Also if another file is of an earlier shard."""
    other = folder / "parts/9.parquet"
    pq.write_table(pa.table({"x": [1]}), other)
    assert message_of(count, folder).startswith(f"{other}: not the predictions of a shard")
    assert other.exists() and (folder / "parts/3.parquet").exists()
    assert not (folder / "counts.json").exists()


def test_what_cannot_be_counted(folder):
    assert "no split 'test'; it has train" in message_of(count, folder, "test")
    second = folder / "parts/1.parquet"
    second.rename(folder / "parts/later.parquet")
    assert message_of(count, folder) == f"{second}: no such file"
    table = pq.read_table(folder / "parts/later.parquet")
    write_table(describe(table, "scores", classes=["cat", "car"]), second)
    assert "has other classes than" in message_of(count, folder)
