"""Engines: what runs the image tower, and in batches of which size."""

import os
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import Tensor

from cdul_steps.config import Engine
from cdul_steps.errors import UserError, first_line
from cdul_steps.method.similarity import unit
from cdul_steps.models.encoder import ImageEncoder, Preprocess
from cdul_steps.progress import note

GPU_BATCH = 256
"""Views per forward pass that fill a GPU."""
MEASURED_WORK = 20.0
"""Seconds of work below which measuring engines takes longer than it saves."""
LONG = 0.3
"""Seconds of a measurement that need no repetition."""
FASTER = 1.05
"""How much faster another engine or batch size must be; less is within measurement noise."""
EQUAL_COSINE = 0.9999
"""Lowest cosine between two engines' vectors of a view for them to count as equal."""

Encoder = Callable[[Tensor], np.ndarray]


class _Tower(torch.nn.Module):
    """Maps uint8 views to vectors, as one graph."""

    def __init__(self, network: torch.nn.Module, preprocess: Preprocess) -> None:
        super().__init__()
        self.network, self.preprocess = network, preprocess

    def forward(self, views: Tensor) -> Tensor:
        return self.network.encode_image(self.preprocess.normalize(views, torch.float32))


class OnnxEncoder:
    """The image tower in ONNX Runtime, on one thread.

    On a CPU it fuses convolutions with adjacent operations, which doubles the speed of such towers.
    """

    def __init__(self, encoder: ImageEncoder) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="cdul-")
        self._file = Path(self._folder.name) / "tower.onnx"
        self._session: onnxruntime.InferenceSession | None = None
        self._process = 0
        size = encoder.preprocess.size
        views = torch.zeros((2, 3, *size), dtype=torch.uint8)
        axes = {"views": {0: "batch"}, "vectors": {0: "batch"}}
        # Torch's fused attention operator cannot be exported.
        fast_path = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                # By tracing: torch's newer exporter takes 12 s at the start of every job.
                torch.onnx.export(
                    _Tower(encoder.network, encoder.preprocess).eval(),
                    (views,),
                    self._file,
                    dynamo=False,
                    input_names=["views"],
                    output_names=["vectors"],
                    dynamic_axes=axes,
                )
        finally:
            torch.backends.mha.set_fastpath_enabled(fast_path)

    def __call__(self, views: Tensor) -> np.ndarray:
        """Embed uint8 views (B, 3, H, W): float32 vectors (B, D), not normalised."""
        # A session does not survive a fork, so every worker process opens its own.
        if self._session is None or self._process != os.getpid():
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = options.inter_op_num_threads = 1
            self._session = onnxruntime.InferenceSession(
                str(self._file), options, providers=["CPUExecutionProvider"]
            )
            self._process = os.getpid()
        return self._session.run(None, {"views": views.numpy()})[0]


def _seconds(encode: Encoder, views: Tensor) -> float:
    """Seconds of processor time per view on one thread, the best of a few runs.

    The first run also prepares memory, so it counts only if it was long.
    """
    spent: list[float] = []
    while len(spent) < 4 and (len(spent) < 2 or sum(spent[1:]) < 0.1):
        start = time.thread_time()
        encode(views)
        spent.append(time.thread_time() - start)
        if spent[0] > LONG:
            break
    return min(spent) / len(views)


@dataclass(frozen=True)
class ChosenEngine:
    """How the tower runs: its engine, the encoder itself, and views per forward pass."""

    engine: str
    encoder: Encoder
    batch_size: int


def choose_engine(
    encoder: ImageEncoder, engine: Engine, batch_size: int, *, views: int, work: float
) -> ChosenEngine:
    """Choose how to run the image tower.

    A GPU uses torch and large batches. On a CPU, where each worker has one thread and handles all
    views of an image together, engines and then batch sizes (one view, half of an image's, all of
    them) are measured on noise, if a worker has enough `work` (views) to benefit. `views` is the
    number per image; a `batch_size` (views) of 0 is automatic. Raises UserError if `onnx` is
    requested and not available.
    """
    if encoder.device.type != "cpu":
        if engine == "onnx":
            raise UserError(f"engine 'onnx' is for a CPU, not for {encoder.device}; use 'auto'")
        return ChosenEngine("torch", encoder, batch_size or GPU_BATCH)
    sizes = [batch_size] if batch_size else sorted({1, -(-views // 2), views})
    middle = sizes[len(sizes) // 2]
    shape = (sizes[-1], 3, *encoder.preprocess.size)
    probe = torch.from_numpy(np.random.default_rng(0).integers(0, 256, shape, np.uint8))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        name, tower = ("onnx", _onnx(encoder, probe)) if engine == "onnx" else ("torch", encoder)
        if engine != "auto" and batch_size:
            return ChosenEngine(name, tower, batch_size)
        seconds = _seconds(tower, probe[: sizes[0]])
        if seconds * work < MEASURED_WORK:
            return ChosenEngine(name, tower, middle)
        onnx = _working_onnx(encoder, probe) if engine == "auto" else None
        if onnx:
            its = _seconds(onnx, probe[: sizes[0]])
            note(
                f"encode: torch embeds {1 / seconds:.1f} and onnx {1 / its:.1f} views/s per "
                f"thread, in batches of {sizes[0]}"
            )
            if seconds > FASTER * its:
                name, tower, seconds = "onnx", onnx, its
        return ChosenEngine(name, tower, _best_size(tower, name, sizes, probe, seconds))
    finally:
        torch.set_num_threads(threads)


def _best_size(tower: Encoder, name: str, sizes: list[int], probe: Tensor, first: float) -> int:
    """The best of ascending batch sizes; `first` are the seconds per view of the smallest.

    Small batches stay in the processor's cache; large ones read the weights less often.
    """
    best, seconds = sizes[0], {sizes[0]: first}
    for size in sizes[1:]:
        seconds[size] = _seconds(tower, probe[:size])
        if seconds[best] <= FASTER * seconds[size]:
            break
        best = size
    rates = ", ".join(f"{1 / seconds[size]:.1f} in batches of {size}" for size in sorted(seconds))
    note(f"encode: {name} embeds {rates}")
    return best


def _onnx(encoder: ImageEncoder, probe: Tensor) -> OnnxEncoder:
    """The tower in ONNX Runtime. Raises UserError if its vectors differ from torch's."""
    try:
        onnx = OnnxEncoder(encoder)
        some = probe[:2]
        cosine = (unit(encoder(some)) * unit(onnx(some))).sum(axis=-1).min()
    except Exception as error:
        raise UserError(f"engine 'onnx' cannot run this model: {first_line(error)}") from error
    if not cosine >= EQUAL_COSINE:
        raise UserError(f"engine 'onnx': its vectors differ from torch's, cosine {cosine:.5f}")
    return onnx


def _working_onnx(encoder: ImageEncoder, probe: Tensor) -> OnnxEncoder | None:
    if encoder.dtype is not torch.float32:
        return None
    try:
        return _onnx(encoder, probe)
    except UserError as error:
        note(f"encode: {error}")
        return None
