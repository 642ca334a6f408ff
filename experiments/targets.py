"""Train the same classifier on labels that differ in their values, and print its mAP as JSON.

    python experiments/targets.py --encoder results/demo/tiny-clip --training fixed

What limits a classifier: the ranking of its labels, or their values? "values from the truth"
keeps the ranking of the final labels and replaces each by the share of positives among similar
labels (isotonic regression on the truth, so not usable for real training); "the truth" is the truth
itself. A table in Markdown goes to stderr.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import yaml
from sklearn.isotonic import IsotonicRegression

from cdul_steps.config import Labels, load
from cdul_steps.data.stores import open_similarity
from cdul_steps.data.tables import describe, read_scores, score_table, write_table
from cdul_steps.data.truth import Truth
from cdul_steps.limits import MAX_PIXELS
from cdul_steps.method.similarity import temperature
from cdul_steps.models.device import Machine
from cdul_steps.provenance import versions
from cdul_steps.steps.label import make_labels
from cdul_steps.steps.train import Inputs, train_classifier


def make_tables(encoder: Path, images: Path, positives: float, folder: Path) -> dict[str, Path]:
    """Label tables by name, written to `folder`."""
    similarity = encoder / "similarity/train.zarr"
    tau = temperature(open_similarity(similarity, None)[2])
    plain = {"tau": tau}
    variants = {
        "final": plain,
        "final, rescaled": {**plain, "positives": positives},
        "final, lambda 1": {**plain, "lambda": 1.0},
        "final, lambda 1, rescaled": {**plain, "lambda": 1.0, "positives": positives},
        "final, warm": {**plain, "tau": 3 * tau, "zeta": 0.05},
        "final, warm, rescaled": {"tau": 3 * tau, "zeta": 0.05, "positives": positives},
    }
    tables = {name: folder / f"{i}.parquet" for i, name in enumerate(variants)}
    for name, settings in variants.items():
        make_labels(
            similarity=similarity,
            images=images,
            split="train",
            settings=Labels(**settings),
            output=tables[name],
        )
    table, classes, labels = read_scores(tables["final"])
    truth = Truth.of(images, table["image_id"].to_pylist(), classes, "ignore")
    calibrated, true = labels.copy(), np.zeros_like(labels)
    true[truth.places] = truth.present
    for c in range(len(classes)):
        mine, present = labels[truth.places, c], truth.present[:, c]
        # Preserve the ranking: equal values keep a trace of their order.
        values = IsotonicRegression(out_of_bounds="clip").fit_transform(mine, present)
        calibrated[truth.places, c] = (values + 1e-5 * mine).clip(0, 1)
    for name, values in (("final, values from the truth", calibrated), ("the truth", true)):
        tables[name] = folder / f"{len(tables)}.parquet"
        scored = score_table(table["image_id"], table["path"], classes, values)
        write_table(describe(scored, "scores", classes=classes), tables[name])
    return tables


def main() -> None:
    """Make the tables, train on each, and print the measures."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--config", type=Path, default=Path("config/config.yaml"))
    parser.add_argument("--encoder", type=Path, required=True, help="results/DATASET/ENCODER")
    parser.add_argument("--training", default="fixed", help="name under trainings")
    parser.add_argument("--positives", type=float, default=3.0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("results/targets"))
    options = parser.parse_args()
    images = options.encoder.parent / "manifest/images.parquet"
    config = load(yaml.safe_load(options.config.read_text()), check_run=False)
    training = config.trainings[options.training]
    tables = make_tables(options.encoder, images, options.positives, options.output)
    found = {}
    for name, labels in tables.items():
        runs = []
        for seed in options.seeds:
            output = options.output / labels.stem / str(seed)
            if not (output / "history.parquet").is_file():
                train_classifier(
                    inputs=Inputs(labels, images),
                    settings=training.model_copy(update={"seed": seed}),
                    difficult="ignore",
                    max_pixels=MAX_PIXELS,
                    max_failed_share=0.05,
                    machine=Machine(threads=options.threads),
                    output=output,
                )
            runs.append(pq.read_table(output / "history.parquet").to_pylist()[-1])
        values = read_scores(labels)[2]
        found[name] = {
            "labels": runs[0]["label_mAP"],
            "sum per image": float(values.sum(axis=1).mean()),
            "classifier": [run["test_mAP"] for run in runs],
        }
    print("| labels | label mAP | sum per image | classifier, test |", file=sys.stderr)
    print("|---|---|---|---|", file=sys.stderr)
    for name, row in found.items():
        mean = np.mean(row["classifier"])
        cells = [name, f"{row['labels']:.2f}", f"{row['sum per image']:.2f}", f"{mean:.2f}"]
        print(f"| {' | '.join(cells)} |", file=sys.stderr)
    software = versions("torch", "timm", "scikit-learn")
    print(json.dumps({"seeds": options.seeds, "targets": found, "software": software}, indent=2))


if __name__ == "__main__":
    main()
