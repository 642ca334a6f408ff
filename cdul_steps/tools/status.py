"""The progress of every stage, read from disk, during and after a run."""

import json
import re
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from cdul_steps.data.tables import read_facts, read_table
from cdul_steps.errors import UserError
from cdul_steps.results import (
    APPLIED,
    CHECKPOINT,
    ENCODED,
    FEATURE_TABLE,
    HISTORY,
    IMAGES,
    LOGS,
    PREDICTIONS,
    PSEUDO_LABELS,
    SHARD,
    SIMILARITY,
    Place,
)

PROGRESS = re.compile(r"(\d+)/(\d+) images, ([\d.]+) images/s, (\d+) s left$")
EPOCH = re.compile(r"train: (?:epoch|resuming after epoch) (\d+)")
EPOCHS = re.compile(r"(\d+) epochs$|^train epoch \d+/(\d+):")
ALIVE = 60
"""Seconds without a new line in its log after which a job counts as dead."""
TAIL = 1 << 16
"""Number of bytes read from the end of a log."""


def _age(*files: Path) -> float | None:
    """Seconds since the most recent of the existing files was written."""
    times = [f.stat().st_mtime for f in files if f.exists()]
    return round(max(0.0, time.time() - max(times)), 1) if times else None


def _lines(log: Path) -> list[str]:
    if not log.is_file():
        return []
    with log.open("rb") as stream:
        stream.seek(max(0, log.stat().st_size - TAIL))
        return stream.read().decode(errors="replace").splitlines()


def _progress(lines: list[str]) -> tuple[int, int, float, float] | None:
    """`(images done, images, images per second, seconds left)` from the last progress line."""
    found = next((m for line in reversed(lines) if (m := PROGRESS.search(line))), None)
    return (int(found[1]), int(found[2]), float(found[3]), float(found[4])) if found else None


def _error(lines: list[str]) -> str | None:
    """The error that ended a job, if its log ends with one."""
    last = next((line for line in reversed(lines) if line.strip()), "")
    if last.startswith("cdul: error:"):
        return last.removeprefix("cdul: error: ")
    return last if "Traceback (most recent call last):" in lines else None


def _row(stage: str, of: str, **values: Any) -> dict[str, Any]:
    empty = {"images_per_second": None, "seconds_left": None, "failed": None, "error": None}
    return {"stage": stage, "of": of, **empty, **values}


def _single(stage: str, of: str, log: Path, output: Path, total: int | None) -> dict[str, Any]:
    """The row of a stage that is a single job on `total` images."""
    lines = _lines(log)
    done: int | None
    rate: float | None
    left: float | None
    done, _, rate, left = _progress(lines) or (0, total, None, None)
    error = _error(lines)
    if output.exists():
        done, left, error = total, 0, None
    values = {"done": done, "total": total, "unit": "images", "images_per_second": rate}
    return _row(stage, of, **values, seconds_left=left, error=error, idle_seconds=_age(log, output))


def _failed(table: Path) -> int:
    return int(pc.sum(pc.not_equal(read_table(table, ["status"])["status"], "ok")).as_py() or 0)


def _busy(intervals: list[tuple[float, float]]) -> float:
    """Seconds covered by the union of the intervals `(start, end)`."""
    total, until = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def _log(place: Place, stage: str, *names: str) -> Path:
    """The log of a stage's job at a place, for one of the `names` there."""
    *folders, last = (*place.names.values(), *names)
    return place.path(LOGS).joinpath(stage, *folders, f"{last}.log")


def _words(place: Place) -> str:
    return "/".join(place.names.values())


def _shards(
    place: Place, stage: str, pattern: str, split: str, sizes: dict[int, int]
) -> dict[str, Any]:
    """The row of a stage with one job per shard of a split; `sizes` are the images of each shard.

    `pattern` is the pattern of the jobs' tables.
    """
    images, failed, intervals = 0, 0, []
    left, running_rate, errors = 0, 0.0, []
    shards = [int(of.names["shard"]) for of in place.find(SHARD, split=split)]
    done = 0
    changed = []
    for shard in shards:
        table = place.path(pattern, split=split, shard=shard)
        log = _log(place, stage, split, str(shard))
        changed += [table, log]
        listed = place.path(SHARD, split=split, shard=shard).stat().st_mtime
        if table.exists() and table.stat().st_mtime >= listed:
            done += 1
            end, facts = table.stat().st_mtime, read_facts(table)
            images += sizes.get(shard, 0)
            failed += _failed(table)
            if "seconds" in facts:
                intervals.append((end - facts["seconds"], end))
            continue
        lines = _lines(log)
        left += sizes.get(shard, 0)
        if (error := _error(lines)) is not None:
            errors.append(f"shard {shard}: {error}")
        elif lines and log.stat().st_mtime >= max(listed, time.time() - ALIVE):
            here, _, rate, _ = _progress(lines) or (0, 0, 0.0, 0.0)
            left -= here
            running_rate += rate
    # Jobs may overlap, and there may be long pauses between them.
    rate = images / _busy(intervals) if intervals else running_rate
    return _row(
        stage,
        f"{_words(place)} {split}",
        done=done,
        total=len(shards),
        unit="shards",
        failed=failed,
        images_per_second=round(rate, 2) or None,
        seconds_left=round(left / rate, 1) if rate else None,
        error="; ".join(errors[:3]) or None,
        idle_seconds=_age(*changed),
    )


def _train(training: Place) -> dict[str, Any]:
    log, history = _log(training, "train"), training.path(HISTORY)
    if history.exists():
        rates = read_table(history, ["images_per_second"])["images_per_second"]
        values: dict[str, Any] = {"done": len(rates), "total": len(rates), "seconds_left": 0}
        values["images_per_second"] = round(pc.mean(rates).as_py(), 2)
    else:
        lines = _lines(log)
        epochs = [int(m[1]) for line in lines if (m := EPOCH.match(line))]
        totals = [int(m[1] or m[2]) for line in lines if (m := EPOCHS.search(line))]
        values = {"done": max(epochs, default=0), "total": totals[-1] if totals else None}
        values["error"] = _error(lines)
        if totals and (progress := _progress(lines)):
            here, images, rate, _ = progress
            left = (values["total"] - values["done"]) * images - here % images
            values["images_per_second"] = rate
            values["seconds_left"] = round(left / rate, 1) if rate else None
    files = (log, history, training.path(CHECKPOINT))
    return _row("train", _words(training), **values, unit="epochs", idle_seconds=_age(*files))


def _names(place: Place, name: str, pattern: str, logs: Path) -> list[Place]:
    """The places of another `name`, found by a file pattern and by a folder of logs."""
    found = {of.names[name] for of in place.find(pattern)}
    found |= {log.name.removesuffix(".log") for log in logs.glob("*")}
    return [Place(place.results, {**place.names, name: value}) for value in sorted(found)]


def _rows(results: Path) -> Iterator[dict[str, Any]]:
    top = Place(results)
    logs = top.path(LOGS)
    for dataset in _names(top, "dataset", IMAGES, logs / "manifest"):
        images = dataset.path(IMAGES)
        table = read_table(images, ["split", "shard"]) if images.exists() else None
        total = None if table is None else len(table)
        yield _single("manifest", _words(dataset), _log(dataset, "manifest"), images, total)
        if table is None:
            continue
        sizes: dict[str, dict[int, int]] = {split: {} for split in read_facts(images)["rows"]}
        counts = table.group_by(["split", "shard"]).aggregate([([], "count_all")])
        for count in counts.to_pylist():
            sizes[count["split"]][count["shard"]] = count["count_all"]
        jobs = logs / "features" / dataset.names["dataset"]
        for trunk in _names(dataset, "trunk", FEATURE_TABLE, jobs):
            for split in sizes:
                yield _shards(trunk, "features", FEATURE_TABLE, split, sizes[split])
        jobs = logs / "apply" / dataset.names["dataset"]
        for classifier in _names(dataset, "classifier", APPLIED, jobs):
            for split in sizes:
                yield _shards(classifier, "apply", APPLIED, split, sizes[split])
        jobs = logs / "encode" / dataset.names["dataset"]
        for encoder in _names(dataset, "encoder", ENCODED, jobs):
            yield from _of_encoder(encoder, sizes)


def _of_encoder(encoder: Place, sizes: dict[str, dict[int, int]]) -> Iterator[dict[str, Any]]:
    """The rows of all stages that follow from an encoder; `sizes` by split and shard."""
    logs = encoder.path(LOGS)
    totals = {split: sum(images.values()) for split, images in sizes.items()}
    for split in sizes:
        yield _shards(encoder, "encode", ENCODED, split, sizes[split])
    for split, total in totals.items():
        log, output = _log(encoder, "similarity", split), encoder.path(SIMILARITY, split=split)
        yield _single("similarity", f"{_words(encoder)} {split}", log, output, total)
    for labels in _names(encoder, "labels", PSEUDO_LABELS, logs / "label" / _words(encoder)):
        log, output = _log(labels, "label"), labels.path(PSEUDO_LABELS)
        yield _single("label", _words(labels), log, output, totals["train"])
        for training in _names(labels, "training", HISTORY, logs / "train" / _words(labels)):
            yield _train(training)
            for split, total in totals.items():
                log, output = (
                    _log(training, "predict", split),
                    training.path(PREDICTIONS, split=split),
                )
                # The classifier of second views predicts nothing.
                if log.exists() or output.exists():
                    row = _single("predict", f"{_words(training)} {split}", log, output, total)
                    yield row | {"failed": _failed(output) if output.exists() else None}


def _duration(seconds: float | None) -> str:
    return "-" if seconds is None else str(timedelta(seconds=round(seconds)))


def status(results: Path, *, as_json: bool) -> str:
    """One row per stage: units done and total, failed images, images per second, seconds left.

    Uses only tables and logs. The rate of encode is that of the finished shards, over the time
    in which at least one of them was running. Raises UserError if there are no results yet.
    """
    rows = list(_rows(results))
    if not rows:
        raise UserError(f"{results}: nothing there yet; run 'cdul run' first")
    if as_json:
        return json.dumps(rows, indent=2, ensure_ascii=False)
    cells = [["stage", "of", "done", "failed", "images/s", "to go", "last change"]]
    for row in rows:
        total = "?" if row["total"] is None else row["total"]
        rate, failed = row["images_per_second"], row["failed"]
        cells.append(
            [
                row["stage"],
                row["of"],
                f"{row['done']}/{total} {row['unit']}",
                "-" if failed is None else str(failed),
                "-" if rate is None else f"{rate:.1f}",
                _duration(row["seconds_left"]),
                "-" if row["idle_seconds"] is None else f"{_duration(row['idle_seconds'])} ago",
            ]
        )
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(x, widths, strict=True)).rstrip() for x in cells]
    lines += [f"{r['stage']} {r['of']}: {r['error']}" for r in rows if r["error"]]
    return "\n".join(lines)
