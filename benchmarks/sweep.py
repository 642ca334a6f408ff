"""Time and memory of labelling and of a sweep over a store of random cosines; prints JSON.

    python benchmarks/sweep.py
    python benchmarks/sweep.py --images 1000000 --skip sweep

The default is COCO's size. Each command runs in a separate process, whose peak memory is measured.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
from measuring import print_result

from cdul_steps.data.stores import new_store, open_store, read_blocks
from cdul_steps.data.tables import describe, write_table

SHARD = 1000
SETTINGS = {
    "tau": [1, 2, 3],
    "zeta": [0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1],
    "lambda": [-1, -0.75, -0.5, -0.25, 0, 0.25, 0.5, 0.75, 1],
}


def make(folder: Path, images: int, views: int, classes: int) -> None:
    """A similarity store and its table of images, with about three positives per image."""
    random = np.random.default_rng(0)
    names = [f"class {c}" for c in range(classes)]
    truth = random.random((images, classes)) < 3 / classes
    attributes = {"classes": names, "logit_scale": 100.0}
    shape = (images, views, classes)
    with new_store(folder / "train.zarr", shape, SHARD, "float32", attributes) as array:
        for first in range(0, images, SHARD):
            shown = truth[first : first + SHARD, None]
            noise = random.standard_normal((len(shown), views, classes), dtype=np.float32)
            array[first : first + SHARD] = 0.2 + 0.03 * (noise + shown)
    lists = pa.list_(pa.int32())
    table = pa.table(
        {
            "image_id": [f"{i:012d}.jpg" for i in range(images)],
            "split": ["train"] * images,
            "path": [f"images/{i:012d}.jpg" for i in range(images)],
            "row": np.arange(images),
            "positive": pa.array([np.flatnonzero(row) for row in truth], lists),
            "difficult": pa.array([[]] * images, lists),
        }
    )
    write_table(describe(table, "images", classes=names), folder / "images.parquet")


def read(store: Path) -> float:
    """Seconds for reading all cosines once."""
    start = time.monotonic()
    for _ in read_blocks(store, open_store(store)):
        pass
    return time.monotonic() - start


def measure(*words: object) -> dict[str, float]:
    """Wall and CPU seconds and peak memory in GiB of a command of `cdul`."""
    start = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "cdul_steps.cli", *map(str, words)])
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"cdul {words[0]} failed")
    return {
        "seconds": round(time.monotonic() - start, 2),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 2),
        "peak_GiB": round(usage.ru_maxrss / 2**20, 3),
    }


def main() -> None:
    """Make the store, run the commands, and print their time and memory."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=82_081)
    parser.add_argument("--views", type=int, default=10)
    parser.add_argument("--classes", type=int, default=80)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--skip", nargs="*", default=[], choices=["label", "calibrated", "sweep"])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder, options.images, options.views, options.classes)
        store, images = folder / "train.zarr", ("--images", folder / "images.parquet")
        label = ("label", "--similarity", store, *images, "--split", "train")
        label += ("--output", folder / "labels.parquet")
        sweep = ("sweep", "--similarity", f"train={store}", *images, "--threads", options.threads)
        sweep += ("--settings", json.dumps(SETTINGS), "--output", folder / "sweep.parquet")
        commands = {
            "label": label,
            "calibrated": (*label, "--settings", '{"standardise": true, "positives": 3}'),
            "sweep": sweep,
        }
        result = {"shape": [options.images, options.views, options.classes]}
        result["read"] = {"seconds": round(read(store), 2)}
        for key, words in commands.items():
            if key not in options.skip:
                result[key] = measure(*words)
        if "sweep" in result:
            lines = len(SETTINGS["zeta"]) * (1 + len(SETTINGS["lambda"])) + 3
            result["sweep"]["settings"] = 2 * len(SETTINGS["tau"]) * lines
    if "label" in result:
        result["label/read"] = round(result["label"]["seconds"] / result["read"]["seconds"], 3)
    print_result(["numpy", "zarr", "pyarrow"], **result)


if __name__ == "__main__":
    main()
