"""mAP of methods that turn cosines into pseudo-labels, those of the package and others.

    python experiments/calibrations.py --vectors vectors.parquet --difficult negative
    python experiments/calibrations.py --similarity train.zarr --images images.parquet

The truth is only used for measuring. `--vectors` reads published probabilities, softmax(cosine /
4.6052), of whole images and of the best and worst snippet per class. Prints JSON, and tables in
Markdown on stderr.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from cdul_steps.data.manifest import read_split, read_truth
from cdul_steps.data.stores import open_similarity
from cdul_steps.method.aggregation import CONSTRUCTIONS, aggregate, combine
from cdul_steps.method.calibration import class_statistics, find_bias, rescale, standardise
from cdul_steps.method.metrics import mean_average_precision, precision_recall_f1, truth_table
from cdul_steps.method.similarity import scores, temperature
from cdul_steps.provenance import versions

MULTIPLES = (0.5, 1, 2, 3, 5, 10)
ZETA = 0.0
SLIP = 4.6052


def read_vectors(path: Path, convention: str) -> tuple:
    """Cosines (N, 3, C) up to a constant per view, truth, counted entries, and tau."""
    table = pq.read_table(path)
    names = [n.partition(":")[2] for n in table.column_names if n.startswith("global:")]
    columns = {
        kind: np.stack([table[f"{kind}:{name}"].to_numpy() for name in names], axis=1)
        for kind in ("global", "max", "min", "label")
    }
    cosines = np.stack([SLIP * np.log(columns[k]) for k in ("global", "max", "min")], axis=1)
    lists = [[np.flatnonzero(row == value) for row in columns["label"]] for value in (1, 0)]
    return cosines, *truth_table(*lists, len(names), convention), 0.01


def read_store(path: Path, images: Path, split: str, convention: str) -> tuple:
    """Cosines (N, 1+S, C) of the images with truth, truth, counted entries, and the model's tau."""
    array, classes, scale = open_similarity(path, None)
    table = read_split(images, split, ["image_id", "row"])
    rows = dict(zip(table["image_id"].to_pylist(), table["row"].to_pylist(), strict=True))
    known = [t for t in read_truth(images, classes).to_pylist() if t["image_id"] in rows]
    cosines = array[:][[rows[t["image_id"]] for t in known]]
    usable = np.isfinite(cosines).all(axis=(1, 2))
    lists = [[t[key] or [] for t in known] for key in ("positive", "difficult")]
    tables = truth_table(*lists, len(classes), convention)
    return cosines[usable], *(t[usable] for t in tables), temperature(scale)


def final(s: np.ndarray, zeta: float = ZETA, lambda_: float = 0.0) -> np.ndarray:
    return CONSTRUCTIONS["final"](s, zeta, lambda_)


def centred(p: np.ndarray) -> np.ndarray:
    """Cosines minus each class's mean over the images, by kind of view."""
    mean = class_statistics([p]).mean.astype(np.float32)
    return np.concatenate([p[:, :1] - mean[0], p[:, 1:] - mean[1]], axis=1)


def standard(p: np.ndarray) -> np.ndarray:
    return standardise(p, class_statistics([p]))


def standard_in_image(p: np.ndarray) -> np.ndarray:
    """Cosines with mean 0 over the classes of a view, and the same deviation in all views."""
    p = p - p.mean(axis=2, keepdims=True)
    deviation = p.std(axis=2, keepdims=True)
    return p / deviation * deviation.mean()


def logit(y: np.ndarray) -> np.ndarray:
    y = np.clip(y.astype(np.float64), 1e-12, 1 - 1e-7)
    return np.log(y) - np.log1p(-y)


def parts(s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return s[:, 0], aggregate(s[:, 1:], ZETA)


def mean_of_logits(s: np.ndarray) -> np.ndarray:
    return np.mean([logit(part) for part in parts(s)], axis=0)


def min_max(s: np.ndarray) -> np.ndarray:
    """Global and aggregated scores, each stretched to 0..1 per class."""
    scaled = [(x - x.min(axis=0)) / np.ptp(x, axis=0) for x in parts(s)]
    return combine(*scaled)


def ranks(s: np.ndarray) -> np.ndarray:
    return combine(*(np.argsort(np.argsort(x, axis=0), axis=0) for x in parts(s)))


def biased_views(s: np.ndarray, positives: float) -> np.ndarray:
    """The scores of every view, shifted by the bias that whole images need, then aggregated."""
    return final(rescale(s, find_bias(s[:, 0], positives)))


def biased_kinds(s: np.ndarray, positives: float) -> np.ndarray:
    """Global and aggregated scores, each shifted by its own bias."""
    return combine(*(rescale(x, find_bias(x, positives)) for x in parts(s)))


def variants(positives: float) -> dict[str, Callable[[np.ndarray, float], np.ndarray]]:
    """Labels (N, C) from cosines and tau, by name."""
    found = {
        name.replace("_", " "): lambda p, tau, n=name: CONSTRUCTIONS[n](scores(p, tau), ZETA, 0.0)
        for name in ("global", "local_mean", "local_max")
    }
    for zeta, lambda_ in ((0, 0), (0.05, 0), (0.1, 0), (0.3, 0), (0.5, 0), (0.05, -1), (0.05, 1)):
        name = f"final, zeta {zeta:g}" + (f", lambda {lambda_:g}" if lambda_ else "")
        found[name] = lambda p, tau, z=zeta, m=lambda_: final(scores(p, tau), z, m)
    changed = {
        "standardised": standard,
        "centred only": centred,
        "standardised within the image, then over images": lambda p: standard(standard_in_image(p)),
    }
    for name, change in changed.items():
        found[f"final, {name}"] = lambda p, tau, f=change: final(scores(f(p), tau))
    joined = {
        "one bias for all views": lambda s: biased_views(s, positives),
        "separate biases for global and aggregate": lambda s: biased_kinds(s, positives),
        "mean of logits": mean_of_logits,
        "min-max per class": min_max,
        "mean of ranks per class": ranks,
    }
    for name, join in joined.items():
        found[f"final, {name}"] = lambda p, tau, f=join: f(scores(p, tau))
        if name in ("separate biases for global and aggregate", "mean of logits"):
            found[f"final, standardised, {name}"] = lambda p, tau, f=join: f(
                scores(standard(p), tau)
            )
    # Without a softmax, the temperature does not matter.
    found["global + best snippet, cosines minus the view's mean"] = lambda p, tau: sum(
        parts(p - p.mean(axis=2, keepdims=True))
    )
    within = "global + best snippet, standardised within the image, then over images"
    found[within] = lambda p, tau: (
        standard(standard_in_image(p))[:, 0] + standard(standard_in_image(p))[:, 1:].max(axis=1)
    )
    return found


def strength(labels: np.ndarray, truth: np.ndarray, counted: np.ndarray) -> dict[str, float]:
    """How close labels are to the truth as targets, regardless of their order."""
    f1 = precision_recall_f1(truth, counted, labels >= 0.5)
    return {
        "sum per image": float(labels.sum(axis=1).mean()),
        "mean label, positives": float(labels[truth & counted].mean()),
        "mean label, negatives": float(labels[~truth & counted].mean()),
        "CF1": 100 * f1["CF1"],
        "OF1": 100 * f1["OF1"],
        "mAP": mean_average_precision(truth, counted, labels),
        "squared error": float(((labels - truth)[counted] ** 2).mean()),
    }


def main() -> None:
    """Measure every variant at every temperature."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--vectors", type=Path)
    parser.add_argument("--similarity", type=Path)
    parser.add_argument("--images", type=Path)
    parser.add_argument("--split", default="train")
    parser.add_argument("--difficult", default="ignore", choices=["ignore", "negative", "positive"])
    parser.add_argument("--positives", type=float, default=1.5, help="estimated objects per image")
    options = parser.parse_args()
    cosines, truth, counted, tau = (
        read_vectors(options.vectors, options.difficult)
        if options.vectors
        else read_store(options.similarity, options.images, options.split, options.difficult)
    )
    table = {
        name: [
            mean_average_precision(truth, counted, labels(cosines, multiple * tau))
            for multiple in MULTIPLES
        ]
        for name, labels in variants(options.positives).items()
    }
    print("| labels |", *(f" x{m:g} |" for m in MULTIPLES), sep="", file=sys.stderr)
    print("|---|", *("---|" for _ in MULTIPLES), sep="", file=sys.stderr)
    for name, row in table.items():
        print(f"| {name} |", *(f" {value:.2f} |" for value in row), sep="", file=sys.stderr)
    targets = {}
    for multiple in MULTIPLES:
        labels = final(scores(cosines, multiple * tau))
        targets[f"x{multiple:g}, unchanged"] = strength(labels, truth, counted)
        for name, slope in (("bias only", 1.0), ("`positives`", multiple)):
            bias = find_bias(labels, options.positives, slope)
            targets[f"x{multiple:g}, {name}"] = strength(
                rescale(labels, bias, slope), truth, counted
            )
    keys = list(targets["x1, unchanged"])
    print(f"\n| final, zeta {ZETA:g} |", *(f" {key} |" for key in keys), sep="", file=sys.stderr)
    print("|---|", *("---|" for _ in keys), sep="", file=sys.stderr)
    for name, row in targets.items():
        print(f"| {name} |", *(f" {row[key]:.3g} |" for key in keys), sep="", file=sys.stderr)
    result = {
        "images": len(truth),
        "positives": float(truth.sum(axis=1).mean()),
        "difficult": options.difficult,
        "multiples": MULTIPLES,
        "mAP": table,
        "targets": targets,
        "software": versions("numpy"),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
