"""Time Snakemake's planning with many finished shards, and print it as JSON.

    python benchmarks/plan.py
    python benchmarks/plan.py --shards 1000 --profile plan.prof
    python benchmarks/plan.py --shards 4000 --images 250

Images and manifest are real; the outputs of the other stages are empty files, which `snakemake
--touch` marks as up to date. Images are links to a few files, which have a thousand names each.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml
from measuring import print_result
from PIL import Image

ROOT = Path(__file__).parents[1]
PARTS = ("Snakefile", "workflow", "config", "profiles")
ENCODER = Path("results/many/tiny-clip")
TRAINING = ENCODER / "final/aligned"
NAMES = 1000
"""Names of a file of an image."""
SINGLE = [
    ENCODER / "text.parquet",
    ENCODER / "embeddings/train.zarr/zarr.json",
    ENCODER / "similarity/train.zarr/zarr.json",
    ENCODER / "final/pseudo_labels.parquet",
    ENCODER / "final/quality.json",
    TRAINING / "model/model.safetensors",
    TRAINING / "model/model.json",
    TRAINING / "model/README.md",
    TRAINING / "history.parquet",
    TRAINING / "refined_labels.parquet",
    TRAINING / "predictions/train.parquet",
    TRAINING / "metrics.json",
]


def snakemake(
    folder: Path, *arguments: str, python: tuple[str, ...] = ()
) -> tuple[dict[str, float], str]:
    """Run snakemake; returns wall and CPU seconds, and its output."""
    # With -P, as with the command `snakemake`, nothing is imported from the folder. Without it,
    # Snakemake looks for plugins among the images.
    command = [sys.executable, "-P", *python, "-m", "snakemake", "--cores", "1", *arguments]
    start, used = time.monotonic(), os.times()
    done = subprocess.run(
        [*command, "--configfile", "overlay.yaml"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        sys.exit(done.stdout)
    now = os.times()
    cpu = sum(getattr(now, n) - getattr(used, n) for n in ("children_user", "children_system"))
    return {"s": round(time.monotonic() - start, 2), "cpu_s": round(cpu, 2)}, done.stdout


def prepare(folder: Path, shards: int, images: int) -> None:
    """A copy of the project, and a folder with this many shards of images and its manifest."""
    for part in PARTS:
        (folder / part).symlink_to(ROOT / part)
    (folder / "images").mkdir()
    for i in range(shards * images):
        path = folder / f"images/{i}.png"
        if i % NAMES == 0:
            Image.new("RGB", (8, 8)).save(path)
            first = path
        else:
            path.hardlink_to(first)
    many = {
        "reader": "folder",
        "root": "images",
        "classes": "config/classes/demo.yaml",
        "splits": {"train": "."},
        "grid": [1, 1],
        "shard_size": images,
    }
    run = {"datasets": ["many"], "labels": ["final"], "trainings": ["aligned"]}
    overlay = {"run": run, "datasets": {"many": many}}
    (folder / "overlay.yaml").write_text(yaml.safe_dump(overlay))
    snakemake(folder, "results/many/manifest/images.parquet")


def finish(folder: Path, shards: int) -> None:
    """Make the run look finished."""
    files = [
        path
        for k in range(shards)
        for path in (
            ENCODER / f"embeddings/train.zarr/c/{k}/0/0",
            ENCODER / f"encode/train/{k}.parquet",
        )
    ]
    for file in [*files, *SINGLE]:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).touch()
    snakemake(folder, "--touch")


def measure(shards: int, images: int, profile: Path | None) -> dict[str, dict[str, float]]:
    """Times of a plan with all shards to do, with none to do, and of a run with none to do."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, shards, images)
        to_do, said = snakemake(folder, "-n", "--quiet", "rules")
        assert f"encode {shards}" in " ".join(said.split()), said
        finish(folder, shards)
        done, said = snakemake(folder, "-n")
        assert "Nothing to be done" in said, said
        no_op, said = snakemake(folder)
        assert "Nothing to be done" in said, said
        if profile:
            snakemake(folder, "-n", python=("-m", "cProfile", "-o", str(profile.resolve())))
    return {"plan_all_to_do": to_do, "plan_none_to_do": done, "run_none_to_do": no_op}


def main() -> None:
    """Measure each number of shards."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shards", nargs="+", type=int, default=[250, 500, 1000])
    parser.add_argument("--images", type=int, default=1, help="in a shard")
    parser.add_argument("--profile", type=Path, help="write a cProfile of the last plan")
    options = parser.parse_args()
    found = {}
    for shards in options.shards:
        found[shards] = measure(shards, options.images, options.profile)
        print(f"{shards} shards: {found[shards]}", file=sys.stderr, flush=True)
    print_result(["snakemake", "pyarrow"], images=options.images, shards=found)


if __name__ == "__main__":
    main()
