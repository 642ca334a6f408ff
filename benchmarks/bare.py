"""The fastest way to run a bare network on tensors that are ready: the most a stage can reach."""

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measuring import PHOTOS

ENGINES = ("eager", "channels_last", "compile", "onnx")
BATCHES = {"cpu": [1, 2, 4, 8, 16, 32, 64], "cuda": [64, 128, 256, 512, 1024]}
# Every size is compiled again, which takes longer than the measurement.
COMPILED = {"cpu": [1, 8, 64], "cuda": [256]}

Load = Callable[[], tuple[torch.nn.Module, tuple[int, int]]]
"""Creates the network, on its device and in its precision, and returns its input size (H, W).

Several processes call it, so it must be picklable.
"""


class Called(torch.nn.Module):
    """Part of a network, as a separate network."""

    def __init__(self, network: torch.nn.Module, part: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.network, self.part = network, part

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.part(images)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `bare`, and of a stage that alternates with it.

    `precision` is an option of the benchmark itself.
    """
    parser.add_argument("--photos", type=Path, default=PHOTOS, help="folder of JPEGs")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--turns", type=int, default=3, help="number of alternations")
    parser.add_argument("--engines", nargs="+", default=ENGINES, choices=ENGINES)
    parser.add_argument("--batches", type=int, nargs="+", help="batch sizes of the bare network")
    parser.add_argument(
        "--seconds", type=float, default=1.0, help="duration of each bare measurement"
    )


def runner(
    network: torch.nn.Module, size: tuple[int, int], engine: str
) -> Callable[[torch.Tensor], Any]:
    """The network in an engine; it takes a float batch (B, 3, H, W) on its device."""
    if engine == "onnx":
        import onnxruntime

        with tempfile.TemporaryDirectory() as name:
            file = Path(name) / "network.onnx"
            torch.backends.mha.set_fastpath_enabled(False)
            torch.onnx.export(
                network.eval(),
                (torch.zeros(2, 3, *size),),
                file,
                dynamo=False,
                input_names=["views"],
                dynamic_axes={"views": {0: "batch"}},
            )
            torch.backends.mha.set_fastpath_enabled(True)
            settings = onnxruntime.SessionOptions()
            settings.intra_op_num_threads = torch.get_num_threads()
            settings.inter_op_num_threads = 1
            session = onnxruntime.InferenceSession(
                file, settings, providers=["CPUExecutionProvider"]
            )
        return lambda views: session.run(None, {"views": views.numpy()})
    layout = torch.contiguous_format if engine == "eager" else torch.channels_last
    network = network.eval().to(memory_format=layout)
    return torch.compile(network, dynamic=False) if engine == "compile" else network


def ready(engine: str, shape: tuple[int, ...], options: argparse.Namespace) -> torch.Tensor:
    """Noise in the form that the network needs."""
    precision = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    views = torch.randn(shape, device=options.device).to(precision[options.precision])
    layout = torch.contiguous_format if engine in ("eager", "onnx") else torch.channels_last
    return views.contiguous(memory_format=layout)


def _process(
    load: Load, threads: int, options: argparse.Namespace, barrier: Any, queue: Any
) -> None:
    """Rates of one of several processes that run the network at the same time."""
    torch.set_num_threads(threads)
    kind = torch.device(options.device).type
    with torch.inference_mode():
        for engine in options.engines:
            if engine == "onnx" and (kind != "cpu" or options.precision != "fp32"):
                continue
            network, size = load()
            run = runner(network, size, engine)
            for batch in options.batches or (COMPILED if engine == "compile" else BATCHES)[kind]:
                views = ready(engine, (batch, 3, *size), options)
                run(views)
                barrier.wait()
                done, start = 0, time.monotonic()
                while not done or time.monotonic() - start < options.seconds:
                    run(views)
                    if kind == "cuda":
                        torch.cuda.synchronize()
                    done += 1
                rate = done * batch / (time.monotonic() - start)
                barrier.wait()
                queue.put(((engine, batch), rate))
    queue.put(None)


def bare(load: Load, options: argparse.Namespace, ways: list[tuple[int, int]]) -> list[dict]:
    """Rates of a network by engine, batch size and `ways`: (processes, threads of each)."""
    context = multiprocessing.get_context("spawn")
    found = []
    for processes, threads in ways:
        barrier, queue = context.Barrier(processes), context.Queue()
        words = (load, threads, options, barrier, queue)
        started = [context.Process(target=_process, args=words) for _ in range(processes)]
        for process in started:
            process.start()
        rates: dict[tuple[str, int], float] = {}
        ended = 0
        while ended < processes:
            if (item := queue.get(timeout=600)) is None:
                ended += 1
            else:
                rates[item[0]] = rates.get(item[0], 0.0) + item[1]
        for process in started:
            process.join()
        for (engine, batch), rate in rates.items():
            row = {"engine": engine, "batch": batch, "processes": processes, "threads": threads}
            found.append({**row, "views_per_second": round(rate, 2)})
            print(found[-1], file=sys.stderr, flush=True)
    return found


def all_ways(load: Load, options: argparse.Namespace) -> list[dict]:
    """`bare` in one process with all threads and, on a CPU, as many of one thread."""
    ways = [(1, options.threads)]
    if options.threads > 1 and options.device == "cpu":
        ways.append((options.threads, 1))
    return bare(load, options, ways)


def fastest(rows: list[dict]) -> dict[str, Any]:
    """The row with the most views per second."""
    return max(rows, key=lambda row: row["views_per_second"])


def again(load: Load, best: dict[str, Any], options: argparse.Namespace) -> float:
    """The rate of the best way to run the network, measured ten times as long.

    The best of many short measurements is partly luck, and a machine's speed drifts.
    """
    only = {"engines": [best["engine"]], "batches": [best["batch"]]}
    longer = argparse.Namespace(**{**vars(options), **only, "seconds": 10 * options.seconds})
    (row,) = bare(load, longer, [(best["processes"], best["threads"])])
    return row["views_per_second"]
