import shlex
import sys
from functools import cache, wraps
from pathlib import Path

# The package lies beside the Snakefile.
sys.path.insert(0, str(Path(workflow.basedir)))

from cdul_steps.config import load
from cdul_steps.data.classes import load_classes
from cdul_steps.data.files import digest
from cdul_steps.data.readers import fingerprint, read_dataset
from cdul_steps.data.tables import read_facts
from cdul_steps.errors import UserError
from cdul_steps.provenance import source_digest
from cdul_steps.report.captions import CAPTIONS, TITLES

# Jobs find `cdul` beside the Python that runs Snakemake, whether or not it is on the path.
BIN = shlex.quote(str(Path(sys.executable).parent))
shell.prefix(f'set -euo pipefail; export PATH={BIN}:"$PATH"; ')


def one_line(function):
    """Let a user's mistake end the planning with its one line."""

    @wraps(function)
    def wrapped(*arguments):
        try:
            return function(*arguments)
        except UserError as error:
            # Snakemake's own error would add the lines of this file.
            sys.exit(f"cdul: error: {error}")

    return wrapped


CONFIG = one_line(load)(config)
RUN = CONFIG.run
RUNTIME = CONFIG.runtime
RESULTS = CONFIG.results
LOGS = f"{RESULTS}/logs"
BENCHMARKS = f"{RESULTS}/benchmarks"
DATASET = f"{RESULTS}/{{dataset}}"
IMAGES = f"{DATASET}/manifest/images.parquet"
ENCODER = f"{DATASET}/{{encoder}}"
TEXT = f"{ENCODER}/text.parquet"
EMBEDDINGS = f"{ENCODER}/embeddings/{{split}}.zarr"
ENCODED = f"{ENCODER}/encode/{{split}}/{{shard}}.parquet"
SIMILARITY = f"{ENCODER}/similarity/{{split}}.zarr"
LABELS = f"{ENCODER}/{{labels}}"
TRAINING = f"{LABELS}/{{training}}"
# In the report's folder; without the constraint, a name would match across folders.
FIGURE_OF = "{dataset,[^/]+}/{encoder,[^/]+}/{labels,[^/]+}"


wildcard_constraints:
    dataset="|".join(CONFIG.datasets),
    encoder="|".join(CONFIG.encoders),
    labels="|".join(CONFIG.labels),
    training="|".join(CONFIG.trainings),
    split="train|test",
    shard=r"\d+",


def dataset_key(key):
    """A value of a job's data set."""
    return lambda wildcards: getattr(CONFIG.datasets[wildcards.dataset], key)


def encoder_key(key):
    """A value of a job's encoder."""
    return lambda wildcards: getattr(CONFIG.encoders[wildcards.encoder], key)


def labels_key(key):
    """A value of a job's labels."""
    return lambda wildcards: getattr(CONFIG.labels[wildcards.labels], key)


def option(name, value):
    """A function from wildcards to command line words: `name` and the value, or nothing."""

    def words(wildcards):
        given = value(wildcards)
        given = given if isinstance(given, list) else [given]
        return [
            word for item in given if item is not None for word in (name, str(item))
        ]

    return words


def code(step):
    """Digest of a step's code: Snakemake does not look inside an imported package."""
    return source_digest(f"cdul_steps.steps.{step}")


def dataset_root(wildcards):
    """Where a data set lies; the demo's scenes are made among the results."""
    dataset = CONFIG.datasets[wildcards.dataset]
    if dataset.reader == "demo":
        return f"{RESULTS}/{wildcards.dataset}/scenes/scenes.csv"
    return dataset.root


def dataset_source(wildcards):
    """The demo's scenes as an input; other data sets are watched through their content."""
    demo = CONFIG.datasets[wildcards.dataset].reader == "demo"
    return dataset_root(wildcards) if demo else []


@one_line
def dataset_content(wildcards):
    """What changes when images come, go or change; scenes have a rule that says so."""
    dataset = CONFIG.datasets[wildcards.dataset]
    if dataset.reader == "demo":
        return "scenes"
    names = load_classes(Path(dataset.classes)).names
    return fingerprint(
        read_dataset(dataset.reader, Path(dataset.root), dataset.splits, names)
    )


@one_line
def class_names(wildcards):
    """The class names without their aliases, which only the text encoder reads."""
    return list(load_classes(Path(CONFIG.datasets[wildcards.dataset].classes)).names)


def scenes_key(key):
    """A value of the demo's scenes."""
    return lambda wildcards: getattr(CONFIG.datasets[wildcards.dataset].scenes, key)


def shards(wildcards):
    """The shards of a split, known once the manifest is made."""
    images = checkpoints.manifest.get(dataset=wildcards.dataset).output[0]
    facts = read_facts(Path(images))
    return range(-(-facts["rows"][wildcards.split] // facts["layout"]["shard_size"]))


@one_line
def shard_manifest(wildcards):
    """The views of a shard. Written by the manifest only when they change."""
    images = checkpoints.manifest.get(dataset=wildcards.dataset).output[0]
    path = Path(images).parent / wildcards.split / f"{wildcards.shard}.parquet"
    if not path.is_file():
        raise UserError(f"{path} is missing: run again with --forcerun manifest")
    return str(path)


@cache
def content(place, what):
    """Digest of a file or folder that a config names; an error before anything runs without it."""
    if not Path(place).exists():
        raise UserError(f"{what}: {place}: no such file or folder")
    return digest(Path(place))


@one_line
def encoder_weights(wildcards):
    """Digest of an encoder's own files; a tag of open_clip always means the same weights."""
    encoder = CONFIG.encoders[wildcards.encoder]
    what = f"encoders.{wildcards.encoder}"
    if encoder.model.startswith("local-dir:"):
        return content(encoder.model.removeprefix("local-dir:"), what)
    file = Path(encoder.pretrained or "")
    if (
        file.suffix in (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
        or file.is_file()
    ):
        return content(file, what)
    return "hub"


@one_line
def start_weights(wildcards):
    """Digest of the file that a training starts from."""
    weights = CONFIG.trainings[wildcards.training].weights
    if weights in (None, "timm"):
        return weights
    return content(weights, f"trainings.{wildcards.training}.weights")


@one_line
def class_table(wildcards):
    """Class names with their aliases."""
    table = load_classes(Path(CONFIG.datasets[wildcards.dataset].classes))
    return [f"{name}: {aliases}" for name, aliases in zip(table.names, table.aliases)]


def encoded(pattern):
    """A file of each shard of a split."""
    return lambda wildcards: expand(
        pattern, shard=shards(wildcards), allow_missing=True
    )


def measured_split(wildcards):
    """The split that the classifier is measured on: test, where there is one."""
    splits = CONFIG.datasets[wildcards.dataset].splits
    return "test" if "test" in splits else "train"


def figure_category(wildcards):
    """Where Snakemake's report lists a figure of ours, or our whole page."""
    return wildcards.get("dataset", "The whole report")


def figure_labels(wildcards):
    """How Snakemake's report tells figures of one data set apart."""
    if "figure" not in wildcards.keys():
        return {"figure": "tables and figures on one page"}
    return {
        "encoder": wildcards.encoder,
        "labels": wildcards.labels,
        "training": wildcards.get("training", ""),
        "figure": TITLES[wildcards.figure],
    }
