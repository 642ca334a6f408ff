"""The workflow's configuration: typed, documented, and checked before anything runs."""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
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
    """Expand `~` and environment variables, such as a cluster's $SCRATCH, in a path."""
    if not isinstance(value, str | Path):
        return value
    # Not with pathlib, which would normalise `local-dir:./folder`.
    expanded = os.path.expandvars(os.path.expanduser(str(value)))  # noqa: PTH111
    if missing := re.search(r"\$\{?(\w+)", expanded):
        raise ValueError(f"the environment variable {missing[1]} is not set")
    return expanded


def _own(value: str) -> str:
    """Find a file that comes with the project from any working directory."""
    folder = value.removeprefix(LOCAL)
    return value.removesuffix(folder) + shipped(folder)


def _runs(value: Any) -> Any:
    """Turn a single run into a list of one."""
    return value if isinstance(value, list) else [value]


def _several(value: Any) -> Any:
    """Turn a single grid into a list of one."""
    if isinstance(value, list | tuple) and not any(isinstance(v, list | tuple) for v in value):
        return [value]
    return value


LOCAL = "local-dir:"
"""Prefix of an encoder name that is a folder."""
ExpandedPath = Annotated[str, BeforeValidator(_expand)]
ShippedPath = Annotated[ExpandedPath, AfterValidator(_own)]
Positive = Annotated[float, Field(gt=0)]
Side = Annotated[int, Field(ge=1, le=8)]
Grid = tuple[Side, Side]
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
"""Valid names for a folder."""
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
    """The names of the sections that one result is made with."""

    dataset: str
    encoder: str
    labels: str
    training: str


class Boxed(NamedTuple):
    """A data set's images with second views; `encoder` made the labels that they are based on."""

    dataset: str
    encoder: str
    boxes: str

    @property
    def folder(self) -> str:
        """The name of its results folder, next to those of data sets."""
        # Names under `datasets` never contain `~`.
        return "~".join(self)


class Run(Section):
    """What `cdul run` makes: every combination of the sections named here. With a list of such
    mappings it makes the combinations of each, for example two data sets with different
    trainings."""

    datasets: list[str] = Field(["demo"], min_length=1, description="Names under `datasets`.")
    encoders: list[str] = Field(["tiny-clip"], min_length=1, description="Names under `encoders`.")
    labels: list[str] = Field(["final"], min_length=1, description="Names under `labels`.")
    trainings: list[str] = Field(["aligned"], min_length=1, description="Names under `trainings`.")


class Scenes(Section):
    """The generated images of the demo."""

    seed: int = Field(0, ge=0, le=MAX_SEED, description="Random seed of the drawings.")
    train: int = Field(2000, ge=1, le=1_000_000, description="Images of the train split.")
    test: int = Field(500, ge=1, le=1_000_000, description="Images of the test split.")
    size: int = Field(192, ge=64, le=4096, description="Width and height in pixels.")


class Dataset(Section):
    """Where the images are, what the classes are called, and how images are cut into views."""

    reader: Literal["demo", Reader] = Field(
        description="`demo`: generated scenes. `voc`: one year's folder of the PASCAL VOC devkit. "
        "`coco`: one year of COCO with its `instances` files. `nuswide`: NUS-WIDE. `folder`: all "
        "images below a folder; no labels are needed. `table`: a CSV or Parquet file with the "
        "column `path` and optionally `image_id`, `split` and one 1/0 column per class. "
        "`webdataset`: tar files with images. `parquet`: Parquet files with images. "
        "docs/datasets.md describes the layouts."
    )
    root: ExpandedPath | None = Field(
        None,
        description="Folder of the data set, relative to the working directory (for `table`: the "
        "file; for `nuswide`: the folder or `nus_wid_data.csv`; for `webdataset` and `parquet`: "
        "also a file pattern such as `shards/{00000..00099}.tar` or `data/*.parquet`; for "
        "`folder`: also a URL such as `s3://bucket/photos`). Not for `demo`, whose images are "
        "generated in the results folder.",
    )
    classes: ShippedPath = Field(
        description="File with the class names in order: a YAML list (entries are names, or "
        "`{name: ..., aliases: [...]}`), or a text file with one name per line."
    )
    context: ShippedPath | None = Field(
        None,
        description="File with context names: what else the images may show, in the same format as "
        "`classes`. They compete with the classes but get no labels, so that an image may show "
        "none of the classes. docs/method.md explains when they matter.",
    )
    context_nearness: float = Field(
        NEARNESS,
        gt=0,
        le=1,
        description="A context name is left out if its text embedding is closer than this to that "
        "of a class (cosine, centred on the mean of everyday names). With 1, only names that equal "
        "a class name except for case and plural are left out.",
    )
    context_keep: list[str] = Field(
        [], description="Context names to keep, however close to a class they are."
    )
    splits: dict[Split, str] = Field(
        {"train": "train"},
        description="The data set's own name for the images to train on (`train`) and, optionally, "
        "to evaluate on (`test`): an image set of VOC (`trainval`), COCO (`train2014`) or NUS-WIDE "
        "(`Train`), a folder below `root` (`.` for all), a value of the table's `split` column, or "
        "for archives (`.` for all) a folder or a pattern below `root`, such as `train/*.tar`.",
    )
    labelled_only: bool = Field(
        False,
        description="Leave out images without any positive label, as is usual for results on COCO "
        "and NUS-WIDE. This reads the ground truth; otherwise, it is only used for measuring.",
    )
    exclude: list[Annotated[str, Field(min_length=1)]] = Field(
        [],
        description="Patterns of images and folders to leave out, such as `thumbs` or "
        "`raw/*.png`. A pattern with a `/` is matched against the path below `root`, any other "
        "against each name in the path; `*` matches any text. An archive counts as a folder. The "
        "number of images left out is recorded. The reader `folder` always leaves out hidden files "
        "and a network disk's own folders, such as `@eaDir`.",
    )
    expected_images: dict[Split, Annotated[int, Field(ge=1)]] | None = Field(
        None,
        description="Images of each split in the complete data set; any other number stops the run "
        "before it starts. Use `null` to work with part of a data set.",
    )
    grid: Annotated[
        list[Grid], BeforeValidator(_several, json_schema_input_type=Grid | list[Grid])
    ] = Field(
        (3, 3),
        min_length=1,
        validate_default=True,
        description="Snippets per image: rows, columns (1 to 8). Several grids, such as "
        "`[[2, 2], [3, 3]]`, give the snippets of all grids.",
    )
    overlap: float = Field(
        0.0,
        ge=0,
        le=0.9,
        description="Overlap of adjacent snippets, as a share of their side.",
    )
    shard_size: int = Field(
        1000,
        ge=1,
        le=1_000_000,
        description="Images per shard; each shard is one encode job and one file of the Zarr "
        "store.",
    )
    max_pixels: int = Field(
        MAX_PIXELS,
        ge=1,
        le=MAX_PIXELS,
        description="Images with more pixels (width x height) get the status `too_large`.",
    )
    max_failed_share: float = Field(
        0.05,
        ge=0,
        le=1,
        description="The run stops if more than this share of a split's images is unusable.",
    )
    scenes: Scenes = Field(Scenes(), description="For the reader `demo` only.")


class Encoder(Section):
    """The CLIP model that scores views against class names."""

    model: ShippedPath = Field(
        description="open_clip's model name (`RN50x64`), or `local-dir:FOLDER` with "
        "`open_clip_config.json` and the weights."
    )
    pretrained: ExpandedPath | None = Field(
        None,
        description="open_clip's tag (`openai`), downloaded once and cached, or a checkpoint file. "
        "Not for `local-dir:`.",
    )
    templates: list[Annotated[str, Field(pattern=r"\{\}")]] = Field(
        ["a photo of a {}"],
        min_length=1,
        description="Prompts, with `{}` for the class name; several are averaged.",
    )
    aliases: bool = Field(
        True,
        description="True averages all names that the class file lists for a class; false uses "
        "only the first.",
    )
    precision: Precision = Field(
        "fp32", description="Arithmetic of the image tower. Use fp32 on a CPU."
    )
    resize_mode: ResizeMode | None = Field(
        None,
        description="How a view is resized to the model's square input; default: as the model "
        "defines. `squash` keeps the whole snippet, `shortest` crops its long side.",
    )
    views: Views = Field(
        "crops",
        description="`crops`: each view is cut out and encoded separately, as in the paper. "
        "`dense`: the whole image is encoded once, squashed to twice the model's input size, and "
        "each view is the mean of the last layer's features in its region; see docs/method.md.",
    )


class Harden(Section):
    """Hard pseudo-labels, 0 or 1; by default labels stay soft."""

    threshold: float | None = Field(
        None, gt=0, le=1, description="Labels of at least this value become 1, all others 0."
    )
    top_k: int | None = Field(
        None, ge=1, description="This many of an image's largest labels become 1, all others 0."
    )


class Part(Section):
    """One of the tables of labels that are averaged."""

    labels: Name = Field(description="Name under `labels`: how the scores become labels.")
    encoder: Name | None = Field(
        None, description="Name under `encoders`: another teacher; default: the run's."
    )
    boxes: Name | None = Field(
        None,
        description="Name under `boxes`: labels of these second views instead of the data set's "
        "own views.",
    )
    training: Name | None = Field(
        None,
        description="Name under `trainings`: the labels as refined by this training, for a second "
        "round of training.",
    )


class Labels(Section):
    """How scores become pseudo-labels."""

    def of(self, dataset: str) -> "Labels":
        """These settings, for one data set."""
        positives = self.positives_of.get(dataset, self.positives)
        return self.model_copy(update={"positives": positives, "positives_of": {}})

    construction: Construction = Field(
        "final", description="Which scores to use; see docs/method.md."
    )
    scores: Scores | None = Field(
        None,
        description="`softmax`: the scores of all names sum to 1. `sigmoid`: each class is scored "
        "independently, for models with a `logit_bias` such as SigLIP. Default: as the model was "
        "trained.",
    )
    tau: float | None = Field(
        None, gt=0, description="Temperature of the scores; default: 1/logit_scale of the model."
    )
    zeta: float = Field(
        0.3,
        ge=0,
        le=1,
        description="A class takes its best snippet score if that is at least this, otherwise its "
        "worst.",
    )
    lambda_: float = Field(
        0.0,
        alias="lambda",
        ge=-1,
        le=1,
        description="Combines global and local scores: 0 is their mean, 1 the larger, -1 the "
        "smaller.",
    )
    grid: Grid | None = Field(
        None,
        description="Use only the snippets of this grid of the data set; default: all grids.",
    )
    standardise: bool = Field(
        False,
        description="Give the cosines of all classes the same mean and standard deviation over the "
        "train split, before the softmax. Not with a sigmoid.",
    )
    positives: Positive | None = Field(
        None,
        description="Mean sum of an image's labels over the train split, to which the labels are "
        "rescaled: roughly the number of objects per image. The labels get the sharpness of the "
        "model's own temperature, whatever `tau` is. Default: no rescaling.",
    )
    positives_of: dict[Name, Positive] = Field(
        {},
        description="`positives` for individual data sets, such as "
        "`{voc2007: 1.5, coco2014: 2.9}`; all others use `positives`.",
    )
    context_weight: float = Field(
        WEIGHT,
        gt=0,
        description="The data set's context names together count as at most this many names. More "
        "weight gives fewer labels, more of them correct. A sigmoid ignores context names.",
    )
    join: list[Part] = Field(
        [],
        description="Labels to average: those of several teachers, of first and second views, or "
        "refined ones. Apart from `join`, only `positives`, `harden` and `corrections` apply.",
    )
    harden: Harden = Field(Harden(), description="Hard labels.")
    corrections: ExpandedPath | None = Field(
        None,
        description="CSV of corrections made by hand (`image_id`, `class`, `value`: 1, 0 or "
        "unknown); see docs/review.md. Training never changes these entries.",
    )


class BoxShape(Section):
    """The shape of second views."""

    classes: int = Field(
        4,
        ge=1,
        le=32,
        description="Boxes per image: one for each of this many most probable classes, or for all "
        "classes if there are fewer.",
    )
    threshold: float = Field(
        0.5,
        gt=0,
        lt=1,
        description="A box contains the cells of the class activation map above this share of its "
        "range. A larger value gives smaller boxes.",
    )
    margin: float = Field(
        0.1, ge=0, le=2, description="Margin added on each side, as a share of the box's sides."
    )


class Boxes(BoxShape):
    """Second views: boxes around what a first classifier takes for a class, which the teacher
    scores again. They are made for the train split of every data set if labels name them under
    `join`; see docs/method.md."""

    labels: Name = Field(description="Name under `labels`: the classifier's training labels.")
    training: Name = Field(
        description="Name under `trainings`: the classifier, a convolutional network."
    )
    encoder: Name | None = Field(
        None, description="Name under `encoders`: the teacher of these labels; default: the run's."
    )


class Alignment(Section):
    """The refinement of the pseudo-labels during training."""

    enabled: bool = Field(True, description="False keeps the labels fixed.")
    sigma: float = Field(
        0.4, gt=0, description="Standard deviation of psi: how far from 0.5 a label still moves."
    )
    step_size: float = Field(
        0.2,
        gt=0,
        description="Size of a label step, in logits. With `loss: bce` and all layers trained, 0.8 "
        "gains more; on a frozen trunk, 0.8 loses several points.",
    )
    every: int = Field(1, ge=1, description="Epochs between label steps.")
    warmup: int = Field(
        10,
        ge=0,
        description="Epochs with fixed labels at the start, until the network has caught up.",
    )


class Asl(Section):
    """The asymmetric loss, with its authors' defaults for MS-COCO."""

    gamma_positive: float = Field(
        0.0, ge=0, description="Focus on the positives that the network misses."
    )
    gamma_negative: float = Field(
        4.0, ge=0, description="Focus on the negatives that the network takes for positives."
    )
    margin: float = Field(
        0.05, ge=0, lt=1, description="Negatives up to this probability are ignored."
    )


class Role(Section):
    """The label estimates of ROLE."""

    learning_rate_scale: float = Field(
        10.0, gt=0, description="Their learning rate, as a multiple of the network's."
    )


class Smoothing(Section):
    """Label smoothing, applied after `positives`; baselines usually use 0.1 for both."""

    positive: float = Field(0.0, ge=0, lt=1, description="A label of 1 becomes 1 minus this.")
    negative: float = Field(0.0, ge=0, lt=1, description="A label of 0 becomes this.")


class Network(Section):
    """A timm network and its input size."""

    model: str = Field("resnet101", description="Any timm model name.")
    model_args: dict[str, Any] = Field({}, description="Other arguments of timm.create_model.")
    weights: ExpandedPath | None = Field(
        None,
        description="Initial weights: `timm` for the model's ImageNet weights from timm's hub, a "
        "safetensors or PyTorch file, or nothing for random initialisation.",
    )
    image_size: int = Field(448, ge=32, description="Width and height of the input in pixels.")

    @property
    def folder(self) -> str:
        """Name of the folder of this network's features: the model, the size, and a digest of
        weights and arguments other than timm's own."""
        name = re.sub(r"[^\w.-]", "_", f"{self.model}-{self.image_size}")
        if self.weights == "timm" and not self.model_args:
            return name
        text = json.dumps([self.weights, self.model_args], sort_keys=True)
        return f"{name}-{hashlib.blake2b(text.encode(), digest_size=4).hexdigest()}"


class Training(Network):
    """The classifier and its training. `config/voc2012.yaml` has the paper's settings."""

    @property
    def network(self) -> Network:
        """The keys that the features of a frozen trunk depend on."""
        return Network.model_validate(self.model_dump(include=set(Network.model_fields)))

    trunk: Literal["trained", "frozen"] = Field(
        "trained",
        description="`trained`: all layers are trained, as in the paper. `frozen`: the network "
        "keeps its weights, which must be given, and only its last layer is trained, on features "
        "that are computed once for all trainings with the same `model`, `model_args`, `weights` "
        "and `image_size` (linear probing). Then `crop_scale`, `flip` and `precision` have no "
        "effect.",
    )
    start_from: str | None = Field(
        None,
        description="Name under `trainings`: start from the classifier that this training makes "
        "from the same labels, instead of a new head on `weights`. Use it to fine-tune after "
        "linear probing on a frozen trunk (LP-FT: Kumar et al., 2022); `model` and `model_args` "
        "must be the same.",
    )
    epochs: int = Field(
        20,
        ge=1,
        description="Passes over the train split; twice as many for a frozen trunk with alignment, "
        "whose final head learns in a second round.",
    )
    batch_size: int = Field(8, ge=1, description="Images per optimiser step.")
    learning_rate: float = Field(1e-5, gt=0, description="Peak learning rate.")
    weight_decay: float = Field(
        0.0,
        ge=0,
        description="Weight decay; decoupled for adamw, added to the gradient for sgd.",
    )
    optimizer: Literal["adamw", "sgd"] = Field("adamw", description="SGD has momentum 0.9.")
    schedule: Literal["constant", "cosine"] = Field(
        "constant", description="Learning rate over the epochs; cosine decays to 0."
    )
    warmup_steps: int = Field(0, ge=0, description="Steps of linear warm-up of the learning rate.")
    loss: LossName = Field(
        "kl",
        description=" ".join(f"`{name}`: {loss.description}." for name, loss in LOSSES.items())
        + f" {', '.join(f'`{name}`' for name, loss in LOSSES.items() if loss.hard_labels)} are "
        "losses of single-positive learning: they need hard `positives` and no `alignment`.",
    )
    asl: Asl = Field(Asl(), description="For the loss `asl` only.")
    expected_positives: float = Field(
        1.5,
        gt=0,
        description="For the losses `epr` and `role` only: your estimate of the mean number of "
        "classes per image. The default is that of PASCAL VOC.",
    )
    role: Role = Field(Role(), description="For the loss `role` only.")
    positives: Positives = Field(
        "soft",
        description="How the pseudo-labels are converted before training. `soft`: they are not "
        "changed. `top1`: the best class of each image becomes 1, its only positive, and the "
        "others 0. `threshold`: classes of at least `threshold` become 1, the others 0.",
    )
    smoothing: Smoothing = Field(Smoothing(), description="Softening of the labels.")
    crop_scale: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Smallest share of the image's area that the random crop keeps; 1: no crop.",
    )
    flip: bool = Field(True, description="Mirror images at random.")
    precision: Precision = Field(
        "fp32", description="Arithmetic of the forward pass; less than fp32 is only for GPUs."
    )
    alignment: Alignment = Field(Alignment(), description="Refinement of the labels.")
    threshold: float = Field(
        0.5,
        gt=0,
        lt=1,
        description="Lowest probability at which `predict` names a label, and lowest label that "
        "`positives: threshold` makes positive.",
    )
    seed: int = Field(0, ge=0, le=MAX_SEED, description="Seed of weights, order and augmentation.")


class Apply(Section):
    """A trained classifier and the data set that `cdul run apply` scores with it."""

    model: ExpandedPath = Field(
        description="Model folder of the classifier, such as "
        "`results/photos/vit-b-32/second/photos/model`; if this run makes it, that happens first."
    )
    dataset: Name = Field(
        description="Name under `datasets`: all of its splits are scored, with one job and one "
        "table per shard."
    )


class Evaluate(Section):
    """How scores are measured."""

    difficult: Difficult = Field(
        "ignore",
        description='How to treat images in which a class occurs only as "difficult" objects.',
    )
    ap: AveragePrecision = Field("all", description="AP over all points, or VOC2007's 11 points.")


class Sweep(Section):
    """Which labels `cdul run sweep` measures: every combination, on every split with ground truth.

    `positives` and `harden` are not varied: `positives` does not change mAP, and hard labels are
    not a ranking."""

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
    """What `cdul run ablation` compares: variants of a training, each with several seeds."""

    training: str = Field(
        "aligned", description="Name under `trainings` of the training that the variants modify."
    )
    table: ShippedPath = Field(
        "config/ablation.tsv",
        validate_default=True,
        description="Table of the variants, one per row: CSV, or TSV by its suffix; "
        "docs/ablation.md describes its columns.",
    )
    seeds: list[Annotated[int, Field(ge=0, le=MAX_SEED)]] = Field(
        [0, 1, 2], min_length=1, description="Training seeds for every variant."
    )


class Runtime(Section):
    """Speed only: changing these settings never triggers a re-run."""

    device: str = Field(
        "auto",
        description="`auto`: a GPU that no other job uses, if there is one, or else the CPU. "
        "`cuda`: such a GPU; an error if there is none. `cuda:1`: that GPU, even if other jobs use "
        "it. `cpu`: the CPU.",
    )
    engine: Engine = Field(
        "auto",
        description="What runs the encoder on a CPU: torch, ONNX Runtime, or `auto`, which "
        "measures both at the start of a long job. Their vectors agree to a cosine of 0.9999; set "
        "an engine and a `batch_size` if the bytes must be identical on every machine.",
    )
    batch_size: int = Field(
        0,
        ge=0,
        le=1_000_000,
        description="Views per forward pass of the encoder; 0: chosen by measuring, as for "
        "`engine`.",
    )
    workers: int = Field(
        -1,
        ge=-1,
        le=1024,
        description="Processes that decode images (on a CPU, also encode them); -1: automatic.",
    )
    train_devices: int = Field(
        1,
        ge=1,
        le=1024,
        description="GPUs that share each batch of a training; `--resources gpu` may allow fewer. "
        "The result is the same as with one GPU except for rounding and dropout. With "
        "`device: cpu`: processes, for networks without batch norm.",
    )


class Config(Section):
    """Configuration of the CDUL workflow."""

    # Braces mark wildcards in Snakemake's file names.
    results: Annotated[ExpandedPath, Field(pattern=r"^[^{}]+$")] = Field(
        "results", description="Folder for all results."
    )
    run: Annotated[list[Run], BeforeValidator(_runs, json_schema_input_type=Run | list[Run])] = (
        Field(Run(), min_length=1, validate_default=True, description="What to make.")
    )
    datasets: dict[Name, Dataset] = Field({}, description="Data sets, by names that you choose.")
    encoders: dict[Name, Encoder] = Field({}, description="Encoders, by names that you choose.")
    labels: dict[Name, Labels] = Field({}, description="Pseudo-labels, by names that you choose.")
    trainings: dict[Name, Training] = Field({}, description="Trainings, by names that you choose.")
    boxes: dict[Name, Boxes] = Field({}, description="Second views, by names that you choose.")
    apply: dict[Name, Apply] = Field(
        {}, description="Classifiers for large collections, by names that you choose."
    )
    evaluate: Evaluate = Field(Evaluate(), description="Evaluation.")
    sweep: Sweep = Field(Sweep(), description="Comparison of label settings.")
    ablation: Ablation = Field(Ablation(), description="Comparison of training variants.")
    runtime: Runtime = Field(Runtime(), description="Speed.")
    container: Annotated[ExpandedPath, Field(min_length=1)] = Field(
        "cdul.sif",
        description="For `--sdm apptainer` only: the container image that jobs run in, a file or "
        "an address such as `docker://...`. It must contain this package; see docs/deployment.md.",
    )

    @property
    def made(self) -> list[Made]:
        """The combinations that `run` makes, without duplicates."""
        products = (product(r.datasets, r.encoders, r.labels, r.trainings) for r in self.run)
        return list(dict.fromkeys(Made(*names) for found in products for names in found))

    def boxed(self, dataset: str, encoder: str, boxes: str) -> "Boxed":
        """The images of `dataset` with second views, for a run with `encoder`."""
        return Boxed(dataset, self.boxes[boxes].encoder or encoder, boxes)

    @property
    def all_boxed(self) -> dict[str, "Boxed"]:
        """All possible sets of images with second views, by folder name."""
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
    # `run` usually has a single entry, so its number is left out.
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
            "'.', '_' and '-' only, because it names a folder"
        )
    problem = error["msg"].removeprefix("Value error, ")
    return f"config: {where!r} is {error['input']!r}: {problem}"


def load(values: dict[str, Any], *, check_run: bool = True) -> Config:
    """Check the values of a config file; `check_run=False` skips the check of names in `run`.

    Raises UserError with one line that names the key, the problem, and for an unknown key or name
    the closest valid one.
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
            problem = "needs a 'root'" if dataset.root is None else "does not use 'root'"
            raise UserError(f"config: datasets.{name}: reader {dataset.reader!r} {problem}")
        if dataset.context_keep and not dataset.context:
            raise UserError(
                f"config: datasets.{name}: 'context_keep' has no effect without 'context'"
            )
        if "train" not in dataset.splits:
            raise UserError(f"config: datasets.{name}.splits: 'train' is missing")
    for name, labels in config.labels.items():
        if None not in (labels.harden.threshold, labels.harden.top_k):
            raise UserError(f"config: labels.{name}.harden: give 'threshold' or 'top_k', not both")
        if labels.join:
            _check_join(config, name)
    for name, encoder in config.encoders.items():
        if encoder.views == "dense" and encoder.resize_mode not in (None, "squash"):
            raise UserError(
                f"config: encoders.{name}: dense views squash the image; remove 'resize_mode'"
            )
    for name in config.boxes:
        _check_boxes(config, name)
    for name in config.labels:
        _check_circles(config, name)
    for name, applied in config.apply.items():
        _check_named(config, f"apply.{name}.dataset", "datasets", applied.dataset)
    for made in config.made if check_run else ():
        grid, grids = config.labels[made.labels].grid, config.datasets[made.dataset].grid
        if grid and grid not in grids:
            raise UserError(
                f"config: labels.{made.labels}.grid is {list(grid)}, and "
                f"datasets.{made.dataset}.grid has only {', '.join(str(list(g)) for g in grids)}"
            )
        for part, teacher in _parts(config, made.labels, made.encoder):
            if part.boxes is not None and config.encoders[teacher].views == "dense":
                raise UserError(
                    f"config: labels.{made.labels}.join: encoders.{teacher} has dense views, which "
                    f"boxes do not support; name an encoder with crops next to {part.boxes!r}"
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
                        f"config: trainings.{name}: loss {training.loss!r} learns from fixed hard "
                        f"positives; set '{change}'"
                    )
    return config


def _check_start(trainings: Mapping[str, Training], name: str, start: str) -> None:
    """Raise UserError if a training cannot start from the one called `start`."""
    training, where = trainings[name], f"config: trainings.{name}.start_from"
    if (first := trainings.get(start)) is None:
        near = nearest(start, list(trainings))
        raise UserError(f"{where} names {start!r}, which is not under 'trainings'{near}")
    if training.trunk == "frozen":
        raise UserError(f"{where}: a frozen trunk gets its own head; set 'trunk: trained'")
    if (training.model, training.model_args) != (first.model, first.model_args):
        raise UserError(
            f"{where}: {start!r} trains {first.model} with {first.model_args}, "
            f"not {training.model} with {training.model_args}"
        )
    if first.start_from is not None:
        raise UserError(f"{where}: {start!r} itself starts from another training")


def _check_named(config: Config, where: str, kind: str, name: str | None) -> None:
    """Raise UserError if `name` is not a section of this kind."""
    sections = getattr(config, kind)
    if name is not None and name not in sections:
        raise UserError(
            f"config: {where} names {name!r}, which is not under {kind!r}{nearest(name, sections)}"
        )


def _check_join(config: Config, name: str) -> None:
    """Raise UserError for labels that cannot be joined from the labels that they name."""
    labels, where = config.labels[name], f"labels.{name}.join"
    if useless := labels.model_fields_set - {
        *("join", "positives", "positives_of", "harden", "corrections")
    }:
        key = min(useless).rstrip("_")
        raise UserError(
            f"config: labels.{name}: '{key}' has no effect with 'join'; set it for the labels that "
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
                f"config: {where} names boxes and a training in one entry; trainings use the data "
                "set's own views"
            )
        of = config.labels[part.labels]
        if of.corrections:
            raise UserError(
                f"config: {where} names {part.labels!r}, which have 'corrections'; give them to "
                f"labels.{name}"
            )
        if part.boxes is not None and of.join:
            raise UserError(
                f"config: {where} names {part.labels!r}, which are themselves joined; boxes have "
                "labels of their own scores only"
            )
        if part.boxes is not None and of.grid:
            raise UserError(
                f"config: labels.{part.labels}.grid: the boxes that {where} names have no grid"
            )


def _parts(config: Config, labels: str, encoder: str) -> Iterator[tuple[Part, str]]:
    """All tables that labels are joined from, also by way of others, each with its encoder."""
    for part in config.labels[labels].join:
        teacher = part.encoder or encoder
        yield part, teacher
        yield from _parts(config, part.labels, teacher)


def _check_boxes(config: Config, name: str) -> None:
    """Raise UserError for boxes that need missing sections."""
    boxes, where = config.boxes[name], f"boxes.{name}"
    for kind, named in (
        ("labels", boxes.labels),
        ("trainings", boxes.training),
        ("encoders", boxes.encoder),
    ):
        _check_named(config, where, kind, named)


def _check_circles(config: Config, name: str, before: tuple[str, ...] = ()) -> None:
    """Raise UserError for labels that need themselves, directly or for the boxes they name."""
    if name in before:
        needs = " need ".join((*before[before.index(name) :], name))
        raise UserError(f"config: labels.{name} need themselves: {needs}")
    for part in config.labels[name].join:
        _check_circles(config, part.labels, (*before, name))
        if part.boxes is not None:
            _check_circles(config, config.boxes[part.boxes].labels, (*before, name))


def check_syntax(file: Path) -> None:
    """Raise UserError with the line if a file is neither JSON nor YAML."""
    try:
        text = file.read_text(encoding="utf-8")
        with suppress(ValueError):
            json.loads(text)
            return
        yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        # A missing colon or bracket is noticed lines later; a wrong indentation at once.
        is_open = re.search("flow|simple key|quoted", error.context or "")
        mark = (is_open and error.context_mark) or error.problem_mark
        where = f"{file}, line {mark.line + 1}" if mark else str(file)
        raise UserError(f"{where}: not valid YAML: {error.problem}") from error
    except (yaml.YAMLError, UnicodeError) as error:
        raise UserError(f"{file}: not valid YAML: {first_line(error)}") from error


def clashes(overlays: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """What is lost when configs of different data sets are combined, one line per loss.

    `overlays` are names of files and their values, in the order of the command line. Only files
    whose `run` names different data sets are compared: all others are meant to change the files
    before them.
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
    """Whether the section `over` changes a key of the section `values`."""
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
    content: str | bytes = text
    if not text.lstrip().startswith("{"):
        try:
            content = Path(text).read_bytes()
        except (OSError, ValueError) as error:  # ValueError: a null byte
            why = error.strerror if isinstance(error, OSError) else first_line(error)
            raise UserError(f"--settings {text[:200]}: neither JSON nor a file: {why}") from error
    try:
        return yaml.safe_load(content) or {}
    # The other errors come from bytes that are not text, dates like 2001-99-99, and deep nesting.
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
    """The config reference in Markdown, from the descriptions of the keys."""
    lines = [
        "# Configuration",
        "",
        "Generated by `cdul config-reference` from `cdul_steps/config.py`; do not edit.",
        "",
        "`config/config.yaml` of the working directory, or else the project's own, is always read",
        "first. A file given with `--configfile` overrides it key by key; lists are replaced as a",
        "whole. `run` selects the sections to make. Paths are relative to the working directory;",
        "`~` and `$VARIABLES` in them are expanded. Class files, context lists, tables of variants",
        "and models that come with the project, such as `config/classes/voc.yaml`, are found from",
        "any directory. Changing a scientific setting re-runs the stages that depend on it;",
        "changing `runtime` re-runs nothing.",
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
