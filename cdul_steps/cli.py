"""`cdul`: every stage as a command. Stages are imported when they run, so that help is quick."""

import atexit
import gc
import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from cdul_steps.errors import UserError, explain
from cdul_steps.limits import MAX_PIXELS

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="CDUL: a multi-label classifier learnt from unlabelled images, with CLIP as the teacher. "
    "Each command is a stage of the workflow; `snakemake` runs them all.",
)
demo = typer.Typer(no_args_is_help=True, help="The embedded demo: its images and its CLIP.")
app.add_typer(demo, name="demo")
review = typer.Typer(no_args_is_help=True, help="Correct pseudo-labels by hand: docs/review.md.")
app.add_typer(review, name="review")

Option = typer.Option
Output = Annotated[Path, Option(help="File to write.", dir_okay=False)]
Images = Annotated[Path, Option(help="images.parquet of the manifest.")]
Classes = Annotated[Path, Option(help="Class names: a YAML list, or text with a name a line.")]
Split = Annotated[str, Option(help="Split to work on: train or test.")]
Model = Annotated[str, Option(help="open_clip model name, or local-dir:FOLDER.")]
Pretrained = Annotated[str | None, Option(help="open_clip tag or checkpoint file.")]
MaxPixels = Annotated[int, Option(help="Images of more pixels are refused.")]
MaxFailedShare = Annotated[
    float, Option(help="More unusable images than this share (0..1) are an error.")
]
Device = Annotated[
    str, Option(help="auto, cpu, cuda (a GPU that no other job has), cuda:1 (that one), ...")
]
Gpus = Annotated[int, Option(help="GPUs that --device auto may take; 0: none, so the CPU.")]
Workers = Annotated[
    int, Option(help="Processes that decode images (on a CPU: and encode them); -1 chooses.")
]
Threads = Annotated[int, Option(help="CPU threads of the model; 0: all.")]
Zeta = Annotated[float, Option(help="Snippet score from which a class takes its maximum (0..1).")]
Lambda = Annotated[
    float, Option("--lambda", help="0: mean of global and local, 1: the larger, -1: the smaller.")
]
Tau = Annotated[float | None, Option(help="Softmax temperature; default: 1/logit_scale.")]
LabelGrid = Annotated[
    tuple[int, int] | None,
    Option(help="Use only the snippets of this one of the manifest's grids; default: all."),
]
Difficult = Annotated[
    str,
    Option(
        help="What an image counts as for a class it shows only difficultly: "
        "ignore, negative or positive."
    ),
]
Ap = Annotated[str, Option(help="all: AP over all points; voc07: VOC2007's 11 points.")]


def _choose(option: str, value: str, known: tuple[str, ...]) -> Any:
    if value not in known:
        raise typer.BadParameter(f"{value!r} is not one of {', '.join(known)}", param_hint=option)
    return value


def _pairs(option: str, values: list[str]) -> dict[str, str]:
    pairs = dict(value.partition("=")[::2] for value in values)
    if len(pairs) < len(values) or not all(pairs.values()):
        raise typer.BadParameter("give each as NAME=VALUE, no name twice", param_hint=option)
    return pairs


def _grid(option: str, text: str) -> tuple[int, int]:
    rows, _, columns = text.partition("x")
    if not (rows.isdecimal() and columns.isdecimal() and int(rows) and int(columns)):
        raise typer.BadParameter(f"{text!r} is not ROWSxCOLUMNS", param_hint=option)
    return int(rows), int(columns)


@app.command()
def manifest(
    reader: Annotated[str, Option(help="voc, coco, nuswide, folder or table.")],
    root: Annotated[Path, Option(help="Folder or file of the data set (docs/datasets.md).")],
    classes: Classes,
    output: Output,
    split: Annotated[
        list[str], Option(help="OURS=THEIRS, for example train=trainval; once a split.")
    ] = ["train=train"],  # noqa: B006
    grid: Annotated[tuple[int, int], Option(help="Rows and columns of snippets.")] = (3, 3),
    further_grid: Annotated[
        list[str], Option(help="Snippets of a further grid, ROWSxCOLUMNS; once a grid.")
    ] = [],  # noqa: B006
    overlap: Annotated[
        float,
        Option(min=0, max=0.9, help="Share of its side by which a snippet overlaps the next."),
    ] = 0.0,
    shard_size: Annotated[int, Option(help="Images a shard.")] = 1000,
    max_pixels: MaxPixels = MAX_PIXELS,
    labelled_only: Annotated[
        bool, Option(help="Leave out images without any positive label.")
    ] = False,
    max_failed_share: MaxFailedShare = 0.05,
) -> None:
    """Find the images, give each a row and a shard, and cut each into views.

    Writes images.parquet at OUTPUT, and SPLIT/SHARD.parquet beside it (a row a view, corners in
    pixels). Where OUTPUT exists, its images keep their rows.
    """
    from cdul_steps.data.readers import READERS
    from cdul_steps.steps.manifest import make_manifest

    if min(grid) < 1:
        raise typer.BadParameter("rows and columns must be above 0", param_hint="--grid")
    make_manifest(
        reader=_choose("--reader", reader, tuple(READERS)),
        root=root,
        classes=classes,
        splits=_pairs("--split", split),
        grid=[grid, *(_grid("--further-grid", text) for text in further_grid)],
        overlap=overlap,
        shard_size=shard_size,
        max_pixels=max_pixels,
        labelled_only=labelled_only,
        max_failed_share=max_failed_share,
        output=output,
    )


@app.command()
def encode(
    manifest: Annotated[Path, Option(help="Manifest of the shard, SPLIT/SHARD.parquet.")],
    store: Annotated[Path, Option(help="Zarr store of the embeddings; gets this shard's object.")],
    table: Annotated[
        Path, Option(help="Parquet to write: image, status, error, seconds.", dir_okay=False)
    ],
    model: Model,
    pretrained: Pretrained = None,
    precision: Annotated[str, Option(help="fp32, fp16 or bf16.")] = "fp32",
    resize_mode: Annotated[
        str | None, Option(help="shortest, longest or squash; default: the model's own.")
    ] = None,
    max_pixels: MaxPixels = MAX_PIXELS,
    device: Device = "auto",
    gpus: Gpus = 1,
    engine: Annotated[
        str, Option(help="What runs the tower on a CPU: torch, onnx, or auto, which measures.")
    ] = "auto",
    batch_size: Annotated[int, Option(help="Views a forward pass; 0 chooses.")] = 0,
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
        model=model,
        pretrained=pretrained,
        precision=_choose("--precision", precision, ("fp32", "fp16", "bf16")),
        resize_mode=resize_mode,
        max_pixels=max_pixels,
        machine=Machine(
            device=device,
            gpus=gpus,
            workers=workers,
            threads=threads,
            engine=_choose("--engine", engine, ("auto", "torch", "onnx")),
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
        list[str], Option(help="Prompt, {} being the class name; several are averaged.")
    ] = ["a photo of a {}"],  # noqa: B006
    aliases: Annotated[bool, Option(help="Use all names of a class, or only its first.")] = True,
) -> None:
    """Embed the class names with the model's text tower."""
    from cdul_steps.steps.encode import encode_text

    encode_text(
        classes=classes,
        output=output,
        model=model,
        pretrained=pretrained,
        templates=template,
        aliases=aliases,
    )


@app.command()
def store(
    images: Images,
    split: Split,
    text: Annotated[Path, Option(help="Class embeddings, for their size.")],
    output: Annotated[Path, Option(help="Zarr store that gets its zarr.json.")],
) -> None:
    """Write the zarr.json of a split's embeddings; the shards are the encode jobs' business."""
    from cdul_steps.steps.similarity import write_store

    write_store(images=images, split=split, text=text, store=output)


@app.command()
def similarity(
    store: Annotated[Path, Option(help="Zarr store of the embeddings.")],
    text: Annotated[Path, Option(help="Class embeddings.")],
    images: Images,
    split: Split,
    output: Annotated[Path, Option(help="Zarr store to write: float32 cosines (N, 1+S, C).")],
    table: Annotated[list[Path], Option(help="Tables of the encode jobs; once a shard.")],
    max_failed_share: MaxFailedShare = 0.05,
) -> None:
    """Compare every view with every class: cosines."""
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
    tau: Tau = None,
    zeta: Zeta = 0.3,
    lam: Lambda = 0.0,
    construction: Annotated[
        str, Option(help="global, local_mean, local_max, aggregate or final.")
    ] = "final",
    grid: LabelGrid = None,
    standardise: Annotated[
        bool, Option("--standardise", help="Give all classes' cosines the same mean and deviation.")
    ] = False,
    positives: Annotated[
        float | None,
        Option(
            min=0,
            help="Make the labels of an image sum to this, on the mean; default: as they come.",
        ),
    ] = None,
    threshold: Annotated[
        float | None, Option(min=0, max=1, help="Make labels of at least this 1 and all others 0.")
    ] = None,
    top_k: Annotated[
        int | None,
        Option(min=1, help="Make so many of the largest labels of an image 1, all others 0."),
    ] = None,
    corrections: Annotated[
        Path | None, Option(help="CSV of what people corrected: image_id, class, value.")
    ] = None,
) -> None:
    """Turn cosines into pseudo-labels: image_id, path, and a float32 column a class (0..1)."""
    from cdul_steps.method.aggregation import CONSTRUCTIONS
    from cdul_steps.steps.label import make_labels

    if threshold is not None and top_k is not None:
        raise UserError("label: give --threshold or --top-k, not both")
    make_labels(
        similarity=similarity,
        images=images,
        split=split,
        construction=_choose("--construction", construction, tuple(CONSTRUCTIONS)),
        tau=tau,
        zeta=zeta,
        lam=lam,
        grid=grid,
        standardise=standardise,
        positives=positives,
        threshold=threshold,
        top_k=top_k,
        corrections=corrections,
        output=output,
    )


@app.command()
def quality(
    similarity: Annotated[list[str], Option(help="SPLIT=STORE of cosines; once a split.")],
    images: Images,
    output: Output,
    tau: Tau = None,
    zeta: Zeta = 0.3,
    lam: Lambda = 0.0,
    grid: LabelGrid = None,
    labels: Annotated[
        Path | None,
        Option(help="pseudo_labels.parquet: where calibrated or hardened, measured as well."),
    ] = None,
    difficult: Difficult = "ignore",
    ap: Ap = "all",
) -> None:
    """Measure the labels of every construction against the truth, where there is one."""
    from cdul_steps.data.truth import AP
    from cdul_steps.steps.evaluate import evaluate_labels

    evaluate_labels(
        similarity={k: Path(v) for k, v in _pairs("--similarity", similarity).items()},
        images=images,
        tau=tau,
        zeta=zeta,
        lam=lam,
        grid=grid,
        labels=labels,
        difficult=_choose("--difficult", difficult, ("ignore", "negative", "positive")),
        ap=_choose("--ap", ap, tuple(AP)),
        output=output,
    )


@app.command()
def sweep(
    similarity: Annotated[list[str], Option(help="SPLIT=STORE of cosines; once a split.")],
    images: Images,
    output: Output,
    settings: Annotated[
        str, Option(help="Keys of `sweep` (config/README.md): JSON, or a YAML file.")
    ] = "{}",
    figure: Annotated[
        Path | None, Option(help="Figure to draw: .svg, .pdf or .png.", dir_okay=False)
    ] = None,
    difficult: Difficult = "ignore",
    ap: Ap = "all",
    threads: Annotated[int, Option(min=0, help="CPU threads; 0: all.")] = 0,
) -> None:
    """Measure every combination of label settings: mAP and the mean sum of an image's labels."""
    from cdul_steps.config import read_sweep
    from cdul_steps.data.truth import AP
    from cdul_steps.steps.sweep import sweep_labels

    sweep_labels(
        similarity={k: Path(v) for k, v in _pairs("--similarity", similarity).items()},
        images=images,
        settings=read_sweep(settings),
        difficult=_choose("--difficult", difficult, ("ignore", "negative", "positive")),
        ap=_choose("--ap", ap, tuple(AP)),
        threads=threads or os.cpu_count() or 1,
        output=output,
        figure=figure,
    )


@app.command()
def train(
    labels: Annotated[Path, Option(help="pseudo_labels.parquet.")],
    images: Images,
    output: Annotated[Path, Option(help="Folder for model, history, refined labels.")],
    settings: Annotated[
        str, Option(help="Keys of `trainings.NAME` (config/README.md): JSON, or a YAML file.")
    ] = "{}",
    difficult: Difficult = "ignore",
    max_pixels: MaxPixels = MAX_PIXELS,
    device: Device = "auto",
    devices: Annotated[
        int, Option(min=1, help="GPUs to share every batch; with --device cpu, processes.")
    ] = 1,
    gpus: Annotated[
        int | None, Option(help="GPUs that --device auto may take; default: as many as --devices.")
    ] = None,
    workers: Workers = -1,
    threads: Threads = 0,
) -> None:
    """Train the classifier and refine its labels; goes on from OUTPUT/checkpoint.pt."""
    from cdul_steps.config import read_training
    from cdul_steps.models.device import Machine
    from cdul_steps.steps.train import train_classifier

    if device != "auto" or gpus is None:
        gpus = devices
    train_classifier(
        labels=labels,
        images=images,
        settings=read_training(settings),
        difficult=_choose("--difficult", difficult, ("ignore", "negative", "positive")),
        max_pixels=max_pixels,
        machine=Machine(device=device, gpus=min(devices, gpus), workers=workers, threads=threads),
        output=output,
    )


@app.command()
def predict(
    model: Annotated[Path, Option(help="Folder of a trained classifier.")],
    output: Annotated[Path, Option(help="File to write: .parquet, .csv or .json.", dir_okay=False)],
    inputs: Annotated[
        list[Path] | None, typer.Argument(metavar="IMAGE_OR_FOLDER...", help="What to score.")
    ] = None,
    images: Annotated[Path | None, Option(help="Instead: images.parquet, with --split.")] = None,
    split: Annotated[str | None, Option(help="Split of --images.")] = None,
    threshold: Annotated[
        float | None, Option(help="Probability from which a label is named; default: the model's.")
    ] = None,
    max_pixels: MaxPixels = MAX_PIXELS,
    device: Device = "auto",
    gpus: Gpus = 1,
    batch_size: Annotated[int, Option(help="Images a forward pass.")] = 32,
    workers: Workers = -1,
    threads: Threads = 0,
) -> None:
    """Score images with a trained classifier; no CLIP."""
    if bool(inputs) == bool(images) or bool(images) != bool(split):
        raise UserError("predict: give images or folders, or else --images with --split")
    from cdul_steps.models.device import Machine
    from cdul_steps.steps.predict import predict_images

    predict_images(
        model=model,
        inputs=inputs or [],
        images=images,
        split=split,
        output=output,
        threshold=threshold,
        max_pixels=max_pixels,
        machine=Machine(
            device=device, gpus=gpus, workers=workers, threads=threads, batch_size=batch_size
        ),
    )


@app.command()
def model_card(
    model: Annotated[Path, Option(help="Folder of a trained classifier.")],
    data: Annotated[str, Option(help="Name of the data set.")],
    images: Images,
    quality: Annotated[Path, Option(help="quality.json of its labels.")],
    metrics: Annotated[Path, Option(help="metrics.json of the classifier.")],
    output: Output,
) -> None:
    """Write the model card: what a classifier learnt from, how good it is, and its limits."""
    from cdul_steps.steps.model_card import make_model_card

    make_model_card(
        model=model, data=data, images=images, quality=quality, metrics=metrics, output=output
    )


@app.command()
def export(
    model: Annotated[Path, Option(help="Folder of a trained classifier.")],
    output: Annotated[Path, Option(help="Folder to write: the file, model.json, README.md.")],
    format_: Annotated[str, Option("--format", help="onnx, pt2 or torchscript.")] = "onnx",
) -> None:
    """Write a trained classifier as one file that runs without this project."""
    formats = ("onnx", "pt2", "torchscript")
    _choose("--format", format_, formats)
    from cdul_steps.tools.export import export_classifier

    export_classifier(model=model, format_=format_, output=output)


@app.command()
def evaluate(
    scores: Annotated[Path, Option(help="Table of scores: pseudo-labels or predictions.")],
    images: Images,
    output: Output,
    difficult: Difficult = "ignore",
    ap: Ap = "all",
) -> None:
    """Measure scores against the truth: mAP, AP a class, precision, recall and F1 (percent)."""
    from cdul_steps.data.truth import AP
    from cdul_steps.steps.evaluate import evaluate_scores

    result = evaluate_scores(
        scores=scores,
        images=images,
        difficult=_choose("--difficult", difficult, ("ignore", "negative", "positive")),
        ap=_choose("--ap", ap, tuple(AP)),
        output=output,
    )
    value = result["mAP"]
    typer.echo(
        f"mAP {value:.2f} on {result['images']} images, written to {output}"
        if value is not None
        else f"no image with known truth; written to {output}"
    )


@app.command()
def ablation(
    table: Annotated[Path, Option(help="Table of the variants, .tsv or .csv: docs/ablation.md.")],
    training: Annotated[
        list[str],
        Option(help="VARIANT=FOLDER of a measured training, below its labels'; once a training."),
    ],
    images: Images,
    output: Annotated[Path, Option(help="Folder for ablation.parquet and ablation.md.")],
    difficult: Difficult = "ignore",
    ap: Ap = "all",
) -> None:
    """Compare variants of a training: mAP of classifiers and labels, mean over seeds (percent)."""
    from cdul_steps.data.truth import AP
    from cdul_steps.steps.ablation import compare_variants

    pairs = [entry.partition("=")[::2] for entry in training]
    compare_variants(
        table=table,
        trainings=[(name, Path(folder)) for name, folder in pairs],
        images=images,
        difficult=_choose("--difficult", difficult, ("ignore", "negative", "positive")),
        ap=_choose("--ap", ap, tuple(AP)),
        output=output,
    )


@app.command()
def summary(
    results: Annotated[Path, typer.Argument(help="Folder of results.")] = Path("results"),
    json: Annotated[bool, Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print the metrics table of all results, and where the outputs are."""
    from cdul_steps.tools.summary import summarise

    typer.echo(summarise(results, as_json=json))


@app.command()
def retry_failed(
    results: Annotated[Path, typer.Argument(help="Folder of results.")] = Path("results"),
) -> None:
    """Have shards encoded again whose failed images can be read now; run where snakemake runs."""
    from cdul_steps.tools.retry import retry_failed

    if retry_failed(results):
        typer.echo("Now run snakemake as before, with --forcerun manifest.")


@review.command("export")
def export_review(
    labels: Annotated[Path, Option(help="pseudo_labels.parquet.")],
    format_: Annotated[str, Option("--format", help="csv, label-studio, coco or fiftyone.")],
    output: Annotated[Path, Option(help="Folder to write.")],
    threshold: Annotated[float, Option(help="Label (0..1) from which a class is proposed.")] = 0.5,
    limit: Annotated[
        int | None, Option(min=1, help="Only so many images, the least decided first.")
    ] = None,
    images: Annotated[
        Path | None, Option(help="images.parquet of the manifest; coco needs it, for the sizes.")
    ] = None,
    root: Annotated[
        Path | None, Option(help="Folder below which the tool finds the images; default: /.")
    ] = None,
) -> None:
    """Write pseudo-labels in the form of a tool in which people correct them."""
    _choose("--format", format_, ("csv", "label-studio", "coco", "fiftyone"))
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
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What the tool gave back.")],
    review: Annotated[Path, Option(help="Folder of `cdul review export`.")],
    output: Annotated[
        Path, Option(help="CSV of corrections; what it has already stays.", dir_okay=False)
    ],
    confirm: Annotated[
        bool, Option("--confirm", help="Entries left as proposed are corrections too.")
    ] = False,
) -> None:
    """Turn what people corrected into a file for `labels.NAME.corrections`."""
    from cdul_steps.tools.review import import_review

    import_review(review=review, file=file, confirm=confirm, output=output)


@app.command()
def doctor(
    configfile: Annotated[
        list[Path] | None, Option(help="As for snakemake: laid over config/config.yaml.")
    ] = None,
    seconds: Annotated[
        float, Option(min=0, max=60, help="Length of each measurement of speed; 0: none.")
    ] = 10.0,
    json: Annotated[bool, Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check before a long run what it needs, and how long it will take; status 1 for a problem."""
    from dataclasses import asdict
    from json import dumps

    from cdul_steps.tools.doctor import examine

    findings = []
    for finding in examine(configfile or [], seconds=seconds):
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
        typer.Argument(metavar="FOLDER...", help="Results (default: results), labels, trainings."),
    ] = None,
    output: Annotated[
        Path, Option(help="Folder to write: report.html, and its figures as files.")
    ] = Path("results/report"),
) -> None:
    """Write one HTML page with tables and figures of what was made."""
    from cdul_steps.steps.report import make_report

    make_report(folders=folders or [Path("results")], output=output)


@app.command()
def show(
    file: Annotated[
        Path,
        typer.Argument(help="Pseudo-labels, refined labels, predictions, images or encode table."),
    ],
    of_class: Annotated[
        str | None, Option("--class", help="Only this class, with its best and worst images.")
    ] = None,
    top: Annotated[int, Option(help="Images to name at either end.", min=0)] = 5,
    json: Annotated[bool, Option("--json", help="Print JSON.")] = False,
) -> None:
    """Look into a table of results: counts and score quantiles a class, best and worst images."""
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

    It opens from a disk, without server or network. An earlier gallery at OUTPUT is replaced.
    """
    from cdul_steps.steps.gallery import make_gallery

    make_gallery(folder=folder, split=split, output=output or folder / "gallery" / split)


@app.command()
def status(
    results: Annotated[Path, typer.Argument(help="Folder of results.")] = Path("results"),
    json: Annotated[bool, Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print how far every stage is, how fast, and what failed: while it runs, and after."""
    from cdul_steps.tools.status import status

    typer.echo(status(results, as_json=json))


@app.command()
def verify(
    results: Annotated[Path, typer.Argument(help="Folder of results.")] = Path("results"),
    json: Annotated[bool, Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check that every file is whole and fits the others; exit status 1 where one does not."""
    from cdul_steps.tools.verify import describe_report, verify

    report = verify(results)
    typer.echo(describe_report(report, as_json=json))
    if report.broken:
        raise typer.Exit(1)


@demo.command()
def scenes(
    output: Annotated[Path, Option(help="Folder to write: images and scenes.csv.")],
    seed: Annotated[int, Option(help="Seed of all that is drawn.")] = 0,
    train: Annotated[int, Option(help="Images of the train split.")] = 2000,
    test: Annotated[int, Option(help="Images of the test split.")] = 500,
    size: Annotated[int, Option(help="Width and height in pixels.")] = 192,
) -> None:
    """Draw the demo's multi-label images."""
    from cdul_steps.demo.scenes import write_scenes

    write_scenes(output, seed=seed, train=train, test=test, size=size)


@demo.command()
def train_clip(
    output: Annotated[Path, Option(help="Folder to write, in open_clip's own form.")],
    seed: Annotated[int, Option(help="Seed of data and weights.")] = 0,
) -> None:
    """Train the demo's tiny CLIP on captioned single objects (about 8 minutes on one core)."""
    from cdul_steps.demo.train_clip import train_clip

    train_clip(output, seed=seed)


@app.command(hidden=True)
def config_reference() -> None:
    """Print config/README.md."""
    from cdul_steps.config import reference

    typer.echo(reference(), nl=False)


@app.command(hidden=True)
def config_schema() -> None:
    """Print workflow/schemas/config.schema.json."""
    from cdul_steps.config import schema

    typer.echo(schema(), nl=False)


def _stop(*_: object) -> None:
    # Once is enough, and the workers were told too: what torch's handler says of them is no news.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    sys.exit(128 + signal.SIGTERM)


def main() -> None:
    """Run a command; what the user can put right is one line on stderr and exit status 1."""
    # SLURM tells a job to stop before it kills it. Unwinding leaves no scratch file and no worker.
    signal.signal(signal.SIGTERM, _stop)
    # Torch's threads wait for each other at every layer. Spinning while they wait, as is the
    # default, is tens of times slower as soon as a decoding process or another job needs a core.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # What torch imports is a second's work for the garbage collector, which looks once more at the
    # end of every process.
    atexit.register(gc.freeze)
    try:
        app()
    except Exception as error:
        # torch's handler would tell of the next process to go by an exception out of nowhere.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        if line := explain(error):
            sys.exit(f"cdul: error: {line}")
        raise


if __name__ == "__main__":
    main()
