"""Where and in which arithmetic a model runs."""

import fcntl
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from cdul_steps.errors import UserError, first_line
from cdul_steps.progress import note

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def choose_device(name: str) -> torch.device:
    """`auto` is a free GPU where there is one, `cuda` a free GPU, `cuda:1` that very one.

    A GPU is free if no other process of this user has chosen it as a free one; where none is,
    waits. Raises UserError for a device that is not there.
    """
    if name == "auto" and not torch.cuda.is_available():
        name = "cpu"
    try:
        free = name in ("auto", "cuda") and torch.cuda.is_available()
        device = torch.device("cuda", _free_gpu()) if free else torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name!r} cannot be used here: {first_line(error)}") from error
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def _free_gpu() -> int:
    """Number of a GPU that this process has from now on to itself."""
    # A GPU's number depends on CUDA_VISIBLE_DEVICES and on SLURM's allocation; its UUID does not.
    gpus = [str(torch.cuda.get_device_properties(i).uuid) for i in range(torch.cuda.device_count())]
    runtime = Path(os.environ.get("XDG_RUNTIME_DIR", ""))
    parent = runtime if runtime.is_absolute() and runtime.is_dir() else tempfile.gettempdir()
    folder = Path(parent) / f"cdul-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if (index := claim(gpus, folder)) is None:
        note(f"all GPUs ({len(gpus)}) are taken by other jobs; waiting for one")
    while index is None:
        time.sleep(1)
        index = claim(gpus, folder)
    return index


def claim(names: Sequence[str], folder: Path) -> int | None:
    """Take the first of the named things that no other process has; its index, None if all are.

    A thing is taken by a lock on a file of its name in `folder`, until the process that took it
    ends, however it ends. Its children do not hold the lock.
    """
    for index, name in enumerate(names):
        lock = os.open(folder / name, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            continue
        # Never closed: that would give the lock back.
        return index
    return None


def set_up(
    device: str, threads: int, workers: int, *, cpu_workers: int
) -> tuple[torch.device, int]:
    """Choose a job's device and its decoding processes, and limit torch to `threads` (0: all).

    `workers` -1 chooses: one a thread with a GPU, `cpu_workers` (0: one a thread) without.
    """
    if threads:
        torch.set_num_threads(threads)
    target = choose_device(device)
    if workers < 0:
        workers = cpu_workers if target.type == "cpu" and cpu_workers else torch.get_num_threads()
    return target, workers
