"""Command doctor: before a long run, find what would stop it and estimate how long it takes."""

import importlib.metadata
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from huggingface_hub import constants as hub
from huggingface_hub.errors import LocalEntryNotFoundError
from packaging.requirements import Requirement
from snakemake.common.configfile import load_configfile
from snakemake.utils import update_config

from cdul_steps.config import (
    Config,
    Dataset,
    Encoder,
    Labels,
    Runtime,
    Training,
    check_syntax,
    clashes,
    load,
)
from cdul_steps.data.classes import check_choice, load_names
from cdul_steps.data.foreign import Tell, ignore
from cdul_steps.data.images import ImageError, read_size
from cdul_steps.data.labels import choose_bias
from cdul_steps.data.readers import check_counts, check_files, check_headers, read_dataset
from cdul_steps.data.remote import is_url
from cdul_steps.data.sources import file_of
from cdul_steps.demo.scenes import write_scenes
from cdul_steps.errors import UserError, first_line
from cdul_steps.method.context import plain_name
from cdul_steps.method.snippets import view_boxes
from cdul_steps.models.classifier import fitting_args, network_and_card, new_classifier
from cdul_steps.models.dense import load_tower, new_encoder, passes
from cdul_steps.models.device import DTYPES, Machine
from cdul_steps.models.embedding import BatchedEncoder, ImageViews, embed_images
from cdul_steps.models.encoder import MissingWeightsError, TextEncoder, load_clip, logit_facts
from cdul_steps.models.engine import choose_engine
from cdul_steps.models.recipe import assumed
from cdul_steps.models.timm_encoder import TOGETHER, TimmEncoder
from cdul_steps.provenance import versions
from cdul_steps.shipped import base_config
from cdul_steps.training.labels import new_labels

DISTRIBUTION = "cdul-steps"
SAMPLE = 500
"""Maximum number of images that a measurement decodes, or whose headers are read in each split."""
REMOTE_SAMPLE = 20
"""The same where images are fetched."""
GIGABYTE = 1e9


@dataclass(frozen=True)
class Finding:
    """One check: its name, whether it passed, a line for people, and values for programs."""

    check: str
    ok: bool
    text: str
    values: dict[str, Any] = field(default_factory=dict)


Result = tuple[str, dict[str, Any]]
"""What a check returns when it passes: the line and the values."""


def read_values(files: Sequence[Path]) -> list[tuple[str, dict[str, Any]]]:
    """Name and values of each file of a config. Raises UserError for one that cannot be read."""
    found = []
    for file in files:
        if file.is_file():
            check_syntax(file)
        try:
            found.append((file.name, load_configfile(str(file))))
        except Exception as error:
            raise UserError(f"config: {file} cannot be read: {first_line(error)}") from error
    return found


def read_config(files: Sequence[Path]) -> Config:
    """The config as Snakemake reads it: `files` in turn over the base config.

    Raises UserError for a file that cannot be read and for an invalid config.
    """
    values: dict[str, Any] = {}
    for _, of_file in read_values([base_config(), *files]):
        update_config(values, of_file)
    return load(values)


def examine(configfiles: Sequence[Path], *, seconds: float) -> Iterator[Finding]:
    """Check what a run with this config needs; yields each finding as soon as it is known.

    Each measurement of speed takes about `seconds`. Nothing is written, and nothing
    is downloaded but a few images where they are on remote storage.
    """

    def check(name: str, function: Callable[..., Result], *arguments: Any) -> Finding:
        try:
            text, values = function(*arguments)
        except UserError as error:
            return Finding(name, False, " ".join(str(error).split()))
        return Finding(name, True, text, values)

    yield check("software", _software)
    try:
        config = read_config(configfiles)
    except UserError as error:
        yield Finding("config", False, str(error))
        return
    lost = clashes(read_values(configfiles))
    files = ", ".join(map(str, configfiles)) or str(base_config())
    yield Finding("config", not lost, "; ".join(lost) or files)
    yield (device := check("device", _device, config.runtime.device))
    images: dict[str, int] = {}
    learnt: dict[str, int] = {}
    datasets = dict.fromkeys(made.dataset for made in config.made)
    for name in datasets:
        yield (found := check(f"data {name}", _data, config.datasets[name]))
        if found.ok:
            images[name] = sum(found.values["images"].values())
            learnt[name] = found.values["images"]["train"]
    needed, unknown = 0.0, len(images) < len(datasets)
    for name in dict.fromkeys(made.encoder for made in config.made):
        encoder = config.encoders[name]
        labels = {m.labels: config.labels[m.labels] for m in config.made if m.encoder == name}
        yield (found := check(f"encoder {name}", _encoder, encoder, labels))
        unknown |= not found.ok
        encoded = dict.fromkeys(m.dataset for m in config.made if m.encoder == name)
        for data in encoded if found.ok else ():
            if data not in images:
                continue
            dataset = config.datasets[data]
            needed += images[data] * _image_bytes(dataset, found.values["dimension"])
            if device.ok and seconds:
                made = [m.labels for m in config.made if (m.encoder, m.dataset) == (name, data)]
                counts = (images[data], learnt[data] * _second_views(config, data, made))
                speed = (encoder, dataset, _scenes(config, data), counts, config, seconds)
                yield check(f"encode {name} {data}", _encode_time, *speed)
    for name in dict.fromkeys(made.training for made in config.made):
        training = config.trainings[name]
        yield (found := check(f"training {name}", _training, training))
        unknown |= not found.ok
        if found.ok:
            # One training for each encoder and labels of a data set.
            sets = [m.dataset for m in config.made if m.training == name and m.dataset in images]
            # The models, and one checkpoint during a training.
            needed += found.values["parameters"] * (4 * len(sets) + 12)
            if device.ok and seconds and sets and training.trunk == "frozen":
                work = (training, sum(images[of] for of in {*sets}), config, seconds)
                yield check(f"features {name}", _features_time, *work)
            elif device.ok and seconds and sets:
                work = (training, sum(learnt[of] for of in sets), config, seconds)
                yield check(f"train {name}", _train_time, *work)
    yield check("disk", _disk, Path(config.results), needed, unknown)


def _software() -> Result:
    try:
        wanted = [Requirement(text) for text in importlib.metadata.requires(DISTRIBUTION) or ()]
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError(f"{DISTRIBUTION} is not installed; install it with pip") from error
    for requirement in wanted:
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            found = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError as error:
            raise UserError(
                f"{requirement.name} is missing; run 'pip install {requirement.name}'"
            ) from error
        if not requirement.specifier.contains(found, prereleases=True):
            raise UserError(
                f"{requirement.name} {found} is installed, but {requirement.specifier} is required"
            )
    names = versions("snakemake", "torch", "open_clip_torch", "timm", "zarr", "pyarrow")
    return ", ".join(f"{name} {version}" for name, version in names.items()), {"versions": names}


def _target(name: str) -> str:
    """The device that a job would get, without waiting for it to become free."""
    if name not in ("auto", "cuda") or (name == "auto" and not torch.cuda.is_available()):
        return name
    return "cuda:0"


def _machine(runtime: Runtime) -> Machine:
    return Machine(
        device=_target(runtime.device),
        workers=runtime.workers,
        engine=runtime.engine,
        batch_size=runtime.batch_size,
    )


def _device(name: str) -> Result:
    device, _ = Machine(_target(name)).set_up(cpu_workers=0)
    cores = len(os.sched_getaffinity(0))
    if device.type != "cuda":
        return f"no GPU is used; {cores} CPU cores", {"device": str(device), "cores": cores}
    free, total = torch.cuda.mem_get_info(device)
    gpu = torch.cuda.get_device_name(device)
    text = f"{gpu}, {free / GIGABYTE:.1f} of {total / GIGABYTE:.1f} GB free; {cores} CPU cores"
    values = {"device": str(device), "gpu": gpu, "free": free, "total": total, "cores": cores}
    return text, values


def _views(dataset: Dataset) -> int:
    return len(view_boxes(1, 1, dataset.grid))


def _second_views(config: Config, dataset: str, labels: Sequence[str]) -> int:
    """Views per training image that are encoded again for second views, for some labels."""
    names = _names(config.datasets[dataset])[0]
    joined = [one for of in labels for one in config.labels[of].join or ()]
    boxes = {one.boxes for one in joined if one.boxes}
    return sum(1 + min(config.boxes[one].classes, len(names)) for one in boxes)


def _names(dataset: Dataset) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The names of the classes, and those of the context list."""
    context = Path(dataset.context) if dataset.context else None
    classes, listed = load_names(Path(dataset.classes), context, dataset.context_keep)
    return classes.names, listed.names


def _paths(dataset: Dataset, tell: Tell = ignore) -> dict[str, list[str]]:
    """The paths of each split's images; `tell` receives lines about what was left out."""
    names, _ = _names(dataset)
    root = dataset.root or ""
    records = read_dataset(
        dataset.reader,
        root,
        dataset.splits,  # type: ignore[arg-type]  # a mapping's keys are invariant
        names,
        labelled_only=dataset.labelled_only,
        exclude=dataset.exclude,
        tell=tell,
    )
    expected = {str(split): count for split, count in (dataset.expected_images or {}).items()}
    check_counts(records, expected, root)
    return {s: [r.path for r in records if r.split == s] for s in dataset.splits}


def _data(dataset: Dataset) -> Result:
    classes, context = _names(dataset)
    check_choice(classes, context, dataset.classes)
    told: list[str] = []
    images: dict[str, int] = {}
    if dataset.reader == "demo":
        images |= {split: getattr(dataset.scenes, split) for split in dataset.splits}
    else:
        for split, paths in _paths(dataset, told.append).items():
            images[split] = len(paths)
            local = [path for path in paths if not is_url(path)]
            absent = [path for path in local if not file_of(path).is_file()]
            check_files(split, len(paths), absent, dataset.max_failed_share)
            if problem := _headers(split, paths, dataset):
                told.append(problem)
    alike: dict[str, list[str]] = {}
    for name in classes:
        alike.setdefault(plain_name(name), []).append(name)
    told += [f"{' and '.join(of)} look like one class" for of in alike.values() if len(of) > 1]
    views = sum(images.values()) * _views(dataset)
    text = ", ".join(f"{count} {split} images" for split, count in images.items())
    values = {"images": images, "views": views, "classes": len(classes), "context": len(context)}
    names = f"{len(classes)} classes" + (f", {len(context)} context names" if context else "")
    return "; ".join([text, names, f"{views} views", *told]), values


def _headers(split: str, paths: list[str], dataset: Dataset) -> str:
    """Problems in the headers of a sample of a split's images, spread evenly over the split."""
    failed = {}
    for path in (looked_at := _spread(paths)):
        try:
            read_size(path, max_pixels=dataset.max_pixels)
        except ImageError as error:
            failed[path] = str(error)
    return check_headers(split, len(looked_at), failed, dataset.max_failed_share)


def _spread(paths: list[str]) -> list[str]:
    """At most SAMPLE of the paths, spread evenly; REMOTE_SAMPLE where there are URLs."""
    limit = REMOTE_SAMPLE if any(map(is_url, paths)) else SAMPLE
    chosen = np.unique(np.linspace(0, len(paths) - 1, min(limit, len(paths))).astype(int))
    return [paths[i] for i in chosen]


@contextmanager
def _offline() -> Iterator[None]:
    """Make missing weights an error, as on a node without network access."""
    before, hub.HF_HUB_OFFLINE = hub.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        hub.HF_HUB_OFFLINE = before


def _encoder(encoder: Encoder, labels: dict[str, Labels]) -> Result:
    """Try both towers, and whether the model has what the labels of its scores need."""
    with _offline():
        try:
            network = load_clip(encoder.model, encoder.pretrained, resize_mode=encoder.resize_mode)
        except MissingWeightsError as error:
            raise UserError(
                f"{error.missing} yet; a run with network access downloads it; without network "
                f"access, {error.instead}"
            ) from error
        prompt = encoder.templates[0].replace("{}", "dog")
        text = TextEncoder(network, encoder.model)([prompt])
        words = assumed(encoder.model, encoder.pretrained)
    blank = torch.zeros(1, 3, *_pair(network.visual.image_size))
    with torch.inference_mode():
        image = network.encode_image(blank).numpy()
    if not (np.isfinite(image).all() and np.isfinite(text).all()):
        raise UserError(
            f"encoder {encoder.model}: its vectors are not finite; are these the right weights?"
        )
    logit_bias = logit_facts(network).get("logit_bias")
    for name, settings in labels.items():
        choose_bias(settings, logit_bias, f"encoder {encoder.model}: labels {name}")
    parameters, dimension = sum(p.numel() for p in network.parameters()), image.shape[1]
    if encoder.views == "dense":
        new_encoder(network, encoder, torch.device("cpu"), [(1, 1)], 0)
    scores = "softmax" if logit_bias is None else "sigmoid"
    found = (
        f"weights found: {parameters / 1e6:.0f} M parameters, {dimension}-dimensional vectors, "
        f"trained with a {scores}"
    )
    return f"{found}; {words}" if words else found, {
        "parameters": parameters,
        "dimension": dimension,
        "scores": scores,
    }


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _image_bytes(dataset: Dataset, dimension: int) -> int:
    """Bytes that an image takes in the results: float16 embeddings, float32 cosines."""
    names = sum(map(len, _names(dataset)))
    drawn = 3 * dataset.scenes.size**2 if dataset.reader == "demo" else 0
    return _views(dataset) * (2 * dimension + 4 * names) + drawn


def _scenes(config: Config, name: str) -> Path:
    return Path(config.results) / name / "scenes"


def _sample(dataset: Dataset, scenes: Path, scratch: Path) -> list[str]:
    """A sample of the data set's images, spread evenly; the demo's are drawn if missing."""
    if dataset.reader != "demo":
        paths = [path for split in _paths(dataset).values() for path in split]
    else:
        if not scenes.is_dir():
            write_scenes(scratch, seed=0, train=64, test=1, size=dataset.scenes.size)
            scenes = scratch
        paths = [str(path) for path in sorted(scenes.glob("*/*.*"))]
    return _spread(paths)


def _encode_time(
    encoder: Encoder,
    dataset: Dataset,
    scenes: Path,
    counts: tuple[int, int],
    config: Config,
    seconds: float,
) -> Result:
    """Encode images like the stage, for about `seconds`.

    `counts` are the number of images and, in total, of second views.
    """
    images, second = counts
    machine = _machine(config.runtime)
    target, workers = machine.set_up(cpu_workers=0)
    with _offline():
        _, model = load_tower(encoder, target, dataset.grid, dataset.overlap)
    in_workers = target.type == "cpu"
    views = _views(dataset)
    each, together = passes(encoder, views)
    choice = choose_engine(
        model,
        machine.engine,
        machine.batch_size,
        views=each * together,
        work=dataset.shard_size * each / max(1, workers),
    )
    encode = BatchedEncoder(choice.encoder, choice.batch_size)
    with tempfile.TemporaryDirectory() as scratch:
        paths, boxes = [], []
        for path in _sample(dataset, scenes, Path(scratch)):
            try:
                boxes.append(view_boxes(*read_size(path), dataset.grid, dataset.overlap))
            except ImageError:
                continue
            paths.append(path)
        if len(paths) < 2:
            raise UserError(
                "fewer than two images can be read, which is too few to measure the speed"
            )
        shard = ImageViews(
            pa.array(paths),
            np.stack(boxes)[:, :each],
            model.preprocess,
            dataset.max_pixels,
            encode if in_workers else None,
        )
        rate, errors = _rate(shard, workers, encode, together, seconds)
    duration = (images + second / views) / rate
    further = f" and {second} second views" if second else ""
    text = (
        f"about {_duration(duration)} for {images * views} views{further} "
        f"({rate * views:.0f} views/s by {choice.engine})"
    )
    # Too few to compare their share with `max_failed_share`.
    if failed := [place for place, error in enumerate(errors) if error]:
        text += (
            f"; {len(failed)} of {len(errors)} encoded images cannot be used, the first is "
            f"{paths[failed[0]]} ({errors[failed[0]]})"
        )
    return text, {"seconds": duration, "views_per_second": rate * views, "engine": choice.engine}


def _rate(
    shard: ImageViews, workers: int, encode: BatchedEncoder, together: int, seconds: float
) -> tuple[float, list[str]]:
    """Images per second, counted from the first that is ready, and the error of each, or ""."""
    errors, start = [], 0.0
    for item in embed_images(shard, encode, workers, together):
        start = start or time.monotonic()
        errors.append("" if item.status == "ok" else f"{item.status}: {item.error}")
        if len(errors) > 1 and time.monotonic() - start > seconds:
            break
    return (len(errors) - 1) / (time.monotonic() - start), errors


def _training(training: Training) -> Result:
    with _offline():
        fitting = fitting_args(training.model, ["a"], training.model_args, training.image_size)
        try:
            network, _ = new_classifier(training.model, ["a"], fitting, training.weights)
        except UserError as error:
            if not isinstance(error.__cause__, LocalEntryNotFoundError):
                raise
            raise UserError(
                f"timm's weights of {training.model} are not in the cache ({hub.HF_HUB_CACHE}) "
                "yet; a run with network access downloads them; without network access, copy that "
                'cache from a machine that ran: python -c "import timm; '
                f"timm.create_model('{training.model}', pretrained=True)\""
            ) from error
    parameters = sum(p.numel() for p in network.parameters())
    start = training.weights or "random weights"
    return f"{training.model}, {parameters / 1e6:.1f} M parameters, from {start}", {
        "parameters": parameters
    }


def _train_time(training: Training, images: int, config: Config, seconds: float) -> Result:
    """Forward and backward passes on noise for about `seconds`; reading images is not included.

    `images` is the total over all label variants.
    """
    target, _ = replace(_machine(config.runtime), workers=1).set_up(cpu_workers=1)
    classes = ["a", "b"]
    fitting = fitting_args(training.model, classes, training.model_args, training.image_size)
    network, _ = new_classifier(training.model, classes, fitting, None)
    network = network.to(target).train()
    size = max(training.batch_size, 2)
    pixels = torch.rand(size, 3, training.image_size, training.image_size, device=target)
    pixels = pixels.contiguous(memory_format=torch.channels_last)
    labels = torch.full((size, 2), 0.4, device=target)
    labels = new_labels(labels, torch.zeros_like(labels, dtype=torch.bool), training)
    index = torch.arange(size, device=target)
    dtype = DTYPES[training.precision]
    steps, start = -1, 0.0
    while steps < 1 or time.monotonic() - start < seconds:
        with torch.autocast(target.type, dtype, enabled=dtype is not torch.float32):
            logits = network(pixels).float()
        labels.loss(logits, index).mean().backward()
        if target.type == "cuda":
            torch.cuda.synchronize(target)
        # The first step is a warm-up.
        start = start or time.monotonic()
        steps += 1
    rate = steps * size / (time.monotonic() - start)
    duration = training.epochs * images / rate
    text = (
        f"about {_duration(duration)} for {training.epochs} epochs of {images} images "
        f"({rate:.1f} images/s, not including reading them)"
    )
    return text, {"seconds": duration, "images_per_second": rate}


def _features_time(training: Training, images: int, config: Config, seconds: float) -> Result:
    """Forward passes of the frozen trunk on noise for about `seconds`.

    They take most of the time of such a training, which needs them once for all `images` of every
    split.
    """
    target, workers = _machine(config.runtime).set_up(cpu_workers=0)
    random = training.network.model_copy(update={"weights": None})
    encoder = TimmEncoder(*network_and_card(random, ["a"]), target)
    runtime = config.runtime
    choice = choose_engine(
        encoder, runtime.engine, 0, views=TOGETHER, work=images / max(1, workers)
    )
    pixels = torch.zeros((choice.batch_size, 3, *encoder.preprocess.size), dtype=torch.uint8)
    in_workers = target.type == "cpu"
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if in_workers else threads)
    done, start = 0, time.monotonic()
    while time.monotonic() - start < seconds or not done:
        choice.encoder(pixels)
        done += len(pixels)
    rate = done / (time.monotonic() - start) * (max(1, workers) if in_workers else 1)
    torch.set_num_threads(threads)
    text = (
        f"about {_duration(images / rate)} for the features of {images} images ({rate:.1f} "
        f"images/s by {choice.engine}, not including reading them); the head takes seconds to "
        "minutes"
    )
    return text, {"seconds": images / rate, "images_per_second": rate, "engine": choice.engine}


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def _disk(results: Path, needed: float, unknown: bool = False) -> Result:
    place = results.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    text = f"needs about {needed / GIGABYTE:.2f} GB below {results}, {free / GIGABYTE:.1f} GB free"
    if unknown:
        text += "; items with a problem above are not included"
    if free < needed:
        raise UserError(f"{text}; free some space, or choose another folder as 'results'")
    return text, {"needed": needed, "free": free}
