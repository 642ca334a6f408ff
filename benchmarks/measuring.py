"""Shared by the benchmarks: the machine, photographs, a command with its time and memory."""

import itertools
import json
import os
import platform
import re
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from cdul_steps.config import Dataset
from cdul_steps.provenance import versions
from cdul_steps.steps.manifest import make_manifest

PHOTOS = Path(os.environ.get("CDUL_TEST_DATA", "")) / "voc2007/VOCdevkit/VOC2007/JPEGImages"
"""Real photographs (tests/conftest.py explains the variable)."""

# `cdul`, which also reports when a function of one of its modules first returned.
NOTING = """
import importlib, sys, time
from cdul_steps import cli
module, name = importlib.import_module(sys.argv.pop(1)), sys.argv.pop(1)
function, returned = getattr(module, name), []
def noting(*words, **options):
    result = function(*words, **options)
    if not returned:
        returned.append(time.monotonic())
        print("returned at", returned[0], file=sys.stderr)
    return result
setattr(module, name, noting)
cli.main()
"""


def noting(module: str, function: str) -> list[str]:
    """The start of a `cdul` command whose log records when `function` of `module` returned."""
    return [sys.executable, "-c", NOTING, module, function]


def noted(log: str) -> float:
    """When the function returned, by the monotonic clock (s)."""
    (line,) = re.findall(r"^returned at (\S+)$", log, re.MULTILINE)
    return float(line)


def machine() -> dict[str, Any]:
    """The processor, its usable cores, memory, GPUs, and load."""
    names = re.findall(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    found = {
        "cpu": names[0] if names else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_GiB": round(psutil.virtual_memory().total / 2**30, 1),
        "load_1_min": round(os.getloadavg()[0], 2),
    }
    if torch := sys.modules.get("torch"):
        found["gpus"] = [
            torch.cuda.get_device_name(i)
            for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
        ]
    return found


def print_result(software: list[str], **figures: Any) -> None:
    """Print the benchmark's one JSON object."""
    result = {"machine": machine(), "software": versions(*software), **figures}
    print(json.dumps(result, indent=2))


def link_photos(
    photos: Path,
    folder: Path,
    images: int,
    shard_size: int,
    *,
    grid: tuple[int, int] = (3, 3),
    classes: Sequence[str] = ("cat", "dog"),
) -> Path:
    """Photographs, repeated if there are too few, and their manifest.

    Returns the folder of the shards; `folder/images.parquet` is the whole manifest.
    """
    (folder / "images").mkdir(parents=True)
    files = sorted(photos.glob("*.jpg"))
    if not files:
        sys.exit(f"{photos}: no photographs (*.jpg); give their folder with --photos")
    for i, file in zip(range(images), itertools.cycle(files), strict=False):
        (folder / f"images/{i:06d}.jpg").symlink_to(file.resolve())
    (folder / "classes.txt").write_text("\n".join(classes))
    dataset = Dataset(
        reader="folder",
        root=folder / "images",
        classes=folder / "classes.txt",
        splits={"train": "."},
        grid=grid,
        shard_size=shard_size,
        max_failed_share=1,
    )
    make_manifest(dataset=dataset, output=folder / "images.parquet")
    return folder / "train"


def measure(command: list[object], *, memory: bool) -> dict[str, Any]:
    """Run a command: its `start` and `end` by the monotonic clock (s), and its `log`.

    With `memory` also the `peak_MiB` of all its processes, with shared pages counted once, and
    `anonymous_MiB`, the peak without pages of files, which the system can drop; measuring it slows
    the command down. Exits if the command fails.
    """
    start = time.monotonic()
    process = subprocess.Popen([str(w) for w in command], stderr=subprocess.PIPE, text=True)
    peaks = {"Pss": 0, "Pss_Anon": 0}

    def watch() -> None:
        while process.poll() is None:
            total = dict.fromkeys(peaks, 0)
            try:
                parent = psutil.Process(process.pid)
                for one in [parent, *parent.children(recursive=True)]:
                    text = Path(f"/proc/{one.pid}/smaps_rollup").read_text()
                    for name in peaks:
                        total[name] += int(re.search(rf"^{name}:\s+(\d+)", text, re.MULTILINE)[1])
            except (psutil.Error, OSError, TypeError):  # it has just ended
                pass
            peaks.update({name: max(peaks[name], total[name]) for name in peaks})
            time.sleep(0.25)

    watcher = threading.Thread(target=watch)
    if memory:
        watcher.start()
    log = process.communicate()[1]
    found: dict[str, Any] = {"start": start, "end": time.monotonic(), "log": log}
    if memory:
        watcher.join()
        found["peak_MiB"] = round(peaks["Pss"] / 1024, 1)
        found["anonymous_MiB"] = round(peaks["Pss_Anon"] / 1024, 1)
    if process.returncode:
        sys.exit(f"{' '.join(map(str, command))} failed:\n{log}")
    return found
