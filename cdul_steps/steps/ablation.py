"""Stage ablation: compare the variants of a training."""

from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa

from cdul_steps.data.files import read_json, write_text
from cdul_steps.data.tables import describe, read_facts, write_table
from cdul_steps.data.truth import measure_table
from cdul_steps.errors import UserError
from cdul_steps.method.choices import AveragePrecision, Difficult
from cdul_steps.progress import note
from cdul_steps.provenance import versions
from cdul_steps.variants import COLUMNS, read_rows


def compare_variants(
    *,
    table: Path,
    trainings: list[tuple[str, Path]],
    images: Path,
    difficult: Difficult,
    ap: AveragePrecision,
    output: Path,
) -> None:
    """Write `ablation.parquet`, one row per training, and `ablation.md`, one row per variant.

    `trainings` gives the variant's name and the folder of each, somewhere below that of its
    pseudo-labels. Measures are mAP in percent: of the classifier on the split of its
    `metrics.json`, and of its training labels before and after refinement. `gain` is the
    classifier's mAP minus that of the variant `against` with the same seed. Raises UserError for
    an invalid table, and for a variant that is not in it.
    """
    rows = read_rows(table).set_index("variant", drop=False)
    keys = [name for name in rows if name not in (*COLUMNS, "seed")]

    @cache
    def label_map(scores: Path) -> float | None:
        return measure_table(scores, images, difficult, ap)["mAP"]

    records: list[dict[str, Any]] = []
    for name, folder in trainings:
        if name not in rows.index:
            raise UserError(f"{table}: has no variant {name!r}")
        labels = _pseudo_labels(folder)
        refined = folder / "refined_labels.parquet"
        metrics = read_json(folder / "metrics.json")
        settings = read_facts(refined)["training"]
        records.append(
            {
                "variant": name,
                "labels": labels.parent.name,
                "seed": settings["seed"],
                **{key: _value(settings, key) for key in keys},
                "split": Path(metrics["scores"]).stem,
                "classifier_mAP": metrics["mAP"],
                "label_mAP_before": label_map(labels),
                "label_mAP_after": label_map(refined),
            }
        )
    frame = pd.DataFrame(records)
    # None, for unknown truth, becomes NaN.
    measures = [name for name in frame if "mAP" in name]
    frame = frame.astype(dict.fromkeys(measures, float))
    measured = frame.set_index(["variant", "seed"])["classifier_mAP"]
    against = frame["variant"].map(rows.get("against", pd.Series(dtype=str))).fillna("")
    other = measured.reindex(pd.MultiIndex.from_arrays([against, frame["seed"]]))
    frame["against"], frame["gain"] = against, measured.to_numpy() - other.to_numpy()
    described = describe(
        pa.Table.from_pandas(frame, preserve_index=False),
        "ablation",
        difficult=difficult,
        ap=ap,
        software=versions("numpy", "pandas"),
    )
    write_table(described, output / "ablation.parquet")
    write_text(output / "ablation.md", _markdown(frame))
    note(f"ablation: {len(rows)} variants, {len(frame)} trainings; {output}/ablation.md")


def _pseudo_labels(folder: Path) -> Path:
    """The labels that a training used."""
    for parent in folder.parents:
        if (parent / "pseudo_labels.parquet").is_file():
            return parent / "pseudo_labels.parquet"
    raise UserError(f"{folder}: has no pseudo_labels.parquet in a folder above it")


def _value(settings: dict[str, Any], key: str) -> Any:
    """The value of a dotted key; None if a training of an older version had none."""
    value: Any = settings
    for part in key.split("."):
        value = (value or {}).get(part)
    return value


def _mean(values: pd.Series, sign: str = "") -> str:
    values = values.dropna()
    if values.empty:
        return "-"
    deviation = f" ± {values.std():.2f}" if len(values) > 1 else ""
    return f"{values.mean():{sign}.2f}{deviation}"


def _markdown(frame: pd.DataFrame) -> str:
    lines = [
        "mAP in percent: mean over the seeds ± their standard deviation. The gain is the mean of",
        "the differences to the variant it names, seed by seed.",
        "",
        "| variant | labels | seeds | classifier | gain | labels before | labels after |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, group in frame.groupby("variant", sort=False):
        (split,), (against,) = group["split"].unique(), group["against"].unique()
        gain = f"{_mean(group['gain'], '+')} over {against}" if against else ""
        cells = [
            name,
            group["labels"].iloc[0],
            len(group),
            f"{_mean(group['classifier_mAP'])} ({split})",
            gain,
            _mean(group["label_mAP_before"]),
            _mean(group["label_mAP_after"]),
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"
