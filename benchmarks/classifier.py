"""Speed of `cdul predict` and `cdul features` against the bare network and bare decoding; JSON.

    python benchmarks/classifier.py --model tf_efficientnet_lite0 --image-size 160
    python benchmarks/classifier.py --model resnet50 --image-size 224 --images 1000

Images per second: `decoding` is only decoding files to input pixels, with one process per core;
`bare` is only the network on tensors that are ready, the fastest of several engines, batch sizes
and ways to use the cores; `allowed` is both in sequence, because they share the cores: 1 / (1 /
decoding + 1 / bare); the others are the whole commands, from the loaded model to the end. Decoding
and the network alternate with the commands. The network has random weights, which does not affect
the speed.
"""

import argparse
import multiprocessing
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bare import Called, add_options, again, all_ways, fastest
from measuring import link_photos, measure, noted, noting, print_result

from cdul_steps.config import Network
from cdul_steps.data.images import decode
from cdul_steps.models.classifier import (
    WEIGHTS,
    Card,
    load_classifier,
    network_and_card,
    save_classifier,
)
from cdul_steps.models.timm_encoder import pooled_features

CLASSES = [f"class {number}" for number in range(20)]


def bare_network(model: Path, device: str, stage: str) -> tuple[torch.nn.Module, tuple[int, int]]:
    """The part of a model folder's network that a stage runs, and its input size."""
    network, card = load_classifier(model, torch.device(device))
    size = (card.image_size, card.image_size)
    if stage == "features":
        return Called(network, pooled_features(network)), size
    return network, size


def _decode(files: list[Path], card: Card, barrier: Any, queue: Any) -> None:
    card.resize(decode(files[0]))
    barrier.wait()
    start = time.monotonic()
    for file in files:
        card.resize(decode(file))
    queue.put(len(files) / (time.monotonic() - start))


def decoding(files: list[Path], card: Card, processes: int) -> float:
    """Images per second decoded and resized by several processes."""
    context = multiprocessing.get_context("spawn")
    barrier, queue = context.Barrier(processes), context.Queue()
    started = [
        context.Process(target=_decode, args=(files[i::processes], card, barrier, queue))
        for i in range(processes)
    ]
    for process in started:
        process.start()
    rate = sum(queue.get(timeout=600) for _ in started)
    for process in started:
        process.join()
    return rate


def command(stage: str, folder: Path, settings: Network, options: argparse.Namespace) -> list[Any]:
    """A stage's command for the images in `folder`."""
    machine = ["--device", options.device, "--threads", options.threads]
    if stage == "predict":
        words = noting("cdul_steps.steps.predict", "load_classifier")
        words += ["predict", folder / "data/images", "--model", folder / "model"]
        return [*words, "--output", folder / "scores.parquet", *machine]
    words = noting("cdul_steps.steps.features", "network_and_card")
    words += ["features", "--manifest", folder / "data/train/0.parquet"]
    words += ["--store", folder / "train.zarr", "--table", folder / "0.parquet"]
    return [*words, "--settings", settings.model_dump_json(), *machine]


def main() -> None:
    """Measure the requested stages, and print the rates and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="tf_efficientnet_lite0", help="a model of timm")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument(
        "--stages", nargs="+", default=["predict", "features"], choices=["predict", "features"]
    )
    add_options(parser)
    options = parser.parse_args()
    options.precision = "fp32"
    software = ["torch", "onnxruntime", "timm", "pillow"]
    keys = ("model", "image_size", "images", "device", "threads")
    sizes = {key: getattr(options, key) for key in keys}
    if options.device == "cuda" and not torch.cuda.is_available():
        print_result(software, **sizes, skipped="no CUDA device")
        return
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.manual_seed(0)
        settings = Network(model=options.model, image_size=options.image_size)
        network, card = network_and_card(settings, CLASSES)
        save_classifier(network, card, folder / "model")
        settings = settings.model_copy(update={"weights": str(folder / "model" / WEIGHTS)})
        link_photos(options.photos, folder / "data", options.images, options.images)
        files = sorted((folder / "data/images").iterdir())
        for stage in options.stages:
            load = partial(bare_network, folder / "model", options.device, stage)
            rows = all_ways(load, options)
            best, turns = fastest(rows), []
            for _ in range(options.turns):
                decoded = decoding(files, card, options.threads)
                before = again(load, best, options)
                found = measure(command(stage, folder, settings, options), memory=False)
                rate = options.images / (found["end"] - noted(found["log"]))
                bare = (before + again(load, best, options)) / 2
                allowed = 1 / (1 / decoded + 1 / bare)
                turn = {"decoding": decoded, "bare": bare, "allowed": allowed, stage: rate}
                turn = {key: round(value, 1) for key, value in turn.items()}
                turn |= {"ratio": round(rate / allowed, 3)}
                turn["with_start_s"] = round(found["end"] - found["start"], 1)
                print(turn, file=sys.stderr, flush=True)
                turns.append(turn)
            result[stage] = {"bare": rows, "best": best, "turns": turns}
    print_result(software, **sizes, **result)


if __name__ == "__main__":
    main()
