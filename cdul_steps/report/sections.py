"""The sections of the report on a data set, an encoder, labels or a training."""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
from matplotlib.figure import Figure
from PIL import Image

from cdul_steps.data.images import ImageError, decode
from cdul_steps.data.labels import build_rows, labels_like
from cdul_steps.data.manifest import read_split
from cdul_steps.data.stores import context_of, read_blocks
from cdul_steps.data.tables import read_facts, read_scores, read_table
from cdul_steps.data.truth import THRESHOLD
from cdul_steps.method.aggregation import global_scores, local_scores
from cdul_steps.method.losses import LOSSES, Loss
from cdul_steps.progress import note
from cdul_steps.report import figures
from cdul_steps.report.page import PageSection, Table
from cdul_steps.report.runs import RunFolder, Scored
from cdul_steps.report.words import (
    checked_in_words,
    estimate_in_words,
    estimate_table,
    labels_in_words,
)
from cdul_steps.results import MODEL, PSEUDO_LABELS, TEXT

SHOWN_FAILURES = 200
SHOWN_CONTEXT = 20
MAP_IMAGES, MAP_LABELS, MAP_SIDE = 4, 3, 256
MEASURES = ("CP", "CR", "CF1", "OP", "OR", "OF1")
MEASURES_CAPTION = (
    "All values in percent. CP, CR, CF1: precision, recall and their harmonic mean, averaged over "
    "the classes; OP, OR, OF1: the same over all labels. They use a threshold of {threshold} and, "
    "in the rightmost columns, the {k} highest scores of each image."
)


def overview(runs: list[RunFolder], failures: list[list[Any]]) -> PageSection:
    rows = [
        [
            *(*run.names, None)[:4],
            pq.read_metadata(run.images).num_rows,
            sum(tuple(failure[:2]) == run.names[:2] for failure in failures),
            run.measured_split,
            _of_labels(run).get("mAP"),
            run.metrics.get("mAP"),
            run.history["label_mAP"][-1] if run.history else None,
        ]
        for run in runs
    ]
    header = ["data set", "encoder", "labels", "training", "images", "unusable", "measured on"]
    header += ["mAP of CLIP's labels (%)", "mAP of the classifier (%)"]
    header += ["mAP of the refined labels, train (%)"]
    caption = (
        "mAP is the mean of the average precision over the classes. It is 100 if every image with "
        "a class is ranked before every image without it. CLIP's labels and the classifier are "
        "evaluated on the same split."
    )
    notes = []
    if all(row[-3] is row[-2] is row[-1] is None for row in rows):
        notes = ["No ground truth is known, so there are no measures against it."]
        header, rows = header[:-4], [row[:-4] for row in rows]
        caption = "The results in this report."
    return PageSection("Overview", notes=notes, parts=[Table(caption, header, rows)])


def _of_labels(run: RunFolder) -> dict[str, Any]:
    """Measures of the pseudo-labels on the classifier's split; empty if there are none."""
    return run.quality_on(run.measured_split).get(run.labels_name, {})


Drawn = dict[str, Figure]
"""Figures by file name."""


def _data_section(run: RunFolder) -> tuple[PageSection, Drawn]:
    facts = read_facts(run.images)
    layout = facts["layout"]
    images = read_table(run.images, ["split", "known"])
    rows = []
    for split, theirs in layout["splits"].items():
        known = images.filter(pc.equal(images["split"], split))["known"]
        rows.append([split, theirs, len(known), pc.sum(known).as_py() or 0])
    section = PageSection(f"Data: {run.names[0]}")
    section.facts = [
        ("read by", f"{layout['reader']} from {layout['root']}"),
        ("classes", f"{len(facts['classes'])}: {', '.join(facts['classes'])}"),
        ("snippets", ", ".join(f"{rows} x {columns}" for rows, columns in layout["grid"])),
    ]
    if facts.get("left_out"):
        section.facts.append(("left out or interpreted", "; ".join(facts["left_out"])))
    header = ["split", "in the data set", "images", "with known ground truth"]
    section.parts = [
        Table(
            "Images of each split, and the number of images with known ground truth.", header, rows
        )
    ]
    return section, {}


def _encoder_section(run: RunFolder) -> tuple[PageSection, Drawn]:
    section = PageSection(f"Encoder: {' / '.join(run.names[:2])}")
    text, tables = run.place.path(TEXT), run.encode_tables()
    if text.is_file():
        facts = read_facts(text)
        section.facts += [
            ("model", ", ".join(filter(None, (facts["model"], facts["pretrained"])))),
            ("prompts", ", ".join(facts["templates"])),
            ("logit scale", f"{facts['logit_scale']:.3f}"),
        ]
        if "logit_bias" in facts:
            section.facts.append(("logit bias", f"{facts['logit_bias']:.3f}"))
        if facts.get("left_out"):
            names = ", ".join(f"{near['name']} ({near['of']})" for near in facts["left_out"])
            section.facts.append(("context names left out because they mean a class", names))
    if tables:
        facts = read_facts(tables[0])
        section.facts += [
            ("arithmetic", facts["precision"]),
            ("resizing of views", facts["resize_mode"] or "the model's own"),
            ("device", ", ".join(sorted({read_facts(table)["device"] for table in tables}))),
        ]
    return section, {}


def _measures_table(what: str, rows: list[list[Any]], definition: dict[str, Any]) -> Table:
    header = ["scores", "split", "mAP", *MEASURES]
    header += [f"{name}, top {definition['k']}" for name in ("CF1", "OF1")]
    return Table(f"{what} {MEASURES_CAPTION.format(**definition)}", header, rows)


def _measures(measured: dict[str, Any]) -> list[float | None]:
    return [
        measured["mAP"],
        *(measured["at_threshold"][name] for name in MEASURES),
        *(measured["top_k"][name] for name in ("CF1", "OF1")),
    ]


def _labels_section(run: RunFolder) -> tuple[PageSection, Drawn]:
    section, facts = PageSection(f"Pseudo-labels: {' / '.join(run.names[:3])}"), run.label_facts
    section.facts = [
        *labels_in_words(facts).items(),
        ("images labelled", pq.read_metadata(run.place.path(PSEUDO_LABELS)).num_rows),
    ]
    rows = [
        [_label_name(run, name), split, *_measures(measured)]
        for split in run.splits
        for name, measured in run.quality_on(split).items()
        if measured["mAP"] is not None
    ]
    if rows:
        what = "Quality of the labels by construction."
        if run.labels_name == "pseudo_labels":
            what += (
                f" The pseudo-labels, on which the classifier is trained, are the "
                f"{_words_of(facts.construction)} labels after all settings above. On a test "
                "split, they are made with the same settings."
            )
        section.parts.append(_measures_table(what, rows, run.quality["definition"]))
    if not run.similarity("train").is_dir():
        return section, {}
    if facts.context or facts.logit_bias is not None:
        section.notes += _nothing_found(run)
    if facts.context:
        section.parts.append(_context_table(run))
    zeta = None if facts.statistics else facts.zeta
    return section, {"scores.svg": figures.draw_scores(score_panels(run), zeta)}


def _label_name(run: RunFolder, name: str) -> str:
    if name == "pseudo_labels":
        return "CLIP, pseudo-labels"
    used = " (the pseudo-labels)" if name == run.labels_name else ""
    return f"CLIP, {_words_of(name)}{used}"


def _words_of(construction: str | None) -> str:
    return (construction or "").replace("_", " ")


def _nothing_found(run: RunFolder) -> list[str]:
    """The number of images without a label, for images that may show none of the classes."""
    _, _, labels = read_scores(run.place.path(PSEUDO_LABELS))
    empty = int((labels < THRESHOLD).all(axis=1).sum())
    return [
        f"Nothing found: {empty} of {len(labels)} images have no label of {THRESHOLD:g} or more."
    ]


def _context_table(run: RunFolder) -> Table:
    """The context names that the whole images of the train split were assigned to."""
    store = run.similarity("train")
    array, classes, scoring = run.open_similarity("train")
    context = context_of(array)
    shares, best, images = np.zeros(len(context)), np.zeros(len(context), int), 0
    for _, cosines in read_blocks(store, array):
        scores = scoring(cosines[:, 0], len(classes))
        scores = scores[np.isfinite(scores).all(axis=1)]
        shares += scores[:, len(classes) :].sum(axis=0)
        # Among all names: an image whose best name is a class is not counted here.
        best += np.bincount(scores.argmax(axis=1), minlength=scores.shape[1])[len(classes) :]
        images += len(scores)
    shares *= 100 / max(1, images)
    order = np.lexsort((-shares, -best))[:SHOWN_CONTEXT]
    rows = [[context[i], int(best[i]), float(shares[i])] for i in order]
    caption = (
        f"Context names that the whole images of the train split were assigned to. On average, "
        f"{shares.sum():.0f}% of CLIP's scores went to context names, and {int(best.sum())} of "
        f"{images} images match one of them best. If labels are missing, find the name that took "
        "their place here, and delete it from the list. The table shows the first "
        f"{len(rows)} of {len(context)} names."
    )
    return Table(
        caption, ["context name", "best match for images", "share of the scores (%)"], rows
    )


def score_panels(run: RunFolder) -> dict[str, dict[str, np.ndarray]]:
    """Counts of the train split's scores: by ground truth, if known, then by kind."""
    store = run.similarity("train")
    array, classes, scoring = run.open_similarity("train")
    table = read_split(run.images, "train", ["image_id", "row"])
    truth, counted = run.truth(table["image_id"].to_pylist(), classes)
    pairs = {"Class is in the image": truth & counted, "Class is not in it": ~truth & counted}
    if not counted.any():
        pairs = {"All pairs of image and class": np.ones_like(counted)}
    by_row = np.zeros((len(pairs), array.shape[0], len(classes)), dtype=bool)
    by_row[:, table["row"].to_numpy()] = list(pairs.values())
    panels: dict[str, dict[str, Any]] = {t: {"whole images": 0, "snippets": 0} for t in pairs}
    for first, cosines in read_blocks(store, array):
        scores = scoring(cosines, len(classes))[..., : len(classes)]
        for counts, of_rows in zip(panels.values(), by_row, strict=True):
            chosen = of_rows[first : first + len(scores)]
            counts["whole images"] += figures.count_scores(global_scores(scores), chosen)
            counts["snippets"] += figures.count_scores(local_scores(scores), chosen)
    labelled, _, labels = read_scores(run.place.path(PSEUDO_LABELS))
    place = {name: i for i, name in enumerate(table["image_id"].to_pylist())}
    at = [place[name] for name in labelled["image_id"].to_pylist()]
    for title, counts in panels.items():
        counts["pseudo-labels"] = figures.count_scores(labels, pairs[title][at])
    return panels


def _training_section(run: RunFolder) -> tuple[PageSection, Drawn]:
    section = PageSection(f"Classifier: {' / '.join(run.names)}")
    settings = run.provenance.get("training", {})
    loss = LOSSES.get(settings.get("loss"), Loss("unknown"))
    of_losses = {key for known in LOSSES.values() for key in known.settings}
    section.facts = [
        (name, _in_words(value))
        for name, value in settings.items()
        if name not in of_losses or name in loss.settings
    ]
    checked, thresholds = run.card.get("checked"), run.card.get("thresholds")
    if checked:
        section.facts.append(("by a person", checked_in_words(checked)))
    if thresholds:
        section.parts.append(_thresholds_table(thresholds))
    drawn: Drawn = {"learning.svg": figures.draw_learning(run.history, loss.unit)}
    measured = run.metrics.get("mAP") is not None
    if measured:
        section.parts += _measured_tables(run)
        drawn["average_precision.svg"] = figures.draw_average_precision(*_by_class(run))
    elif run.metrics:
        section.notes.append("No ground truth is known, so the classifier is not evaluated.")
    scored = Scored.read(run, run.measured_split)
    if scored:
        if measured:
            drawn["precision_recall.svg"] = _precision_recall(run, scored)
        drawn["cooccurrence.svg"] = _cooccurrence(scored)
        maps = _class_maps(run, scored)
        if isinstance(maps, str):
            section.notes.append(maps)
        else:
            drawn["class_maps.jpg"] = maps
    return section, drawn


def _thresholds_table(thresholds: dict[str, float]) -> Table:
    caption = "Score from which the classifier names a class, from a person's answers (cdul check)."
    return Table(caption, ["class", "threshold"], [[name, t] for name, t in thresholds.items()])


def _in_words(value: Any) -> str:
    """A value of the settings as text; the values of a section are listed."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {_in_words(of)}" for name, of in value.items()) or "none"
    if value is None:
        return "none"
    return value if isinstance(value, str) else json.dumps(value)


def _measured_tables(run: RunFolder) -> Iterator[Table]:
    split = run.measured_split
    of_clip = run.quality_on(split)
    rows = [
        [_label_name(run, name), split, *_measures(of_clip[name])]
        for name in dict.fromkeys(("global", run.labels_name))
        if name in of_clip
    ]
    rows.append([f"classifier, {run.names[-1]}", split, *_measures(run.metrics)])
    yield _measures_table(
        "The classifier compared with its teacher.", rows, run.metrics["definition"]
    )
    classes, positives, values = _by_class(run)
    columns = [classes, positives, *values.values()]
    header = ["class", "images with it", *(f"{name}, AP" for name in values)]
    caption = f"Average precision of every class on the {split} split, in percent."
    yield Table(caption, header, [list(row) for row in zip(*columns, strict=True)])


def _by_class(run: RunFolder) -> tuple[list[str], list[int], dict[str, list[float | None]]]:
    """Classes, their positives, and the AP of pseudo-labels and classifier, if evaluated."""
    of_classifier = run.metrics["per_class"]
    columns = {
        _label_name(run, run.labels_name): _of_labels(run).get("per_class"),
        f"classifier, {run.names[-1]}": of_classifier,
    }
    return (
        list(of_classifier),
        [found["positives"] for found in of_classifier.values()],
        {name: [of[c]["AP"] for c in of_classifier] for name, of in columns.items() if of},
    )


def _precision_recall(run: RunFolder, scored: Scored) -> Figure:
    scores = {**_clip_scores(run, scored), f"classifier, {run.names[-1]}": scored.scores}
    ap = [of["AP"] for of in run.metrics["per_class"].values()]
    return figures.draw_precision_recall(
        scores, scored.truth, scored.counted, scored.classes, ap, THRESHOLD
    )


def _clip_scores(run: RunFolder, scored: Scored) -> dict[str, np.ndarray]:
    """CLIP's scores of the same images (N, C), of the whole image and made like the labels."""
    store, facts = run.similarity(scored.split), run.label_facts
    if not store.is_dir():
        return {}
    array, _, scoring = run.open_similarity(scored.split)
    table = read_split(run.images, scored.split, ["image_id", "row"])
    row = dict(zip(table["image_id"].to_pylist(), table["row"].to_pylist(), strict=True))
    rows = np.array([row[name] for name in scored.images["image_id"].to_pylist()])
    # Neither zeta nor lambda affects the scores of the whole image.
    settings = {"scoring": scoring, "zeta": 0.0, "lambda_": 0.0}
    labels = build_rows(store, array, run.images, rows, ["global"], facts.grid, **settings)
    if facts.recipe:
        labels[run.labels_name] = labels_like(facts, store, array, run.images, rows)
    # In an image that the encoder rejected, CLIP found nothing.
    return {_label_name(run, n): np.nan_to_num(values) for n, values in labels.items()}


def _cooccurrence(scored: Scored) -> Figure:
    predicted = scored.scores >= scored.threshold
    limits = np.unique(scored.threshold)
    at = f"{limits[0]:g}" if len(limits) == 1 else "each class's threshold"
    labels = {f"Predicted, {scored.split} (at {at})": predicted}
    known = scored.counted.any(axis=1)
    if known.any():
        labels[f"Truth, {scored.split}"] = scored.truth[known]
    counts = {title: figures.cooccurrence(table) for title, table in labels.items()}
    return figures.draw_cooccurrence(counts, scored.classes)


def _class_maps(run: RunFolder, scored: Scored) -> Figure | str:
    """Maps of the top labels of some images, or a line with the reason why there are none."""
    folder = run.place.path(MODEL)
    if not folder.is_dir():
        return "No class activation maps: the model is missing."
    # Importing torch takes seconds, and the other sections do not need it.
    import torch

    from cdul_steps.models.cam import class_maps
    from cdul_steps.models.classifier import load_classifier

    network, card = load_classifier(folder, torch.device("cpu"))
    limit = read_facts(run.images)["layout"]["max_pixels"]
    count = min(MAP_IMAGES, len(scored.images))
    rows = []
    for place in np.linspace(0, len(scored.images) - 1, count).astype(int):
        path = scored.images["path"][place].as_py()
        try:
            image = decode(path, max_pixels=limit)
        except ImageError as error:
            note(f"report: no class activation map of {path}: {error}")
            continue
        labels = np.argsort(-scored.scores[place], kind="stable")[:MAP_LABELS]
        inputs = card.normalize(torch.from_numpy(card.resize(image))[None])
        try:
            maps = class_maps(network, inputs, labels.tolist())
        except ValueError as error:
            return f"No class activation maps of {card.model}: {error}."
        image.thumbnail((MAP_SIDE, MAP_SIDE))
        rows.append(
            {
                "name": Path(scored.images["image_id"][place].as_py()).name,
                "pixels": np.asarray(image),
                "labels": [_named(scored, place, c) for c in labels],
                "maps": [
                    np.asarray(Image.fromarray(m).resize(image.size, Image.Resampling.BILINEAR))
                    for m in maps
                ],
            }
        )
    if not rows:
        return "No class activation maps: none of the images can be read any longer."
    return figures.draw_class_maps(rows)


def _named(scored: Scored, place: int, c: int) -> str:
    """A label with its probability and, if known, whether it is true."""
    words = f"{scored.classes[c]} {scored.scores[place, c]:.2f}"
    if not scored.counted[place, c]:
        return words
    return f"{words}, {'present' if scored.truth[place, c] else 'absent'}"


def estimate_section(found: dict[str, Any]) -> tuple[PageSection, Drawn]:
    """An estimate as read by `read_estimate`."""
    section = PageSection(f"Check by a person: {found['scores']}", notes=estimate_in_words(found))
    caption = (
        "Estimates at the threshold in use. 'named' is the number of images whose score reaches "
        "the threshold. A class is estimated only from its own answers."
    )
    section.parts.append(Table(caption, *estimate_table(found)))
    in_use = {row["threshold"] for row in found["classes"].values()}
    common = in_use.pop() if len(in_use) == 1 else None
    panels = [
        (f"{name} ({row['answers']} answers)", row["curve"], row.get("threshold", common))
        for name, row in {"all classes": found["all"], **found["classes"]}.items()
        if row["curve"]
    ]
    return section, {"estimate.svg": figures.draw_estimate(panels)} if panels else {}


def failure_section(failures: list[list[Any]]) -> PageSection:
    section = PageSection("Images that could not be used")
    if not failures:
        section.notes.append("None.")
        return section
    header = ["data set", "encoder", "split", "image", "status", "reason"]
    caption = "These images have no pseudo-labels and are not used for training."
    if len(failures) > SHOWN_FAILURES:
        caption += (
            f" The table shows the first {SHOWN_FAILURES} of {len(failures)}; the encoder's folder "
            "lists all of them in encode/{split}/{shard}.parquet."
        )
    section.parts.append(Table(caption, header, failures[:SHOWN_FAILURES]))
    return section


def software_section(runs: Iterable[RunFolder]) -> PageSection:
    found: dict[str, set[str]] = {}
    for run in runs:
        for facts in run.facts():
            for name, version in facts.get("software", {}).items():
                found.setdefault(name, set()).add(version)
    rows = [[name, ", ".join(sorted(versions))] for name, versions in sorted(found.items())]
    caption = (
        "Versions recorded in the results. The commit at the top of the page is the version of the "
        "code at the time when the page was written. Snakemake remakes every result whose code has "
        "changed, so it is also the commit of the results."
    )
    return PageSection("Software", parts=[Table(caption, ["package", "version"], rows)])


SECTIONS: dict[int, Callable[[RunFolder], tuple[PageSection, Drawn]]] = {
    1: _data_section,
    2: _encoder_section,
    3: _labels_section,
    4: _training_section,
}
"""The section functions for a run's data set, encoder, labels and training."""
