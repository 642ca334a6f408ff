"""Train heads on features of fewer photographs, and on the truth; prints a table in Markdown.

    python experiments/growth.py --labels LABELS.parquet --images images.parquet \\
        --features train=TRAIN.zarr --features test=TEST.zarr --settings settings.yaml

The photographs are drawn at random, the same for every seed. In the truth, difficult objects count
as absent.
"""

import argparse
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import yaml

from cdul_steps.data.manifest import read_truth
from cdul_steps.data.tables import describe, read_scores, score_table, write_table

LAST = re.compile(r"label mAP ([\d.]+).*test mAP ([\d.]+)")


def write_labels(table: pa.Table, classes: list[str], scores: np.ndarray, path: Path) -> None:
    """Labels (N, C) of the images in a table."""
    scored = score_table(table["image_id"], table["path"], classes, scores)
    write_table(describe(scored, "scores", classes=classes), path)


def train(labels: Path, settings: dict, options: argparse.Namespace) -> tuple[float, float]:
    """The mAP of the labels and on the test images after `cdul train`."""
    with tempfile.TemporaryDirectory() as name:
        file = Path(name, "settings.yaml")
        file.write_text(yaml.safe_dump(settings))
        words = ["train", "--labels", labels, "--images", options.images, "--settings", file]
        words += ["--device", "cpu", "--threads", "1", "--output", Path(name, "out")]
        for store in options.features:
            words += ["--features", store]
        command = [sys.executable, "-m", "cdul_steps.cli", *map(str, words)]
        log = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    *_, last = LAST.finditer(log)
    return float(last[1]), float(last[2])


def row(what: str, labels: Path, settings: dict, options: argparse.Namespace) -> None:
    """Print a row of the table: every seed with fixed and with moving labels."""
    cells: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    for seed in options.seeds:
        for aligned, found in cells.items():
            changes = {"seed": seed, "alignment": {**settings["alignment"], "enabled": aligned}}
            found.append(train(labels, {**settings, **changes}, options))
    fixed, aligned = ([test for _, test in found] for found in cells.values())
    gains = ", ".join(f"{a - f:+.2f}" for f, a in zip(fixed, aligned, strict=True))
    spread = [
        f"{statistics.mean(v):.2f} ± {statistics.stdev(v) if len(v) > 1 else 0:.2f}"
        for v in (fixed, aligned)
    ]
    print(f"| {what} | {' | '.join(spread)} | {gains} |", flush=True)


def main() -> None:
    """Train with each number of photographs and each seed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--labels", type=Path, required=True, help="pseudo_labels.parquet")
    parser.add_argument("--images", type=Path, required=True, help="images.parquet")
    parser.add_argument("--features", action="append", required=True, help="SPLIT=STORE, each once")
    parser.add_argument("--settings", type=Path, required=True, help="YAML of trainings.NAME")
    parser.add_argument("--photographs", type=int, nargs="*", default=[100, 250, 500, 1000])
    parser.add_argument("--truth", action="store_true", help="also train on the truth")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    settings = yaml.safe_load(options.settings.read_text())
    table, classes, scores = read_scores(options.labels)
    order = np.random.default_rng(0).permutation(len(table))
    print("| photographs | fixed | aligned | gain, seed by seed |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        file = Path(name, "labels.parquet")
        for count in options.photographs:
            some = np.sort(order[:count])
            write_labels(table.take(pa.array(some)), classes, scores[some], file)
            row(str(count), file, settings, options)
        if options.truth:
            known = read_truth(options.images, classes).to_pylist()
            positive = {image["image_id"]: image["positive"] for image in known}
            truth = np.zeros_like(scores)
            for i, image in enumerate(table["image_id"].to_pylist()):
                truth[i, positive.get(image) or []] = 1
            write_labels(table, classes, truth, file)
            row("all, from the truth", file, settings, options)


if __name__ == "__main__":
    main()
