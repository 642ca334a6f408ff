"""A few photographs of VOC2007, as tables for the reader `table`.

    python experiments/few.py .../VOCdevkit/VOC2007 photographs
    snakemake --cores all ablation --configfile config/photos.yaml experiments/few.yaml

Draws 100 and 250 photographs for training at random; the test photographs are the same for both.
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

from cdul_steps.data.classes import load_classes
from cdul_steps.data.readers.voc import read_voc

SPLITS = {"train": "trainval", "test": "test"}


def main() -> None:
    """Write a table for each number: path, split, and a 1/0 column per class."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("root", type=Path, help="folder of VOC2007")
    parser.add_argument("folder", type=Path, help="folder to write few-100.csv and few-250.csv to")
    parser.add_argument("--counts", type=int, nargs="+", default=[100, 250])
    options = parser.parse_args()
    classes = load_classes(Path("config/classes/voc.yaml")).names
    rows = [
        {"path": str(Path(record.path).resolve()), "split": record.split}
        | {name: int(c in record.positive) for c, name in enumerate(classes)}
        for record in read_voc(options.root, SPLITS, classes)
    ]
    table = pd.DataFrame(rows)
    train = table[table["split"] == "train"]
    order = np.random.default_rng(0).permutation(len(train))
    options.folder.mkdir(parents=True, exist_ok=True)
    for count in options.counts:
        some = train.iloc[np.sort(order[:count])]
        few = pd.concat([some, table[table["split"] == "test"]])
        few.to_csv(options.folder / f"few-{count}.csv", index=False)


if __name__ == "__main__":
    main()
