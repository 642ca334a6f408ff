"""Speed and memory of `cdul encode` on photographs against the bare image tower; prints JSON.

    python benchmarks/encode.py --model local-dir:PHOTO-MINI
    python benchmarks/encode.py --model ViT-B-32 --images 400
    python benchmarks/encode.py --model ViT-L-14 --device cuda --precision bf16

Three rates in views per second: `encode` is the whole command from the loaded model to its end;
`bare` is only the tower on tensors that are ready, the fastest of several engines, batch sizes and
ways to use the cores, which then alternates with `encode`; `usual` is one image at a time, with one
call per view and one file per image. With `--views dense` all views of an image are one pass, with
an input of twice the size, and passes per second are compared. A model without its own weights gets
random ones. `--parts memory` compares the peak memory of 1,000 and 10,000 images. For a quick look:
`--images 20 --usual-images 5 --seconds 0.2 --turns 1`.
"""

import argparse
import json
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from bare import Called, add_options, again, all_ways, fastest
from measuring import link_photos, measure, noted, noting, print_result
from PIL import Image
from safetensors.torch import save_file

from cdul_steps.data.manifest import read_shard
from cdul_steps.models.dense import DenseEncoder
from cdul_steps.models.encoder import Preprocess, load_clip

VIEWS = 10
"""Views per image: the whole image, and a grid of 3x3 snippets."""


def random_model(name: str, folder: Path) -> str:
    """An open_clip model with random weights, in a separate folder."""
    folder.mkdir()
    torch.manual_seed(0)
    network = open_clip.create_model(name, pretrained=None)
    config = {
        "model_cfg": open_clip.get_model_config(name),
        "preprocess_cfg": open_clip.get_model_preprocess_cfg(network),
    }
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    save_file(network.state_dict(), folder / "open_clip_model.safetensors")
    return f"local-dir:{folder}"


def encode(
    manifest: Path, model: str, options: argparse.Namespace, *, memory: bool = False
) -> dict[str, Any]:
    """The time and memory of `cdul encode` for a shard, from `measure`."""
    with tempfile.TemporaryDirectory() as name:
        words = ["encode", "--manifest", manifest, "--store", Path(name, "train.zarr")]
        words += ["--table", Path(name, "0.parquet"), "--model", model]
        words += ["--precision", options.precision, "--device", options.device]
        words += ["--threads", options.threads, "--views", options.views]
        command = [*noting("cdul_steps.steps.encode", "load_tower"), *words]
        return measure(command, memory=memory)


def encode_rate(manifest: Path, model: str, options: argparse.Namespace) -> dict[str, Any]:
    """Rates of `cdul encode`, from the loaded model to the end of the process."""
    found = encode(manifest, model, options)
    notes = [line for line in found["log"].splitlines() if "loaded in" in line]
    seconds = found["end"] - noted(found["log"])
    return {
        "seconds": round(seconds, 2),
        "with_start_s": round(found["end"] - found["start"], 2),
        "note": notes[-1].removeprefix("encode: "),
        "images_per_second": round(options.images / seconds, 2),
        "views_per_second": round(options.images * VIEWS / seconds, 2),
    }


def tower(
    model: str, precision: str, device: str, views: str
) -> tuple[torch.nn.Module, tuple[int, int]]:
    """A bare image tower, and the size of its input."""
    target = torch.device(device)
    network = load_clip(model, precision=precision, device=target)
    if views == "dense":
        dense = DenseEncoder(network, precision, target, [(3, 3)], 0)
        return Called(dense.network, dense.network.encode_image), dense.preprocess.size
    return Called(network, network.encode_image), Preprocess.of(network).size


def usual(manifest: Path, model: str, options: argparse.Namespace) -> dict[str, Any]:
    """One image at a time, with ten calls of preprocessing and tower, and one file per image."""
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    network = load_clip(model, precision=options.precision, device=device)
    config = open_clip.transform.PreprocessCfg(**open_clip.get_model_preprocess_cfg(network))
    preprocess = open_clip.transform.image_transform_v2(config, is_train=False)
    dtype = next(network.visual.parameters()).dtype
    _, images, boxes = read_shard(manifest)
    with tempfile.TemporaryDirectory() as name, torch.inference_mode():
        for warm in (True, False):
            count = 2 if warm else options.usual_images
            start = time.monotonic()
            for path, of_image in zip(images["path"].to_pylist()[:count], boxes, strict=False):
                image = Image.open(path).convert("RGB")
                vectors = []
                for box in of_image:
                    view = preprocess(image.crop(tuple(box.tolist())))[None].to(device, dtype)
                    vector = network.encode_image(view)
                    vectors.append((vector / vector.norm(dim=1, keepdim=True)).float().cpu())
                np.save(Path(name, f"{Path(path).stem}.npy"), torch.cat(vectors).numpy())
            seconds = time.monotonic() - start
    views = min(options.usual_images, len(images)) * boxes.shape[1]
    return {"views_per_second": round(views / seconds, 2), "seconds": round(seconds, 2)}


def memory(model: str, photos: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Peak memory (MiB) of jobs with 1,000 and 10,000 images, in shards of each size.

    Several jobs of each and their median, because the peak of the same job varies by a tenth.
    """
    found: dict[str, list[float]] = {}
    few, many = options.memory_images
    for images, shard_size in ((few, few), (many, few), (many, many)):
        with tempfile.TemporaryDirectory() as name:
            shards = link_photos(photos, Path(name, "data"), images, shard_size)
            jobs = sorted(shards.glob("*.parquet"))
            jobs *= -(-options.memory_jobs // len(jobs))
            peaks = [encode(job, model, options, memory=True)["peak_MiB"] for job in jobs]
        found[f"{images} in shards of {shard_size}"] = peaks
        print(f"memory: {found}", file=sys.stderr, flush=True)
    medians = {key: float(np.median(peaks)) for key, peaks in found.items()}
    first = medians[f"{few} in shards of {few}"]
    growth = {key: round(median / first - 1, 4) for key, median in medians.items()}
    return {"peak_MiB": found, "median_MiB": medians, "growth": growth}


def main() -> None:
    """Measure the requested parts, and print the rates and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="local-dir:cdul_steps/demo/tiny-clip")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--usual-images", type=int, default=40)
    parser.add_argument("--memory-images", type=int, nargs=2, default=[1000, 10_000])
    parser.add_argument(
        "--memory-jobs", type=int, default=5, help="smallest number of jobs per size"
    )
    parser.add_argument("--views", default="crops", choices=["crops", "dense"])
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16", "fp16"])
    add_options(parser)
    parts = ("encode", "bare", "usual", "memory")
    parser.add_argument("--parts", nargs="+", default=parts[:3], choices=parts)
    options = parser.parse_args()
    software = ["torch", "onnxruntime", "open_clip_torch", "timm", "pillow", "zarr"]
    keys = ("model", "images", "views", "device", "precision", "threads")
    sizes = {key: getattr(options, key) for key in keys}
    if options.device == "cuda" and not torch.cuda.is_available():
        print_result(software, **sizes, skipped="no CUDA device")
        return
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder, model = Path(name), options.model
        if not model.startswith("local-dir:"):
            model = random_model(model, folder / "model")
        load = partial(tower, model, options.precision, options.device, options.views)
        if set(options.parts) & {"encode", "usual"}:
            manifest = link_photos(options.photos, folder / "data", options.images, options.images)
            manifest /= "0.parquet"
        if "usual" in options.parts:
            result["usual"] = usual(manifest, model, options)
        if "bare" in options.parts:
            result["bare"] = all_ways(load, options)
            result["best"] = fastest(result["bare"])
        for _ in range(options.turns if "encode" in options.parts else 0):
            before = again(load, result["best"], options) if "best" in result else None
            turn = encode_rate(manifest, model, options)
            rate = turn["views_per_second"]
            if before is not None:
                passes = turn["images_per_second"] * (1 if options.views == "dense" else VIEWS)
                bares = [before, again(load, result["best"], options)]
                turn |= {"bare": bares, "encode/bare": round(2 * passes / sum(bares), 3)}
            if "usual" in result:
                ratio = rate / result["usual"]["views_per_second"]
                turn["encode/usual"] = round(ratio, 2)
            result.setdefault("encode", []).append(turn)
            print(turn, file=sys.stderr, flush=True)
        if "memory" in options.parts:
            result["memory"] = memory(model, options.photos, options)
    print_result(software, **sizes, **result)


if __name__ == "__main__":
    main()
