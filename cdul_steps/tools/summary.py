"""The metrics of all results in one table."""

import json
from pathlib import Path
from typing import Any

from cdul_steps.data.files import read_json
from cdul_steps.errors import UserError
from cdul_steps.results import CARD, METRICS, QUALITY, TRAINING, Place

LABEL_ROWS = {
    "global": "global",
    "local_mean": "local mean",
    "local_max": "local max",
    "aggregate": "aggregate",
    "final": "final",
    "pseudo_labels": "pseudo-labels",
}


def _rows(results: Path) -> list[dict[str, Any]]:
    rows = []
    for labels in Place(results).find(QUALITY):
        quality = read_json(labels.path(QUALITY))
        for split, constructions in quality["splits"].items():
            for name in [n for n in LABEL_ROWS if n in constructions]:
                rows.append(
                    {
                        **labels.names,
                        "scores": f"CLIP, {LABEL_ROWS[name]}",
                        "split": split,
                        "mAP": constructions[name]["mAP"],
                        "CF1": constructions[name]["at_threshold"]["CF1"],
                        "OF1": constructions[name]["at_threshold"]["OF1"],
                        "images": constructions[name]["images"],
                    }
                )
        for training in labels.find(METRICS):
            metrics = read_json(training.path(METRICS))
            rows.append(
                {
                    **labels.names,
                    "scores": f"classifier, {training.names['training']}",
                    "split": Path(metrics["scores"]).stem,
                    "mAP": metrics["mAP"],
                    "CF1": metrics["at_threshold"]["CF1"],
                    "OF1": metrics["at_threshold"]["OF1"],
                    "images": metrics["images"],
                }
            )
    return rows


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def summarise(results: Path, *, as_json: bool) -> str:
    """The metrics below a results folder (percent), as a table for people or as JSON.

    Raises UserError if there are none, or if they do not have this version's format.
    """
    try:
        rows = _rows(results)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{results}: a quality.json or metrics.json has no {error}; run 'cdul run' again"
        ) from error
    if not rows:
        raise UserError(f"{results}: no metrics there yet; run 'cdul run' first")
    if as_json:
        return json.dumps(rows, indent=2, ensure_ascii=False)
    if all(row["mAP"] is None for row in rows):
        text = (
            "The images with known ground truth show none of the classes, so there is no mAP."
            if any(row["images"] for row in rows)
            else "There is no ground truth, so there is nothing to measure."
        )
    else:
        header = list(rows[0])
        cells = [header, *([_cell(row[name]) for name in header] for row in rows)]
        widths = [max(len(line[i]) for line in cells) for i in range(len(header))]
        numbers = {header.index(name) for name in ("mAP", "CF1", "OF1", "images")}
        text = "\n".join(
            "  ".join(
                cell.rjust(w) if i in numbers else cell.ljust(w)
                for i, (cell, w) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in cells
        )
        text += "\n\nmAP, CF1 and OF1 (at 0.5) in percent."
    places = [training.path(TRAINING) for training in Place(results).find(CARD)]
    if places:
        text += "\n\nTrained classifiers:"
    for place in places:
        text += f"\n{place}/: model/, history.parquet, refined_labels.parquet, predictions/"
    return text
