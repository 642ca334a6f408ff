"""Stage evaluate: scores against the truth."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import zarr

from cdul_steps.data.files import write_text
from cdul_steps.data.manifest import read_split, read_truth
from cdul_steps.data.stores import open_similarity
from cdul_steps.data.tables import read_facts, read_scores
from cdul_steps.errors import UserError
from cdul_steps.method import metrics
from cdul_steps.method.aggregation import CONSTRUCTIONS, build_labels, finish
from cdul_steps.method.calibration import ClassStatistics
from cdul_steps.method.similarity import temperature
from cdul_steps.method.snippets import Grid
from cdul_steps.provenance import versions
from cdul_steps.steps.label import read_views, views_of

AP = {"all": metrics.average_precision, "voc07": metrics.average_precision_voc07}
TOP_K = 3
THRESHOLD = 0.5
DEFINITION = {
    "mAP": "mean over classes with a positive of the average precision, in percent",
    "all": "AP over all points: sum of (recall step x precision), no interpolation",
    "voc07": "AP over 11 points: mean of the best precision at recall >= 0, 0.1, ..., 1",
    "ignore": "images with only difficult objects of a class are left out for that class",
    "negative": "images with only difficult objects of a class count as without it",
    "positive": "images with only difficult objects of a class count as with it",
    "at_threshold": f"a label is predicted where its score is at least {THRESHOLD}",
    "top_k": f"the {TOP_K} highest scores of each image are predicted, whatever their value",
    "CF1, OF1": "harmonic means of CP and CR (means over classes), OP and OR (over all labels)",
}


def measure(
    scores: np.ndarray,
    positive: list,
    difficult: list,
    classes: list[str],
    convention: metrics.Difficult,
    ap: str,
) -> dict[str, Any]:
    """All measures of scores (N, C) against lists of class indices; values in percent.

    A class without positives has AP null, is listed and left out of the mean.
    """
    try:
        truth, counted = metrics.truth_table(positive, difficult, len(classes), convention)
    except IndexError as error:
        raise UserError(
            f"the ground truth names a class beyond the {len(classes)} scored: {error}"
        ) from error
    per_class = {}
    for c, name in enumerate(classes):
        here = counted[:, c]
        positives = int(truth[here, c].sum())
        value = AP[ap](truth[here, c], scores[here, c]) if positives else None
        per_class[name] = {
            "AP": None if value is None else 100 * value,
            "positives": positives,
            "images": int(here.sum()),
        }
    values = [c["AP"] for c in per_class.values() if c["AP"] is not None]
    at_threshold = metrics.precision_recall_f1(truth, counted, scores >= THRESHOLD)
    at_top_k = metrics.precision_recall_f1(truth, counted, metrics.top_k(scores, TOP_K))
    return {
        "mAP": float(np.mean(values)) if values else None,
        "at_threshold": _percent(at_threshold),
        "top_k": _percent(at_top_k),
        "images": len(scores),
        "positives": int((truth & counted).sum()),
        "classes_without_positives": [n for n, c in per_class.items() if not c["positives"]],
        "per_class": per_class,
    }


def _percent(values: dict[str, float | None]) -> dict[str, float | None]:
    return {name: None if value is None else 100 * value for name, value in values.items()}


def _definition(difficult: str, ap: str) -> dict[str, Any]:
    return {
        "difficult": difficult,
        "ap": ap,
        "threshold": THRESHOLD,
        "k": TOP_K,
        "meaning": {
            k: v
            for k, v in DEFINITION.items()
            if k not in {*AP, "ignore", "negative", "positive"} or k in (ap, difficult)
        },
    }


def evaluate_scores(
    *, scores: Path, images: Path, difficult: metrics.Difficult, ap: str, output: Path | None
) -> dict[str, Any]:
    """Measure a table of scores and write the measures as JSON.

    Images are matched by `image_id`; those without known truth are left out. Raises UserError
    where classes differ or an image is named twice.
    """
    ids, classes, values = read_scores(scores)
    truth = read_truth(images, classes)
    result = {
        "scores": str(scores),
        "definition": _definition(difficult, ap),
        **_measure_known(
            ids["image_id"].to_pylist(), values, truth, classes, difficult, ap, scores
        ),
        "settings": {
            k: v for k, v in read_facts(scores).items() if k not in ("classes", "software")
        },
        "software": versions("numpy"),
    }
    if output:
        write_json(output, result)
    return result


def _measure_known(
    image_ids: list[str],
    values: np.ndarray,
    truth: pa.Table,
    classes: list[str],
    difficult: metrics.Difficult,
    ap: str,
    origin: Path,
) -> dict[str, Any]:
    place = {image_id: i for i, image_id in enumerate(truth["image_id"].to_pylist())}
    if len(set(image_ids)) != len(image_ids):
        raise UserError(f"{origin}: an image_id stands in more than one row")
    pairs = [(i, place[name]) for i, name in enumerate(image_ids) if name in place]
    mine = [i for i, _ in pairs]
    theirs = truth.take(pa.array([j for _, j in pairs], pa.int64()))
    return measure(
        values[mine],
        theirs["positive"].to_pylist(),
        [entry or [] for entry in theirs["difficult"].to_pylist()],
        classes,
        difficult,
        ap,
    )


def evaluate_labels(
    *,
    similarity: dict[str, Path],
    images: Path,
    tau: float | None,
    zeta: float,
    lam: float,
    grid: Grid | None = None,
    labels: Path | None = None,
    difficult: metrics.Difficult,
    ap: str,
    output: Path,
) -> dict[str, Any]:
    """Measure every label construction on each split: `quality.json`.

    `similarity` maps splits to their stores. Result: split, construction, then as `measure`.
    Where the table `labels` was calibrated or hardened, labels made in its way are there too, as
    `pseudo_labels`: on every split with the statistics, bias and slope that the table has.
    """
    own = read_facts(labels) if labels else {}
    finishing = {key: own.get(key) for key in ("bias", "threshold", "top_k")}
    calibrated = own.get("statistics") or any(v is not None for v in finishing.values())
    result: dict[str, Any] = {"definition": _definition(difficult, ap), "splits": {}}
    for split, store in similarity.items():
        array, classes, scale = open_similarity(store, tau)
        used_tau = temperature(scale) if tau is None else tau
        truth = read_truth(images, classes)
        table = read_split(images, split, ["image_id", "row"])
        table = table.filter(pc.is_in(table["image_id"], pc.unique(truth["image_id"])))
        build = partial(_build_rows, store, array, images, table["row"].to_numpy(), len(classes))
        found = build(list(CONSTRUCTIONS), grid, tau=used_tau, zeta=zeta, lam=lam)
        usable = np.isfinite(found["global"]).all(axis=1)
        if calibrated:
            if own["classes"] != classes:
                raise UserError(f"{labels} and {store} are not of the same class table")
            found["pseudo_labels"] = build(
                [own["construction"]],
                own["grid"],
                tau=own["tau"],
                zeta=own["zeta"],
                lam=own["lambda"],
                statistics=own["statistics"] and ClassStatistics(**own["statistics"]),
            )[own["construction"]]
            finish(found["pseudo_labels"], slope=own["slope"], **finishing)
        names = table["image_id"].filter(pa.array(usable)).to_pylist()
        result["splits"][split] = {
            name: _measure_known(names, values[usable], truth, classes, difficult, ap, images)
            for name, values in found.items()
        }
        result |= {"tau": used_tau, "zeta": zeta, "lambda": lam}
    result["software"] = versions("numpy")
    write_json(output, result)
    return result


def _build_rows(
    store: Path,
    array: zarr.Array,
    images: Path,
    rows: np.ndarray,
    classes: int,
    constructions: list[str],
    grid: Grid | None,
    **settings: Any,
) -> dict[str, np.ndarray]:
    """Labels (len(rows), C) of some rows of a store, by each of the constructions."""
    blocks = read_views(store, array, views_of(images, grid)) if len(rows) else ()
    shape = (array.shape[0] if len(rows) else 0, classes)
    built = build_labels(blocks, shape, constructions, **settings)
    return {name: values[rows] for name, values in built.items()}


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write JSON whole."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
