"""Photographs most of which show none of three names, as a table for the reader `table`.

    python experiments/mostly_none.py VOCdevkit/VOC2007 photographs/mostly-none.csv
    snakemake --cores all report --configfile config/photos.yaml experiments/mostly_none.yaml

Takes every photograph that shows none of the names, and others so that they make up a tenth of all.
Photographs that show one of the names only as "difficult" objects are left out.
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

from cdul_steps.data.classes import load_classes
from cdul_steps.data.readers.voc import read_voc

SPLITS = {"train": "trainval", "test": "test"}


def main() -> None:
    """Write the table: path, split, and a 1/0 column per name."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("root", type=Path, help="folder of VOC2007")
    parser.add_argument("table", type=Path, help="CSV file to write")
    parser.add_argument("--names", nargs="+", default=["dog", "bicycle", "boat"])
    parser.add_argument(
        "--share", type=float, default=0.1, help="share that shows one of the names"
    )
    options = parser.parse_args()
    classes = load_classes(Path("config/classes/voc.yaml")).names
    chosen = [classes.index(name) for name in options.names]
    random, rows = np.random.default_rng(0), []
    for split in SPLITS:
        records = [r for r in read_voc(options.root, SPLITS, classes) if r.split == split]
        records = [r for r in records if not set(chosen) & set(r.difficult or ())]
        some = [r for r in records if set(chosen) & set(r.positive)]
        none = [r for r in records if not set(chosen) & set(r.positive)]
        count = round(len(none) * options.share / (1 - options.share))
        some = [some[i] for i in sorted(random.permutation(len(some))[:count])]
        for record in [*some, *none]:
            shows = {
                name: int(c in record.positive)
                for name, c in zip(options.names, chosen, strict=True)
            }
            rows.append({"path": str(Path(record.path).resolve()), "split": split, **shows})
    options.table.parent.mkdir(parents=True, exist_ok=True)
    table = pd.DataFrame(rows)
    table.to_csv(options.table, index=False)
    options.table.with_suffix(".txt").write_text("\n".join(options.names) + "\n")
    print(table.groupby("split")[options.names].agg(["size", "sum"]).to_string())


if __name__ == "__main__":
    main()
