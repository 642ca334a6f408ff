"""Where and in which arithmetic a model runs."""

import torch

from cdul_steps.errors import UserError, first_line

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
