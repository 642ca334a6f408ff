"""A synthetic results tree as the workflow would write it, made without any model."""

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from cdul_steps.config import Dataset, Labels
from cdul_steps.data.manifest import read_split
from cdul_steps.data.stores import new_store
from cdul_steps.data.tables import describe, read_scores, score_table, write_table
from cdul_steps.method.similarity import cosine, unit
from cdul_steps.steps.label import make_labels
from cdul_steps.steps.manifest import make_manifest

LOGIT_SCALE = 18.0
SETTINGS = Labels(tau=3 / LOGIT_SCALE, zeta=0.05, positives=1.5)
MACHINE = {"precision": "fp32", "resize_mode": None, "device": "cpu", "seconds": 1.0}
DIMENSION = 16
SHARD_SIZE = 50


def make_results(
    results: Path,
    files: dict[str, Sequence[str]],
    classes: Sequence[str] = ("boat", "car", "cat"),
    size: tuple[int, int] = (48, 36),
    seed: int = 0,
    context: Sequence[str] = (),
) -> Path:
    """Write `results/demo/tiny-clip/calibrated/aligned` and its parents; returns that folder.

    `files` are the names of the images to draw, by split. Every third image has no known ground
    truth, and the first image of each split was not encoded.
    """
    random = np.random.default_rng(seed)
    dataset = results / "demo"
    encoder, training = dataset / "tiny-clip", dataset / "tiny-clip/calibrated/aligned"
    images = _make_manifest(dataset, files, classes, size, random)
    text = unit(random.normal(size=(len(classes), DIMENSION)))
    further = np.random.default_rng(seed + 1).normal(size=(len(context), DIMENSION))
    text = np.concatenate([text, unit(further)])
    both = [*classes, *context]
    columns = {"class": both, "aliases": [[c] for c in both], "embedding": list(text)}
    facts = {"model": "made", "pretrained": None, "templates": ["{}"], "logit_scale": LOGIT_SCALE}
    attributes = {"kind": "similarity", "classes": list(classes), **facts}
    if context:
        columns["context"] = [False] * len(classes) + [True] * len(context)
        attributes["context"] = list(context)
        near = [{"name": "Boats", "of": "boat", "nearness": None}]
        facts |= {"context": len(context), "nearness": 0.6, "left_out": near}
    write_table(describe(pa.table(columns), "text", **facts), encoder / "text.parquet")
    for split, names in files.items():
        # Each view shows one class plus noise.
        shown = text[random.integers(0, len(text), (len(names), 10))]
        embeddings = unit(shown + random.normal(scale=0.3, size=shown.shape))
        embeddings[0] = np.nan
        _write_store(encoder / f"embeddings/{split}.zarr", embeddings.astype(np.float16), {})
        store = encoder / f"similarity/{split}.zarr"
        _write_store(store, cosine(embeddings, text), attributes)
        _write_encode(encoder / f"encode/{split}", images, split)
        labels = encoder / "calibrated/pseudo_labels.parquet"
        if split != "train":
            labels = results / "unused.parquet"
        make_labels(similarity=store, images=images, split=split, settings=SETTINGS, output=labels)
        table, _, scores = read_scores(labels)
        _write_scores(
            training / f"predictions/{split}.parquet", table, classes, _nudge(scores, 2.0, random)
        )
        if split == "train":
            refined = _nudge(scores, 0.5, random)
            _write_scores(training / "refined_labels.parquet", table, classes, refined)
        else:
            labels.unlink()
    return training


def _make_manifest(dataset: Path, files, classes, size, random) -> Path:
    table = dataset / "scenes/scenes.csv"
    table.parent.mkdir(parents=True)
    with table.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["path", "split", *classes])
        for split, names in files.items():
            for i, name in enumerate(names):
                path = table.parent / split / name
                path.parent.mkdir(parents=True, exist_ok=True)
                colours = random.integers(0, 256, (3, 4, 3), dtype=np.uint8)
                Image.fromarray(colours).resize(size[:: -1 if i % 4 == 1 else 1]).save(path)
                truth = random.integers(0, 2, len(classes)) if i % 3 else [""] * len(classes)
                writer.writerow([f"{split}/{name}", split, *truth])
    names = dataset / "classes.yaml"
    names.write_text("".join(f"- {_quoted(name)}\n" for name in classes), encoding="utf-8")
    settings = Dataset(
        reader="table",
        root=table,
        classes=names,
        splits={split: split for split in files},
        shard_size=SHARD_SIZE,
        max_pixels=1_000_000,
    )
    make_manifest(dataset=settings, output=dataset / "manifest/images.parquet")
    return dataset / "manifest/images.parquet"


def _quoted(name: str) -> str:
    return "'" + name.replace("'", "''") + "'"


def _write_store(path: Path, rows: np.ndarray, attributes: dict) -> None:
    with new_store(path, rows.shape, SHARD_SIZE, str(rows.dtype), attributes) as store:
        store[:] = rows


def _write_encode(folder: Path, images: Path, split: str) -> None:
    table = read_split(images, split, ["image_id", "row"])
    status = pa.array(["truncated", *["ok"] * (len(table) - 1)])
    table = table.append_column("status", status)
    table = table.append_column("error", pa.array(["cut short", *[""] * (len(table) - 1)]))
    table = table.append_column("seconds", pa.array([0.01] * len(table), pa.float32()))
    for first in range(0, len(table), SHARD_SIZE):
        shard = table.slice(first, SHARD_SIZE)
        write_table(
            describe(shard, "encode", shard=first, **MACHINE),
            folder / f"{first // SHARD_SIZE}.parquet",
        )


def _nudge(scores: np.ndarray, by: float, random: np.random.Generator) -> np.ndarray:
    """Scores with random changes of their logits."""
    scores = np.clip(scores, 1e-4, 1 - 1e-4)
    logits = np.log(scores / (1 - scores)) + random.normal(scale=by, size=scores.shape)
    return 1 / (1 + np.exp(-logits))


def _write_scores(path: Path, table: pa.Table, classes: Sequence[str], scores: np.ndarray) -> None:
    result = score_table(table["image_id"], table["path"], classes, scores)
    write_table(describe(result, "scores", classes=list(classes)), path)
