"""Stage report: what a run made, on one page with figures."""

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from matplotlib.figure import Figure
from PIL import Image

from cdul_steps import __version__
from cdul_steps.data.files import replacing
from cdul_steps.data.images import ImageError, decode
from cdul_steps.data.manifest import read_split, read_truth
from cdul_steps.data.stores import open_similarity, read_blocks
from cdul_steps.data.tables import read_facts, read_scores, read_table
from cdul_steps.errors import UserError
from cdul_steps.method.aggregation import (
    CONSTRUCTIONS,
    build_labels,
    global_scores,
    local_scores,
)
from cdul_steps.method.metrics import truth_table
from cdul_steps.method.similarity import scores as scores_of
from cdul_steps.progress import note
from cdul_steps.provenance import git_state
from cdul_steps.report import figures
from cdul_steps.report.page import Picture, Section, Table, render
from cdul_steps.steps.similarity import check_failures

PAGE = "report.html"
STAGES = {
    "scenes": 1,
    "manifest": 1,
    "encode_text": 2,
    "store": 2,
    "encode": 2,
    "similarity": 2,
    "label": 3,
    "quality": 3,
    "train": 4,
    "predict": 4,
    "evaluate": 4,
}
"""Stages in order, and of how many names their files are: data set, encoder, labels, training."""
SHOWN_FAILURES = 200
THRESHOLD = 0.5
MAP_IMAGES, MAP_LABELS, MAP_SIDE = 4, 3, 256


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


@dataclass(frozen=True)
class Run:
    """A labels folder among the results and, once there is one, a training in it."""

    labels: Path
    training: Path | None = None

    @property
    def encoder(self) -> Path:
        return self.labels.parent

    @property
    def dataset(self) -> Path:
        return self.encoder.parent

    @property
    def results(self) -> Path:
        return self.dataset.parent

    @property
    def names(self) -> tuple[str, ...]:
        """Of data set, encoder, labels and training."""
        return (self.training or self.labels).relative_to(self.results).parts

    @property
    def images(self) -> Path:
        return self.dataset / "manifest/images.parquet"

    @property
    def splits(self) -> dict[str, str]:
        """The splits, and what the data set calls them."""
        return read_facts(self.images)["layout"]["splits"]

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Facts of the pseudo-labels: classes, construction, tau, zeta, lambda."""
        return read_facts(self.labels / "pseudo_labels.parquet")

    @cached_property
    def quality(self) -> dict[str, Any]:
        return _read_json(self.labels / "quality.json")

    @cached_property
    def metrics(self) -> dict[str, Any]:
        return _read_json(self.training / "metrics.json") if self.training else {}

    @property
    def difficult(self) -> str:
        """The convention for difficult objects under which all was measured."""
        return self.quality.get("definition", {}).get("difficult", "ignore")

    @property
    def measured_split(self) -> str:
        return "test" if "test" in self.splits else "train"

    def similarity(self, split: str) -> Path:
        return self.encoder / "similarity" / f"{split}.zarr"


def find_runs(folders: Sequence[Path]) -> list[Run]:
    """The labels and trainings that folders of results, of labels or of trainings hold.

    Raises UserError for a folder that is none of these.
    """
    runs: list[Run] = []
    for folder in folders:
        place = folder.absolute()
        if (place / "history.parquet").is_file():
            runs.append(Run(place.parent, place))
            continue
        found = sorted(
            file.parent
            for pattern in ("", "*/*/*/")
            for file in place.glob(f"{pattern}pseudo_labels.parquet")
        )
        if not found:
            raise UserError(
                f"{folder}: neither a folder of results, nor of labels, nor of a training; "
                "run snakemake first"
            )
        for labels in found:
            trainings = sorted(file.parent for file in labels.glob("*/history.parquet"))
            runs += [Run(labels, training) for training in trainings] or [Run(labels)]
    return list(dict.fromkeys(runs))


def make_report(*, folders: Sequence[Path], output: Path) -> None:
    """Write the folder `output`: `report.html`, which needs no other file, and its figures.

    `folders` are read as by `find_runs`; what has not been made is left out. Raises UserError
    where they hold nothing, and where `output` is a folder of something else.
    """
    runs = find_runs(folders)
    if output.is_dir() and any(output.iterdir()) and not (output / PAGE).is_file():
        raise UserError(f"{output}: holds other files than a report; give a folder of its own")
    with replacing(output) as part, figures.style():
        part.mkdir()
        writer = Writer(part)
        failures = _failures(runs)
        sections = [_overview(runs, failures)]
        for run, depth in _once(runs):
            note(f"report: {' / '.join(run.names[:depth])}")
            sections.append(SECTIONS[depth](run, writer))
        sections += [_failure_section(failures), _cost_section(runs), _software_section(runs)]
        page = render(
            sections,
            title=", ".join(" / ".join(run.names) for run in runs),
            written=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
            version=__version__,
            git=git_state(),
        )
        (part / PAGE).write_text(page, encoding="utf-8")
    note(f"report: {output / PAGE}, {len(page) / 1e6:.1f} MB")


def _once(runs: Iterable[Run]) -> Iterable[tuple[Run, int]]:
    """Each data set, encoder, labels and training of the runs once, with its depth (1 to 4)."""
    seen = set()
    for run in runs:
        for depth in range(1, len(run.names) + 1):
            if run.names[:depth] not in seen:
                seen.add(run.names[:depth])
                yield run, depth


class Writer:
    """Keeps figures as files of the report's folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, run: Run, depth: int, name: str, figure: Figure) -> Picture:
        """Write a figure below the names of its run; `name` says which, and the format."""
        path = self.folder.joinpath(*run.names[:depth], name)
        path.parent.mkdir(parents=True, exist_ok=True)
        figures.save(figure, path)
        return Picture(path)


# What is known


def _truth(run: Run, image_ids: list[str], classes: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """`(truth, counted)` bool (N, C) of images; those without known truth are not counted."""
    known = read_truth(run.images, classes)
    place = {name: i for i, name in enumerate(known["image_id"].to_pylist())}
    at = np.array([place.get(name, -1) for name in image_ids], dtype=int)
    lists = [
        [entry or [] for entry in known[name].to_pylist()] for name in ("positive", "difficult")
    ]
    found, considered = truth_table(*lists, len(classes), run.difficult)
    truth = np.zeros((len(at), len(classes)), dtype=bool)
    counted = truth.copy()
    truth[at >= 0], counted[at >= 0] = found[at[at >= 0]], considered[at[at >= 0]]
    return truth, counted


def _failures(runs: Iterable[Run]) -> list[list[Any]]:
    """Data set, encoder, split, image, status and error of each image without an embedding."""
    found = []
    for run in {run.encoder: run for run in runs}.values():
        for split in run.splits:
            tables = _encode_tables(run, split)
            if tables:
                failed = check_failures(run.images, split, tables, 1).to_pylist()
                found += [[*run.names[:2], split, *image.values()] for image in failed]
    return found


def _encode_tables(run: Run, split: str) -> list[Path]:
    return sorted((run.encoder / "encode" / split).glob("*.parquet"))


# Sections


def _overview(runs: list[Run], failures: list[list[Any]]) -> Section:
    section = Section("Overview")
    rows = []
    for run in runs:
        split, history = run.measured_split, _history(run)
        labels = _of_labels(run, split)
        failed = sum(tuple(failure[:2]) == run.names[:2] for failure in failures)
        rows.append(
            [
                *(*run.names, None)[:4],
                pq.read_metadata(run.images).num_rows,
                failed,
                split,
                labels.get("mAP"),
                run.metrics.get("mAP"),
                history["label_mAP"][-1] if history else None,
            ]
        )
    header = ["data set", "encoder", "labels", "training", "images", "unusable", "measured on"]
    header += ["mAP of CLIP's labels (%)", "mAP of the classifier (%)"]
    header += ["mAP of the refined labels, train (%)"]
    caption = (
        "mAP, the mean over the classes of the average precision, is 100 where every image with "
        "a class is ranked before every image without it. CLIP's labels and the classifier are "
        "measured on the same images."
    )
    if all(row[-3] is row[-2] is row[-1] is None for row in rows):
        section.notes.append("No ground truth is known, so nothing here is measured against it.")
        header, rows = header[:-4], [row[:-4] for row in rows]
        caption = "What this report is of."
    section.parts.append(Table(caption, header, rows))
    return section


def _of_labels(run: Run, split: str) -> dict[str, Any]:
    """Measures of the pseudo-labels' construction on a split; empty where there are none."""
    return run.quality.get("splits", {}).get(split, {}).get(run.settings.get("construction"), {})


def _history(run: Run) -> dict[str, list]:
    path = run.training and run.training / "history.parquet"
    return pq.read_table(path).to_pydict() if path and path.is_file() else {}


def _data_section(run: Run, _: Writer) -> Section:
    facts = read_facts(run.images)
    layout = facts["layout"]
    images = read_table(run.images, ["split", "known"])
    rows = []
    for split, theirs in layout["splits"].items():
        known = images.filter(pc.equal(images["split"], split))["known"]
        rows.append([split, theirs, len(known), pc.sum(known).as_py() or 0])
    section = Section(f"Data: {run.names[0]}")
    section.facts = [
        ("read by", f"{layout['reader']} from {layout['root']}"),
        ("classes", f"{len(facts['classes'])}: {', '.join(facts['classes'])}"),
        ("snippets", "{} x {} an image".format(*layout["grid"])),
    ]
    header = ["split", "in the data set", "images", "with known truth"]
    section.parts.append(Table("Images.", header, rows))
    return section


def _encoder_section(run: Run, _: Writer) -> Section:
    section = Section(f"Encoder: {' / '.join(run.names[:2])}")
    text = run.encoder / "text.parquet"
    if text.is_file():
        facts = read_facts(text)
        section.facts += [
            ("model", _model(facts)),
            ("prompts", ", ".join(facts["templates"])),
            ("logit scale", f"{facts['logit_scale']:.3f}"),
        ]
    tables = [table for split in run.splits for table in _encode_tables(run, split)]
    if tables:
        facts = read_facts(tables[0])
        section.facts += [
            ("arithmetic", facts["precision"]),
            ("views resized by", facts["resize_mode"] or "the model's own way"),
            ("device", ", ".join(sorted({read_facts(table)["device"] for table in tables}))),
        ]
    return section


def _model(facts: dict[str, Any]) -> str:
    return facts["model"] + (f", {facts['pretrained']}" if facts["pretrained"] else "")


MEASURES = ("CP", "CR", "CF1", "OP", "OR", "OF1")
MEASURES_CAPTION = (
    "All in percent. CP, CR, CF1: precision, recall and their harmonic mean, averaged over the "
    "classes; OP, OR, OF1: over all labels; at a threshold of {threshold} and, at the right, for "
    "the {k} highest scores of each image."
)


def _measures(measured: dict[str, Any]) -> list[float | None]:
    return [
        measured["mAP"],
        *(measured["at_threshold"][name] for name in MEASURES),
        *(measured["top_k"][name] for name in ("CF1", "OF1")),
    ]


def _measures_table(what: str, rows: list[list[Any]], definition: dict[str, Any]) -> Table:
    header = ["scores", "split", "mAP", *MEASURES]
    header += [f"{name}, top {definition['k']}" for name in ("CF1", "OF1")]
    return Table(f"{what} {MEASURES_CAPTION.format(**definition)}", header, rows)


def _labels_section(run: Run, write: Writer) -> Section:
    section = Section(f"Pseudo-labels: {' / '.join(run.names[:3])}")
    facts, construction = run.settings, run.settings.get("construction")
    section.facts = [
        ("construction", construction),
        *((name, f"{facts[name]:g}") for name in ("tau", "zeta", "lambda") if name in facts),
        ("images labelled", pq.read_metadata(run.labels / "pseudo_labels.parquet").num_rows),
    ]
    rows = [
        [_label_name(run, name), split, *_measures(measured)]
        for split, constructions in run.quality.get("splits", {}).items()
        for name, measured in constructions.items()
        if measured["mAP"] is not None
    ]
    if rows:
        what = "Quality of the labels by their construction."
        section.parts.append(_measures_table(what, rows, run.quality["definition"]))
    if run.similarity("train").is_dir():
        figure = figures.draw_scores(_score_panels(run), facts["zeta"])
        section.parts.append(write(run, 3, "scores.svg", figure))
    return section


def _label_name(run: Run, construction: str) -> str:
    used = " (the pseudo-labels)" if construction == run.settings.get("construction") else ""
    return f"CLIP, {construction.replace('_', ' ')}{used}"


def _score_panels(run: Run) -> dict[str, dict[str, np.ndarray]]:
    """Counts of the train split's scores, by truth where it is known, and by kind."""
    array, classes, _ = open_similarity(run.similarity("train"), run.settings["tau"])
    table = read_split(run.images, "train", ["image_id", "row"])
    truth, counted = _truth(run, table["image_id"].to_pylist(), classes)
    pairs = {"Class is in the image": truth & counted, "Class is not in it": ~truth & counted}
    if not counted.any():
        pairs = {"All pairs of image and class": np.ones_like(counted)}
    panels: dict[str, dict[str, np.ndarray]] = {}
    for title, of_images in pairs.items():
        chosen = np.zeros((array.shape[0], len(classes)), dtype=bool)
        chosen[table["row"].to_numpy()] = of_images
        panels[title] = _count(run, array, chosen)
    return panels


def _count(run: Run, array: Any, chosen: np.ndarray) -> dict[str, np.ndarray]:
    facts = run.settings
    counts: dict[str, np.ndarray] = {}
    for first, cosines in read_blocks(run.similarity("train"), array):
        scores = scores_of(cosines, facts["tau"])
        kinds = {
            "whole images": global_scores(scores),
            "snippets": local_scores(scores),
            f"pseudo-labels ({facts['construction']})": CONSTRUCTIONS[facts["construction"]](
                scores, facts["zeta"], facts["lambda"]
            ),
        }
        for name, values in kinds.items():
            found = figures.count_scores(values, chosen[first : first + len(scores)])
            counts[name] = counts.get(name, 0) + found
    return counts


def _training_section(run: Run, write: Writer) -> Section:
    section = Section(f"Classifier: {' / '.join(run.names)}")
    settings = _read_json(run.training / "model/model.json").get("provenance", {})
    section.facts = [
        (name, value if isinstance(value, str) else json.dumps(value))
        for name, value in settings.get("training", {}).items()
    ]
    history = _history(run)
    measured = run.metrics.get("mAP") is not None
    if measured:
        section.parts += _measured_tables(run, history)
    elif run.metrics:
        section.notes.append("No ground truth is known, so the classifier is not measured.")
    drawn = {"learning.svg": figures.draw_learning(history)}
    predictions = run.training / "predictions" / f"{run.measured_split}.parquet"
    if predictions.is_file():
        scored = Scored.read(run, predictions)
        if measured:
            drawn["average_precision.svg"] = figures.draw_average_precision(*_by_class(run))
            drawn["precision_recall.svg"] = _precision_recall(run, scored)
        drawn["cooccurrence.svg"] = _cooccurrence(run, scored)
        maps = _class_maps(run, scored)
        if isinstance(maps, str):
            section.notes.append(maps)
        else:
            drawn["class_maps.jpg"] = maps
    section.parts += [write(run, 4, name, figure) for name, figure in drawn.items()]
    return section


def _measured_tables(run: Run, history: dict[str, list]) -> Iterator[Table]:
    split = run.measured_split
    of_clip = run.quality.get("splits", {}).get(split, {})
    rows = [
        [_label_name(run, name), split, *_measures(of_clip[name])]
        for name in ("global", run.settings["construction"])
        if name in of_clip
    ]
    rows.append([f"classifier, {run.training.name}", split, *_measures(run.metrics)])
    yield _measures_table("The classifier beside its teacher.", rows, run.metrics["definition"])
    classes, positives, values = _by_class(run)
    columns = [classes, positives, *values.values()]
    header = ["class", "images with it", *(f"{name}, AP" for name in values)]
    caption = f"Average precision of every class on the {split} split, in percent."
    yield Table(caption, header, [list(row) for row in zip(*columns, strict=True)])


def _by_class(run: Run) -> tuple[list[str], list[int], dict[str, list[float | None]]]:
    """Classes, their positives, and the AP of pseudo-labels and classifier, where measured."""
    of_classifier = run.metrics["per_class"]
    of_labels = _of_labels(run, run.measured_split).get("per_class")
    columns = {_label_name(run, run.settings["construction"]): of_labels}
    columns = {name: of for name, of in columns.items() if of}
    columns[f"classifier, {run.training.name}"] = of_classifier
    return (
        list(of_classifier),
        [found["positives"] for found in of_classifier.values()],
        {name: [of[c]["AP"] for c in of_classifier] for name, of in columns.items()},
    )


@dataclass(frozen=True)
class Scored:
    """The classifier's predictions on a split, and the truth of the same images.

    `images` has `image_id` and `path`, `scores` are float32 (N, C), `truth` and `counted` bool
    of the same shape.
    """

    split: str
    images: pa.Table
    classes: list[str]
    scores: np.ndarray
    threshold: float
    truth: np.ndarray
    counted: np.ndarray

    @classmethod
    def read(cls, run: Run, path: Path) -> "Scored":
        images, classes, scores = read_scores(path)
        truth = _truth(run, images["image_id"].to_pylist(), classes)
        return cls(path.stem, images, classes, scores, read_facts(path)["threshold"], *truth)


def _precision_recall(run: Run, scored: Scored) -> Figure:
    scores = {**_clip_scores(run, scored), f"classifier, {run.training.name}": scored.scores}
    ap = [of["AP"] for of in run.metrics["per_class"].values()]
    return figures.draw_precision_recall(
        scores, scored.truth, scored.counted, scored.classes, ap, THRESHOLD
    )


def _clip_scores(run: Run, scored: Scored) -> dict[str, np.ndarray]:
    """CLIP's scores of the same images (N, C), of the whole image and as the labels are made."""
    store, facts = run.similarity(scored.split), run.settings
    if not store.is_dir():
        return {}
    array, _, _ = open_similarity(store, facts["tau"])
    table = read_split(run.images, scored.split, ["image_id", "row"])
    row = dict(zip(table["image_id"].to_pylist(), table["row"].to_pylist(), strict=True))
    rows = [row[name] for name in scored.images["image_id"].to_pylist()]
    labels = build_labels(
        read_blocks(store, array),
        (array.shape[0], array.shape[2]),
        list(dict.fromkeys(("global", facts["construction"]))),
        tau=facts["tau"],
        zeta=facts["zeta"],
        lam=facts["lambda"],
    )
    # An image that CLIP's encoder refused is one that it found nothing in.
    return {_label_name(run, n): np.nan_to_num(values[rows]) for n, values in labels.items()}


def _cooccurrence(run: Run, scored: Scored) -> Figure:
    predicted = scored.scores >= scored.threshold
    counts = {f"Predicted, {scored.split} (at {scored.threshold:g})": predicted}
    known = scored.counted.any(axis=1)
    if known.any():
        counts[f"Truth, {scored.split}"] = scored.truth[known]
    counts = {title: figures.cooccurrence(labels) for title, labels in counts.items()}
    return figures.draw_cooccurrence(counts, scored.classes)


def _class_maps(run: Run, scored: Scored) -> Figure | str:
    """Maps of the first labels of some images, or the line that says why there are none."""
    folder = run.training / "model"
    if not (folder / "model.json").is_file():
        return "No class activation maps: the model is not there."
    # Torch takes seconds to load, and the other sections need none of it.
    import torch

    from cdul_steps.models.cam import class_maps
    from cdul_steps.models.classifier import load_classifier
    from cdul_steps.models.device import set_up

    device, _ = set_up("cpu", 0, 0, cpu_workers=0)
    network, card = load_classifier(folder, device)
    limit = read_facts(run.images)["layout"]["max_pixels"]
    count = min(MAP_IMAGES, len(scored.images))
    rows = []
    for place in np.linspace(0, len(scored.images) - 1, count).astype(int):
        item = {n: scored.images[n][place].as_py() for n in scored.images.column_names}
        try:
            image = decode(item["path"], max_pixels=limit)
        except ImageError as error:
            note(f"report: no class activation map of {item['path']}: {error}")
            continue
        labels = np.argsort(-scored.scores[place], kind="stable")[:MAP_LABELS]
        inputs = card.normalize(torch.from_numpy(card.resize(image))[None])
        try:
            maps = class_maps(network, inputs.expand(len(labels), -1, -1, -1), labels)
        except ValueError as error:
            return f"No class activation maps of {card.model}: {error}."
        image.thumbnail((MAP_SIDE, MAP_SIDE))
        rows.append(
            {
                "name": Path(item["image_id"]).name,
                "pixels": np.asarray(image),
                "labels": [_named(scored, place, c) for c in labels],
                "maps": [
                    np.asarray(Image.fromarray(m).resize(image.size, Image.Resampling.BILINEAR))
                    for m in maps
                ],
            }
        )
    if not rows:
        return "No class activation maps: none of the images can be read any more."
    return figures.draw_class_maps(rows)


def _named(scored: Scored, place: int, c: int) -> str:
    """A label with its probability and, where known, whether it is true."""
    known = {True: ", present", False: ", absent"}[bool(scored.truth[place, c])]
    known = known if scored.counted[place, c] else ""
    return f"{scored.classes[c]} {scored.scores[place, c]:.2f}{known}"


def _failure_section(failures: list[list[Any]]) -> Section:
    section = Section("Images that could not be used")
    if not failures:
        section.notes.append("None.")
        return section
    header = ["data set", "encoder", "split", "image", "status", "reason"]
    caption = "They have no labels and are left out of learning and measuring."
    if len(failures) > SHOWN_FAILURES:
        caption += (
            f" The first {SHOWN_FAILURES} of {len(failures)}; all are in the encoder's folder, "
            "encode/{split}/{shard}.parquet."
        )
    section.parts.append(Table(caption, header, failures[:SHOWN_FAILURES]))
    return section


# Time and memory


def _cost_section(runs: Iterable[Run]) -> Section:
    section = Section("Time, speed and memory")
    rows = {}
    for stage, depth in STAGES.items():
        for run in runs:
            names = run.names[:depth]
            if len(names) == depth and (stage, names) not in rows:
                rows[stage, names] = _cost(run, stage, names)
    header = ["stage", "of", "jobs", "time (s)", "images/s", "peak memory (MiB)"]
    caption = (
        "Time is that of all jobs of a stage one after the other, with the start of the program. "
        "Images a second are those of the encoder and of training while they work, of other "
        "stages over the whole time. Memory is the largest of any job, with its worker processes, "
        "as sampled by Snakemake; a dash where it did not run the stage."
    )
    section.parts.append(Table(caption, header, [row for row in rows.values() if row]))
    return section


def _cost(run: Run, stage: str, names: tuple[str, ...]) -> list[Any] | None:
    """A row of the table of costs; None where nothing is known of the stage."""
    jobs = _benchmarks(run.results / "benchmarks" / stage, names)
    seconds = sum(float(job["s"]) for job in jobs)
    memory = [float(job["max_pss"]) for job in jobs if _is_number(job["max_pss"])]
    images, measured = _work(run, stage)
    if not jobs and not measured:
        return None
    rate = images / (measured or seconds) if images else None
    return [
        stage,
        " / ".join(names),
        len(jobs) or None,
        seconds if jobs else measured,
        rate,
        round(max(memory)) if memory else None,
    ]


def _benchmarks(folder: Path, names: tuple[str, ...]) -> list[dict[str, str]]:
    place = folder.joinpath(*names)
    files = [place.with_name(f"{place.name}.tsv")] if place.parent.is_dir() else []
    rows = []
    for file in [*filter(Path.is_file, files), *sorted(place.rglob("*.tsv"))]:
        with file.open(encoding="utf-8") as stream:
            rows += csv.DictReader(stream, delimiter="\t")
    return rows


def _is_number(text: str) -> bool:
    return text.replace(".", "", 1).isdigit()


def _work(run: Run, stage: str) -> tuple[int, float | None]:
    """Images that a stage worked on, 0 where it is not about images, and the seconds that it
    measured itself, None where it does not."""
    if stage == "encode":
        tables = [table for split in run.splits for table in _encode_tables(run, split)]
        images = sum(pq.read_metadata(table).num_rows for table in tables)
        return images, sum(read_facts(table)["seconds"] for table in tables) or None
    if stage == "train":
        images = pq.read_metadata(run.training / "refined_labels.parquet").num_rows
        seconds = [images / speed for speed in _history(run)["images_per_second"]]
        return images * len(seconds), sum(seconds)
    if stage in ("scenes", "manifest", "similarity", "quality", "predict"):
        return pq.read_metadata(run.images).num_rows, None
    return 0, None


# Software


def _software_section(runs: Iterable[Run]) -> Section:
    """Versions that the results' own files name."""
    section = Section("Software")
    found: dict[str, set[str]] = {}
    for facts in _all_facts(runs):
        for name, version in facts.get("software", {}).items():
            found.setdefault(name, set()).add(version)
    rows = [[name, ", ".join(sorted(versions))] for name, versions in sorted(found.items())]
    caption = "What the results were made with, as their files say."
    section.parts.append(Table(caption, ["package", "version"], rows))
    section.notes.append(
        "A run by Snakemake makes every result again whose code has changed, so the commit named "
        "above is that of the results too, unless code was edited after the run."
    )
    return section


def _all_facts(runs: Iterable[Run]) -> Iterator[dict[str, Any]]:
    for run in runs:
        files = [run.encoder / "text.parquet", run.labels / "pseudo_labels.parquet"]
        files += sorted(run.encoder.glob("encode/*/*.parquet"))
        if run.training:
            files += sorted(run.training.glob("predictions/*.parquet"))
            yield _read_json(run.training / "model/model.json").get("provenance", {})
        yield run.quality
        yield run.metrics
        yield from (read_facts(file) for file in files if file.is_file())


SECTIONS: dict[int, Callable[[Run, Writer], Section]] = {
    1: _data_section,
    2: _encoder_section,
    3: _labels_section,
    4: _training_section,
}
"""What is told of a run's data set, encoder, labels and training."""
