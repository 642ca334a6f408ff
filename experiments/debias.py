"""CCD's debiased labels, and its mixture of first and second views, beside those of this project.

    python experiments/debias.py --images images.parquet --whole GLOBAL.parquet \\
        --boxes BOXES.parquet --labels calibrated/pseudo_labels.parquet --output FOLDER

CCD (CVPR 2025) raises every probability to at least 1 / C, divides each class by its bias, and
limits the result to 1. The bias of a class is the mean top probability of the images whose top
class it is, without images whose entropy exceeds 2 nats. Its second labels are 0.2 times the first
plus 0.8 times the maximum over the boxes. Prints the label mAP of each table, as JSON, and writes
the tables to FOLDER, for `growth.py`.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from growth import write_labels

from cdul_steps.data.tables import read_scores
from cdul_steps.data.truth import Truth

ENTROPY = 2.0
FIRST = 0.2
"""The weight of the first labels."""


def class_bias(whole: np.ndarray) -> np.ndarray:
    """The bias of each class (C,), from probabilities (N, C) of whole images; 1 for none."""
    entropy = -(whole * np.log(np.maximum(whole, 1e-12))).sum(axis=1)
    sure = whole[entropy <= ENTROPY]
    top, value = sure.argmax(axis=1), sure.max(axis=1)
    return np.array(
        [value[top == c].mean() if (top == c).any() else 1.0 for c in range(whole.shape[1])]
    )


def main() -> None:
    """Read the tables, debias and mix them, print the mAP of each result."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=Path, required=True, help="images.parquet with the truth")
    parser.add_argument("--whole", type=Path, required=True, help="labels of the whole images")
    parser.add_argument("--boxes", type=Path, required=True, help="the best box of each class")
    parser.add_argument(
        "--labels", type=Path, action="append", default=[], help="also debiased and mixed"
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for the tables")
    options = parser.parse_args()
    table, classes, whole = read_scores(options.whole)
    ids = table["image_id"].to_pylist()

    def scores(file: Path) -> np.ndarray:
        of, names, values = read_scores(file)
        if of["image_id"].to_pylist() != ids or names != classes:
            parser.error(f"{file}: has other images or classes than {options.whole}")
        return values

    bias, boxes = class_bias(whole), scores(options.boxes)

    def debiased(values: np.ndarray) -> np.ndarray:
        return np.minimum(np.maximum(values, 1 / len(classes)) / bias, 1)

    made = {
        "whole": whole,
        "whole-debiased": debiased(whole),
        "mixed": FIRST * whole + (1 - FIRST) * boxes,
        "mixed-debiased": FIRST * debiased(whole) + (1 - FIRST) * debiased(boxes),
    }
    for file in options.labels:
        values, name = scores(file), file.parent.name
        made[f"{name}-mixed"] = FIRST * values + (1 - FIRST) * boxes
        made |= {
            f"{name}-debiased": debiased(values),
            f"{name}-divided": np.minimum(values / bias, 1),
        }
    truth = Truth.of(options.images, ids, classes, "ignore")
    options.output.mkdir(parents=True, exist_ok=True)
    for name, values in made.items():
        write_labels(table, classes, values.astype(np.float32), options.output / f"{name}.parquet")
    found = {name: round(truth.mean_average_precision(v) or 0.0, 2) for name, v in made.items()}
    print(json.dumps({"bias": bias.round(3).tolist(), "label_mAP": found}, indent=1))


if __name__ == "__main__":
    main()
