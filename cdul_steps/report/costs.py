"""Time, speed and memory of the stages."""

import csv
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from cdul_steps.data.tables import read_facts
from cdul_steps.report.page import Table
from cdul_steps.report.runs import RunFolder, unique_levels
from cdul_steps.results import BENCHMARKS, FEATURE_TABLE, PSEUDO_LABELS

STAGES = {
    "scenes": 1,
    "manifest": 1,
    "encode_text": 2,
    "store": 2,
    "encode": 2,
    "similarity": 2,
    "label": 3,
    "quality": 3,
    "features": 1,
    "train": 4,
    "predict": 4,
    "evaluate": 4,
}
"""Stages, and the number of names in their results' paths: data set, encoder, labels, training."""
OF_ALL_IMAGES = ("scenes", "manifest", "similarity", "quality", "predict")
HEADER = ["stage", "of", "jobs", "time (s)", "images/s", "peak memory (MiB)"]
CAPTION = (
    "Time is the sum over all jobs of a stage, including program start. For the encoder and "
    "training, images per second do not include that start; for other stages they use the whole "
    "time. Memory is the maximum over the jobs, including worker processes, as sampled by "
    "Snakemake. A stage that was not run by Snakemake has only the values that it measured itself."
)


def costs(runs: Iterable[RunFolder]) -> Table:
    """One row per stage of each data set, encoder, labels and training, if anything is known."""
    places = list(unique_levels(runs))
    rows = [
        row
        for stage, depth in STAGES.items()
        for run, at in places
        if at == depth and (row := _row(run, stage, run.names[:depth]))
    ]
    return Table(CAPTION, HEADER, rows)


def _row(run: RunFolder, stage: str, names: tuple[str, ...]) -> list[Any] | None:
    jobs = _benchmarks(run.place.path(BENCHMARKS) / stage, names)
    images, measured = _work(run, stage)
    if not jobs and not measured:
        return None
    seconds = sum(float(job["s"]) for job in jobs) if jobs else measured or 0.0
    # "NA" if a job ended before the first sample.
    memory = [float(job["max_pss"]) for job in jobs if job["max_pss"][:1].isdigit()]
    return [
        stage,
        " / ".join(names),
        len(jobs) or None,
        seconds,
        images / (measured or seconds) if images else None,
        round(max(memory)) if memory else None,
    ]


def _benchmarks(folder: Path, names: tuple[str, ...]) -> list[dict[str, str]]:
    """Snakemake's benchmarks of a rule: of one job, or of one job per split or shard."""
    *parents, last = names
    one = folder.joinpath(*parents, f"{last}.tsv")
    files = [one] if one.is_file() else sorted(folder.joinpath(*names).rglob("*.tsv"))
    rows: list[dict[str, str]] = []
    for file in files:
        with file.open(encoding="utf-8") as stream:
            rows += csv.DictReader(stream, delimiter="\t")
    return rows


def _work(run: RunFolder, stage: str) -> tuple[int, float | None]:
    """Images that a stage processed (0 if it processes no images), and the seconds that it measured
    itself (None if it does not)."""
    if stage == "encode":
        tables = run.encode_tables()
        images = sum(pq.read_metadata(table).num_rows for table in tables)
        return images, sum(read_facts(table)["seconds"] for table in tables) or None
    if stage == "features":
        tables = [trunk.path(FEATURE_TABLE) for trunk in run.place.find(FEATURE_TABLE)]
        images = sum(pq.read_metadata(table).num_rows for table in tables)
        return images, sum(read_facts(table)["seconds"] for table in tables) or None
    if stage == "train":
        images = pq.read_metadata(run.place.path(PSEUDO_LABELS)).num_rows
        seconds = [images / speed for speed in run.history["images_per_second"]]
        return images * len(seconds), sum(seconds)
    return pq.read_metadata(run.images).num_rows if stage in OF_ALL_IMAGES else 0, None
