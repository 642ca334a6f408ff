"""The device and arithmetic of a model."""

import fcntl
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np
import torch

from cdul_steps.config import Engine
from cdul_steps.errors import UserError, first_line
from cdul_steps.progress import note

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Machine:
    """The resources that a job may use; they change its speed, not its result.

    `device` is a name for `choose_device`. `gpus` of them work together (with `cpu`: processes); 0
    makes `auto` choose the CPU. `workers` processes decode images; -1 is automatic. `threads` is
    for the model; 0 is all. `engine` runs the encoder's tower on a CPU. `batch_size` is the number
    of views or images per forward pass; 0 is automatic. A training has its own batch size in its
    settings.
    """

    device: str = "auto"
    gpus: int = 1
    workers: int = -1
    threads: int = 0
    engine: Engine = "auto"
    batch_size: int = 0

    def set_up(self, *, cpu_workers: int) -> tuple[torch.device, int]:
        """Choose the device and the number of decoding processes, and limit torch to `threads`.

        With workers of -1 there is one per thread with a GPU, and `cpu_workers` (0: one per thread)
        without. The latter reduce torch's threads, because a thread that waits for a core delays
        all others.
        """
        if self.threads:
            torch.set_num_threads(self.threads)
        target = choose_device("cpu" if self.device == "auto" and not self.gpus else self.device)
        if self.workers >= 0:
            return target, self.workers
        if target.type != "cpu" or not cpu_workers:
            return target, torch.get_num_threads()
        torch.set_num_threads(max(1, torch.get_num_threads() - cpu_workers))
        return target, cpu_workers

    def split(self) -> list[Self]:
        """One machine for each of `gpus` processes that work together.

        Raises UserError if there are not enough devices.
        """
        if self.gpus < 2:
            return [self]
        names = several_devices(self.device, self.gpus)
        if len(names) == 1:
            return [replace(self, device=names[0], gpus=1)]
        threads = max(1, (self.threads or torch.get_num_threads()) // len(names))
        workers = -(-self.workers // len(names)) if self.workers > 0 else self.workers
        return [
            replace(self, device=name, gpus=1, threads=threads, workers=workers) for name in names
        ]


def choose_device(name: str) -> torch.device:
    """`auto` is a free GPU if the machine has GPUs, `cuda` a free GPU, `cuda:1` that GPU.

    A GPU is free if no other process of this user has claimed it; waits if none is free. Raises
    UserError for a device that does not exist.
    """
    if name == "auto" and not torch.cuda.is_available():
        name = "cpu"
    try:
        free = name in ("auto", "cuda") and torch.cuda.is_available()
        device = torch.device("cuda", _free_gpus(1)[0]) if free else torch.device(name)
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name!r} cannot be used here: {first_line(error)}") from error
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def several_devices(name: str, count: int) -> list[str]:
    """Names for `choose_device` of several devices that work together.

    `auto` is `count` free GPUs, which this process claims, or a single `cpu` if there are none;
    `cuda` is the GPUs, and `cpu` is `count` processes. Raises UserError if there are not enough.
    """
    if name == "cpu":
        return ["cpu"] * count
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto" and not there:
        return ["cpu"]
    if name not in ("auto", "cuda"):
        raise UserError(f"device {name!r} is a single device; for {count}, use 'auto'")
    if there < count:
        raise UserError(f"device {name!r}: {count} GPUs are requested, but there are {there}")
    return [f"cuda:{index}" for index in _free_gpus(count)]


def _free_gpus(count: int) -> list[int]:
    """Claim GPUs for this process; returns their numbers."""
    # A GPU's number depends on CUDA_VISIBLE_DEVICES and on SLURM's allocation; its UUID does not.
    gpus = [str(torch.cuda.get_device_properties(i).uuid) for i in range(torch.cuda.device_count())]
    runtime = Path(os.environ.get("XDG_RUNTIME_DIR", ""))
    parent = runtime if runtime.is_absolute() and runtime.is_dir() else tempfile.gettempdir()
    folder = Path(parent) / f"cdul-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if not (taken := claim(gpus, folder, count)):
        note(f"the GPUs ({len(gpus)}) are in use by other jobs; waiting for {count}")
    while not taken:
        time.sleep(1)
        taken = claim(gpus, folder, count)
    return taken


def claim(names: Sequence[str], folder: Path, count: int = 1) -> list[int]:
    """Claim the first `count` of the named resources that no other process holds; their indices.

    It claims all of them or, if too few are free, none, so that two jobs never deadlock. A resource
    is claimed by a lock on a file with its name in `folder`, until the claiming process ends for
    any reason. Child processes do not hold the lock.
    """
    taken: dict[int, int] = {}
    for index, name in enumerate(names):
        lock = os.open(folder / name, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            continue
        taken[index] = lock
        if len(taken) == count:  # never closed, which would release the locks
            return list(taken)
    for lock in taken.values():
        os.close(lock)
    return []


def stop_without(parent: int, worker: int) -> None:
    """For `worker_init_fn`: end a decoding process whose `parent` was killed while it started.

    Torch's own watchdog starts later, and would take the process that adopted it for its parent.
    """
    if os.getppid() != parent:
        os._exit(1)


class InBatches:
    """Calls a function in batches; after running out of GPU memory, in smaller ones from then on.

    `function` maps a tensor of B items to an array of B rows, which must not depend on each other.
    """

    def __init__(
        self, function: Callable[[torch.Tensor], np.ndarray], batch_size: int, stage: str
    ) -> None:
        self.function, self.batch_size, self.stage = function, batch_size, stage

    def __call__(self, items: np.ndarray) -> np.ndarray:
        """All rows; raises torch.OutOfMemoryError if not even one item fits."""
        while True:
            try:
                parts = torch.from_numpy(items).split(self.batch_size)
                return np.concatenate([self.function(part) for part in parts])
            except torch.OutOfMemoryError:
                if self.batch_size == 1:
                    raise
                self.batch_size //= 2
                torch.cuda.empty_cache()
                note(f"{self.stage}: out of GPU memory, continuing in batches of {self.batch_size}")
