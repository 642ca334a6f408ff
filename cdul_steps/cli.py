"""`cdul`: every stage as a command. Stages are imported only when they run, to keep help fast."""

import atexit
import gc
import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import typer
from pydantic import TypeAdapter, ValidationError

from cdul_steps import __version__
from cdul_steps.config import (
    BoxShape,
    Dataset,
    Encoder,
    Engine,
    Precision,
    Reader,
    ResizeMode,
    Runtime,
    Scenes,
    Section,
    Side,
    Views,
    read_labels,
    read_sweep,
    read_training,
    reference,
    schema,
)
from cdul_steps.errors import UserError, explain
from cdul_steps.limits import MAX_PIXELS
from cdul_steps.method.choices import NEARNESS, AveragePrecision, Difficult
from cdul_steps.shipped import DOCS, SNAKEFILE, require_config

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="CDUL: train a multi-label classifier on unlabelled images, with CLIP as the teacher. "
    "`cdul init` creates a working folder, and `cdul run` runs the workflow there. Each stage of "
    "the workflow is also a separate command.",
)
demo = typer.Typer(no_args_is_help=True, help="The built-in demo: its images and its CLIP.")
app.add_typer(demo, name="demo")
review = typer.Typer(no_args_is_help=True, help="Correct pseudo-labels by hand: docs/review.md.")
app.add_typer(review, name="review")
check = typer.Typer(
    no_args_is_help=True, help="Estimate quality from yes/no answers: docs/checks.md."
)
app.add_typer(check, name="check")

Option = typer.Option
UsageError: Any = typer.BadParameter.__bases__[0]
"""What typer raises for invalid arguments; typer exports only its subclass."""
AnySection = TypeVar("AnySection", bound=Section)


def _bounds(metadata: list[Any]) -> dict[str, Any]:
    """The `min` and `max` of an option, from pydantic's metadata for a number."""
    return {
        name: getattr(bound, key)
        for name, key in (("min", "ge"), ("max", "le"))
        for bound in metadata
        if hasattr(bound, key)
    }


def _key(section: type[Section], key: str, help: str) -> Any:
    """An option with the bounds of a config key."""
    field = section.model_fields[key]

    def check(value: Any) -> Any:
        # Exclusive bounds, which typer does not support.
        try:
            bounded: Any = Annotated[field.annotation, *field.metadata]
            TypeAdapter(bounded).validate_python(value)
        except ValidationError as error:
            raise typer.BadParameter(error.errors()[0]["msg"]) from error
        return value

    return Option(help=help, callback=check, **_bounds(field.metadata))


def _section(section: type[AnySection], **values: Any) -> AnySection:
    """A config section built from options; invalid values are reported as usage errors."""
    try:
        return section(**values)
    except ValidationError as error:
        first = error.errors()[0]
        option = {"splits": "--split", "templates": "--template"}.get(
            str(first["loc"][0]), f"--{first['loc'][0]}".replace("_", "-")
        )
        message = f"{first['input']!r}: {first['msg'].removeprefix('Value error, ')}"
        raise typer.BadParameter(message, param_hint=option) from error


SIDES = _bounds(get_args(Side)[1].metadata)
Output = Annotated[Path, Option(help="File to write.", dir_okay=False)]
Images = Annotated[Path, Option(help="images.parquet of the manifest.")]
Classes = Annotated[Path, Option(help="Class names: a YAML list, or text with one name per line.")]
Split = Annotated[str, Option(help="Split to work on: train or test.")]
Model = Annotated[str, Option(help="open_clip model name, or local-dir:FOLDER.")]
Pretrained = Annotated[str | None, Option(help="open_clip tag or checkpoint file.")]
MaxPixels = Annotated[int, _key(Dataset, "max_pixels", "Images with more pixels are rejected.")]
MaxFailedShare = Annotated[
    float, _key(Dataset, "max_failed_share", "Largest tolerated share of unusable images.")
]
Device = Annotated[
    str, Option(help="auto, cpu, cuda (a GPU that no other job uses), cuda:1 (that GPU), ...")
]
Gpus = Annotated[
    int, Option(min=0, max=1024, help="GPUs that --device auto may use; 0: use the CPU.")
]
Workers = Annotated[
    int,
    _key(
        Runtime, "workers", "Processes that decode images (on a CPU, also encode); -1: automatic."
    ),
]
Threads = Annotated[int, Option(min=0, max=1024, help="CPU threads of the model; 0: all.")]
Seed = Annotated[int, _key(Scenes, "seed", "Random seed.")]
RunBy = Annotated[
    Engine, Option(help="What runs the network on a CPU; auto picks the fastest by measuring.")
]
BoxSettings = Annotated[
    str,
    Option(
        help="`classes`, `threshold` and `margin` of `boxes.NAME` (config/README.md), as JSON or a "
        "YAML file."
    ),
]
NetworkSettings = Annotated[
    str,
    Option(
        "--settings",
        help="Keys `model`, `model_args`, `weights`, `image_size` of `trainings.NAME` "
        "(config/README.md), as JSON or a YAML file.",
    ),
]
Similarities = Annotated[list[str], Option(help="SPLIT=STORE of cosines; once per split.")]
OfDifficult = Annotated[
    Difficult,
    Option(help='How to treat images in which a class occurs only as "difficult" objects.'),
]
Ap = Annotated[
    AveragePrecision, Option(help="all: AP over all points; voc07: VOC2007's 11 points.")
]


def _pairs(option: str, values: list[str]) -> list[tuple[str, str]]:
    pairs = [(name, value) for name, _, value in (text.partition("=") for text in values)]
    if not all(name and value for name, value in pairs):
        raise typer.BadParameter("give each as NAME=VALUE", param_hint=option)
    return pairs


def _by_split(option: str, values: list[str]) -> dict[str, str]:
    pairs = _pairs(option, values)
    if len(dict(pairs)) < len(pairs):
        raise typer.BadParameter("names a split twice", param_hint=option)
    return dict(pairs)


def _stores(option: str, values: list[str]) -> dict[str, Path]:
    return {split: Path(store) for split, store in _by_split(option, values).items()}


def _grid(option: str, text: str) -> tuple[int, int]:
    rows, _, columns = text.partition("x")
    if not {rows, columns} <= {str(side) for side in range(SIDES["min"], SIDES["max"] + 1)}:
        raise typer.BadParameter(
            f"{text!r} is not ROWSxCOLUMNS of {SIDES['min']} to {SIDES['max']}", param_hint=option
        )
    return int(rows), int(columns)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"cdul {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Options before the command; the application provides the help text."""


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(help="Folder to write into; created if missing.")],
    config: Annotated[
        str, Option(help="photos (your own), demo, or a data set: voc2007, voc2012, coco2014, ...")
    ] = "photos",
) -> None:
    """Create a working folder: a config, class names, and a README that explains the files.

    Existing files are not changed.
    """
    from cdul_steps.tools.init import init_folder

    for file, written in init_folder(folder, config):
        typer.echo(f"wrote {file}" if written else f"kept  {file}, which already existed")
    typer.echo(f"{folder / 'README.md'} explains the files; run 'cdul doctor' in that folder")


@app.command(context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
def run(context: typer.Context) -> None:
    """Run the workflow in this folder: cdul run [TARGETS] [OPTIONS OF SNAKEMAKE].

    Targets are `all` (the default), `report`, `sweep`, `ablation`, `apply`, or a file of results.

    All cores are used unless `--cores` is given. `--dry-run` shows what would run, and `snakemake
    --help` lists all options.
    """
    from cdul_steps.tools.run import run_workflow

    run_workflow(context.args)


@app.command()
def snakefile() -> None:
    """Print the path of the workflow's Snakefile: snakemake --snakefile "$(cdul snakefile)"."""
    typer.echo(SNAKEFILE)


@app.command()
def docs() -> None:
    """Print the path of the documentation, the docs/ of messages, help texts and configs."""
    typer.echo(DOCS)


@app.command()
def manifest(
    reader: Annotated[Reader, Option(help="Layout of the data set (docs/datasets.md).")],
    root: Annotated[str, Option(help="Folder, file, pattern or URL (docs/datasets.md).")],
    classes: Classes,
    output: Output,
    split: Annotated[
        list[str], Option(help="OURS=THEIRS, for example train=trainval; once per split.")
    ] = ["train=train"],  # noqa: B006
    grid: Annotated[
        tuple[int, int],
        Option(help="Rows and columns of snippets.", **SIDES),
    ] = (3, 3),
    further_grid: Annotated[
        list[str], Option(help="Additional grid of snippets, ROWSxCOLUMNS; once per grid.")
    ] = [],  # noqa: B006
    overlap: Annotated[
        float,
        _key(Dataset, "overlap", "Overlap of adjacent snippets, as a share of their side."),
    ] = 0.0,
    shard_size: Annotated[int, _key(Dataset, "shard_size", "Images per shard.")] = 1000,
    max_pixels: MaxPixels = MAX_PIXELS,
    labelled_only: Annotated[
        bool, Option(help="Leave out images without any positive label.")
    ] = False,
    exclude: Annotated[
        list[str], Option(help="Pattern of files and folders to leave out; repeatable.")
    ] = [],  # noqa: B006
    max_failed_share: MaxFailedShare = 0.05,
) -> None:
    """Find the images, assign each a row and a shard, and cut each into views.

    Writes images.parquet to OUTPUT, and SPLIT/SHARD.parquet next to it (one row per view, corners
    in pixels). If OUTPUT exists, its images keep their rows.
    """
    from cdul_steps.steps.manifest import make_manifest

    dataset = _section(
        Dataset,
        reader=reader,
        root=root,
        classes=classes,
        splits=_by_split("--split", split),
        grid=[grid, *(_grid("--further-grid", text) for text in further_grid)],
        overlap=overlap,
        shard_size=shard_size,
        max_pixels=max_pixels,
        labelled_only=labelled_only,
        exclude=exclude,
        max_failed_share=max_failed_share,
    )
    make_manifest(dataset=dataset, output=output)


@app.command()
def encode(
    manifest: Annotated[Path, Option(help="Manifest of the shard, SPLIT/SHARD.parquet.")],
    store: Annotated[Path, Option(help="Zarr store of embeddings; this shard's object is added.")],
    table: Annotated[
        Path, Option(help="Parquet to write: image, status, error, seconds.", dir_okay=False)
    ],
    model: Model,
    pretrained: Pretrained = None,
    precision: Annotated[Precision, Option(help="Arithmetic of the image tower.")] = "fp32",
    resize_mode: Annotated[
        ResizeMode | None,
        Option(help="How a view is resized to the model's input; default: as the model defines."),
    ] = None,
    views: Annotated[
        Views, Option(help="Encode each crop separately, or get all views from one pass.")
    ] = "crops",
    max_pixels: MaxPixels = MAX_PIXELS,
    device: Device = "auto",
    gpus: Gpus = 1,
    engine: RunBy = "auto",
    batch_size: Annotated[
        int, _key(Runtime, "batch_size", "Views per forward pass; 0: automatic.")
    ] = 0,
    workers: Workers = -1,
    threads: Threads = 0,
) -> None:
    """Encode the views of one shard into float16 unit vectors."""
    from cdul_steps.models.device import Machine
    from cdul_steps.steps.encode import encode_shard

    encode_shard(
        manifest=manifest,
        store=store,
        table=table,
        encoder=_section(
            Encoder,
            model=model,
            pretrained=pretrained,
            precision=precision,
            resize_mode=resize_mode,
            views=views,
        ),
        max_pixels=max_pixels,
        machine=Machine(
            device=device,
            gpus=gpus,
            workers=workers,
            threads=threads,
            engine=engine,
            batch_size=batch_size,
        ),
    )


@app.command()
def encode_text(
    classes: Classes,
    output: Output,
    model: Model,
    pretrained: Pretrained = None,
    template: Annotated[
        list[str], Option(help="Prompt, with {} for the class name; several are averaged.")
    ] = ["a photo of a {}"],  # noqa: B006
    aliases: Annotated[bool, Option(help="Use all names of a class, or only the first.")] = True,
    context: Annotated[
        Path | None, Option(help="Names of what else images show; same format as --classes.")
    ] = None,
    nearness: Annotated[
        float,
        _key(Dataset, "context_nearness", "Centred cosine from which a name is taken for a class."),
    ] = NEARNESS,
    keep: Annotated[
        list[str], Option(help="Context name to keep even if it is close to a class; repeatable.")
    ] = [],  # noqa: B006
) -> None:
    """Embed the class names, followed by context names, with the model's text tower."""
    from cdul_steps.data.classes import ContextList
    from cdul_steps.steps.encode import encode_text

    encoder = _section(
        Encoder, model=model, pretrained=pretrained, templates=template, aliases=aliases
    )
    listed = ContextList(context, tuple(keep), nearness) if context else None
    encode_text(classes=classes, encoder=encoder, output=output, context=listed)


@app.command()
def store(
    images: Images,
    split: Split,
    text: Annotated[Path, Option(help="Class embeddings; only their size is used.")],
    output: Annotated[Path, Option(help="Zarr store whose zarr.json is written.")],
) -> None:
    """Write the zarr.json of a split's embeddings; the encode jobs write the shards."""
    from cdul_steps.steps.similarity import write_store

    write_store(images=images, split=split, text=text, store=output)


@app.command()
def similarity(
    store: Annotated[Path, Option(help="Zarr store of the embeddings.")],
    text: Annotated[Path, Option(help="Class embeddings.")],
    images: Images,
    split: Split,
    output: Annotated[Path, Option(help="Zarr store to write: float32 cosines (N, 1+S, C).")],
    table: Annotated[list[Path], Option(help="Table of an encode job; once per shard.")],
    max_failed_share: MaxFailedShare = 0.05,
) -> None:
    """Compute the cosine of every view with every class."""
    from cdul_steps.steps.similarity import make_similarity

    make_similarity(
        store=store,
        text=text,
        images=images,
        split=split,
        tables=table,
        max_failed_share=max_failed_share,
        output=output,
    )


@app.command()
def label(
    similarity: Annotated[Path, Option(help="Zarr store of cosines (N, 1+S, C).")],
    images: Images,
    split: Split,
    output: Output,
    settings: Annotated[
        str, Option(help="Keys of `labels.NAME` (config/README.md), as JSON or a YAML file.")
    ] = "{}",
) -> None:
    """Turn cosines into pseudo-labels: image_id, path, one float32 column per class (0..1)."""
    from cdul_steps.steps.label import make_labels

    make_labels(
        similarity=similarity,
        images=images,
        split=split,
        settings=read_labels(settings),
        output=output,
    )


@app.command("join-labels")
def join_labels(
    labels: Annotated[
        list[Path], Option(help="pseudo_labels.parquet; once per table, at least twice.")
    ],
    output: Output,
    settings: Annotated[
        str,
        Option(help="`positives`, `harden`, `corrections` (config/README.md), as JSON or a file."),
    ] = "{}",
) -> None:
    """Average the pseudo-labels of several teachers or views."""
    from cdul_steps.steps.label import join_labels

    join_labels(tables=labels, settings=read_labels(settings), output=output)


@app.command()
def quality(
    images: Images,
    labels: Annotated[
        Path, Option(help="pseudo_labels.parquet: its temperature, zeta, lambda and grid are used.")
    ],
    output: Output,
    similarity: Similarities = [],  # noqa: B006
    difficult: OfDifficult = "ignore",
    ap: Ap = "all",
) -> None:
    """Measure the labels of every construction against the ground truth, if it is known.

    Joined labels need no --similarity.
    """
    from cdul_steps.steps.evaluate import evaluate_labels

    evaluate_labels(
        similarity=_stores("--similarity", similarity),
        images=images,
        labels=labels,
        difficult=difficult,
        ap=ap,
        output=output,
    )


@app.command()
def sweep(
    similarity: Similarities,
    images: Images,
    output: Output,
    settings: Annotated[
        str, Option(help="Keys of `sweep` (config/README.md), as JSON or a YAML file.")
    ] = "{}",
    figure: Annotated[
        Path | None, Option(help="Figure to draw: .svg, .pdf or .png.", dir_okay=False)
    ] = None,
    difficult: OfDifficult = "ignore",
    ap: Ap = "all",
    threads: Annotated[int, Option(min=0, max=1024, help="CPU threads; 0: all.")] = 0,
) -> None:
    """Measure every combination of label settings: mAP and the mean label sum per image."""
    from cdul_steps.steps.sweep import sweep_labels

    sweep_labels(
        similarity=_stores("--similarity", similarity),
        images=images,
        settings=read_sweep(settings),
        difficult=difficult,
        ap=ap,
        threads=threads or os.cpu_count() or 1,
        output=output,
        figure=figure,
    )


@app.command()
def features(
    manifest: Annotated[Path, Option(help="Manifest of the shard, SPLIT/SHARD.parquet.")],
    store: Annotated[Path, Option(help="Zarr store of features; this shard's object is added.")],
    table: Annotated[
        Path, Option(help="Parquet to write: image, status, error, seconds.", dir_okay=False)
    ],
    settings: NetworkSettings,
    max_pixels: MaxPixels = MAX_PIXELS,
    device: Device = "auto",
    gpus: Gpus = 1,
    engine: RunBy = "auto",
    workers: Workers = -1,
    threads: Threads = 0,
) -> None:
    """Compute the features of one shard's images with a frozen trunk."""
    from cdul_steps.config import read_network
    from cdul_steps.models.device import Machine
    from cdul_steps.steps.features import make_features

    make_features(
        manifest=manifest,
        store=store,
        table=table,
        settings=read_network(settings),
        max_pixels=max_pixels,
        machine=Machine(
            device=device,
            gpus=gpus,
            workers=workers,
            threads=threads,
            engine=engine,
        ),
    )


@app.command()
def feature_store(
    images: Images,
    split: Split,
    settings: NetworkSettings,
    output: Annotated[Path, Option(help="Zarr store whose zarr.json is written.")],
) -> None:
    """Write the zarr.json of a split's features; the `features` jobs write the shards."""
    from cdul_steps.config import read_network
    from cdul_steps.steps.features import write_feature_store

    write_feature_store(images=images, split=split, settings=read_network(settings), store=output)


@app.command()
def train(
    labels: Annotated[Path, Option(help="pseudo_labels.parquet.")],
    images: Images,
    output: Annotated[Path, Option(help="Folder for model, history, refined labels.")],
    features: Annotated[
        list[str], Option(help="SPLIT=STORE of features, for `trunk: frozen`; once per split.")
    ] = [],  # noqa: B006
    start: Annotated[
        Path | None, Option(help="Folder of a classifier to start from, for `start_from`.")
    ] = None,
    settings: Annotated[
        str, Option(help="Keys of `trainings.NAME` (config/README.md), as JSON or a YAML file.")
    ] = "{}",
    difficult: OfDifficult = "ignore",
    max_pixels: MaxPixels = MAX_PIXELS,
    max_failed_share: MaxFailedShare = 0.05,
    device: Device = "auto",
    devices: Annotated[
        int,
        _key(Runtime, "train_devices", "GPUs that share each batch; with --device cpu, processes."),
    ] = 1,
    gpus: Annotated[
        int | None,
        Option(
            min=0, max=1024, help="GPUs that --device auto may use; default: as many as --devices."
        ),
    ] = None,
    workers: Workers = -1,
    threads: Threads = 0,
) -> None:
    """Train the classifier and refine its labels; resumes from OUTPUT/checkpoint.pt."""
    from cdul_steps.models.device import Machine
    from cdul_steps.steps.train import Inputs, train_classifier

    if device != "auto" or gpus is None:
        gpus = devices
    train_classifier(
        inputs=Inputs(labels, images, _stores("--features", features), start),
        settings=read_training(settings),
        difficult=difficult,
        max_pixels=max_pixels,
        max_failed_share=max_failed_share,
        machine=Machine(device=device, gpus=min(devices, gpus), workers=workers, threads=threads),
        output=output,
    )


@app.command("box-images")
def box_images(
    images: Images,
    output: Output,
    classes: Annotated[int, _key(BoxShape, "classes", "Boxes per image.")] = 4,
) -> None:
    """Write the images.parquet of second views; `boxes` makes the views shard by shard."""
    from cdul_steps.steps.boxes import write_box_images

    write_box_images(images=images, class_count=classes, output=output)


@app.command()
def boxes(
    manifest: Annotated[Path, Option(help="Manifest of the shard, SPLIT/SHARD.parquet.")],
    model: Annotated[Path, Option(help="Folder of a trained classifier.")],
    output: Output,
    settings: BoxSettings = "{}",
    max_pixels: MaxPixels = MAX_PIXELS,
    device: Device = "auto",
    gpus: Gpus = 1,
    engine: RunBy = "auto",
    workers: Workers = -1,
    threads: Threads = 0,
) -> None:
    """Make second views of a shard's images: a box around each class that a classifier sees."""
    from cdul_steps.config import read_box_shape
    from cdul_steps.models.device import Machine
    from cdul_steps.steps.boxes import make_boxes

    make_boxes(
        manifest=manifest,
        model=model,
        settings=read_box_shape(settings),
        max_pixels=max_pixels,
        machine=Machine(device=device, gpus=gpus, workers=workers, threads=threads, engine=engine),
        output=output,
    )


@app.command()
def predict(
    model: Annotated[Path, Option(help="Folder of a trained classifier.")],
    output: Annotated[
        Path,
        Option(
            help="File to write: .parquet, .csv or .json. An existing .csv or .json is kept.",
            dir_okay=False,
        ),
    ],
    inputs: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="IMAGE_OR_FOLDER...", help="Images to score; also a .tar or .parquet of images."
        ),
    ] = None,
    images: Annotated[
        Path | None, Option(help="Instead: images.parquet, with --split or --manifest.")
    ] = None,
    split: Annotated[str | None, Option(help="Split of --images.")] = None,
    manifest: Annotated[
        Path | None, Option(help="Manifest of one shard of --images, SPLIT/SHARD.parquet.")
    ] = None,
    features: Annotated[
        Path | None, Option(help="Store of the split's features, for a frozen-trunk classifier.")
    ] = None,
    threshold: Annotated[
        float | None,
        Option(min=0, max=1, help="Lowest probability of a predicted label; default: the model's."),
    ] = None,
    max_pixels: MaxPixels = MAX_PIXELS,
    device: Device = "auto",
    gpus: Gpus = 1,
    engine: RunBy = "auto",
    batch_size: Annotated[
        int, Option(min=0, max=1_000_000, help="Images per forward pass; 0: automatic.")
    ] = 0,
    workers: Workers = -1,
    threads: Threads = 0,
) -> None:
    """Score images with a trained classifier; CLIP is not needed."""
    if bool(inputs) == bool(images) or [bool(split), bool(manifest)].count(True) != bool(images):
        raise UserError(
            "predict: give images or folders, or --images with --split or with --manifest"
        )
    if features and not split:
        raise UserError("predict: --features belong to a split; give --images with --split")
    from cdul_steps.models.device import Machine
    from cdul_steps.steps.predict import ShardImages, SplitImages, predict_images

    scored: list[Path] | SplitImages | ShardImages = inputs or []
    if images and split:
        scored = SplitImages(images, split, features)
    if images and manifest:
        scored = ShardImages(manifest, images)
    predict_images(
        model=model,
        inputs=scored,
        output=output,
        threshold=threshold,
        max_pixels=max_pixels,
        machine=Machine(device, gpus, workers, threads, engine, batch_size),
    )


@app.command()
def applied(
    parts: Annotated[
        Path, Option(help="Folder of the predictions of a split, SHARD.parquet.", file_okay=False)
    ],
    images: Images,
    split: Annotated[str, Option(help="The split of the data set.")],
    output: Output,
) -> None:
    """Count what the shards of a split show, and delete predictions of earlier shards."""
    from cdul_steps.steps.applied import count_applied

    count_applied(parts=parts, images=images, split=split, output=output)


@app.command()
def model_card(
    model: Annotated[Path, Option(help="Folder of a trained classifier.")],
    data: Annotated[str, Option(help="Name of the data set.")],
    images: Images,
    quality: Annotated[Path, Option(help="quality.json of its labels.")],
    metrics: Annotated[Path, Option(help="metrics.json of the classifier.")],
    output: Output,
) -> None:
    """Write the model card: what a classifier was trained on, how good it is, and its limits."""
    from cdul_steps.steps.model_card import make_model_card

    make_model_card(
        model=model, data=data, images=images, quality=quality, metrics=metrics, output=output
    )


@app.command()
def export(
    model: Annotated[Path, Option(help="Folder of a trained classifier.")],
    output: Annotated[Path, Option(help="Folder to write: the file, model.json, README.md.")],
    format_: Annotated[
        Literal["onnx", "pt2", "torchscript"], Option("--format", help="File format.")
    ] = "onnx",
) -> None:
    """Export a trained classifier as a single file that runs without this project."""
    from cdul_steps.tools.export import export_classifier

    export_classifier(model=model, format_=format_, output=output)


@app.command()
def evaluate(
    scores: Annotated[Path, Option(help="Table of scores: pseudo-labels or predictions.")],
    images: Images,
    output: Output,
    difficult: OfDifficult = "ignore",
    ap: Ap = "all",
) -> None:
    """Measure scores against the truth: mAP, AP per class, precision, recall and F1 (percent)."""
    from cdul_steps.steps.evaluate import conclusion, evaluate_scores

    result = evaluate_scores(
        scores=scores,
        images=images,
        difficult=difficult,
        ap=ap,
        output=output,
    )
    typer.echo(f"{conclusion(result)}, written to {output}")


@app.command()
def ablation(
    table: Annotated[Path, Option(help="Table of the variants, .tsv or .csv: docs/ablation.md.")],
    training: Annotated[
        list[str],
        Option(
            help="VARIANT=FOLDER of an evaluated training, inside its labels' folder; once per "
            "training."
        ),
    ],
    images: Images,
    output: Annotated[Path, Option(help="Folder for ablation.parquet and ablation.md.")],
    difficult: OfDifficult = "ignore",
    ap: Ap = "all",
) -> None:
    """Compare variants of a training: mAP of classifiers and labels, mean over seeds (percent)."""
    from cdul_steps.steps.ablation import compare_variants

    compare_variants(
        table=table,
        trainings=[(name, Path(folder)) for name, folder in _pairs("--training", training)],
        images=images,
        difficult=difficult,
        ap=ap,
        output=output,
    )


@app.command()
def summary(
    results: Annotated[Path, typer.Argument(help="Folder of results.")] = Path("results"),
    json: Annotated[bool, Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print the metrics of all results, and the location of the outputs."""
    from cdul_steps.tools.summary import summarise

    typer.echo(summarise(results, as_json=json))


@app.command()
def retry_failed(
    results: Annotated[Path, typer.Argument(help="Folder of results.")] = Path("results"),
) -> None:
    """Retry images that failed and can be read now; run it in the folder of the workflow."""
    from cdul_steps.tools.retry import retry_failed

    if retry_failed(results):
        typer.echo(
            "Now repeat the command of before with --forcerun manifest at its end, such as "
            "'cdul run --forcerun manifest' or 'cdul run apply --forcerun manifest'."
        )


@review.command("export")
def export_review(
    labels: Annotated[Path, Option(help="pseudo_labels.parquet.")],
    format_: Annotated[
        Literal["csv", "label-studio", "coco", "fiftyone"], Option("--format", help="Tool.")
    ],
    output: Annotated[Path, Option(help="Folder to write.")],
    threshold: Annotated[
        float, Option(min=0, max=1, help="Lowest label value for which a class is proposed.")
    ] = 0.5,
    limit: Annotated[
        int | None, Option(min=1, max=10**9, help="Largest number of images; least certain first.")
    ] = None,
    images: Annotated[
        Path | None, Option(help="images.parquet of the manifest; coco needs it for image sizes.")
    ] = None,
    root: Annotated[
        Path | None, Option(help="Folder in which the tool finds the images; default: /.")
    ] = None,
) -> None:
    """Export pseudo-labels to a tool in which people correct them."""
    from cdul_steps.tools.review import export_review

    export_review(
        labels=labels,
        format_=format_,
        output=output,
        threshold=threshold,
        limit=limit,
        images=images,
        root=root,
    )


@review.command("import")
def import_review(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="File that the tool exported.")],
    review: Annotated[Path, Option(help="Folder of `cdul review export`.")],
    output: Annotated[
        Path, Option(help="CSV of corrections; existing entries are kept.", dir_okay=False)
    ],
    confirm: Annotated[
        bool, Option("--confirm", help="Treat unchanged entries as corrections too.")
    ] = False,
) -> None:
    """Convert corrected labels into a file for `labels.NAME.corrections`."""
    from cdul_steps.tools.review import import_review

    import_review(review=review, file=file, confirm=confirm, output=output)


CheckFolder = Annotated[Path, Option("--check", help="Folder of `cdul check draw`.")]
AnswersFile = Annotated[Path, typer.Argument(metavar="ANSWERS", help="CSV of the answers.")]
AsJson = Annotated[bool, Option("--json", help="Print JSON.")]


@check.command("draw")
def draw_sample(
    scores: Annotated[
        Path, Option(help="Table to check: predictions, pseudo-labels or refined labels.")
    ],
    output: Annotated[Path, Option(help="Folder to write; extends an earlier check of the table.")],
    number: Annotated[int, Option(min=1, max=100_000, help="Number of questions.")] = 200,
    threshold: Annotated[
        float | None,
        Option(min=0, max=1, help="Lowest score of a predicted class; default: the one in use."),
    ] = None,
    of_class: Annotated[
        list[str] | None, Option("--class", help="Ask only about this class; repeatable.")
    ] = None,
    corrections: Annotated[
        Path | None, Option(help="Corrections used in training; these entries are left out.")
    ] = None,
    seed: Seed = 0,
) -> None:
    """Draw a sample of images and classes, and write a page with yes/no questions about them."""
    from cdul_steps.tools.check import draw_sample

    draw_sample(
        scores=scores,
        output=output,
        number=number,
        threshold=threshold,
        only=of_class or [],
        corrections=corrections,
        seed=seed,
    )


@check.command("estimate")
def estimate_scores(answers: AnswersFile, check: CheckFolder, json: AsJson = False) -> None:
    """Estimate precision, recall, F1 and mAP from the answers, with confidence bounds."""
    from json import dumps

    from cdul_steps.tools.check import describe_estimate, estimate_scores

    found = estimate_scores(answers, check)
    typer.echo(dumps(found, indent=2, ensure_ascii=False) if json else describe_estimate(found))


@check.command("thresholds")
def choose_thresholds(
    answers: AnswersFile,
    check: CheckFolder,
    precision: Annotated[
        float | None, Option(min=0, max=1, help="Target precision; default: maximise F1.")
    ] = None,
    model: Annotated[
        Path | None, Option(help="Folder of the checked model; the thresholds are stored there.")
    ] = None,
    json: AsJson = False,
) -> None:
    """Choose the threshold of each class."""
    from json import dumps

    from cdul_steps.tools.check import choose_thresholds, describe_thresholds

    found = choose_thresholds(answers, check, precision=precision, model=model)
    typer.echo(dumps(found, indent=2, ensure_ascii=False) if json else describe_thresholds(found))


@app.command()
def doctor(
    further: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[FILE]...", help="More files for --configfile."),
    ] = None,
    configfile: Annotated[
        list[Path] | None,
        Option(help="As for snakemake: one or more files; later files override earlier ones."),
    ] = None,
    seconds: Annotated[
        float, Option(min=0, max=60, help="Seconds per speed measurement; 0: measure nothing.")
    ] = 10.0,
    json: Annotated[bool, Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check what a long run needs, and estimate its time; exit status 1 if there is a problem."""
    from dataclasses import asdict
    from json import dumps

    from cdul_steps.tools.doctor import examine

    files = [*(configfile or []), *(further or [])]
    if len(configfile or []) > 1 or (further and not configfile):
        # Snakemake uses only the last --configfile, which is not what a user who gives two expects.
        raise UserError("doctor: give all config files after one --configfile, as for snakemake")
    if not files:
        require_config(Path())
    findings = []
    for finding in examine(files, seconds=seconds):
        findings.append(finding)
        if not json:
            state = "ok" if finding.ok else "problem"
            typer.echo(f"{state:8} {finding.check}: {finding.text}")
    if json:
        typer.echo(dumps([asdict(finding) for finding in findings], indent=2, ensure_ascii=False))
    if not all(finding.ok for finding in findings):
        raise typer.Exit(1)


@app.command()
def report(
    folders: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="FOLDER...", help="Folders of results (default: results), labels or trainings."
        ),
    ] = None,
    output: Annotated[
        Path, Option(help="Folder to write: report.html, and the figures as files.")
    ] = Path("results/report"),
    estimate: Annotated[
        list[Path] | None,
        Option(help="Output of `cdul check estimate --json` to show; repeatable."),
    ] = None,
) -> None:
    """Write one HTML page with tables and figures of the results."""
    from cdul_steps.steps.report import make_report

    make_report(folders=folders or [Path("results")], output=output, estimates=estimate or [])


@app.command()
def show(
    file: Annotated[
        Path,
        typer.Argument(help="Pseudo-labels, refined labels, predictions, images or encode table."),
    ],
    of_class: Annotated[
        str | None, Option("--class", help="Only this class, with its best and worst images.")
    ] = None,
    top: Annotated[int, Option(help="Number of best and worst images.", min=0, max=10**9)] = 5,
    json: Annotated[bool, Option("--json", help="Print JSON.")] = False,
) -> None:
    """Inspect a table of results: counts and score quantiles per class, best and worst images."""
    from cdul_steps.tools.show import show_table

    typer.echo(show_table(file, of_class=of_class, top=top, as_json=json))


@app.command()
def gallery(
    folder: Annotated[
        Path, typer.Argument(metavar="TRAINING", help="results/DATASET/ENCODER/LABELS/TRAINING.")
    ],
    output: Annotated[
        Path | None,
        Option(help="Folder to write; open its index.html. Default: TRAINING/gallery/SPLIT."),
    ] = None,
    split: Split = "train",
) -> None:
    """Write a web page of the images with their scores before and after refinement.

    It works offline, without a server. An earlier gallery at OUTPUT is replaced.
    """
    from cdul_steps.steps.gallery import make_gallery

    make_gallery(folder=folder, split=split, output=output or folder / "gallery" / split)


@app.command()
def status(
    results: Annotated[Path, typer.Argument(help="Folder of results.")] = Path("results"),
    json: Annotated[bool, Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print the progress, speed and failures of every stage, during a run or after it."""
    from cdul_steps.tools.status import status

    typer.echo(status(results, as_json=json))


@app.command()
def verify(
    results: Annotated[Path, typer.Argument(help="Folder of results.")] = Path("results"),
    json: Annotated[bool, Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check that all files are complete and consistent; exit status 1 if one is not."""
    from cdul_steps.tools.verify import describe_report, verify

    report = verify(results)
    typer.echo(describe_report(report, as_json=json))
    if report.broken:
        raise typer.Exit(1)


@demo.command()
def scenes(
    output: Annotated[Path, Option(help="Folder to write: images and scenes.csv.")],
    seed: Seed = 0,
    train: Annotated[int, _key(Scenes, "train", "Images of the train split.")] = 2000,
    test: Annotated[int, _key(Scenes, "test", "Images of the test split.")] = 500,
    size: Annotated[int, _key(Scenes, "size", "Width and height in pixels.")] = 192,
) -> None:
    """Draw the demo's multi-label images."""
    from cdul_steps.demo.scenes import write_scenes

    write_scenes(output, seed=seed, train=train, test=test, size=size)


@demo.command()
def train_clip(
    output: Annotated[Path, Option(help="Folder to write, in open_clip's own form.")],
    seed: Seed = 0,
) -> None:
    """Train the demo's tiny CLIP on captioned single objects (about 8 minutes on one core)."""
    from cdul_steps.demo.train_clip import train_clip

    train_clip(output, seed=seed)


@app.command(hidden=True)
def config_reference() -> None:
    """Print config/README.md."""
    typer.echo(reference(), nl=False)


@app.command(hidden=True)
def config_schema() -> None:
    """Print workflow/schemas/config.schema.json."""
    typer.echo(schema(), nl=False)


def _end_quietly() -> None:
    """Ignore stop signals and the ends of processes, because this command is ending anyway."""
    # The default handlers would not do: Python prints a traceback for a signal that has already
    # arrived if its handler is gone.
    for number in (signal.SIGTERM, signal.SIGCHLD):
        signal.signal(number, lambda *_: None)


def _stop(*_: object) -> None:
    # The workers get the signal too, and torch reports that they have ended.
    _end_quietly()
    sys.exit(128 + signal.SIGTERM)


def main() -> None:
    """Run a command; an error that the user can fix is one line on stderr and exit status 1."""
    # SLURM sends SIGTERM before it kills a job. Unwinding removes scratch files and workers.
    signal.signal(signal.SIGTERM, _stop)
    # Torch's threads wait for each other at every layer. Spinning while they wait, the default, is
    # tens of times slower as soon as a decoding process or another job needs a core.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Without this, the garbage collector spends a second at exit on what torch has imported.
    atexit.register(gc.freeze)
    try:
        status = app(standalone_mode=False)
    except UsageError as error:
        if not error.args or not str(error):  # no command was given, and the help is shown
            sys.exit(error.exit_code)
        words = f"; see '{error.ctx.command_path} --help'" if error.ctx else ""
        text = error.format_message().replace("Value error, ", "").rstrip(".")
        print(f"cdul: error: {text}{words}", file=sys.stderr)
        sys.exit(error.exit_code)
    except Exception as error:
        _end_quietly()
        if line := explain(error):
            sys.exit(f"cdul: error: {line}")
        raise
    _end_quietly()
    sys.exit(status)


if __name__ == "__main__":
    main()
