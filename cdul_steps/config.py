"""The workflow's configuration: typed, documented, and checked before anything runs."""

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from inspect import cleandoc
from itertools import combinations, product, starmap
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
)

from cdul_steps import results
from cdul_steps.errors import UserError, first_line, nearest
from cdul_steps.limits import MAX_PIXELS, MAX_SEED
from cdul_steps.method.choices import (
    NEARNESS,
    WEIGHT,
    AveragePrecision,
    Construction,
    Difficult,
    Positives,
    Scores,
)
from cdul_steps.method.losses import LOSSES, LossName
from cdul_steps.shipped import shipped


def _expand(value: Any) -> Any:
    """`~` and environment variables in a path: clusters have their $SCRATCH."""
    if not isinstance(value, str | Path):
        return value
    # Not by pathlib, which would tidy `local-dir:./folder` away.
    expanded = os.path.expandvars(os.path.expanduser(str(value)))  # noqa: PTH111
    if missing := re.search(r"\$\{?(\w+)", expanded):
        raise ValueError(f"the environment variable {missing[1]} is not set")
    return expanded


def _own(value: str) -> str:
    """A file that comes with the project is found from any working directory."""
    folder = value.removeprefix(LOCAL)
    return value.removesuffix(folder) + shipped(folder)


def _runs(value: Any) -> Any:
    """One product is a list of one."""
    return value if isinstance(value, list) else [value]


def _several(value: Any) -> Any:
    """One grid is a list of one."""
    if isinstance(value, list | tuple) and not any(isinstance(v, list | tuple) for v in value):
        return [value]
    return value


LOCAL = "local-dir:"
"""How the name of an encoder begins that is a folder."""
Place = Annotated[str, BeforeValidator(_expand)]
OwnPlace = Annotated[Place, AfterValidator(_own)]
Positive = Annotated[float, Field(gt=0)]
Side = Annotated[int, Field(ge=1, le=8)]
Grid = tuple[Side, Side]
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
"""What can name a folder."""
Name = Annotated[str, Field(pattern=NAME)]
Split = Literal["train", "test"]
Reader = Literal["voc", "coco", "nuswide", "folder", "table", "webdataset", "parquet"]
Precision = Literal["fp32", "fp16", "bf16"]
ResizeMode = Literal["shortest", "longest", "squash"]
Views = Literal["crops", "dense"]
Engine = Literal["auto", "torch", "onnx"]


class Section(BaseModel):
    """A part of the config; unknown keys are errors."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, populate_by_name=True, allow_inf_nan=False
    )


class Made(NamedTuple):
    """The names of the sections that one result is made by."""

    dataset: str
    encoder: str
    labels: str
    training: str


class Boxed(NamedTuple):
    """A data set's images with second views; the encoder is that of the labels behind them."""

    dataset: str
    encoder: str
    boxes: str

    @property
    def folder(self) -> str:
        """The name of its folder of results, beside those of data sets."""
        # `~` is in no name under `datasets`.
        return "~".join(self)


class Run(Section):
    """What `snakemake` makes: every combination of the sections named here. A list of such
    mappings makes what each of them says: two data sets with a training of its own for each."""

    datasets: list[str] = Field(["demo"], min_length=1, description="Names under `datasets`.")
    encoders: list[str] = Field(["tiny-clip"], min_length=1, description="Names under `encoders`.")
    labels: list[str] = Field(["final"], min_length=1, description="Names under `labels`.")
    trainings: list[str] = Field(["aligned"], min_length=1, description="Names under `trainings`.")


class Scenes(Section):
    """The generated images of the demo."""

    seed: int = Field(0, ge=0, le=MAX_SEED, description="Seed of all that is drawn.")
    train: int = Field(2000, ge=1, le=1_000_000, description="Images of the train split.")
    test: int = Field(500, ge=1, le=1_000_000, description="Images of the test split.")
    size: int = Field(192, ge=64, le=4096, description="Width and height in pixels.")


class Dataset(Section):
    """Where the images are, what the classes are called, and how images are cut."""

    reader: Literal["demo", Reader] = Field(
        description="`demo`: generated scenes. `voc`: a year's folder of the PASCAL VOC devkit. "
        "`coco`: a year of COCO with its `instances` files. `nuswide`: NUS-WIDE. `folder`: all "
        "images below a folder, no labels needed. `table`: a CSV or Parquet file with `path`, "
        "optionally `image_id`, `split` and a 1/0 column a class. `webdataset`: tar files with "
        "images. `parquet`: Parquet files with images. docs/datasets.md has the layouts."
    )
    root: Place | None = Field(
        None,
        description="Folder of the data set (for `table` the file, for `nuswide` the folder or "
        "`nus_wid_data.csv`, for `webdataset` and `parquet` also a pattern of files, as in "
        "`shards/{00000..00099}.tar` or `data/*.parquet`, for `folder` also a URL as in "
        "`s3://bucket/photos`), relative to the working directory. Not for `demo`, whose images "
        "are generated below the results.",
    )
    classes: OwnPlace = Field(
        description="File with the class names in order: a YAML list (entries are names, or "
        "`{name: ..., aliases: [...]}`), or text with a name a line."
    )
    context: OwnPlace | None = Field(
        None,
        description="File with context names, in the form of `classes`: what else the images may "
        "show. They take part in the comparison with the classes and get no label, so that an "
        "image may show none of the classes. docs/method.md says when they matter.",
    )
    context_nearness: float = Field(
        NEARNESS,
        gt=0,
        le=1,
        description="A context name is left out where its text embedding is nearer than this to "
        "that of a class (a cosine around the mean of everyday names); 1 leaves out only names "
        "that are those of a class but for case and plural.",
    )
    context_keep: list[str] = Field(
        [], description="Context names that stay, however near to a class they are."
    )
    splits: dict[Split, str] = Field(
        {"train": "train"},
        description="What the data set calls the images to learn from (`train`) and, optionally, "
        "to measure on (`test`): an image set of VOC (`trainval`), COCO (`train2014`) or NUS-WIDE "
        "(`Train`), a folder below `root` (`.` for all), a value of the table's `split` column, or "
        "those of the archives (`.` for all) that are in a folder or match a pattern below `root`, "
        "as in `train/*.tar`.",
    )
    labelled_only: bool = Field(
        False,
        description="Leave out images without any positive label, as results on COCO and NUS-WIDE "
        "are reported. It looks at the ground truth, which nothing else does before measuring.",
    )
    exclude: list[Annotated[str, Field(min_length=1)]] = Field(
        [],
        description="Patterns of images and folders to leave out, such as `thumbs` or "
        "`raw/*.png`: with a `/` of the path below `root`, else of any name in it; `*` is any "
        "text. An archive counts as a folder. The number is noted. Hidden files and a network "
        "disk's own folders, such as `@eaDir`, are left out by the reader `folder` in any case.",
    )
    expected_images: dict[Split, Annotated[int, Field(ge=1)]] | None = Field(
        None,
        description="Images of each split in the whole set; another number ends the run before it "
        "starts. `null` to use a part of a set.",
    )
    grid: Annotated[
        list[Grid], BeforeValidator(_several, json_schema_input_type=Grid | list[Grid])
    ] = Field(
        (3, 3),
        min_length=1,
        validate_default=True,
        description="Snippets of an image: rows, columns (1 to 8). Several grids, as in "
        "`[[2, 2], [3, 3]]`, give the snippets of all.",
    )
    overlap: float = Field(
        0.0,
        ge=0,
        le=0.9,
        description="Share of a snippet's side by which it overlaps the next.",
    )
    shard_size: int = Field(
        1000,
        ge=1,
        le=1_000_000,
        description="Images a shard: one encode job, one file of the Zarr store.",
    )
    max_pixels: int = Field(
        MAX_PIXELS,
        ge=1,
        le=MAX_PIXELS,
        description="Images of more pixels (width x height) get the status `too_large`.",
    )
    max_failed_share: float = Field(
        0.05, ge=0, le=1, description="More unusable images than this share of a split end the run."
    )
    scenes: Scenes = Field(Scenes(), description="For the reader `demo` only.")


class Encoder(Section):
    """The CLIP model that scores views against class names."""

    model: OwnPlace = Field(
        description="open_clip's model name (`RN50x64`), or `local-dir:FOLDER` with "
        "`open_clip_config.json` and the weights."
    )
    pretrained: Place | None = Field(
        None,
        description="open_clip's tag (`openai`), fetched once and cached, or a checkpoint file. "
        "Not for `local-dir:`.",
    )
    templates: list[Annotated[str, Field(pattern=r"\{\}")]] = Field(
        ["a photo of a {}"],
        min_length=1,
        description="Prompts, `{}` being the class name; several are averaged.",
    )
    aliases: bool = Field(
        True,
        description="Use all names that the class file lists for a class, averaged; false: only "
        "the first.",
    )
    precision: Precision = Field(
        "fp32", description="Arithmetic of the image tower. fp32 is what a CPU should use."
    )
    resize_mode: ResizeMode | None = Field(
        None,
        description="How a view becomes the model's square input; default: the model's own way. "
        "`squash` keeps all of a snippet, `shortest` crops its long side.",
    )
    views: Views = Field(
        "crops",
        description="`crops`: each view is cut out and encoded by itself, as in the paper. "
        "`dense`: the whole image is encoded once, squashed to twice the model's input size, and "
        "each view is the mean of what the last layer has for its place; docs/method.md.",
    )


class Harden(Section):
    """Hard pseudo-labels, 0 or 1; by default they stay soft."""

    threshold: float | None = Field(
        None, gt=0, le=1, description="Labels of at least this become 1, all others 0."
    )
    top_k: int | None = Field(
        None, ge=1, description="So many of the largest labels of an image become 1, all others 0."
    )


class Part(Section):
    """Labels that others are joined of."""

    labels: Name = Field(description="Name under `labels`: how the scores become labels.")
    encoder: Name | None = Field(
        None, description="Name under `encoders`: another teacher; default: the run's own."
    )
    boxes: Name | None = Field(
        None,
        description="Name under `boxes`: labels of these second views, in place of the data set's "
        "own views.",
    )
    training: Name | None = Field(
        None,
        description="Name under `trainings`: the labels as this training has refined them, to "
        "learn a second time.",
    )


class Labels(Section):
    """How scores become pseudo-labels."""

    def of(self, dataset: str) -> "Labels":
        """These settings for one data set."""
        positives = self.positives_of.get(dataset, self.positives)
        return self.model_copy(update={"positives": positives, "positives_of": {}})

    construction: Construction = Field("final", description="Which scores: see docs/method.md.")
    scores: Scores | None = Field(
        None,
        description="`softmax`: the names share a total of 1. `sigmoid`: each class by itself, for "
        "models with a `logit_bias` such as SigLIP. Default: the way that the model was trained.",
    )
    tau: float | None = Field(
        None, gt=0, description="Temperature of the scores; default: 1/logit_scale of the model."
    )
    zeta: float = Field(
        0.3, ge=0, le=1, description="Best snippet score from which a class takes its maximum."
    )
    lambda_: float = Field(
        0.0,
        alias="lambda",
        ge=-1,
        le=1,
        description="Joins global and local: 0 their mean, 1 the larger, -1 the smaller.",
    )
    grid: Grid | None = Field(
        None,
        description="Only the snippets of this one of the data set's grids; default: those of all.",
    )
    standardise: bool = Field(
        False,
        description="Give all classes' cosines the same mean and deviation over the train split, "
        "before the softmax. Not with a sigmoid.",
    )
    positives: Positive | None = Field(
        None,
        description="What the labels of an image are made to sum to, on the mean over the train "
        "split: about as many objects as images show. They get the sharpness of the model's own "
        "temperature, whatever `tau` is. Default: as they come.",
    )
    positives_of: dict[Name, Positive] = Field(
        {},
        description="`positives` of single data sets, as in `{voc2007: 1.5, coco2014: 2.9}`; all "
        "others take `positives`.",
    )
    context_weight: float = Field(
        WEIGHT,
        gt=0,
        description="As how many names the data set's context names count together, at most. More "
        "weight makes fewer labels, of which more are right. In a sigmoid they take no part.",
    )
    join: list[Part] = Field(
        [],
        description="Labels that these are the mean of: those of several teachers, of first and "
        "second views, or refined ones. Besides it, only `positives`, `harden` and `corrections` "
        "count.",
    )
    harden: Harden = Field(Harden(), description="Hard labels.")
    corrections: Place | None = Field(
        None,
        description="CSV of what people corrected (`image_id`, `class`, `value`: 1, 0 or unknown): "
        "see docs/review.md. Training keeps these entries as they are.",
    )


class BoxShape(Section):
    """What boxes of second views are like."""

    classes: int = Field(
        4, ge=1, le=32, description="Boxes an image: one for each of so many most probable classes."
    )
    threshold: float = Field(
        0.5,
        gt=0,
        lt=1,
        description="A box holds the cells of the class activation map from this share of its "
        "range on. More makes smaller boxes.",
    )
    margin: float = Field(
        0.1, ge=0, le=2, description="Share of a box's sides by which it grows on each of them."
    )


class Boxes(BoxShape):
    """Second views: boxes around what a first classifier takes for a class, for the teacher to look
    at again. They are made for every data set, of the train split, once labels name them under
    `join`; docs/method.md."""

    labels: Name = Field(description="Name under `labels`: what the classifier has learnt from.")
    training: Name = Field(
        description="Name under `trainings`: the classifier, a convolutional network."
    )
    encoder: Name | None = Field(
        None, description="Name under `encoders`: whose labels these were; default: the run's own."
    )


class Alignment(Section):
    """The refinement of the pseudo-labels during training."""

    enabled: bool = Field(True, description="False keeps the labels fixed.")
    sigma: float = Field(
        0.4, gt=0, description="Deviation of psi: how far from 0.5 a label still moves."
    )
    step_size: float = Field(
        0.2, gt=0, description="Size of a label step (no unit: logits); `loss: bce` takes 0.8 too."
    )
    every: int = Field(1, ge=1, description="Epochs between label steps.")
    warmup: int = Field(
        10,
        ge=0,
        description="Epochs with fixed labels first: until the network has caught up with them.",
    )


class Asl(Section):
    """The asymmetric loss; the defaults are its authors' for MS-COCO."""

    gamma_positive: float = Field(
        0.0, ge=0, description="Focus on the positives that the network misses."
    )
    gamma_negative: float = Field(
        4.0, ge=0, description="Focus on the negatives that the network takes for positives."
    )
    margin: float = Field(
        0.05, ge=0, lt=1, description="Probability up to which a negative counts nothing."
    )


class Role(Section):
    """The label estimates of ROLE."""

    learning_rate_scale: float = Field(
        10.0, gt=0, description="Their learning rate, as a multiple of the network's."
    )


class Smoothing(Section):
    """Label smoothing, after `positives`: 0.1 in both is the rivals' usual."""

    positive: float = Field(0.0, ge=0, lt=1, description="A label of 1 becomes 1 less this.")
    negative: float = Field(0.0, ge=0, lt=1, description="A label of 0 becomes this.")


class Network(Section):
    """A timm network and the images that it takes."""

    model: str = Field("resnet101", description="Any timm model name.")
    model_args: dict[str, Any] = Field({}, description="Further arguments of timm.create_model.")
    weights: Place | None = Field(
        None,
        description="Start: `timm` for the model's ImageNet weights from timm's hub, a "
        "safetensors or PyTorch file, or nothing for a random start.",
    )
    image_size: int = Field(448, ge=32, description="Width and height of the input in pixels.")

    @property
    def folder(self) -> str:
        """Name of a folder for what this network makes: the model, the size, and a digest of
        weights and arguments that are not timm's own."""
        name = re.sub(r"[^\w.-]", "_", f"{self.model}-{self.image_size}")
        if self.weights == "timm" and not self.model_args:
            return name
        text = json.dumps([self.weights, self.model_args], sort_keys=True)
        return f"{name}-{hashlib.blake2b(text.encode(), digest_size=4).hexdigest()}"


class Training(Network):
    """The classifier and how it learns. `config/voc2012.yaml` has the paper's settings."""

    @property
    def network(self) -> Network:
        """The keys that the features of a frozen trunk depend on."""
        return Network.model_validate(self.model_dump(include=set(Network.model_fields)))

    trunk: Literal["trained", "frozen"] = Field(
        "trained",
        description="`trained`: all layers learn, as in the paper. `frozen`: the network keeps its "
        "weights, which must be given, and only its last layer learns, from features that are "
        "computed once for all trainings of the same `model`, `model_args`, `weights` and "
        "`image_size` (linear probing). Then `crop_scale`, `flip` and `precision` have no effect.",
    )
    start_from: str | None = Field(
        None,
        description="Name under `trainings`: start from the classifier that this training makes "
        "of the same labels, rather than with a new head on `weights`. For fine-tuning after a "
        "frozen trunk has got its head (LP-FT: Kumar et al., 2022); `model` and `model_args` must "
        "be the same.",
    )
    epochs: int = Field(20, ge=1, description="Passes over the train split.")
    batch_size: int = Field(8, ge=1, description="Images a step of the optimiser.")
    learning_rate: float = Field(1e-5, gt=0, description="Peak learning rate.")
    weight_decay: float = Field(
        0.0, ge=0, description="Weight decay; decoupled with adamw, added to the gradient with sgd."
    )
    optimizer: Literal["adamw", "sgd"] = Field("adamw", description="SGD has momentum 0.9.")
    schedule: Literal["constant", "cosine"] = Field(
        "constant", description="Learning rate over the epochs; cosine falls to 0."
    )
    warmup_steps: int = Field(0, ge=0, description="Steps of linear warm-up of the learning rate.")
    loss: LossName = Field(
        "kl",
        description=" ".join(f"`{name}`: {loss.description}." for name, loss in LOSSES.items())
        + f" {', '.join(f'`{name}`' for name, loss in LOSSES.items() if loss.hard_labels)} are of "
        "single-positive learning: they need hard `positives` and no `alignment`.",
    )
    asl: Asl = Field(Asl(), description="For the loss `asl` only.")
    expected_positives: float = Field(
        1.5,
        gt=0,
        description="For the losses `epr` and `role` only: your guess how many classes an image "
        "shows on the average. The default is PASCAL VOC's.",
    )
    role: Role = Field(Role(), description="For the loss `role` only.")
    positives: Positives = Field(
        "soft",
        description="What becomes of the pseudo-labels first. `soft`: they stay as they are. "
        "`top1`: the best class of each image becomes its one positive, 1, and the others 0. "
        "`threshold`: classes from `threshold` on become 1, the others 0.",
    )
    smoothing: Smoothing = Field(Smoothing(), description="Softening of the labels.")
    crop_scale: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Smallest share of the image's area that the random crop keeps; 1 for none.",
    )
    flip: bool = Field(True, description="Mirror images at random.")
    precision: Precision = Field(
        "fp32", description="Arithmetic of the forward pass; less than fp32 is for GPUs."
    )
    alignment: Alignment = Field(Alignment(), description="Refinement of the labels.")
    threshold: float = Field(
        0.5,
        gt=0,
        lt=1,
        description="Probability from which `predict` names a label, and `positives: threshold` "
        "observes one.",
    )
    seed: int = Field(0, ge=0, le=MAX_SEED, description="Seed of weights, order and augmentation.")


class Apply(Section):
    """A trained classifier, and a data set that `snakemake apply` scores with it."""

    model: Place = Field(
        description="Model folder of the classifier, as in "
        "`results/photos/vit-b-32/final/photos/model`; one that this run makes is made first."
    )
    dataset: Name = Field(
        description="Name under `datasets`: all of its splits are scored, one job and one table "
        "per shard."
    )


class Evaluate(Section):
    """How scores are measured."""

    difficult: Difficult = Field(
        "ignore", description="What an image counts as for a class it shows only difficultly."
    )
    ap: AveragePrecision = Field("all", description="AP over all points, or VOC2007's 11.")


class Sweep(Section):
    """Which labels `snakemake sweep` measures: every combination, on every split with truth.

    `positives` and `harden` of labels are not among them: the one changes no mAP, the other is
    no ranking."""

    constructions: list[Construction] = Field(
        list(get_args(Construction)), min_length=1, description="As `labels.NAME.construction`."
    )
    tau: list[Annotated[float, Field(gt=0)]] = Field(
        [0.5, 1, 2, 3, 5, 10],
        min_length=1,
        description="Temperatures as multiples of the model's own, 1/logit_scale.",
    )
    zeta: list[Annotated[float, Field(ge=0, le=1)]] = Field(
        [0, 0.05, 0.1, 0.3, 0.5], min_length=1, description="As `labels.NAME.zeta`."
    )
    lambda_: list[Annotated[float, Field(ge=-1, le=1)]] = Field(
        [-1, 0, 1], alias="lambda", min_length=1, description="As `labels.NAME.lambda`."
    )
    standardise: list[bool] = Field(
        [False, True], min_length=1, description="As `labels.NAME.standardise`."
    )


class Ablation(Section):
    """What `snakemake ablation` compares: variants of a training, each with several seeds."""

    training: str = Field(
        "aligned", description="Name under `trainings` of the training that the variants vary."
    )
    table: OwnPlace = Field(
        "config/ablation.tsv",
        validate_default=True,
        description="The variants, a row each: CSV, or TSV by its suffix; docs/ablation.md has "
        "its columns.",
    )
    seeds: list[Annotated[int, Field(ge=0, le=MAX_SEED)]] = Field(
        [0, 1, 2], min_length=1, description="Seeds of the trainings, for every variant."
    )


class Runtime(Section):
    """How fast, not what: changing these re-runs nothing."""

    device: str = Field(
        "auto",
        description="`auto`: a GPU that no other job has, where there is one. `cuda`: the same, "
        "and an error where there is none. `cuda:1`: that one, though others have it. `cpu`.",
    )
    engine: Engine = Field(
        "auto",
        description="What runs the encoder on a CPU: torch, ONNX Runtime, or `auto`, which "
        "measures at the start of a long job. Vectors agree to a cosine of 0.9999; name one and a "
        "`batch_size` where bytes must be the same on every machine.",
    )
    batch_size: int = Field(
        0,
        ge=0,
        le=1_000_000,
        description="Views a forward pass of the encoder; 0 chooses, as `engine` does.",
    )
    workers: int = Field(
        -1,
        ge=-1,
        le=1024,
        description="Processes that decode images (on a CPU: and encode them); -1 chooses.",
    )
    train_devices: int = Field(
        1,
        ge=1,
        le=1024,
        description="GPUs that share every batch of a training; `--resources gpu` may allow fewer. "
        "The result is that of one, but for rounding and dropout. With `device: cpu`, processes: "
        "for networks without batch norm.",
    )


class Config(Section):
    """Configuration of the CDUL workflow."""

    # Braces mark wildcards in Snakemake's file names.
    results: Annotated[Place, Field(pattern=r"^[^{}]+$")] = Field(
        "results", description="Folder for all that is made."
    )
    run: Annotated[list[Run], BeforeValidator(_runs, json_schema_input_type=Run | list[Run])] = (
        Field(Run(), min_length=1, validate_default=True, description="What to make.")
    )
    datasets: dict[Name, Dataset] = Field({}, description="Data sets by a name of your choice.")
    encoders: dict[Name, Encoder] = Field({}, description="Encoders by a name of your choice.")
    labels: dict[Name, Labels] = Field({}, description="Pseudo-labels by a name of your choice.")
    trainings: dict[Name, Training] = Field({}, description="Trainings by a name of your choice.")
    boxes: dict[Name, Boxes] = Field({}, description="Second views by a name of your choice.")
    apply: dict[Name, Apply] = Field(
        {}, description="Classifiers for large collections by a name of your choice."
    )
    evaluate: Evaluate = Field(Evaluate(), description="Measuring.")
    sweep: Sweep = Field(Sweep(), description="Comparing label settings.")
    ablation: Ablation = Field(Ablation(), description="Comparison of variants.")
    runtime: Runtime = Field(Runtime(), description="Speed.")
    container: Annotated[Place, Field(min_length=1)] = Field(
        "cdul.sif",
        description="For `--sdm apptainer` only: the image that jobs run in, a file or an address "
        "such as `docker://...`, with this package in it: docs/deployment.md.",
    )

    @property
    def made(self) -> list[Made]:
        """What `run` makes, each once."""
        products = (product(r.datasets, r.encoders, r.labels, r.trainings) for r in self.run)
        return list(dict.fromkeys(Made(*names) for found in products for names in found))

    def boxed(self, dataset: str, encoder: str, boxes: str) -> "Boxed":
        """The images of `dataset` with second views, for a run by `encoder`."""
        return Boxed(dataset, self.boxes[boxes].encoder or encoder, boxes)

    @property
    def all_boxed(self) -> dict[str, "Boxed"]:
        """All sets of images with second views that there can be, by their folder's name."""
        found = starmap(self.boxed, product(self.datasets, self.encoders, self.boxes))
        return {boxed.folder: boxed for boxed in found}

    @property
    def ablated(self) -> Run:
        """The run whose data sets the ablation is made on: the first that names its training."""
        return next((r for r in self.run if self.ablation.training in r.trainings), self.run[0])


def _section(model: Any, keys: list[Any]) -> Any:
    """The section class at a path of keys."""
    for key in keys:
        field = next(f for n, f in model.model_fields.items() if (f.alias or n) == key)
        model = field.annotation
        if get_args(model):
            return get_args(model)[-1]
    return model


def _explain(error: dict[str, Any]) -> str:
    # Of the products in `run` there is mostly one, which has no number.
    place = [str(key) for i, key in enumerate(error["loc"]) if error["loc"][0] != "run" or i != 1]
    where = ".".join(place)
    if error["type"] == "extra_forbidden":
        parents = place[:1] + place[2:-1] if len(place) > 2 else place[:-1]
        section = Config
        for key in parents:
            section = _section(section, [key])
        known = [f.alias or n for n, f in section.model_fields.items()]
        return f"config: unknown key {where!r}{nearest(place[-1], known)}"
    if error["type"] == "missing":
        return f"config: {where!r} is missing"
    if error["type"] == "string_pattern_mismatch" and place[-1] == "[key]":
        return (
            f"config: {place[1]!r} under {place[0]!r} is not a usable name: letters, digits, "
            "'.', '_' and '-' only, since it names a folder"
        )
    problem = error["msg"].removeprefix("Value error, ")
    return f"config: {where!r} is {error['input']!r}: {problem}"


def load(values: dict[str, Any], *, check_run: bool = True) -> Config:
    """Check the values of a config file; without `check_run`, not whether `run` names sections.

    Raises UserError of one line that names the key, what is wrong with it, and for an unknown key
    or name the nearest valid one.
    """
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        raise UserError(_explain(dict(error.errors()[0]))) from error
    for kind, names in (pair for run in config.run for pair in run) if check_run else ():
        sections = getattr(config, kind)
        for name in names:
            if name not in sections:
                raise UserError(
                    f"config: run.{kind} names {name!r}, which is not under {kind!r}"
                    + nearest(name, sections)
                )
    wildcards = {kind: kind.removesuffix("s") for kind in ("datasets", "encoders", "trainings")}
    for kind, wildcard in {**wildcards, "labels": "labels"}.items():
        for name in results.taken(wildcard) & set(getattr(config, kind)):
            raise UserError(
                f"config: {name!r} under {kind!r} is the name of a folder of results; "
                "choose another"
            )
    for name, dataset in config.datasets.items():
        if (dataset.root is None) != (dataset.reader == "demo"):
            problem = "needs a 'root'" if dataset.root is None else "has no use for 'root'"
            raise UserError(f"config: datasets.{name}: reader {dataset.reader!r} {problem}")
        if dataset.context_keep and not dataset.context:
            raise UserError(f"config: datasets.{name}: 'context_keep' has no use without 'context'")
        if "train" not in dataset.splits:
            raise UserError(f"config: datasets.{name}.splits: 'train' is missing")
    for name, labels in config.labels.items():
        if None not in (labels.harden.threshold, labels.harden.top_k):
            raise UserError(f"config: labels.{name}.harden: give 'threshold' or 'top_k', not both")
        if labels.join:
            _check_join(config, name)
    for name in config.boxes:
        _check_boxes(config, name)
    for name, applied in config.apply.items():
        _check_named(config, f"apply.{name}.dataset", "datasets", applied.dataset)
    for made in config.made if check_run else ():
        grid, grids = config.labels[made.labels].grid, config.datasets[made.dataset].grid
        if grid and grid not in grids:
            raise UserError(
                f"config: labels.{made.labels}.grid is {list(grid)}, and "
                f"datasets.{made.dataset}.grid has only {', '.join(str(list(g)) for g in grids)}"
            )
        for part in config.labels[made.labels].join:
            encoder = part.encoder or made.encoder
            if part.boxes is not None and config.encoders[encoder].views == "dense":
                raise UserError(
                    f"config: labels.{made.labels}.join: encoders.{encoder} has dense views, which "
                    f"boxes are not cut of; name an encoder with crops beside {part.boxes!r}"
                )
    for name, training in config.trainings.items():
        if training.trunk == "frozen" and training.weights is None:
            raise UserError(
                f"config: trainings.{name}: a frozen trunk needs 'weights': 'timm' or a file"
            )
        if training.start_from is not None and check_run:
            _check_start(config.trainings, name, training.start_from)
        if LOSSES[training.loss].hard_labels:
            for wrong, change in (
                (training.positives == "soft", "positives: top1"),
                (training.alignment.enabled, "alignment: {enabled: false}"),
            ):
                if wrong:
                    raise UserError(
                        f"config: trainings.{name}: loss {training.loss!r} learns from hard "
                        f"positives, which are given; set '{change}'"
                    )
    return config


def _check_start(trainings: Mapping[str, Training], name: str, start: str) -> None:
    """Raise UserError where a training cannot start from the one called `start`."""
    training, where = trainings[name], f"config: trainings.{name}.start_from"
    if (first := trainings.get(start)) is None:
        near = nearest(start, list(trainings))
        raise UserError(f"{where} names {start!r}, which is not under 'trainings'{near}")
    if training.trunk == "frozen":
        raise UserError(f"{where}: a frozen trunk gets a head of its own; set 'trunk: trained'")
    if (training.model, training.model_args) != (first.model, first.model_args):
        raise UserError(
            f"{where}: {start!r} trains {first.model} with {first.model_args}, "
            f"not {training.model} with {training.model_args}"
        )
    if first.start_from is not None:
        raise UserError(f"{where}: {start!r} starts from another training itself")


def _check_named(config: Config, where: str, kind: str, name: str | None) -> None:
    """Raise UserError where a section of a kind is named that is not there."""
    sections = getattr(config, kind)
    if name is not None and name not in sections:
        raise UserError(
            f"config: {where} names {name!r}, which is not under {kind!r}{nearest(name, sections)}"
        )


def _check_join(config: Config, name: str) -> None:
    """Raise UserError for labels that cannot be joined of what they name."""
    labels, where = config.labels[name], f"labels.{name}.join"
    if useless := labels.model_fields_set - {
        *("join", "positives", "positives_of", "harden", "corrections")
    }:
        key = min(useless).rstrip("_")
        raise UserError(
            f"config: labels.{name}: '{key}' has no use beside 'join'; set it for the labels that "
            "are joined"
        )
    for part in labels.join:
        for kind, named in (
            ("labels", part.labels),
            ("encoders", part.encoder),
            ("boxes", part.boxes),
            ("trainings", part.training),
        ):
            _check_named(config, where, kind, named)
        if part.boxes is not None and part.training is not None:
            raise UserError(
                f"config: {where} names boxes and a training in one entry; trainings are of the "
                "data set's own views"
            )
        of = config.labels[part.labels]
        if of.join or of.corrections:
            problem = "are joined themselves" if of.join else "have 'corrections'"
            raise UserError(
                f"config: {where} names {part.labels!r}, which {problem}; "
                + ("name their parts" if of.join else f"give them to labels.{name}")
            )
        if part.boxes is not None and of.grid:
            raise UserError(
                f"config: labels.{part.labels}.grid: boxes, which {where} names, have none"
            )


def _check_boxes(config: Config, name: str, behind: tuple[str, ...] = ()) -> None:
    """Raise UserError for boxes of what is not there, or of labels that they make themselves."""
    boxes, where = config.boxes[name], f"boxes.{name}"
    if name in behind:
        raise UserError(
            f"config: {where}: its classifier learns from labels that these boxes make: "
            + " needs ".join((*behind, name))
        )
    for kind, named in (
        ("labels", boxes.labels),
        ("trainings", boxes.training),
        ("encoders", boxes.encoder),
    ):
        _check_named(config, where, kind, named)
    for part in config.labels[boxes.labels].join:
        if part.boxes is not None:
            _check_named(config, f"labels.{boxes.labels}.join", "boxes", part.boxes)
            _check_boxes(config, part.boxes, (*behind, name))


def clashes(overlays: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """What is lost where configs of different data sets are laid over each other: a line for each.

    `overlays` are names of files and their values, in the order of the command line. Only such are
    compared whose `run` names data sets and that have none of them in common: all others are meant
    to change what lies beneath.
    """
    sets = []
    for name, values in overlays:
        runs = _runs(values.get("run") or {})
        if datasets := {d for run in runs for d in run.get("datasets") or ()}:
            sets.append((name, values, datasets))
    found = []
    made = sets[-1][2] if sets else set()
    for (lower, below, of_lower), (upper, above, of_upper) in combinations(sets, 2):
        if of_lower & of_upper:
            continue
        if not of_lower <= made:
            found.append(f"{upper} replaces 'run' of {lower}; a list under 'run' makes both")
        for kind in ("encoders", "labels", "trainings"):
            ours, theirs = below.get(kind) or {}, above.get(kind) or {}
            found += [
                f"{upper} changes {kind}.{name} of {lower}; give one of the two another name"
                for name in ours.keys() & theirs.keys()
                if _changes(ours[name], theirs[name])
            ]
    return found


def _changes(values: Mapping[str, Any], over: Mapping[str, Any]) -> bool:
    """Whether a section laid over another one changes a key that this has."""
    return any(
        _changes(values[key], over[key])
        if isinstance(values[key], Mapping) and isinstance(over[key], Mapping)
        else values[key] != over[key]
        for key in values.keys() & over.keys()
    )


def read_training(text: str) -> Training:
    """Settings of a training from JSON, or from a YAML file. Raises UserError as `load` does."""
    values = {"run": {}, "trainings": {"settings": _read_settings(text)}}
    return load(values, check_run=False).trainings["settings"]


def read_labels(text: str) -> Labels:
    """Settings of labels from JSON, or from a YAML file. Raises UserError as `load` does."""
    values = {"run": {}, "labels": {"settings": _read_settings(text)}}
    labels = load(values, check_run=False).labels["settings"]
    if labels.positives_of:
        raise UserError(
            "--settings: give this data set's number as 'positives', not 'positives_of'"
        )
    return labels


def read_box_shape(text: str) -> BoxShape:
    """Settings of second views from JSON, or from a YAML file. Raises UserError as `load` does."""
    try:
        return BoxShape.model_validate(_read_settings(text))
    except ValidationError as error:
        raise UserError(_explain(dict(error.errors()[0]))) from error


def read_network(text: str) -> Network:
    """Settings of a network from JSON, or from a YAML file. Raises UserError as `load` does."""
    return read_training(text).network


def read_sweep(text: str) -> Sweep:
    """Settings of a sweep from JSON, or from a YAML file. Raises UserError as `load` does."""
    return load({"run": {}, "sweep": _read_settings(text)}, check_run=False).sweep


def _read_settings(text: str) -> dict[str, Any]:
    path = Path(text)
    if not text.lstrip().startswith("{"):
        if not path.is_file():
            raise UserError(f"--settings {text}: neither JSON nor a file")
        content: str | bytes = path.read_bytes()
    else:
        content = text
    try:
        return yaml.safe_load(content) or {}
    # The others are of bytes that are no text, of dates like 2001-99-99, and of deep nesting.
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"--settings: not readable as YAML or JSON: {first_line(error)}") from error


def schema() -> str:
    """The JSON schema of the config."""
    return json.dumps(Config.model_json_schema(), indent=2) + "\n"


def _type_name(schema: dict[str, Any]) -> str:
    if "enum" in schema:
        return ", ".join(f"`{v}`" for v in schema["enum"])
    if "anyOf" in schema:
        return " or ".join(_type_name(s) for s in schema["anyOf"])
    if schema.get("type") == "array" and "items" in schema:
        return f"list of {_type_name(schema['items'])}"
    if "prefixItems" in schema:
        return f"list of {len(schema['prefixItems'])} {_type_name(schema['prefixItems'][0])}s"
    name = schema.get("type", "mapping")
    return {"null": "nothing", "object": "mapping"}.get(name, name)


def reference() -> str:
    """The config's reference in Markdown, from the descriptions of its keys."""
    lines = [
        "# Configuration",
        "",
        "Written by `cdul config-reference` from `cdul_steps/config.py`; do not edit.",
        "",
        "`config/config.yaml` of the working directory, or else the project's own, is always read",
        "first. Another file given with `--configfile` is laid over it, key by key; lists are",
        "replaced as a whole. `run` says which sections are made. Paths are relative to the",
        "working directory; `~` and `$VARIABLES` in them are expanded. Class files, context lists,",
        "tables of variants and models that come with the project, such as",
        "`config/classes/voc.yaml`, are found from anywhere.",
        "Scientific values re-run what depends on them; `runtime` re-runs nothing.",
    ]
    headings: list[tuple[str, type[Section]]] = [
        ("Top level", Config),
        ("run", Run),
        ("datasets.NAME", Dataset),
        ("datasets.NAME.scenes", Scenes),
        ("encoders.NAME", Encoder),
        ("labels.NAME", Labels),
        ("labels.NAME.join", Part),
        ("labels.NAME.harden", Harden),
        ("trainings.NAME", Training),
        ("trainings.NAME.asl", Asl),
        ("trainings.NAME.role", Role),
        ("trainings.NAME.smoothing", Smoothing),
        ("trainings.NAME.alignment", Alignment),
        ("boxes.NAME", Boxes),
        ("apply.NAME", Apply),
        ("evaluate", Evaluate),
        ("sweep", Sweep),
        ("ablation", Ablation),
        ("runtime", Runtime),
    ]
    for heading, section in headings:
        text = cleandoc(section.__doc__ or "")
        lines += ["", f"## {heading}", "", text, "", "| key | type | default | meaning |"]
        lines.append("|---|---|---|---|")
        properties = section.model_json_schema()["properties"]
        for name, field in section.model_fields.items():
            key = field.alias or name
            default = "required" if field.is_required() else _default(field.default)
            kind = _type_name(properties[key])
            description = (field.description or "").replace("|", "\\|")
            lines.append(f"| `{key}` | {kind} | {default} | {description} |")
    return "\n".join(lines) + "\n"


def _default(value: Any) -> str:
    if isinstance(value, Section):
        return "see below"
    return f"`{json.dumps(value)}`"
