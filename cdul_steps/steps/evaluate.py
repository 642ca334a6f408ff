"""Stage evaluate: scores against the truth."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from cdul_steps.data.files import SCHEMA_VERSION, write_json
from cdul_steps.data.labels import LabelFacts, build_rows, labels_like
from cdul_steps.data.manifest import check_rows, read_split, read_truth
from cdul_steps.data.stores import open_similarity
from cdul_steps.data.tables import read_facts, read_scores
from cdul_steps.data.truth import Truth, definition, measure
from cdul_steps.errors import UserError
from cdul_steps.method.aggregation import CONSTRUCTIONS, seen_whole
from cdul_steps.method.choices import AveragePrecision, Difficult
from cdul_steps.provenance import versions


def evaluate_scores(
    *, scores: Path, images: Path, difficult: Difficult, ap: AveragePrecision, output: Path | None
) -> dict[str, Any]:
    """Measure a table of scores and write the measures as JSON.

    Images are matched by `image_id`; those without known truth are left out. Raises UserError
    where classes differ or an image is named twice.
    """
    table, classes, values = read_scores(scores)
    image_ids = table["image_id"].to_pylist()
    if len(set(image_ids)) != len(image_ids):
        raise UserError(f"{scores}: an image_id stands in more than one row")
    truth = Truth.of(images, image_ids, classes, difficult)
    result = {
        "schema_version": SCHEMA_VERSION,
        "scores": str(scores),
        "definition": definition(difficult, ap),
        **measure(values, truth, classes, ap),
        "settings": {
            k: v for k, v in read_facts(scores).items() if k not in ("classes", "software")
        },
        "software": versions("numpy"),
    }
    if output:
        write_json(output, result)
    return result


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

    `similarity` maps splits to their stores. Temperature, zeta, lambda and grid are those of the
    table `labels`. Result: split, construction, then as `measure`. Where that table was calibrated
    or hardened, labels made in its way are there too, as `pseudo_labels`: on every split with the
    statistics, bias and slope that the table has. Raises UserError where the table does not say how
    it was made, or is of other classes.
    """
    facts = LabelFacts.read(labels)
    if not facts.whole:
        raise UserError(f"{labels}: does not say how its labels were made; use 'cdul label'")
    settings = {"tau": facts.tau, "zeta": facts.zeta}
    result: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "definition": definition(difficult, ap),
        "splits": {},
        **settings,
        "lambda": facts.lambda_,
    }
    for split, store in similarity.items():
        array, classes, _ = open_similarity(store, facts.tau)
        if facts.classes != classes:
            raise UserError(f"{labels} and {store} are not of the same class table")
        check_rows(images, split, store, array.shape[0])
        known = read_truth(images, classes)["image_id"]
        table = read_split(images, split, ["image_id", "row"])
        table = table.filter(pc.is_in(table["image_id"], pc.unique(known)))
        rows = table["row"].to_numpy()
        found = build_rows(
            *(store, array, images, rows, list(CONSTRUCTIONS), facts.grid),
            **settings,
            lam=facts.lambda_,
            context_weight=facts.context_weight,
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
