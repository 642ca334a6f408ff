"""Speed of training with gradient alignment compared with fixed labels; prints JSON.

    python benchmarks/train.py --weights backbone.safetensors --model tf_efficientnet_lite0

The same network, images and loss, alternately. The time includes everything in the epochs: label
steps, measures, checkpoints. For a quick look:
`--model test_resnet --size 32 --images 20 --epochs 2 --turns 1`.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from measuring import PHOTOS, link_photos, print_result

from cdul_steps.config import Training
from cdul_steps.data.tables import describe, score_table, write_table
from cdul_steps.limits import MAX_PIXELS
from cdul_steps.models.device import Machine
from cdul_steps.steps import train


def make_data(photos: Path, folder: Path, images: int, classes: int) -> None:
    """Photographs, their manifest, and random labels."""
    names = [f"class {c}" for c in range(classes)]
    link_photos(photos, folder, images, 1000, grid=(1, 1), classes=names)
    table = pq.read_table(folder / "images.parquet")
    scores = np.random.default_rng(0).random((images, classes), dtype=np.float32)
    scored = score_table(table["image_id"], table["path"], names, scores)
    write_table(describe(scored, "scores", classes=names), folder / "labels.parquet")


def seconds(folder: Path, aligned: bool, options: argparse.Namespace) -> float:
    """Seconds of the epochs of a training, from the first image to the last."""
    marks: list[float] = []
    epoch, end = train.Trainer.train_epoch, train._match_labels

    def marked_epoch(*words: object) -> float:
        marks.append(time.monotonic())
        return epoch(*words)

    def marked_end(*words: object) -> None:
        marks.append(time.monotonic())
        end(*words)

    train.Trainer.train_epoch, train._match_labels = marked_epoch, marked_end
    settings = {
        "model": options.model,
        "weights": options.weights,
        "image_size": options.size,
        "batch_size": options.batch_size,
        "epochs": options.epochs,
        "precision": options.precision,
        "alignment": {"enabled": aligned, "warmup": 0},
    }
    try:
        with tempfile.TemporaryDirectory() as output:
            train.train_classifier(
                inputs=train.Inputs(folder / "labels.parquet", folder / "images.parquet"),
                settings=Training(**settings),
                difficult="ignore",
                max_pixels=MAX_PIXELS,
                max_failed_share=0.05,
                machine=Machine(device=options.device, threads=options.threads),
                output=Path(output),
            )
    finally:
        train.Trainer.train_epoch, train._match_labels = epoch, end
    return marks[-1] - marks[0]


def main() -> None:
    """Train alternately, and print images per second and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--photos", type=Path, default=PHOTOS, help="folder of JPEGs")
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--weights")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--classes", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16", "fp16"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        make_data(options.photos, Path(name), options.images, options.classes)
        taken: dict[str, list[float]] = {"aligned": [], "fixed": []}
        for turn in range(options.turns):
            # Alternate which of the two runs first.
            for way in sorted(taken, reverse=bool(turn % 2)):
                taken[way].append(seconds(Path(name), way == "aligned", options))
    images = options.images * options.epochs
    rates = {way: [round(images / s, 2) for s in found] for way, found in taken.items()}
    medians = {way: float(np.median(found)) for way, found in rates.items()}
    keys = [
        "model",
        "size",
        "batch_size",
        "images",
        "classes",
        "epochs",
        "precision",
        "device",
        "threads",
    ]
    print_result(
        ["torch", "timm"],
        **{key: getattr(options, key) for key in keys},
        images_per_second=rates,
        **{"aligned/fixed": round(medians["aligned"] / medians["fixed"], 4)},
    )


if __name__ == "__main__":
    main()
