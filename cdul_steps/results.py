"""Locations of results: folders that mirror the DAG, each named after a section of the config.

A pattern is a path with names in braces, like Snakemake's wildcards.
"""

import glob
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

LOGS = "{results}/logs"
BENCHMARKS = "{results}/benchmarks"
REPORT = "{results}/report"
DATASET = "{results}/{dataset}"
SCENES = f"{DATASET}/scenes/scenes.csv"
IMAGES = f"{DATASET}/manifest/images.parquet"
SHARD = f"{DATASET}/manifest/{{split}}/{{shard}}.parquet"
FEATURES = f"{DATASET}/features/{{trunk}}/{{split}}.zarr"
FEATURE_TABLE = f"{DATASET}/features/{{trunk}}/{{split}}/{{shard}}.parquet"
APPLIED = f"{DATASET}/applied/{{classifier}}/{{split}}/{{shard}}.parquet"
COUNTS = f"{DATASET}/applied/{{classifier}}/{{split}}.json"
ENCODER = f"{DATASET}/{{encoder}}"
TEXT = f"{ENCODER}/text.parquet"
EMBEDDINGS = f"{ENCODER}/embeddings/{{split}}.zarr"
ENCODED = f"{ENCODER}/encode/{{split}}/{{shard}}.parquet"
SIMILARITY = f"{ENCODER}/similarity/{{split}}.zarr"
SWEEP = f"{ENCODER}/sweep/sweep.parquet"
ABLATION = f"{ENCODER}/ablation/ablation.parquet"
LABELS = f"{ENCODER}/{{labels}}"
PSEUDO_LABELS = f"{LABELS}/pseudo_labels.parquet"
QUALITY = f"{LABELS}/quality.json"
VARIANT = f"{LABELS}/ablation/variant~{{variant}}/seed~{{seed}}"
TRAINING = f"{LABELS}/{{training}}"
MODEL = f"{TRAINING}/model"
WEIGHTS = f"{MODEL}/model.safetensors"
CARD = f"{MODEL}/model.json"
HISTORY = f"{TRAINING}/history.parquet"
CHECKPOINT = f"{TRAINING}/checkpoint.pt"
REFINED = f"{TRAINING}/refined_labels.parquet"
PREDICTIONS = f"{TRAINING}/predictions/{{split}}.parquet"
METRICS = f"{TRAINING}/metrics.json"
GALLERY = f"{TRAINING}/gallery/{{split}}"
# From a copy, because a warning issued meanwhile would add a name to the module.
PATTERNS = tuple(value for name, value in globals().copy().items() if name.isupper())

WILDCARDS = {"split": "train|test", "shard": r"\d+"}
"""Restrictions on names in a pattern; other names are free."""
_NAME = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Place:
    """A place in a results folder: the known names of a data set, an encoder, and so on."""

    results: Path
    names: Mapping[str, str] = field(default_factory=dict)

    def path(self, pattern: str, **further: str | int) -> Path:
        """The path of a pattern here; `further` are the names that are not known yet."""
        return Path(pattern.format(results=self.results, **self.names, **further))

    def find(self, pattern: str, **further: str) -> Iterator["Place"]:
        """A place for every existing match of a pattern, in order of the paths.

        Hidden files, such as those of an active writer, are not found.
        """
        names = {**self.names, **further}
        pattern = pattern.removeprefix("{results}/")
        known = _NAME.sub(lambda m: glob.escape(names.get(m[1], "")) or "*", pattern)
        regex = ""
        for literal, name in re.findall(r"([^{}]*)(?:\{(\w+)\})?", pattern):
            regex += re.escape(literal)
            if name in names:
                regex += re.escape(names[name])
            elif name:
                regex += f"(?P<{name}>{WILDCARDS.get(name, '[^/.][^/]*')})"
        for path in sorted(self.results.glob(known)):
            if match := re.fullmatch(regex, path.relative_to(self.results).as_posix()):
                yield Place(self.results, {**names, **match.groupdict()})


def taken(kind: str) -> set[str]:
    """Names that a `kind` of section (`dataset`, `encoder`, `labels`, `training`) cannot have,
    because other files and folders in the same place have them."""
    folder = next(p for p in PATTERNS if p.endswith(f"/{{{kind}}}"))
    above = folder.removesuffix(f"{{{kind}}}")
    beside = (p.removeprefix(above).partition("/")[0] for p in PATTERNS if p.startswith(above))
    return {name for name in beside if not _NAME.fullmatch(name)}


def measured_split(splits: Iterable[str]) -> str:
    """The split that a classifier is evaluated on: test, if there is one."""
    return "test" if "test" in splits else "train"
