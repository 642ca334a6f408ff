"""The processes that train one network together, each on a device of its own: its ranks."""

import os
import pickle
import socket
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from cdul_steps.errors import UserError


class Ranks:
    """A training in a single process; `SeveralRanks` is one in several."""

    rank, count = 0, 1

    def part(self, plan: list[list[int]]) -> list[list[int]]:
        """This process's part of every batch of a plan; it may be empty."""
        return [batch[self.rank :: self.count] for batch in plan]

    def prepare(self, network: torch.nn.Module) -> torch.nn.Module:
        """The network with layers that see the whole batch, not only the part of this process."""
        return network

    def wrap(self, network: torch.nn.Module) -> torch.nn.Module:
        """What to call in the network's place, so that its gradients become the ranks' mean."""
        return network

    def sum(self, values: Tensor) -> Tensor:
        """The sum of a tensor over the ranks, to the same bits on each."""
        return values

    def average(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Replace the gradients of parameters outside the network by the mean over the ranks."""

    def merge(self, rows: Tensor) -> Tensor:
        """A table of which each rank knows some entries, the others being NaN."""
        return rows


class SeveralRanks(Ranks):
    """One of several processes, which exchange tensors by Accelerate."""

    def __init__(self, device: torch.device) -> None:
        # Imported here, since it takes seconds that a single process need not wait.
        from accelerate import Accelerator
        from accelerate.utils import InitProcessGroupKwargs

        # Counts are exchanged on the CPU, so that no GPU is waited for.
        backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
        self._accelerator = Accelerator(
            cpu=device.type == "cpu", kwargs_handlers=[InitProcessGroupKwargs(backend=backend)]
        )
        self.rank = self._accelerator.process_index
        self.count = self._accelerator.num_processes

    def prepare(self, network: torch.nn.Module) -> torch.nn.Module:
        """Batch norm over the whole batch; raises UserError on a CPU, for which there is none."""
        if not any(isinstance(module, _BatchNorm) for module in network.modules()):
            return network
        if self._accelerator.device.type == "cpu":
            raise UserError(
                "training: batch norm over several processes is for GPUs; train on one device"
            )
        # timm's, since its layers of batch norm and activation in one are not torch's.
        from timm.layers import convert_sync_batchnorm

        return convert_sync_batchnorm(network)

    def wrap(self, network: torch.nn.Module) -> torch.nn.Module:
        """torch's DistributedDataParallel."""
        return self._accelerator.prepare_model(network)

    def sum(self, values: Tensor) -> Tensor:
        """See `Ranks`."""
        return self._accelerator.reduce(values, "sum")

    def average(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """See `Ranks`."""
        for parameter in parameters:
            parameter.grad = self._accelerator.reduce(parameter.grad, "mean")

    def merge(self, rows: Tensor) -> Tensor:
        """See `Ranks`."""
        known = ~rows.isnan()
        total = self.sum(torch.where(known, rows, 0.0))
        return torch.where(self.sum(known.int()) > 0, total, torch.nan)


def run_ranks(function: Callable[..., None], devices: Sequence[str], **arguments: Any) -> None:
    """Call `function(ranks, device, **arguments)` in a process for each of several devices.

    Raises what the first process to fail raised, and UserError where one was killed. The others
    are ended then, as all are when this process is told to end.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="cdul-") as folder:
        error = Path(folder) / "error"
        context = torch.multiprocessing.spawn(
            _run_rank,
            (function, list(devices), port, error, arguments),
            nprocs=len(devices),
            join=False,
        )
        try:
            while not context.join():
                pass
        except torch.multiprocessing.ProcessExitedException as exited:
            if error.exists():
                raise pickle.loads(error.read_bytes()) from exited
            raise UserError(
                f"train: one of {len(devices)} processes was killed ({exited}), as it is when "
                "memory runs out; run again"
            ) from exited
        finally:
            for process in context.processes:
                process.kill()


def _run_rank(
    rank: int,
    function: Callable[..., None],
    devices: list[str],
    port: int,
    error: Path,
    arguments: dict[str, Any],
) -> None:
    device = torch.device(devices[rank])
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(device.index or 0),  # Accelerate takes the GPU of this number
        WORLD_SIZE=str(len(devices)),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    if rank:  # what all of them have to say, the first one says
        sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115
    try:
        function(SeveralRanks(device), devices[rank], **arguments)
        torch.distributed.destroy_process_group()
    except Exception as raised:
        # That the others fail too, for want of this one, comes after this.
        if not error.exists():
            part = error.with_suffix(f".{rank}")
            part.write_bytes(pickle.dumps(raised))
            part.rename(error)
        sys.exit(1)
