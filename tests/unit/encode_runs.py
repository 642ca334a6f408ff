"""Encode one shard with a tiny random CLIP, and read the results."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import tiny

from cdul_steps.config import Encoder
from cdul_steps.data.stores import open_store, write_metadata
from cdul_steps.data.tables import read_facts
from cdul_steps.steps.encode import encode_shard

SHARD = 5
VIEWS = 5
DIMENSION = tiny.CLIP["embed_dim"]


def make_data(folder: Path) -> Path:
    """Eight images of two sizes, and their manifest with two shards."""
    for i in range(8):
        tiny.noise(folder / f"images/{i}.png", i, (48, 40) if i % 2 else (37, 61))
    tiny.folder_manifest(folder / "images", folder / "manifest", SHARD)
    return folder


def run(manifest: Path, folder: Path, model: str, **options) -> tuple[np.ndarray, list[dict]]:
    """Encode one shard; returns its rows and those of its table."""
    arguments = {
        "max_pixels": tiny.MAX_PIXELS,
        **options,
    }
    store, table = folder / "a.zarr", folder / f"{manifest.stem}.parquet"
    settings = {
        key: arguments.pop(key) for key in ("precision", "resize_mode", "views") if key in arguments
    }
    encode_shard(
        manifest=manifest,
        store=store,
        table=table,
        encoder=Encoder(model=model, **settings),
        **tiny.on(arguments),
    )
    write_metadata(store, (2 * SHARD, VIEWS, DIMENSION), SHARD, "float16", {"kind": "embeddings"})
    first = read_facts(manifest)["shard"] * SHARD
    return np.asarray(open_store(store)[first : first + SHARD]), pq.read_table(table).to_pylist()


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = a.astype(np.float32), b.astype(np.float32)
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


def statuses(outcome: list[dict]) -> dict[str, str]:
    return {row["image_id"]: row["status"] for row in outcome}
