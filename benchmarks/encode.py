"""Speed and memory of `cdul encode` on photographs against the bare image tower; prints JSON.

    python benchmarks/encode.py --model local-dir:PHOTO-MINI
    python benchmarks/encode.py --model ViT-B-32 --images 400
    python benchmarks/encode.py --model ViT-L-14 --device cuda --precision bf16

Three rates, views a second: `encode`, of the whole command from the model loaded to its end;
`bare`, of the tower alone on tensors that are ready, the fastest of several engines, batch sizes
and ways to use the cores, which then takes turns with `encode`; `usual`, of one image at a time,
a call a view, a file an image. A model without weights of its own gets random ones. `--parts
memory` compares the peak memory of 1,000 and 10,000 images. For a quick look: `--images 20
--usual-images 5 --seconds 0.2 --turns 1`.
"""

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from measuring import PHOTOS, link_photos, measure, print_result
from PIL import Image
from safetensors.torch import save_file

from cdul_steps.data.manifest import read_shard
from cdul_steps.models.encoder import Preprocess, load_clip

ENGINES = ("eager", "channels_last", "compile", "onnx")
BATCHES = {"cpu": [1, 2, 4, 8, 16, 32, 64], "cuda": [64, 128, 256, 512, 1024]}
# Every size is compiled anew, which takes longer than the measurement.
COMPILED = {"cpu": [1, 8, 64], "cuda": [256]}
# `cdul encode`, which leaves a note of when its model was loaded.
ENCODE = """
import sys, time
from cdul_steps import cli
from cdul_steps.steps import encode
load = encode.load_clip
def noted(*words, **options):
    network = load(*words, **options)
    print("loaded at", time.monotonic(), file=sys.stderr)
    return network
encode.load_clip = noted
cli.main()
"""


def random_model(name: str, folder: Path) -> str:
    """An open_clip model with random weights, in a folder of its own."""
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
    """What `cdul encode` takes for a shard, by `measure`."""
    with tempfile.TemporaryDirectory() as name:
        words = ["encode", "--manifest", manifest, "--store", Path(name, "train.zarr")]
        words += ["--table", Path(name, "0.parquet"), "--model", model]
        words += ["--precision", options.precision, "--device", options.device]
        words += ["--threads", options.threads]
        return measure([sys.executable, "-c", ENCODE, *words], memory=memory)


def encode_rate(manifest: Path, model: str, options: argparse.Namespace) -> dict[str, Any]:
    """Views a second of `cdul encode`, from its model loaded to the end of the process."""
    found = encode(manifest, model, options)
    lines = found["log"].splitlines()
    (loaded,) = (float(line.split()[-1]) for line in lines if "loaded at" in line)
    notes = [line for line in lines if "loaded in" in line]
    seconds = found["end"] - loaded
    return {
        "seconds": round(seconds, 2),
        "with_start_s": round(found["end"] - found["start"], 2),
        "note": notes[-1].removeprefix("encode: "),
        "views_per_second": round(options.images * 10 / seconds, 2),
    }


def tower(model: str, engine: str, options: argparse.Namespace) -> Callable[[torch.Tensor], Any]:
    """A bare image tower; it takes a float batch (B, 3, H, W) on its device."""
    device = torch.device(options.device)
    network = load_clip(model, precision=options.precision, device=device)
    if engine == "onnx":
        import onnxruntime

        class Visual(torch.nn.Module):
            def forward(self, views: torch.Tensor) -> torch.Tensor:
                return network.encode_image(views)

        size = Preprocess.of(network).size
        with tempfile.TemporaryDirectory() as name:
            file = Path(name) / "tower.onnx"
            torch.backends.mha.set_fastpath_enabled(False)
            torch.onnx.export(
                Visual().eval(),
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
    if engine != "eager":
        network = network.to(memory_format=torch.channels_last)
    run = network.encode_image
    return torch.compile(run, dynamic=False) if engine == "compile" else run


def ready(engine: str, shape: tuple[int, ...], options: argparse.Namespace) -> torch.Tensor:
    """Noise as the tower wants it."""
    precision = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    views = torch.randn(shape, device=options.device).to(precision[options.precision])
    layout = torch.contiguous_format if engine in ("eager", "onnx") else torch.channels_last
    return views.contiguous(memory_format=layout)


def bare_process(
    model: str, threads: int, options: argparse.Namespace, barrier: Any, queue: Any
) -> None:
    """Rates of one of the processes that run the tower at the same time."""
    torch.set_num_threads(threads)
    kind = torch.device(options.device).type
    size = Preprocess.of(load_clip(model)).size
    with torch.inference_mode():
        for engine in options.engines:
            if engine == "onnx" and (kind != "cpu" or options.precision != "fp32"):
                continue
            run = tower(model, engine, options)
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


def bare(
    model: str, options: argparse.Namespace, ways: list[tuple[int, int]]
) -> list[dict[str, Any]]:
    """Rates of the tower by engine, batch size and `ways`: processes with how many threads each."""
    context = multiprocessing.get_context("spawn")
    found = []
    for processes, threads in ways:
        barrier, queue = context.Barrier(processes), context.Queue()
        words = (model, threads, options, barrier, queue)
        started = [context.Process(target=bare_process, args=words) for _ in range(processes)]
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


def best_bare(model: str, best: dict[str, Any], options: argparse.Namespace) -> float:
    """The rate of the best way to run the tower, over ten times as long."""
    only = {"engines": [best["engine"]], "batches": [best["batch"]]}
    again = argparse.Namespace(**{**vars(options), **only, "seconds": 10 * options.seconds})
    (row,) = bare(model, again, [(best["processes"], best["threads"])])
    return row["views_per_second"]


def usual(manifest: Path, model: str, options: argparse.Namespace) -> dict[str, Any]:
    """One image at a time, ten calls of the model's preprocessing and the tower, a file each."""
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
    """Peak memory (MiB) of the jobs of 1,000 and of 10,000 images, in shards of each size.

    Several of each, and their median, since that of the same job varies by a tenth.
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
    """Measure the parts asked for, and print the rates and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="local-dir:cdul_steps/demo/tiny-clip")
    parser.add_argument("--photos", type=Path, default=PHOTOS, help="folder of JPEGs")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--usual-images", type=int, default=40)
    parser.add_argument("--memory-images", type=int, nargs=2, default=[1000, 10_000])
    parser.add_argument("--memory-jobs", type=int, default=5, help="at least so many of a size")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16", "fp16"])
    parser.add_argument("--engines", nargs="+", default=ENGINES, choices=ENGINES)
    parser.add_argument("--batches", type=int, nargs="+", help="of the bare tower")
    parser.add_argument("--seconds", type=float, default=1.0, help="of each bare measurement")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--turns", type=int, default=3, help="how often encode and bare take turns")
    parts = ("encode", "bare", "usual", "memory")
    parser.add_argument("--parts", nargs="+", default=parts[:3], choices=parts)
    options = parser.parse_args()
    software = ["torch", "onnxruntime", "open_clip_torch", "timm", "pillow", "zarr"]
    sizes = {k: getattr(options, k) for k in ("model", "images", "device", "precision", "threads")}
    if options.device == "cuda" and not torch.cuda.is_available():
        print_result(software, **sizes, skipped="no CUDA device")
        return
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder, model = Path(name), options.model
        if not model.startswith("local-dir:"):
            model = random_model(model, folder / "model")
        if set(options.parts) & {"encode", "usual"}:
            manifest = link_photos(options.photos, folder / "data", options.images, options.images)
            manifest /= "0.parquet"
        if "usual" in options.parts:
            result["usual"] = usual(manifest, model, options)
        if "bare" in options.parts:
            ways = [(1, options.threads)]
            if options.threads > 1 and options.device == "cpu":
                ways.append((options.threads, 1))
            result["bare"] = bare(model, options, ways)
            result["best"] = max(result["bare"], key=lambda row: row["views_per_second"])
        for _ in range(options.turns if "encode" in options.parts else 0):
            # The best of many short measurements is also the luckiest, and machines have moods: so
            # it is measured again, before and after.
            before = best_bare(model, result["best"], options) if "best" in result else None
            turn = encode_rate(manifest, model, options)
            rate = turn["views_per_second"]
            if before is not None:
                bares = [before, best_bare(model, result["best"], options)]
                turn |= {"bare": bares, "encode/bare": round(2 * rate / sum(bares), 3)}
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
