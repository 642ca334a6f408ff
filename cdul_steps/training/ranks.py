"""Ranks: the processes that train one network together, each on its own device."""

import json
import os
import signal
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from cdul_steps.errors import UserError, explain


class Ranks:
    """A training in a single process; see `SeveralRanks` for several."""

    rank, count = 0, 1

    def part(self, plan: list[list[int]]) -> list[list[int]]:
        """This process's part of every batch of a plan; it may be empty."""
        return [batch[self.rank :: self.count] for batch in plan]

    def prepare(self, network: torch.nn.Module) -> torch.nn.Module:
        """The network with layers that see the whole batch, not only the part of this process."""
        return network

    def wrap(self, network: torch.nn.Module) -> torch.nn.Module:
        """The module to call instead of the network, so that gradients are averaged over ranks."""
        return network

    def sum(self, values: Tensor) -> Tensor:
        """The sum of a tensor over the ranks, bitwise identical on each."""
        return values

    def whole(self, index: Tensor) -> tuple[Tensor, slice]:
        """The images of the whole batch, and the slice of them that is this process's `index`."""
        return index, slice(0, len(index))

    def gather(self, logits: Tensor, mine: slice, size: int) -> Tensor:
        """Logits (size, C) of the whole batch; this process has those of `mine`.

        The loss of the whole batch, which every rank computes, gives the network wrapped by `wrap`
        the same gradient as in a single process.
        """
        return logits


class SeveralRanks(Ranks):
    """One of several processes, which exchange tensors with Accelerate."""

    def __init__(self, device: torch.device) -> None:
        # Imported here, because it takes seconds and a single process does not need it.
        from accelerate import Accelerator
        from accelerate.utils import InitProcessGroupKwargs

        backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
        self._accelerator = Accelerator(
            cpu=device.type == "cpu", kwargs_handlers=[InitProcessGroupKwargs(backend=backend)]
        )
        self.rank = self._accelerator.process_index
        self.count = self._accelerator.num_processes

    def prepare(self, network: torch.nn.Module) -> torch.nn.Module:
        """Batch norm over the whole batch; raises UserError on a CPU, where it is not supported."""
        if not any(isinstance(module, _BatchNorm) for module in network.modules()):
            return network
        if self._accelerator.device.type == "cpu":
            raise UserError(
                "training: batch norm over several processes needs GPUs; train on one device"
            )
        # timm's function, because its combined batch norm and activation layers are not torch's.
        from timm.layers import convert_sync_batchnorm

        return convert_sync_batchnorm(network)

    def wrap(self, network: torch.nn.Module) -> torch.nn.Module:
        """torch's DistributedDataParallel."""
        return self._accelerator.prepare_model(network)

    def sum(self, values: Tensor) -> Tensor:
        """See `Ranks`."""
        return self._accelerator.reduce(values, "sum")

    def whole(self, index: Tensor) -> tuple[Tensor, slice]:
        """See `Ranks`. Computed on the CPU, to avoid waiting for a GPU."""
        sizes = torch.zeros(self.count, dtype=torch.int64)
        sizes[self.rank] = len(index)
        ends = self.sum(sizes).cumsum(0).tolist()
        mine = slice(ends[self.rank] - len(index), ends[self.rank])
        whole = index.new_zeros(ends[-1])
        whole[mine] = index
        return self.sum(whole), mine

    def gather(self, logits: Tensor, mine: slice, size: int) -> Tensor:
        """See `Ranks`."""
        # The wrapped network averages the ranks' gradients, each from its own images only.
        if logits.requires_grad:
            logits.register_hook(lambda gradient: gradient * self.count)
        rows = torch.nn.functional.pad(logits, (0, 0, mine.start, size - mine.stop))
        others = self.sum(rows.detach())
        others[mine] = 0
        return rows + others


def run_ranks(function: Callable[..., None], devices: Sequence[str], **arguments: Any) -> None:
    """Call `function(ranks, device, **arguments)` in one process per device.

    Raises UserError if the first process that fails can explain its error or a process was killed,
    and otherwise RuntimeError with its traceback. The other processes are then ended; all are ended
    when this process is told to stop.
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
            # If a rank is killed, the others report that they have lost it.
            codes = [process.exitcode for process in context.processes]
            if killed := {code for code in codes if code not in (0, 1, -signal.SIGTERM)}:
                raise UserError(
                    f"train: one of {len(devices)} processes was killed (signal {-killed.pop()}), "
                    "as happens when memory runs out; run again"
                ) from exited
            told = json.loads(error.read_text())
            if told["line"]:
                raise UserError(told["line"]) from exited
            raise RuntimeError(told["trace"]) from exited
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
    if sys.platform == "linux":
        # Otherwise it uses the host name, which not every machine can resolve.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if rank:  # only the first process prints messages
        sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115
    try:
        function(SeveralRanks(device), devices[rank], **arguments)
        torch.distributed.destroy_process_group()
    except Exception as raised:
        # The others then fail because this one is gone; only the first error is kept.
        if not error.exists():
            told = {"line": explain(raised), "trace": traceback.format_exc()}
            part = error.with_suffix(f".{rank}")
            part.write_text(json.dumps(told))
            part.rename(error)
        sys.exit(1)
