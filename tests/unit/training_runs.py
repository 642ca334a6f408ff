"""A training on small synthetic data, and its results."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
from PIL import Image

from cdul_steps.config import Dataset, Training, read_training
from cdul_steps.data.corrections import apply_corrections
from cdul_steps.data.tables import describe, read_scores, score_table, write_table
from cdul_steps.errors import UserError
from cdul_steps.steps import train
from cdul_steps.steps.manifest import make_manifest
from cdul_steps.steps.train import Inputs, train_classifier

CLASSES = ["red", "green", "blue"]
COLUMNS = [
    "epoch",
    "loss",
    "learning_rate",
    "label_movement",
    "train_mAP",
    "images_per_second",
    "label_mAP",
    "test_mAP",
]
SETTINGS = {
    "model": "test_resnet",
    "model_args": {"drop_rate": 0.2},
    "image_size": 32,
    "epochs": 4,
    "batch_size": 5,
    "learning_rate": 1e-3,
    "schedule": "cosine",
    "crop_scale": 0.5,
    # With the KL divergence, labels converge; many steps with the BCE amplify rounding errors.
    "loss": "kl",
    "alignment": {"warmup": 1, "step_size": 0.2},
}
# Settings of every variant that has its own state or loss.
OFF = {"enabled": False}
HARD = {"positives": "top1", "alignment": OFF}
VARIANTS = {
    "kl_reverse": {"loss": "kl_reverse"},
    "kl_classes": {"loss": "kl_classes"},
    "bce": {"loss": "bce"},
    "asl": {"loss": "asl"},
    "an": {"loss": "bce", **HARD},
    "ls": {"loss": "bce", "smoothing": {"positive": 0.1, "negative": 0.1}, **HARD},
    "wan": {"loss": "wan", **HARD},
    "epr": {"loss": "epr", **HARD},
    "role": {"loss": "role", **HARD},
}


def make_data(folder: Path, images: int = 24, tests: int = 8, classes=CLASSES) -> Path:
    """Images with bright squares of the classes' colours, their manifest, and soft labels."""
    random = np.random.default_rng(0)
    truth = random.random((images + tests, 3)) < 0.5
    (folder / "images").mkdir(parents=True)
    rows = []
    for i, present in enumerate(truth):
        pixels = random.integers(0, 60, (32, 32, 3), dtype=np.uint8)
        for c in np.flatnonzero(present):
            pixels[10 * c : 10 * c + 10, :, c] = 250
        Image.fromarray(pixels).save(folder / f"images/{i}.png")
        labels = dict(zip(classes, present.astype(int), strict=False))
        rows.append({"path": f"images/{i}.png", "split": "a" if i < images else "b", **labels})
    pd.DataFrame(rows).to_csv(folder / "data.csv", index=False)
    manifest(folder, classes, tests > 0)
    table = pq.read_table(folder / "images.parquet").slice(0, images)
    scores = np.clip(truth * 0.6 + random.normal(0.2, 0.1, truth.shape), 0, 1)[:images]
    write_labels(folder / "labels.parquet", table, list(classes), scores[:, : len(classes)])
    return folder


def manifest(folder: Path, classes=CLASSES, test: bool = True) -> None:
    (folder / "classes.txt").write_text("\n".join(classes))
    dataset = Dataset(
        reader="table",
        root=folder / "data.csv",
        classes=folder / "classes.txt",
        splits={"train": "a", **({"test": "b"} if test else {})},
        grid=(1, 1),
        shard_size=100,
        max_pixels=10_000,
        max_failed_share=1,
    )
    make_manifest(dataset=dataset, output=folder / "images.parquet")


def write_labels(path: Path, table: pa.Table, classes: list[str], scores: np.ndarray) -> None:
    scored = score_table(table["image_id"], table["path"], classes, scores)
    write_table(describe(scored, "scores", classes=classes), path)


def arguments(data: Path, output: Path, **changes) -> dict:
    values = {
        "difficult": "ignore",
        "max_pixels": 10_000,
        "max_failed_share": 0.5,
        "output": output,
    }
    settings = {k: v for k, v in changes.items() if k in Training.model_fields}
    files = {"labels": data / "labels.parquet", "images": data / "images.parquet"}
    for name, value in changes.items():
        if name not in settings:
            (files if name in Inputs.__dataclass_fields__ else values)[name] = value
    read = read_training(json.dumps({**SETTINGS, **settings}))
    return {**tiny.on(values), "inputs": Inputs(**files), "settings": read}


def run(data: Path, output: Path, **changes) -> Path:
    train_classifier(**arguments(data, output, **changes))
    return output


def history(output: Path) -> pd.DataFrame:
    return pq.read_table(output / "history.parquet").to_pandas()


def weights(output: Path) -> bytes:
    return (output / "model/model.safetensors").read_bytes()


def refined(output: Path) -> np.ndarray:
    return read_scores(output / "refined_labels.parquet")[2]


def same(a: Path, b: Path) -> bool:
    return weights(a) == weights(b) and np.array_equal(refined(a), refined(b))


def fails(*positional, **changes) -> str:
    with pytest.raises(UserError) as error:
        run(*positional, **changes)
    assert "\n" not in str(error.value)
    return str(error.value)


class StopError(Exception):
    pass


def interrupt(monkeypatch, data: Path, output: Path, **changes) -> None:
    """Train up to the middle of epoch 3."""
    whole = train.Trainer.train_epoch

    def stopping(self, images, steps, label):
        if " 3/" not in label:
            return whole(self, images, steps, label)
        whole(self, (batch for batch, _ in zip(images, range(2), strict=False)), steps, label)
        raise StopError

    with monkeypatch.context() as patch:
        patch.setattr(train.Trainer, "train_epoch", stopping)
        with pytest.raises(StopError):
            run(data, output, **changes)
    assert (output / "checkpoint.pt").is_file()


def corrected_labels(data: Path, path: Path, corrections) -> dict[str, Path]:
    """The labels with corrections, as the stage label writes them."""
    table, classes, scores = read_scores(data / "labels.parquet")
    ids = table["image_id"].to_pylist()
    column = apply_corrections(scores, ids, classes, corrections(ids), path)
    scored = score_table(table["image_id"], table["path"], classes, scores)
    scored = scored.append_column("corrected", column)
    write_table(describe(scored, "scores", classes=classes), path)
    return {"labels": path}


# Its layer norm is per image. SGD, because Adam amplifies rounding errors for small gradients.
PLAIN = {
    "model": "test_convnext",
    "model_args": {},
    "optimizer": "sgd",
    "learning_rate": 0.1,
    "epochs": 3,
}
