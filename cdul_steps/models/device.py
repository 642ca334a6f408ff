"""Where and in which arithmetic a model runs."""

from collections.abc import Callable

import numpy as np
import torch

from cdul_steps.errors import UserError, first_line
from cdul_steps.progress import note

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def choose_device(name: str) -> torch.device:
    """`auto` is the GPU where there is one; UserError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name!r} cannot be used here: {first_line(error)}") from error
    return device


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


class InBatches:
    """Calls a function in batches; after running out of GPU memory, in smaller ones from then on.

    `function` takes a tensor of B items to an array of B rows, which must not depend on each other.
    """

    def __init__(
        self, function: Callable[[torch.Tensor], np.ndarray], batch_size: int, stage: str
    ) -> None:
        self.function, self.batch_size, self.stage = function, batch_size, stage

    def __call__(self, items: np.ndarray) -> np.ndarray:
        """All rows; raises torch.OutOfMemoryError where not even one item fits."""
        while True:
            try:
                parts = torch.from_numpy(items).split(self.batch_size)
                return np.concatenate([self.function(part) for part in parts])
            except torch.OutOfMemoryError:
                if self.batch_size == 1:
                    raise
                self.batch_size //= 2
                torch.cuda.empty_cache()
                note(f"{self.stage}: out of GPU memory, going on with batches of {self.batch_size}")
