"""The workflow's configuration: typed, documented, and checked before anything runs."""

import difflib
import json
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from cdul_steps.errors import UserError, first_line

MAX_PIXELS = 178_956_970
"""Where Pillow itself refuses an image as a decompression bomb."""


def _expand(value: Any) -> Any:
    """`~` and environment variables in a path: clusters have their $SCRATCH."""
    if not isinstance(value, str):
        return value
    # Not by pathlib, which would tidy `local-dir:./folder` away.
    expanded = os.path.expandvars(os.path.expanduser(value))  # noqa: PTH111
    if missing := re.search(r"\$\{?(\w+)", expanded):
        raise ValueError(f"the environment variable {missing[1]} is not set")
    return expanded


Place = Annotated[str, BeforeValidator(_expand)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


class Section(BaseModel):
    """A part of the config; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class Run(Section):
    """What `snakemake` makes: every combination of the sections named here."""

    datasets: list[str] = Field(["demo"], min_length=1, description="Names under `datasets`.")
    encoders: list[str] = Field(["tiny-clip"], min_length=1, description="Names under `encoders`.")
    labels: list[str] = Field(["final"], min_length=1, description="Names under `labels`.")
    trainings: list[str] = Field(["aligned"], min_length=1, description="Names under `trainings`.")


class Scenes(Section):
    """The generated images of the demo."""

    seed: int = Field(0, ge=0, description="Seed of all that is drawn.")
    train: int = Field(2000, ge=1, description="Images of the train split.")
    test: int = Field(500, ge=1, description="Images of the test split.")
    size: int = Field(192, ge=64, description="Width and height in pixels.")


class Dataset(Section):
    """Where the images are, what the classes are called, and how images are cut."""

    reader: Literal["demo", "voc", "folder", "table"] = Field(
        description="`demo`: generated scenes. `voc`: a year's folder of the PASCAL VOC devkit. "
        "`folder`: all images below a folder, no labels needed. `table`: a CSV or Parquet file "
        "with `path`, optionally `image_id`, `split` and a 1/0 column a class."
    )
    root: Place | None = Field(
        None,
        description="Folder (for `table`, the file) of the data set, relative to the working "
        "directory. Not for `demo`, whose images are generated below the results.",
    )
    classes: Place = Field(
        description="File with the class names in order: a YAML list (entries are names, or "
        "`{name: ..., aliases: [...]}`), or text with a name a line."
    )
    splits: dict[Literal["train", "test"], str] = Field(
        {"train": "train"},
        description="What the data set calls the images to learn from (`train`) and, optionally, "
        "to measure on (`test`): a VOC image set, a folder below `root` (`.` for all), or a value "
        "of the table's `split` column.",
    )
    grid: tuple[Annotated[int, Field(ge=1, le=8)], Annotated[int, Field(ge=1, le=8)]] = Field(
        (3, 3), description="Snippets of an image: rows, columns."
    )
    shard_size: int = Field(
        1000, ge=1, description="Images a shard: one encode job, one file of the Zarr store."
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

    model: Place = Field(
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
    precision: Literal["fp32", "fp16", "bf16"] = Field(
        "fp32", description="Arithmetic of the image tower. fp32 is what a CPU should use."
    )
    resize_mode: Literal["shortest", "longest", "squash"] | None = Field(
        None,
        description="How a view becomes the model's square input; default: the model's own way. "
        "`squash` keeps all of a snippet, `shortest` crops its long side.",
    )


class Labels(Section):
    """How scores become pseudo-labels."""

    construction: Literal["global", "local_mean", "local_max", "aggregate", "final"] = Field(
        "final", description="Which scores: see docs/method.md."
    )
    tau: float | None = Field(
        None, gt=0, description="Temperature of the softmax; default: 1/logit_scale of the model."
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


class Alignment(Section):
    """The refinement of the pseudo-labels during training."""

    enabled: bool = Field(True, description="False keeps the labels fixed.")
    sigma: float = Field(
        0.4, gt=0, description="Deviation of psi: how far from 0.5 a label still moves."
    )
    step_size: float = Field(0.2, gt=0, description="Size of a label step (no unit: logits).")
    every: int = Field(1, ge=1, description="Epochs between label steps.")
    warmup: int = Field(
        10,
        ge=0,
        description="Epochs with fixed labels first: until the network has caught up with them.",
    )


class Training(Section):
    """The classifier and how it learns. `config/voc2012.yaml` has the paper's settings."""

    model: str = Field("resnet101", description="Any timm model name.")
    model_args: dict[str, Any] = Field({}, description="Further arguments of timm.create_model.")
    weights: Place | None = Field(
        None,
        description="Start: `timm` for the model's ImageNet weights from timm's hub, a "
        "safetensors or PyTorch file, or nothing for a random start.",
    )
    image_size: int = Field(448, ge=32, description="Width and height of the input in pixels.")
    epochs: int = Field(20, ge=1, description="Passes over the train split.")
    batch_size: int = Field(8, ge=1, description="Images a step of the optimiser.")
    learning_rate: float = Field(1e-5, gt=0, description="Peak learning rate.")
    weight_decay: float = Field(0.0, ge=0, description="Decoupled weight decay.")
    optimizer: Literal["adamw", "sgd"] = Field("adamw", description="SGD has momentum 0.9.")
    schedule: Literal["constant", "cosine"] = Field(
        "constant", description="Learning rate over the epochs; cosine falls to 0."
    )
    warmup_steps: int = Field(0, ge=0, description="Steps of linear warm-up of the learning rate.")
    loss: Literal["kl", "kl_reverse", "kl_classes"] = Field(
        "kl",
        description="`kl`: KL(label || network) of a Bernoulli a class. `kl_reverse`: the other "
        "way round. `kl_classes`: one softmax over all classes.",
    )
    crop_scale: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Smallest share of the image's area that the random crop keeps; 1 for none.",
    )
    flip: bool = Field(True, description="Mirror images at random.")
    precision: Literal["fp32", "fp16", "bf16"] = Field(
        "fp32", description="Arithmetic of the forward pass; less than fp32 is for GPUs."
    )
    alignment: Alignment = Field(Alignment(), description="Refinement of the labels.")
    threshold: float = Field(
        0.5, gt=0, lt=1, description="Probability from which `predict` names a label."
    )
    seed: int = Field(0, ge=0, description="Seed of weights, order and augmentation.")


class Evaluate(Section):
    """How scores are measured."""

    difficult: Literal["ignore", "negative", "positive"] = Field(
        "ignore", description="What an image counts as for a class it shows only difficultly."
    )
    ap: Literal["all", "voc07"] = Field("all", description="AP over all points, or VOC2007's 11.")


class Runtime(Section):
    """How fast, not what: changing these re-runs nothing."""

    device: str = Field(
        "auto",
        description="`auto`: a GPU that no other job has, where there is one. `cuda`: the same, "
        "and an error where there is none. `cuda:1`: that one, though others have it. `cpu`.",
    )
    batch_size: int = Field(
        0, ge=0, description="Views a forward pass of the encoder; 0 chooses by the device."
    )
    workers: int = Field(
        -1,
        ge=-1,
        description="Processes that decode images (on a CPU: and encode them); -1 chooses.",
    )


class Config(Section):
    """Configuration of the CDUL workflow."""

    results: Place = Field("results", description="Folder for all that is made.")
    run: Run = Field(Run(), description="What to make.")
    datasets: dict[Name, Dataset] = Field({}, description="Data sets by a name of your choice.")
    encoders: dict[Name, Encoder] = Field({}, description="Encoders by a name of your choice.")
    labels: dict[Name, Labels] = Field({}, description="Pseudo-labels by a name of your choice.")
    trainings: dict[Name, Training] = Field({}, description="Trainings by a name of your choice.")
    evaluate: Evaluate = Field(Evaluate(), description="Measuring.")
    runtime: Runtime = Field(Runtime(), description="Speed.")


TAKEN = {
    "datasets": {"logs"},
    "encoders": {"manifest", "scenes"},
    "labels": {"embeddings", "encode", "similarity"},
}
"""Names of sections that would collide with the workflow's own folders of results."""


def _nearest(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(sorted(known))}"


def _section(model: Any, keys: list[Any]) -> Any:
    """The section class at a path of keys."""
    for key in keys:
        field = next(f for n, f in model.model_fields.items() if (f.alias or n) == key)
        model = field.annotation
        if get_args(model):
            return get_args(model)[1]
    return model


def _explain(error: dict[str, Any]) -> str:
    place = [str(key) for key in error["loc"]]
    where = ".".join(place)
    if error["type"] == "extra_forbidden":
        parents = place[:1] + place[2:-1] if len(place) > 2 else place[:-1]
        section = Config
        for key in parents:
            section = _section(section, [key])
        known = [f.alias or n for n, f in section.model_fields.items()]
        return f"config: unknown key {where!r}{_nearest(place[-1], known)}"
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
        raise UserError(_explain(error.errors()[0])) from error
    for kind, names in config.run if check_run else ():
        sections = getattr(config, kind)
        for name in names:
            if name not in sections:
                raise UserError(
                    f"config: run.{kind} names {name!r}, which is not under {kind!r}"
                    + _nearest(name, list(sections))
                )
    for kind, taken in TAKEN.items():
        for name in taken & set(getattr(config, kind)):
            raise UserError(
                f"config: {name!r} under {kind!r} is the name of a folder of results; "
                "choose another"
            )
    for name, dataset in config.datasets.items():
        if (dataset.root is None) != (dataset.reader == "demo"):
            problem = "needs a 'root'" if dataset.root is None else "has no use for 'root'"
            raise UserError(f"config: datasets.{name}: reader {dataset.reader!r} {problem}")
        if "train" not in dataset.splits:
            raise UserError(f"config: datasets.{name}.splits: 'train' is missing")
    return config


def read_training(text: str) -> Training:
    """Settings of a training from JSON, or from a YAML file. Raises UserError as `load` does."""
    path = Path(text)
    if not text.lstrip().startswith("{"):
        if not path.is_file():
            raise UserError(f"--settings {text}: neither JSON nor a file")
        text = path.read_text(encoding="utf-8")
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"--settings: not readable as YAML or JSON: {first_line(error)}") from error
    return load({"run": {}, "trainings": {"settings": values or {}}}, check_run=False).trainings[
        "settings"
    ]


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
        "`config/config.yaml` is always read first. Another file given with `--configfile` is laid",
        "over it, key by key; lists are replaced as a whole. `run` says which sections are made.",
        "Paths are relative to the working directory; `~` and `$VARIABLES` in them are expanded.",
        "Scientific values re-run what depends on them; `runtime` re-runs nothing.",
    ]
    headings: list[tuple[str, type[Section]]] = [
        ("Top level", Config),
        ("run", Run),
        ("datasets.NAME", Dataset),
        ("datasets.NAME.scenes", Scenes),
        ("encoders.NAME", Encoder),
        ("labels.NAME", Labels),
        ("trainings.NAME", Training),
        ("trainings.NAME.alignment", Alignment),
        ("evaluate", Evaluate),
        ("runtime", Runtime),
    ]
    for heading, section in headings:
        text = (section.__doc__ or "").strip()
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
