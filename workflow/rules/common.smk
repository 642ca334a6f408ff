import importlib.util
import os
import shlex
import sys
from functools import cache, wraps
from itertools import chain
from pathlib import Path
from typing import get_args

# Not `workflow.basedir`: if another workflow uses this one as a module, that is its folder.
BESIDE = Path(str(workflow.current_basedir)).parents[1]
# In a clone the package is next to the Snakefile; otherwise it is installed.
if (BESIDE / "cdul_steps").is_dir():
    sys.path.insert(0, str(BESIDE))
if importlib.util.find_spec("cdul_steps") is None:
    sys.exit(
        "cdul: error: the rules need the package cdul-steps in Snakemake's environment "
        f"({sys.executable}): pip install it there, in the version of this workflow"
    )

from snakemake.common.configfile import load_configfile
from snakemake.logging import logger
from snakemake.utils import Paramspace

# The imports here need only Snakemake's own dependencies, so that its lint can read the rules
# without the package's other dependencies; functions import the rest.
from cdul_steps import results
from cdul_steps.config import LOCAL, BoxShape, Split, clashes, load
from cdul_steps.data.files import check_dates, digest
from cdul_steps.errors import UserError
from cdul_steps.provenance import source_digest
from cdul_steps.report.captions import CAPTIONS, TITLES
from cdul_steps.shipped import PACKAGE

# Jobs find `cdul` next to the Python that runs Snakemake, even if it is not on the path. A
# container image has its own.
BIN = shlex.quote(str(Path(sys.executable).parent))
shell.prefix(
    'set -euo pipefail; [ -n "${{APPTAINER_CONTAINER:-}}" ] || '
    f'export PATH={BIN}:"$PATH"; '
)


def one_line(function):
    """Let a user's mistake end the planning with a one-line message."""

    @wraps(function)
    def wrapped(*arguments):
        try:
            return function(*arguments)
        except UserError as error:
            # Snakemake's own error would add the lines of this file.
            sys.exit(f"cdul: error: {error}")

    return wrapped


CONFIG = one_line(load)(config)
RUNTIME = CONFIG.runtime
# Images with second views have a folder, a manifest and an encoding, like a data set.
BOXED = CONFIG.all_boxed
DATASETS = CONFIG.datasets | {
    folder: CONFIG.datasets[boxed.dataset].model_copy(
        update={"splits": {"train": CONFIG.datasets[boxed.dataset].splits["train"]}}
    )
    for folder, boxed in BOXED.items()
}
# If another workflow uses this one as a module, its config files are not checked.
if str(BASE_CONFIG) in workflow.configfiles and not workflow.remote_exec:
    for clash in clashes(
        [(file.name, load_configfile(file)) for file in workflow.overwrite_configfiles]
    ):
        logger.warning(f"cdul: {clash}")
JOINED = [name for name, labels in CONFIG.labels.items() if labels.join]
RESULTS = CONFIG.results


def below(pattern):
    """A pattern of results, below this run's results folder."""
    return pattern.replace("{results}", RESULTS)


LOGS = below(results.LOGS)
BENCHMARKS = below(results.BENCHMARKS)
IMAGES = below(results.IMAGES)
SHARD = below(results.SHARD)
FEATURES = below(results.FEATURES)
FEATURE_TABLE = below(results.FEATURE_TABLE)
TEXT = below(results.TEXT)
EMBEDDINGS = below(results.EMBEDDINGS)
ENCODED = below(results.ENCODED)
SIMILARITY = below(results.SIMILARITY)
ABLATION = below(results.ABLATION)
SWEEP = below(results.SWEEP)
PSEUDO_LABELS = below(results.PSEUDO_LABELS)
QUALITY = below(results.QUALITY)
TRAINING = below(results.TRAINING)
MODEL = below(results.MODEL)
WEIGHTS = below(results.WEIGHTS)
CARD = below(results.CARD)
HISTORY = below(results.HISTORY)
REFINED = below(results.REFINED)
PREDICTIONS = below(results.PREDICTIONS)
APPLIED = below(results.APPLIED)
COUNTS = below(results.COUNTS)
METRICS = below(results.METRICS)
# In the report's folder; without the constraint, a name would match across folders.
FIGURE_OF = "{dataset,[^/]+}/{encoder,[^/]+}/{labels,[^/]+}"


def one_of(names):
    """A wildcard constraint: one of some names; matches nothing if there are none."""
    return "|".join(names) or "(?!)"


# Used with `--sdm apptainer` only.
container: CONFIG.container


wildcard_constraints:
    **results.WILDCARDS,
    dataset="|".join(DATASETS),
    encoder="|".join(CONFIG.encoders),
    labels="|".join(CONFIG.labels),
    classifier=one_of(CONFIG.apply),
    training="|".join([*CONFIG.trainings, r"ablation/variant~[^/]+/seed~\d+"]),


def made(pattern, **further):
    """A pattern for everything that the config's `run` makes; `further` are other names in it."""
    paths = [
        path
        for of in CONFIG.made
        for path in expand(
            pattern,
            **of._asdict(),
            split=list(CONFIG.datasets[of.dataset].splits),
            **further,
        )
    ]
    return list(dict.fromkeys(paths))


def reported_files(wildcards):
    """What the report reads besides the results of `all`: a storage fetches only named inputs."""
    if not IN_STORAGE:
        return []
    of_runs = (IMAGES, TEXT, SIMILARITY, PSEUDO_LABELS, WEIGHTS, CARD, METRICS)
    of_shards = [
        expand(
            [SHARD, ENCODED],
            dataset=of.dataset,
            encoder=of.encoder,
            split=split,
            shard=shards_of(of.dataset, split),
        )
        for of in CONFIG.made
        for split in CONFIG.datasets[of.dataset].splits
    ]
    return [*chain(*map(made, of_runs)), *dict.fromkeys(chain(*of_shards))]


def training_folders(wildcards, input):
    """The folders of the trainings that are made."""
    return [
        str(Path(card).parents[1]) for card in input if Path(card).name == "README.md"
    ]


def unboxed(wildcards):
    """The name of a job's data set, with its own or with second views."""
    boxed = BOXED.get(wildcards.dataset)
    return boxed.dataset if boxed else wildcards.dataset


def boxes_of(wildcards):
    """The settings of a job's second views."""
    return CONFIG.boxes[BOXED[wildcards.dataset].boxes]


def box_shape(wildcards):
    """The settings that boxes depend on, besides the classifier, as `cdul boxes` takes them."""
    return boxes_of(wildcards).model_dump_json(include=set(BoxShape.model_fields))


def boxing(pattern):
    """A file of the training that second views come from."""

    def path(wildcards):
        boxed, boxes = BOXED[wildcards.dataset], boxes_of(wildcards)
        return expand(
            pattern,
            dataset=boxed.dataset,
            encoder=boxed.encoder,
            labels=boxes.labels,
            training=boxes.training,
        )[0]

    return path


def first_images(wildcards):
    """The images of the data set that second views belong to."""
    return expand(IMAGES, dataset=unboxed(wildcards))


def first_manifest(wildcards):
    """The same shard's views in that data set, known once its manifest is made."""
    images_of(unboxed(wildcards))
    return expand(SHARD, dataset=unboxed(wildcards), allow_missing=True)


def joined_labels(wildcards):
    """The tables that joined labels are averaged from."""
    found = []
    for part in CONFIG.labels[wildcards.labels].join:
        dataset, encoder = wildcards.dataset, wildcards.encoder
        if part.boxes is not None:
            dataset = CONFIG.boxed(dataset, encoder, part.boxes).folder
        found += expand(
            PSEUDO_LABELS if part.training is None else REFINED,
            dataset=dataset,
            encoder=part.encoder or encoder,
            labels=part.labels,
            training=part.training,
        )
    return found


def dataset_key(key):
    """A value of a job's data set."""
    return lambda wildcards: getattr(DATASETS[wildcards.dataset], key)


def encoder_key(key):
    """A value of a job's encoder."""
    return lambda wildcards: getattr(CONFIG.encoders[wildcards.encoder], key)


def label_settings(wildcards):
    """The settings of a job's labels, as `cdul label` takes them."""
    settings = CONFIG.labels[wildcards.labels].of(unboxed(wildcards))
    return settings.model_dump_json(by_alias=True, exclude={"positives_of", "join"})


def option(name, value):
    """A function from wildcards to command-line words: `name` and the value, or nothing."""

    def words(wildcards):
        given = value(wildcards)
        given = given if isinstance(given, list) else [given]
        return [
            word for item in given if item is not None for word in (name, str(item))
        ]

    return words


def input_mode(wildcards):
    """Command-line words for how images become the encoder's input; none for the default, so that
    a new key re-encodes nothing."""
    encoder = CONFIG.encoders[wildcards.encoder]
    words = option("--resize-mode", encoder_key("resize_mode"))(wildcards)
    return words + (["--views", "dense"] if encoder.views == "dense" else [])


def flag(name, value):
    """A function from wildcards to `--name` if the value is true, else `--no-name`."""
    return lambda wildcards: f"--{name}" if value(wildcards) else f"--no-{name}"


def code(step, function):
    """Digest of a stage's code: Snakemake does not look inside an imported package."""
    return source_digest(f"cdul_steps.steps.{step}", function)


def submission(stage):
    """The group of a shard's job: as many neighbours as `group-components` has for the stage.

    Groups that Snakemake forms from all shards overlap when it resumes after a checkpoint, and jobs
    run twice (https://github.com/snakemake/snakemake/issues/1628). These are the same each time.
    """

    def group(wildcards):
        size = workflow.group_settings.group_components.get(stage)
        if size is None:
            return None
        place = [value for name, value in sorted(wildcards.items()) if name != "shard"]
        # No name of the config contains ~, so that no two places share a group.
        name = "~".join([stage, *place, str(int(wildcards.shard) // size)])
        workflow.parent_groupids[name] = stage
        return name

    return group


def gpus(wildcards):
    """One GPU, but none for a job to which SLURM gave none, because the plugin does not pass
    `--resources gpu=0` to the job."""
    in_slurm = workflow.remote_exec and "SLURM_JOB_ID" in os.environ
    return 0 if in_slurm and "SLURM_GPUS_ON_NODE" not in os.environ else 1


def train_gpus(wildcards):
    """The GPUs of a training; a head on a frozen trunk is trained on the CPU."""
    if training(wildcards).trunk == "frozen":
        return 0
    return gpus(wildcards) * RUNTIME.train_devices


def dataset_source(wildcards):
    """The demo's scenes as an input; other data sets are tracked by their content."""
    demo = CONFIG.datasets[wildcards.dataset].reader == "demo"
    return below(results.SCENES) if demo else []


def dataset_root(wildcards, input):
    """The root of a data set; for the demo the rule's input, which is in the results folder."""
    return input[0] if input else CONFIG.datasets[wildcards.dataset].root


@one_line
def dataset_content(wildcards):
    """A value that changes when images are added, removed or changed; scenes have their own rule."""
    from cdul_steps.data.classes import load_classes
    from cdul_steps.data.readers import check_counts, fingerprint, read_dataset

    dataset = CONFIG.datasets[wildcards.dataset]
    if dataset.reader == "demo":
        return "scenes"
    root, names = dataset.root, load_classes(Path(dataset.classes)).names
    records = read_dataset(
        dataset.reader,
        root,
        dataset.splits,
        names,
        labelled_only=dataset.labelled_only,
        exclude=dataset.exclude,
    )
    check_counts(records, dataset.expected_images or {}, root)
    return fingerprint(records)


def name_tables(wildcards):
    """Class table and context list, read early so that errors do not appear after the encoding."""
    from cdul_steps.data.classes import check_choice, load_names

    dataset = DATASETS[wildcards.dataset]
    context = dataset.context and Path(dataset.context)
    tables = load_names(Path(dataset.classes), context, dataset.context_keep)
    check_choice(*(table.names for table in tables), dataset.classes)
    return tables


@one_line
def class_names(wildcards):
    """The class names without their aliases, which only the text encoder reads."""
    return list(name_tables(wildcards)[0].names)


def scenes_key(key):
    """A value of the demo's scenes."""
    return lambda wildcards: getattr(CONFIG.datasets[wildcards.dataset].scenes, key)


def grid_options(wildcards):
    """Command-line words for the grids of a data set."""
    (rows, columns), *further = CONFIG.datasets[wildcards.dataset].grid
    return [
        f"--grid {rows} {columns}",
        *(f"--further-grid {rows}x{columns}" for rows, columns in further),
    ]


def manifest_reader(wildcards):
    """The reader of a data set; the demo's scenes come with a table."""
    reader = CONFIG.datasets[wildcards.dataset].reader
    return "table" if reader == "demo" else reader


IN_STORAGE = workflow.storage_settings.default_storage_provider is not None


def stored_folders():
    """The folders of shard manifests, if results are in a storage (empty for a missing split)."""
    splits = get_args(Split) if IN_STORAGE else ()
    return [str(Path(SHARD.replace("{split}", split)).parent) for split in splits]


def images_of(dataset):
    """The manifest's table of images, once it is made.

    Second views have the shards of the data set's own train split. With a checkpoint of their own,
    Snakemake would leave their inputs open if the data set's manifest is made again unchanged.
    """
    if dataset in BOXED:
        dataset = BOXED[dataset].dataset
    return checkpoints.manifest.get(dataset=dataset).output.images


def shards_of(dataset, split):
    """The shards of a data set's split, known once the manifest is made."""
    from cdul_steps.data import manifest
    from cdul_steps.data.tables import read_facts

    # Open the file, because only then is it fetched from a storage.
    with images_of(dataset).open("rb") as images:
        return manifest.shards_of(read_facts(Path(images.name)), split)


@cache
def images_per_shard(manifest, modified):
    """How many images each shard of each split has in a manifest, by split and shard."""
    import pyarrow.parquet as pq

    table = pq.read_table(manifest, columns=["split", "shard"])
    counts = table.group_by(["split", "shard"]).aggregate([([], "count_all")])
    columns = (counts[name].to_pylist() for name in ("split", "shard", "count_all"))
    return {(split, shard): count for split, shard, count in zip(*columns)}


def shard_images(wildcards):
    """How many images of a shard are in the data set, which changes when one is removed."""
    with images_of(wildcards.dataset).open("rb") as images:
        path = Path(images.name)
        counts = images_per_shard(path, path.stat().st_mtime_ns)
    return counts.get((wildcards.split, int(wildcards.shard)), 0)


def shards(wildcards):
    """The shards of a split."""
    return shards_of(wildcards.dataset, wildcards.split)


@one_line
def shard_manifest(wildcards):
    """The views of a shard. The manifest writes them only when they change."""
    path = Path(images_of(wildcards.dataset)).parent / wildcards.split
    path /= f"{wildcards.shard}.parquet"
    if path.is_file() or IN_STORAGE or wildcards.dataset in BOXED:
        # Not `path`: if this workflow is a module, Snakemake adds its prefix to the result.
        return SHARD
    if workflow.dag_settings.allowed_rules and not workflow.remote_exec:
        # A generated unit test of another rule, whose folder has only the inputs of that rule.
        return []
    raise UserError(f"{path} is missing: run again with --forcerun manifest")


@cache
def content(place, what):
    """Digest of a file or folder named in the config; an error before anything runs if missing."""
    if not Path(place).exists():
        raise UserError(f"{what}: {place}: no such file or folder")
    return digest(Path(place))


@one_line
def encoder_weights(wildcards):
    """Digest of an encoder's own files; a tag of open_clip always means the same weights."""
    encoder = CONFIG.encoders[wildcards.encoder]
    what = f"encoders.{wildcards.encoder}"
    if encoder.model.startswith(LOCAL):
        return content(encoder.model.removeprefix(LOCAL), what)
    file = Path(encoder.pretrained or "")
    if (
        file.suffix in (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
        or file.is_file()
    ):
        return content(file, what) + recipe_mark(encoder.model)
    return "hub"


@cache
def recipe_mark(model):
    """How weights from a file are used, unless it is open_clip's default for all models."""
    # The import takes seconds, and few encoders are files.
    from cdul_steps.models.recipe import Recipe

    recipe = Recipe.of_file(model)
    return "" if recipe == Recipe.of_tag(model, "") else f" {recipe}"


@cache
@one_line
def ablation_trainings():
    """The trainings of the ablation, by the names of their folders in their labels' folder."""
    # Pandas is slow to import, and no other target needs it.
    from pandas import DataFrame

    from cdul_steps.variants import read_variants

    variants = read_variants(
        CONFIG.ablation,
        CONFIG.trainings,
        CONFIG.labels,
        default=CONFIG.ablated.labels[0],
    )
    pairs = [(variant.name, variant.settings.seed) for variant in variants]
    space = Paramspace(DataFrame(pairs, columns=["variant", "seed"]))
    names = (f"ablation/{pattern}" for pattern in space.instance_patterns)
    return dict(zip(names, variants))


@one_line
def ablation_content(wildcards):
    """Digest of the table of the variants."""
    return content(CONFIG.ablation.table, "ablation.table")


def ablation_files(file):
    """A file of each training of the ablation."""
    return lambda wildcards: [
        expand(
            f"{TRAINING}/{file}",
            labels=variant.labels,
            training=training,
            allow_missing=True,
        )[0]
        for training, variant in ablation_trainings().items()
    ]


def ablation_options(wildcards, input):
    """Command-line words that name the variant of each training's folder."""
    variants = ablation_trainings().values()
    return [
        f"--training={variant.name}={Path(metrics).parent}"
        for variant, metrics in zip(variants, input.metrics)
    ]


@one_line
def training(wildcards):
    """The settings of a training, from the config or the ablation's table."""
    if wildcards.training in CONFIG.trainings:
        return CONFIG.trainings[wildcards.training]
    if wildcards.training in ablation_trainings():
        return ablation_trainings()[wildcards.training].settings
    raise UserError(f"{CONFIG.ablation.table}: has no {wildcards.training!r}")


def weights_content(weights, what):
    """Digest of the file that a network starts from."""
    return weights if weights in (None, "timm") else content(weights, what)


@one_line
def start_weights(wildcards):
    """Digest of the file that a training starts from."""
    return weights_content(
        training(wildcards).weights, f"trainings.{wildcards.training}.weights"
    )


@one_line
def trunk(wildcards):
    """The network of a folder of features, among those of all trainings."""
    trainings = [*CONFIG.trainings.values()]
    if not any(wildcards.trunk == settings.folder for settings in trainings):
        trainings += [variant.settings for variant in ablation_trainings().values()]
    for settings in trainings:
        if settings.folder == wildcards.trunk:
            return settings
    raise UserError(f"features/{wildcards.trunk}: no training has such a network")


def network_settings(wildcards):
    """The keys of a network that its features depend on."""
    return trunk(wildcards).network.model_dump_json()


@one_line
def trunk_weights(wildcards):
    """Digest of the file that a trunk's weights come from."""
    return weights_content(trunk(wildcards).weights, f"features/{wildcards.trunk}")


def features_of(wildcards, split, pattern):
    """Files of the features of a split, for a training on a frozen trunk; else none."""
    settings = training(wildcards)
    if settings.trunk == "trained":
        return []
    return expand(
        pattern,
        dataset=wildcards.dataset,
        trunk=settings.folder,
        split=split,
        shard=shards_of(wildcards.dataset, split),
    )


def training_features(pattern):
    """Files of the features of all splits, for a training on a frozen trunk."""
    return lambda wildcards: [
        file
        for split in CONFIG.datasets[wildcards.dataset].splits
        for file in features_of(wildcards, split, pattern)
    ]


def first_classifier(wildcards):
    """The classifier that a training starts from, if it names one."""
    first = training(wildcards).start_from
    if first is None:
        return []
    return expand([WEIGHTS, CARD], training=first, allow_missing=True)


def start_option(wildcards, input):
    """Command-line words that name the folder of that classifier."""
    return [f"--start={Path(input.start[0]).parent}"] if input.start else []


def split_features(pattern):
    """Files of the features of a job's split, for a training on a frozen trunk."""
    return lambda wildcards: features_of(wildcards, wildcards.split, pattern)


def feature_options(wildcards, input):
    """Command-line words that assign feature stores to splits."""
    stores = [Path(metadata).parent for metadata in input.features]
    return [f"--features={store.stem}={store}" for store in stores]


@one_line
def corrections_content(wildcards):
    """Digest of the corrections of some labels."""
    file = CONFIG.labels[wildcards.labels].corrections
    return content(file, f"labels.{wildcards.labels}.corrections") if file else None


@one_line
def class_table(wildcards):
    """Class names with the aliases that the prompts use, and context names with all of them."""
    table, listed = name_tables(wildcards)
    used = None if CONFIG.encoders[wildcards.encoder].aliases else 1
    names = [
        f"{name}: {aliases[:used]}" for name, aliases in zip(table.names, table.aliases)
    ]
    if listed.names:
        # All aliases of a class matter when context names are left out.
        for tables in (table, listed):
            names += [f"{n}: {a}" for n, a in zip(tables.names, tables.aliases)]
    return names


def text_options(wildcards):
    """Command-line words for the names to embed: aliases, and context if there is one.

    Without context they are the same as before context existed, so that nothing is made again.
    """
    dataset = DATASETS[wildcards.dataset]
    words = [flag("aliases", encoder_key("aliases"))(wildcards)]
    if dataset.context:
        words += ["--context", dataset.context]
        words += [f"--nearness={dataset.context_nearness}"]
        words += [f"--keep={name}" for name in dataset.context_keep]
    return shlex.join(words)


def encoded(pattern):
    """A file of each shard of a split."""
    return lambda wildcards: expand(
        pattern, shard=shards(wildcards), allow_missing=True
    )


def similarities(wildcards):
    """The similarity stores of all splits; none for joined labels, which have no single store.

    On SLURM, these would also put the quality of joined labels into the group of the labels that
    they are joined from, which it waits for.
    """
    if wildcards.get("labels") in JOINED:
        return []
    splits = DATASETS[wildcards.dataset].splits
    return expand(SIMILARITY, split=splits, allow_missing=True)


def similarity_options(wildcards, input):
    """Command-line words that assign similarity stores to splits."""
    return [f"--similarity={Path(store).stem}={store}" for store in input.similarity]


def measured_split(wildcards):
    """The split that the classifier is evaluated on."""
    return results.measured_split(CONFIG.datasets[wildcards.dataset].splits)


@cache
def below_results(folder):
    """A folder's path below the results of this run, however it is written; None if elsewhere."""
    top, folder = Path(RESULTS).resolve(), Path(folder).resolve()
    return Path(RESULTS) / folder.relative_to(top) if top in folder.parents else None


@one_line
def applied_parts(wildcards):
    """The predictions of everything that the config's `apply` names, and the counts of each."""
    if not CONFIG.apply:
        raise UserError(
            "config: nothing to apply: name a classifier and a data set under 'apply'"
        )
    # Those below the results may be made by this run.
    for name, applied in CONFIG.apply.items():
        if not (below_results(applied.model) or Path(applied.model).is_dir()):
            raise UserError(
                f"config: apply.{name}.model: {applied.model}: no such folder"
            )
    return [
        path
        for name, applied in CONFIG.apply.items()
        for split in CONFIG.datasets[applied.dataset].splits
        for path in expand(
            [APPLIED, COUNTS],
            dataset=applied.dataset,
            classifier=name,
            split=split,
            shard=shards_of(applied.dataset, split),
        )
    ]


def applied_model(wildcards):
    """The files of a classifier to apply."""
    model = CONFIG.apply[wildcards.classifier].model
    folder = below_results(model) or Path(model)
    return [str(folder / Path(file).name) for file in (WEIGHTS, CARD)]


def figure_category(wildcards):
    """The category of a figure, or of our whole page, in Snakemake's report."""
    return wildcards.get("dataset", "The whole report")


def figure_labels(wildcards):
    """The labels that distinguish figures of one data set in Snakemake's report."""
    if "figure" not in wildcards.keys():
        return {"figure": "tables and figures on one page"}
    return report_labels(TITLES[wildcards.figure])(wildcards)


def report_labels(what):
    """The labels that distinguish a file from others of its data set in Snakemake's report."""

    def labels(wildcards):
        names = ("encoder", "labels", "training")
        return {name: wildcards.get(name, "") for name in names} | {"figure": what}

    return labels
