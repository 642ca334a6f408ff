"""Kill every stage at random moments, resume, and count what was lost; print it as JSON.

    python tests/robustness/kill.py --kills 55 --seed 0

A reduced demo runs undisturbed. Then, from the last stage to the first, a stage is forced to run
again and killed with SIGKILL at a random moment: either only its job, as the kernel does when
memory runs out, or Snakemake with all its processes, as when the machine goes down. Then the same
command resumes it. Losses are finished jobs that had to run again, result files that differ from
the undisturbed run, and leftover files. At the end, the whole workflow is brought up to date and
compared once more.
"""

import argparse
import atexit
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path

import psutil
import pyarrow.parquet as pq

from cdul_steps.data.tables import KEY
from cdul_steps.provenance import versions

sys.path.insert(0, str(Path(__file__).parents[1] / "workflow"))
from copies import SMALL_TRAINING, Project, copy_project

STAGES = (
    *("evaluate", "predict", "train", "quality", "label", "similarity", "encode", "store"),
    *("encode_text", "manifest", "scenes"),
)


def files(dataset: str, encoder: str, shards: int, *splits: str) -> dict[str, list[str]]:
    """The targets of each stage, below the results; `shards` are those of the split train."""
    encoded = f"{dataset}/{encoder}"
    trained = f"{encoded}/final/small"
    return {
        "evaluate": [f"{trained}/metrics.json"],
        "predict": [f"{trained}/predictions/{split}.parquet" for split in splits],
        "train": [f"{trained}/history.parquet"],
        "quality": [f"{encoded}/final/quality.json"],
        "label": [f"{encoded}/final/pseudo_labels.parquet"],
        "similarity": [f"{encoded}/similarity/{split}.zarr" for split in splits],
        "encode": [f"{encoded}/encode/train/{shard}.parquet" for shard in range(shards)],
        "store": [f"{encoded}/embeddings/{split}.zarr/zarr.json" for split in splits],
        "encode_text": [f"{encoded}/text.parquet"],
        "manifest": [f"{dataset}/manifest/images.parquet"],
        "scenes": [f"{dataset}/scenes/scenes.csv"],
    }


CONFIG = {
    "datasets": {"demo": {"shard_size": 10, "scenes": {"train": 30, "test": 10, "size": 96}}},
    "run": {"labels": ["final"], "trainings": ["small"]},
    "trainings": {"small": SMALL_TRAINING | {"epochs": 8}},
    "runtime": {"workers": 1},
}
TIMES = {"seconds", "images_per_second", "views_per_second", "modified"}
"""Columns and facts that differ from run to run."""


def digests(results: Path) -> dict[str, str]:
    """A digest of every result file except logs and benchmarks, ignoring times."""
    found = {}
    for path in sorted(p for p in results.rglob("*") if p.is_file()):
        name = path.relative_to(results).as_posix()
        if name.startswith(("logs/", "benchmarks/")):
            continue
        content = path.read_bytes()
        if path.suffix == ".parquet":
            table = pq.read_table(path)
            facts = json.loads((table.schema.metadata or {}).get(KEY, b"{}"))
            facts = {k: v for k, v in facts.items() if k not in TIMES}
            table = table.drop_columns([n for n in table.column_names if n in TIMES])
            content = repr((facts, table.to_pydict())).encode()
        found[name] = blake2b(content, digest_size=8).hexdigest()
    return found


class Run:
    """A running snakemake and its output with times. It does not outlive this process."""

    def __init__(self, project: Project, *arguments: str) -> None:
        self.lines: list[tuple[float, str]] = []
        self.process = project.start(*arguments, start_new_session=True)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        atexit.register(self._end)

    def _end(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)

    def _read(self) -> None:
        for line in self.process.stdout:
            self.lines.append((time.monotonic(), line.rstrip()))

    def started(self, stage: str) -> float | None:
        """When the first job of a stage began; None if none has."""
        heads = {f"{kind} {stage}:" for kind in ("localrule", "localcheckpoint")}
        return next((moment for moment, line in self.lines if line in heads), None)

    def finished(self, stage: str) -> list[float]:
        """The times at which jobs of a stage finished successfully."""
        return [m for m, line in self.lines if line.endswith(f"(Rule: {stage})")]

    def wait(self) -> int:
        """Wait for the end; returns the exit status."""
        status = self.process.wait()
        self._reader.join()
        return status

    @property
    def text(self) -> str:
        return "\n".join(line for _, line in self.lines)

    def kill(self, job_only: bool) -> bool:
        """SIGKILL the running jobs, or everything, and wait; False if no job was running."""
        family = psutil.Process(self.process.pid).children(recursive=True)
        killed = not job_only
        if not job_only:
            os.killpg(self.process.pid, signal.SIGKILL)
        for process in family if job_only else ():
            with suppress(psutil.NoSuchProcess):
                if any(Path(word).name == "cdul" for word in process.cmdline()[:2]):
                    process.kill()
                    killed = True
        psutil.wait_procs(family)
        self.wait()
        return killed


def resume(project: Project, *arguments: str) -> Run:
    """Run the same command once more, after removing the lock if one was left."""
    if any((project.folder / ".snakemake/locks").glob("*")):
        assert Run(project, "--unlock").wait() == 0
    run = Run(project, *arguments)
    assert run.wait() == 0, run.text
    return run


def kill_once(
    project: Project,
    stage: str,
    outputs: list[str],
    expected: dict[str, str],
    seconds: float,
    chance: random.Random,
) -> dict | float:
    """Force a stage, kill it, resume it; returns its seconds if it ended before it was killed."""
    targets = [str((project.results / file).relative_to(project.folder)) for file in outputs]
    moment, job_only = chance.uniform(0, seconds), chance.random() < 0.5
    run = Run(project, *targets, "--forcerun", stage)
    while run.process.poll() is None:
        begin = run.started(stage)
        if begin is not None and time.monotonic() >= begin + moment:
            break
        time.sleep(0.01)
    if run.process.poll() is not None or not run.kill(job_only):
        assert run.wait() == 0, run.text
        return stage_seconds(run, [stage])[stage]
    done = len(run.finished(stage))
    again = resume(project, *targets)
    repeated = len(again.finished(stage)) - (len(targets) - done)
    after = digests(project.results)
    differing = [name for name in expected | after if expected.get(name) != after.get(name)]
    return {
        "moment": round(moment, 2),
        "killed": "job" if job_only else "all",
        "jobs_done_again": max(0, repeated),
        "files_lost": differing,
    }


def stage_seconds(run: Run, stages: Iterable[str]) -> dict[str, float]:
    """How long each stage took, from the start of its first job to the end of its last."""
    return {stage: run.finished(stage)[-1] - run.started(stage) for stage in stages}


def kill_stages(
    project: Project,
    outputs: dict[str, list[str]],
    kills: Counter,
    seconds: dict[str, float],
    seed: int,
) -> dict:
    """Kill each stage `kills` times, from the last to the first; returns the outcomes."""
    expected = digests(project.results)
    chance = random.Random(seed)
    table = {}
    for stage in [s for s in STAGES if kills[s]]:
        row = table[stage] = {"kills": 0, "resumed": 0, "lost": 0, "moments": []}
        while row["kills"] < kills[stage]:
            outcome = kill_once(project, stage, outputs[stage], expected, seconds[stage], chance)
            if isinstance(outcome, float):
                seconds[stage] = outcome
                continue
            lost = outcome["jobs_done_again"] + len(outcome["files_lost"])
            row["kills"] += 1
            row["resumed"] += not outcome["files_lost"]
            row["lost"] += lost
            row["moments"].append([outcome["killed"], outcome["moment"]])
            print(stage, json.dumps(outcome), file=sys.stderr, flush=True)
    return table


def main() -> None:
    """Run the loop and print the results."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=55, help="shared evenly by all stages")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    kills = Counter(options.stages[i % len(options.stages)] for i in range(options.kills))
    with tempfile.TemporaryDirectory() as folder:
        project = copy_project(Path(folder) / "project")
        project.config = CONFIG
        undisturbed = resume(project)
        expected = digests(project.results)
        outputs = files("demo", "tiny-clip", 3, "train", "test")
        seconds = stage_seconds(undisturbed, STAGES)
        table = kill_stages(project, outputs, kills, seconds, options.seed)
        resume(project)
        whole = digests(project.results) == expected
    total = {key: sum(row[key] for row in table.values()) for key in ("kills", "resumed", "lost")}
    result = {"stages": table, **total, "whole_run_as_undisturbed": whole, "seed": options.seed}
    print(json.dumps({**result, "software": versions("snakemake", "torch")}, indent=2))
    sys.exit(0 if whole and not total["lost"] else 1)


if __name__ == "__main__":
    main()
