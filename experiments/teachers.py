"""Compare ways of joining the labels of several teachers: their scores, logits or ranks.

    python experiments/teachers.py results/voc2007/manifest/images.parquet \\
        results/voc2007/{photo-mini,photo-mini-dense}/calibrated/pseudo_labels.parquet

Prints the label mAP of each table and of the three means, as JSON. `labels.NAME.join` averages the
scores.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from scipy.special import logit
from scipy.stats import rankdata

from cdul_steps.data.tables import read_scores
from cdul_steps.data.truth import Truth

LIMIT = 1e-6
"""Distance from 0 and 1 that keeps logits finite."""


def main() -> None:
    """Read the tables, join them, and print the mAP of each result."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("images", type=Path, help="images.parquet, with the truth")
    parser.add_argument("tables", type=Path, nargs="+", help="pseudo_labels.parquet of one split")
    options = parser.parse_args()
    read = [read_scores(table) for table in options.tables]
    ids, classes = read[0][0]["image_id"].to_pylist(), read[0][1]
    if any(of["image_id"].to_pylist() != ids or names != classes for of, names, _ in read):
        parser.error("the tables do not have the same images and classes")
    truth = Truth.of(options.images, ids, classes, "ignore")
    tables = [scores for *_, scores in read]
    joined = {str(file): scores for file, scores in zip(options.tables, tables, strict=True)}
    joined["scores"] = np.mean(tables, axis=0)
    joined["logits"] = np.mean([logit(t.clip(LIMIT, 1 - LIMIT)) for t in tables], axis=0)
    joined["ranks"] = np.mean([rankdata(t, axis=0) for t in tables], axis=0)
    found = {
        name: round(truth.mean_average_precision(scores) or 0.0, 2)
        for name, scores in joined.items()
    }
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
