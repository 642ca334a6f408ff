"""Peak memory of stages whose tables grow with the number of images; prints JSON.

    python benchmarks/memory.py
    python benchmarks/memory.py --images 1000000 2000000 4000000 --stages label calibrated
    python benchmarks/memory.py --images 20000 40000 --stages manifest

The inputs are made: a store of cosines, one of features, tables of images and labels, and for the
manifest a tar of tiny images. `peak_MiB` is that of all processes of the command, and
`anonymous_MiB` leaves out pages of files, which the system can drop when memory is short. The
training has a frozen trunk and gradient alignment, two rounds of one epoch.
"""

import argparse
import io
import json
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
from measuring import measure, print_result
from PIL import Image
from safetensors.torch import save_file

from cdul_steps.config import Network
from cdul_steps.data.stores import new_store
from cdul_steps.data.tables import describe, write_scores, write_table
from cdul_steps.models.classifier import network_and_card

SHARD = 1000
MODEL = "test_resnet"


def made_images(images: int) -> pa.Table:
    """A table of images without truth."""
    names = [f"{i:09d}.jpg" for i in range(images)]
    paths = [f"/data/images/{name}" for name in names]
    columns = {"image_id": names, "path": paths, "row": np.arange(images)}
    return pa.table({**columns, "split": pa.array(["train"]).take(pa.array([0] * images))})


def make_store(path: Path, images: int, shape: tuple[int, int], **attributes: object) -> None:
    """A store in which every shard has the same random values."""
    block = np.random.default_rng(0).normal(0.2, 0.03, (SHARD, *shape)).astype(np.float32)
    with new_store(path, (images, *shape), SHARD, "float32", attributes) as array:
        for first in range(0, images, SHARD):
            array[first : first + SHARD] = block


def label(folder: Path, images: int, classes: list[str], settings: dict) -> list[object]:
    """The command that labels made cosines of two views."""
    make_store(folder / "s.zarr", images, (2, len(classes)), classes=classes, logit_scale=100.0)
    table = made_images(images)
    write_table(describe(table, "images", classes=classes), folder / "images.parquet")
    words = ["label", "--similarity", folder / "s.zarr", "--images", folder / "images.parquet"]
    words += ["--split", "train", "--settings", json.dumps(settings)]
    return [*words, "--output", folder / "labels.parquet"]


def train(folder: Path, images: int, classes: list[str]) -> list[object]:
    """The command that trains on made labels and features."""
    table = made_images(images)
    write_table(describe(table, "images", classes=classes), folder / "images.parquet")
    scores = np.random.default_rng(0).random((images, len(classes)), np.float32)
    write_scores(table.select(["image_id", "path"]), classes, scores, folder / "labels.parquet")
    network, _ = network_and_card(Network(model=MODEL), classes)
    state = {k: v.contiguous() for k, v in network.state_dict().items()}
    save_file(state, folder / "trunk.safetensors")
    shape = (1, network.get_classifier().in_features)
    make_store(folder / "f.zarr", images, shape, kind="features")
    settings = {
        "model": MODEL,
        "weights": str(folder / "trunk.safetensors"),
        "trunk": "frozen",
        "loss": "kl",
        "epochs": 1,
        "batch_size": 4096,
        "alignment": {"enabled": True, "warmup": 0},
    }
    words = ["train", "--labels", folder / "labels.parquet", "--images", folder / "images.parquet"]
    words += ["--settings", json.dumps(settings), "--features", f"train={folder / 'f.zarr'}"]
    return [*words, "--device", "cpu", "--output", folder / "out"]


def manifest(folder: Path, images: int, classes: list[str]) -> list[object]:
    """The command that reads the headers of a tar of tiny images."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    with tarfile.open(folder / "images.tar", "w") as tar:
        for i in range(images):
            member = tarfile.TarInfo(f"{i:09d}.png")
            member.size = len(buffer.getvalue())
            tar.addfile(member, io.BytesIO(buffer.getvalue()))
    (folder / "classes.txt").write_text("\n".join(classes))
    words = ["manifest", "--reader", "webdataset", "--root", folder, "--split", "train=."]
    words += ["--classes", folder / "classes.txt", "--shard-size", SHARD]
    return [*words, "--output", folder / "manifest/images.parquet"]


STAGES = {
    "label": lambda *made: label(*made, {}),
    "calibrated": lambda *made: label(*made, {"standardise": True, "positives": 3}),
    "train": train,
    "manifest": manifest,
}


def main() -> None:
    """Make, run and measure each stage at each size."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", nargs="+", type=int, default=[100_000, 200_000])
    parser.add_argument("--classes", type=int, default=80)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    options = parser.parse_args()
    classes = [f"class {c}" for c in range(options.classes)]
    found: dict[str, dict[int, dict[str, float]]] = {stage: {} for stage in options.stages}
    for stage in options.stages:
        for images in options.images:
            with tempfile.TemporaryDirectory() as folder:
                words = STAGES[stage](Path(folder), images, classes)
                run = measure([sys.executable, "-m", "cdul_steps.cli", *words], memory=True)
            row = {name: run[name] for name in ("peak_MiB", "anonymous_MiB")}
            found[stage][images] = row | {"s": round(run["end"] - run["start"], 1)}
            print(stage, images, found[stage][images], file=sys.stderr, flush=True)
    print_result(["numpy", "pyarrow", "torch", "zarr"], classes=options.classes, peak_memory=found)


if __name__ == "__main__":
    main()
