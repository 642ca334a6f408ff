import json
import shlex
import sys
from functools import wraps
from pathlib import Path

from snakemake.exceptions import WorkflowError

# The package lies beside the Snakefile.
sys.path.insert(0, str(Path(workflow.basedir)))

from cdul_steps.config import load
from cdul_steps.data.classes import load_classes
from cdul_steps.data.files import digest
from cdul_steps.data.readers import fingerprint, read_dataset
from cdul_steps.data.tables import read_facts
from cdul_steps.errors import UserError
from cdul_steps.provenance import source_digest

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
            raise WorkflowError(str(error)) from None

    return wrapped


CONFIG = one_line(load)(config)
RUN = CONFIG.run
RUNTIME = CONFIG.runtime
RESULTS = CONFIG.results
LOGS = f"{RESULTS}/logs"
DATASET = f"{RESULTS}/{{dataset}}"
IMAGES = f"{DATASET}/manifest/images.parquet"
ENCODER = f"{DATASET}/{{encoder}}"
TEXT = f"{ENCODER}/text.parquet"
EMBEDDINGS = f"{ENCODER}/embeddings/{{split}}.zarr"
ENCODED = f"{ENCODER}/encode/{{split}}/{{shard}}.parquet"
SIMILARITY = f"{ENCODER}/similarity/{{split}}.zarr"
LABELS = f"{ENCODER}/{{labels}}"
TRAINING = f"{LABELS}/{{training}}"


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
        return [word for item in given if item is not None for word in (name, str(item))]

    return words


def code(step):
    """Digest of a step's code: Snakemake does not look inside an imported package."""
    return source_digest(f"cdul_steps.steps.{step}")
