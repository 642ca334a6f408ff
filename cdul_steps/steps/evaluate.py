"""Stage evaluate: compare scores with the truth."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from cdul_steps.data.files import SCHEMA_VERSION, write_json
from cdul_steps.data.labels import LabelFacts, build_rows, labels_like
from cdul_steps.data.manifest import check_rows, read_split, read_truth
from cdul_steps.data.stores import open_similarity
from cdul_steps.data.tables import read_facts, read_scores
from cdul_steps.data.truth import Truth, definition, measure, measure_table
from cdul_steps.errors import UserError
from cdul_steps.method.aggregation import CONSTRUCTIONS, seen_whole
from cdul_steps.method.choices import AveragePrecision, Difficult
from cdul_steps.provenance import versions


def evaluate_scores(
    *, scores: Path, images: Path, difficult: Difficult, ap: AveragePrecision, output: Path
) -> dict[str, Any]:
    """Measure a table of scores, and write the measures as JSON.

    Raises UserError as `measure_table` does.
    """
    result = {
        "schema_version": SCHEMA_VERSION,
        "scores": str(scores),
        "definition": definition(difficult, ap),
        **measure_table(scores, images, difficult, ap),
        "settings": {
            k: v for k, v in read_facts(scores).items() if k not in ("classes", "software")
        },
        "software": versions("numpy"),
    }
    write_json(output, result)
    return result


def conclusion(result: dict[str, Any]) -> str:
    """The result of `evaluate_scores` in one line: the mAP, or why there is none."""
    left_out = result["left_out"]
    words = {
        "without_scores": "without scores",
        "not_in_images": "not in the data set",
        "truth_unknown": "with unknown truth",
    }
    others = ", ".join(f"{n} {words[why]}" for why, n in left_out.items() if n)
    if result["mAP"] is not None:
        text = f"mAP {result['mAP']:.2f} on {result['images']} images"
        return f"{text} ({others})" if others else text
    if result["images"]:
        reason = f"the {result['images']} images with known truth show no class"
    elif left_out["truth_unknown"]:
        reason = "no image with known truth"
    else:
        reason = f"no row has scores, {'all are NaN' if others else 'there are none'}"
    return f"no mAP: {reason} ({others})" if others else f"no mAP: {reason}"


def evaluate_labels(
    *,
    similarity: dict[str, Path],
    images: Path,
    labels: Path,
    difficult: Difficult,
    ap: AveragePrecision,
    output: Path,
) -> dict[str, Any]:
    """Measure every label construction on each split: `quality.json`.

    `similarity` maps splits to their stores. Scoring, zeta, lambda and grid are those of the
    table `labels`. The result is nested: split, construction, then as `measure`. If that table was
    calibrated or hardened, `pseudo_labels` measures labels made the same way on every split, with
    the table's statistics, bias and slope. For joined labels there is only `pseudo_labels`, on
    their own split. Raises UserError if the table does not record how it was made, or has other
    classes.
    """
    facts = LabelFacts.read(labels)
    result: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "definition": definition(difficult, ap),
        "splits": {},
    }
    if facts.joined and facts.split:
        scored, classes, values = read_scores(labels)
        truth = Truth.of(images, scored["image_id"].to_pylist(), classes, difficult)
        measured = {"pseudo_labels": measure(values, truth, classes, ap)}
        result |= {"splits": {facts.split: measured}, "software": versions("numpy")}
        write_json(output, result)
        return result
    if not similarity:
        raise UserError("quality: give --similarity SPLIT=STORE; only joined labels need none")
    if facts.recipe is None:
        raise UserError(f"{labels}: does not record how its labels were made; use 'cdul label'")
    _, scoring, zeta, lambda_ = facts.recipe
    result |= {"tau": scoring.tau, "zeta": zeta, "lambda": lambda_}
    if scoring.logit_bias is not None:
        result["logit_bias"] = scoring.logit_bias
    for split, store in similarity.items():
        array, classes, _ = open_similarity(store, scoring.tau)
        if facts.classes != classes:
            raise UserError(f"{labels} and {store} do not have the same class table")
        check_rows(images, split, store, array.shape[0])
        known = read_truth(images, classes)["image_id"]
        table = read_split(images, split, ["image_id", "row"])
        table = table.filter(pc.is_in(table["image_id"], pc.unique(known)))
        rows = table["row"].to_numpy()
        found = build_rows(
            *(store, array, images, rows, list(CONSTRUCTIONS), facts.grid),
            scoring=scoring,
            zeta=zeta,
            lambda_=lambda_,
        )
        usable = seen_whole(found)
        if facts.changed:
            found["pseudo_labels"] = labels_like(facts, store, array, images, rows)
        names = table["image_id"].filter(pa.array(usable)).to_pylist()
        truth = Truth.of(images, names, classes, difficult)
        result["splits"][split] = {
            name: measure(values[usable], truth, classes, ap) for name, values in found.items()
        }
    result["software"] = versions("numpy")
    write_json(output, result)
    return result
