"""Verify all results: every file is readable and consistent with the files it was made from."""

import json
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from safetensors import SafetensorError
from safetensors.numpy import load_file

from cdul_steps.data.files import digest, read_json
from cdul_steps.data.manifest import read_shard, read_split
from cdul_steps.data.stores import context_of, open_store, read_blocks, shard_file, shard_rows
from cdul_steps.data.tables import read_facts, read_scores, read_table
from cdul_steps.errors import UserError, first_line
from cdul_steps.method.similarity import cosine
from cdul_steps.progress import Progress
from cdul_steps.results import (
    CARD,
    EMBEDDINGS,
    ENCODED,
    FEATURE_TABLE,
    FEATURES,
    HISTORY,
    IMAGES,
    METRICS,
    PREDICTIONS,
    PSEUDO_LABELS,
    QUALITY,
    REFINED,
    SHARD,
    SIMILARITY,
    TEXT,
    WEIGHTS,
    Place,
)

TOLERANCE = 1e-5
"""For a recomputed cosine: another machine may sum in another order."""


@dataclass
class Verification:
    """The broken files, and the number of files checked.

    broken: `(file, problem, file to remake)`. unfinished: shards that do not exist yet.
    """

    broken: list[tuple[Path, str, Path]] = field(default_factory=list)
    unfinished: int = 0
    files: int = 0

    def add(self, path: Path, problem: str, remake: Path | None = None) -> None:
        """Record that a file is broken."""
        self.broken.append((path, problem, remake or path))

    @contextmanager
    def reading(self, path: Path, remake: Path | None = None) -> Iterator[None]:
        """Count a file, and record it as broken if reading it fails."""
        self.files += 1
        try:
            yield
        except (UserError, OSError, ValueError, KeyError, SafetensorError) as error:
            message = first_line(error).removeprefix(f"{path}: ")
            self.add(path, message, remake)

    @property
    def command(self) -> str | None:
        """The command that remakes everything broken; None if nothing is broken."""
        if not self.broken:
            return None
        remake = sorted({str(remake) for *_, remake in self.broken})
        command = f"cdul run --forcerun {shlex.join(remake)}"
        # The manifest reads its own earlier output.
        manifests = [str(p) for p, *_ in self.broken if "manifest" in p.parts and p.exists()]
        return f"rm {shlex.join(manifests)} && {command}" if manifests else command


@dataclass(frozen=True)
class SplitManifest:
    """A split as in its manifest: facts of the layout, and the images (`image_id, path, row`)."""

    name: str
    rows: int
    views: int
    shard_size: int
    images: pa.Table

    @property
    def shards(self) -> range:
        return range(-(-self.rows // self.shard_size))


def _check_dataset(dataset: Place, report: Verification) -> None:
    splits, images = [], dataset.path(IMAGES)
    with report.reading(images):
        facts = read_facts(images)
        layout = facts["layout"]
        views = layout["views"]
        pq.read_table(images)
        for name, rows in facts["rows"].items():
            table = read_split(images, name, ["image_id", "path", "row"])
            splits.append(SplitManifest(name, rows, views, layout["shard_size"], table))
    if not splits:
        return
    manifests = {split.name: _read_manifests(split, dataset, report) for split in splits}
    for encoder in dataset.find(TEXT):
        embedded, text = None, encoder.path(TEXT)
        with report.reading(text):
            table = read_table(text, ["class", "embedding"])
            embedded = table["class"].to_pylist(), np.stack(table["embedding"].to_numpy())
        for split in splits:
            files = ShardFiles.of(encoder, split, EMBEDDINGS, ENCODED, split.views)
            finished = encoder.path(SIMILARITY, split=split.name).exists()
            _check_shards(files, split, manifests[split.name], finished, report)
            if embedded and encoder.path(SIMILARITY, split=split.name).exists():
                _check_similarity(encoder, split, *embedded, report)
        for labels in encoder.find(PSEUDO_LABELS):
            _check_labels(labels, splits, report)
    trunks = {trunk.names["trunk"] for trunk in dataset.find(FEATURE_TABLE)}
    for trunk, split in product(sorted(trunks), splits):
        place = Place(dataset.results, {**dataset.names, "trunk": trunk})
        files = ShardFiles.of(place, split, FEATURES, FEATURE_TABLE, 1)
        _check_shards(files, split, manifests[split.name], False, report)


def _read_manifests(
    split: SplitManifest, dataset: Place, report: Verification
) -> dict[int, np.ndarray]:
    """The rows of each shard's manifest that can be read."""
    found = {}
    members = split.images["row"].to_numpy()
    for shard in split.shards:
        path = dataset.path(SHARD, split=split.name, shard=shard)
        with report.reading(path, dataset.path(IMAGES)):
            _, table, boxes = read_shard(path)
            here = split.images.filter(pa.array(members // split.shard_size == shard))
            if len(here.join(table, here.column_names, join_type="left anti")):
                raise ValueError("does not contain the images that images.parquet assigns to it")
            if boxes.shape[1] != split.views:
                raise ValueError(f"has {boxes.shape[1]} views per image, not {split.views}")
            found[shard] = table["row"].to_numpy()
    return found


@dataclass(frozen=True)
class ShardFiles:
    """What the jobs of a split's shards wrote: their store, and a table per shard."""

    store: Path
    tables: list[Path]
    views: int

    @classmethod
    def of(
        cls, place: Place, split: SplitManifest, store: str, table: str, views: int
    ) -> "ShardFiles":
        """By the patterns of store and tables at a place among the results."""
        tables = [place.path(table, split=split.name, shard=shard) for shard in split.shards]
        return cls(place.path(store, split=split.name), tables, views)


def _check_shards(
    files: ShardFiles,
    split: SplitManifest,
    manifests: dict[int, np.ndarray],
    finished: bool,
    report: Verification,
) -> None:
    """Each shard of a store against its table, and the table against the manifest.

    Snakemake makes a missing shard by itself, but not once what follows is `finished`.
    """
    store, array = files.store, None
    if any(table.exists() for table in files.tables):
        with report.reading(store / "zarr.json"):
            array = open_store(store)
            shape = (*array.shape[:2], shard_rows(array))
            expected = (split.rows, files.views, split.shard_size)
            if shape != expected:
                raise ValueError(f"has {shape} images, views, images per shard, not {expected}")
    with Progress(f"verify {store}", len(split.shards), "shards") as progress:
        for shard, table in zip(split.shards, files.tables, strict=True):
            vectors = shard_file(store, shard)
            missing = [path for path in (vectors, table) if not path.exists()]
            if missing and finished:
                report.add(missing[0], "is missing", table)
            elif missing:
                report.unfinished += 1
            else:
                _check_shard(shard, table, vectors, array, manifests.get(shard), report)
            progress.update()


def _check_shard(
    shard: int,
    table: Path,
    vectors: Path,
    array: Any,
    expected: np.ndarray | None,
    report: Verification,
) -> None:
    content = None
    with report.reading(table):
        outcome = read_table(table, ["row", "status"])
        rows, usable = outcome["row"].to_numpy(), pc.equal(outcome["status"], "ok").to_numpy()
        if expected is not None and not np.array_equal(rows, expected):
            raise ValueError("its rows differ from the shard's manifest")
        content = read_facts(table)["digest"]
    if content is None:
        return
    with report.reading(vectors, table):
        if digest(vectors) != content:
            raise ValueError("is not the file that its job wrote: the checksum differs")
        if array is not None:
            size = shard_rows(array)
            found = np.asarray(array[shard * size : (shard + 1) * size])
            finite = np.isfinite(found).all(axis=(1, 2))
            if not np.array_equal(np.flatnonzero(finite), rows[usable] - shard * size):
                raise ValueError("its vectors do not match the images with status ok in its table")


def _check_similarity(
    encoder: Place,
    split: SplitManifest,
    names: list[str],
    class_vectors: np.ndarray,
    report: Verification,
) -> None:
    """Compare the cosines with embeddings and class embeddings."""
    store, source = (encoder.path(p, split=split.name) for p in (SIMILARITY, EMBEDDINGS))
    broken = {path for path, *_ in report.broken}
    with report.reading(store):
        array = open_store(store)
        listed = array.attrs.get("classes")
        if not isinstance(listed, list) or [*listed, *context_of(array)] != names:
            raise ValueError("its classes and context differ from text.parquet")
        if array.shape[:2] != (split.rows, split.views):
            raise ValueError(
                f"has {array.shape[:2]} images and views, not {(split.rows, split.views)}"
            )
        blocks = read_blocks(store, array)
        if any(source in path.parents for path in broken):
            for _ in blocks:
                pass
            return
        embeddings = open_store(source)
        for first, cosines in blocks:
            vectors = np.asarray(embeddings[first : first + len(cosines)])
            expected = cosine(vectors, class_vectors)
            if not np.allclose(cosines, expected, atol=TOLERANCE, equal_nan=True):
                raise ValueError(f"is not the cosine of {source} and text.parquet")


def _check_labels(labels: Place, splits: list[SplitManifest], report: Verification) -> None:
    """Check pseudo-labels, and each training that used them."""
    (train,) = [split for split in splits if split.name == "train"]
    members = train.images.select(["image_id", "path"])
    classes, path = None, labels.path(PSEUDO_LABELS)
    with report.reading(path):
        table, classes, scores = read_scores(path)
        if len(table.join(members, ["image_id", "path"], join_type="left anti")):
            raise ValueError("has images that are not in the manifest's train split")
        if not ((scores >= 0) & (scores <= 1)).all():
            raise ValueError("has labels outside 0..1")
    quality = labels.path(QUALITY)
    if quality.exists():
        with report.reading(quality):
            read_json(quality)
    if classes is None:
        return
    for training in labels.find(HISTORY):
        _check_training(training, classes, table, splits, report)


def _check_training(
    training: Place,
    classes: list[str],
    labels: pa.Table,
    splits: list[SplitManifest],
    report: Verification,
) -> None:
    card, weights, history, refined, metrics = (
        training.path(pattern) for pattern in (CARD, WEIGHTS, HISTORY, REFINED, METRICS)
    )
    with report.reading(history):
        if not len(pq.read_table(history)):
            raise ValueError("has no epochs")
    with report.reading(refined):
        table, names, _ = read_scores(refined)
        if names != classes or not table["image_id"].equals(labels["image_id"]):
            raise ValueError("its images and classes differ from pseudo_labels.parquet")
    with report.reading(card):
        if read_json(card)["classes"] != classes:
            raise ValueError("its classes differ from pseudo_labels.parquet")
    with report.reading(weights):
        load_file(weights)
    for split in splits:
        path = training.path(PREDICTIONS, split=split.name)
        if path.exists() and weights.exists():
            with report.reading(path):
                if read_facts(path).get("weights") != digest(weights):
                    raise ValueError("was made with weights other than model.safetensors")
                predicted = pq.read_table(path)["image_id"]
                if not predicted.equals(split.images["image_id"]):
                    raise ValueError("its images differ from the manifest")
    if metrics.exists():
        with report.reading(metrics):
            read_json(metrics)


def verify(results: Path) -> Verification:
    """Check all results: manifests, shards and their checksums, stores, tables, weights.

    Reads every file once. Raises UserError if there is nothing to check.
    """
    report = Verification()
    found = list(Place(results).find(IMAGES))
    if not found:
        raise UserError(f"{results}: no manifest found; run 'cdul run' first")
    for dataset in found:
        _check_dataset(dataset, report)
    return report


def describe_report(report: Verification, *, as_json: bool) -> str:
    """A report as text for people, or as JSON."""
    if as_json:
        broken = [{"path": str(p), "problem": problem} for p, problem, _ in report.broken]
        values = {"files": report.files, "unfinished_shards": report.unfinished, "broken": broken}
        return json.dumps(values | {"command": report.command}, indent=2, ensure_ascii=False)
    lines = [f"{path}: {problem}" for path, problem, _ in report.broken]
    unfinished = f"; {report.unfinished} shards do not exist yet" if report.unfinished else ""
    lines.append(f"{report.files} files checked, {len(report.broken)} broken{unfinished}")
    if report.broken:
        lines.append("To remake them (add the --configfile of the run, if it had one):")
        lines.append(f"  {report.command}")
    return "\n".join(lines)
