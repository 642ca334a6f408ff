"""The effect of context names on the labels of images that may show none of the classes.

    python experiments/context.py --encoder results/voc2007/photo-mini
    python experiments/context.py --vectors vectors.parquet

The first draws K classes of an encoded data set with truth at random, and compares their labels
without and with a list of context names; the second uses the other classes as context. The tables,
in Markdown, go to stdout.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import yaml
from calibrations import read_vectors

from cdul_steps.config import Encoder
from cdul_steps.data.classes import ClassTable, ContextList, load_classes
from cdul_steps.data.manifest import read_split, read_truth
from cdul_steps.data.stores import open_store
from cdul_steps.data.tables import read_facts
from cdul_steps.method.aggregation import build_labels
from cdul_steps.method.calibration import class_statistics, find_bias, rescale
from cdul_steps.method.context import (
    NEARNESS,
    REFERENCE,
    WEIGHT,
    centred_cosine,
    find_near,
)
from cdul_steps.method.metrics import mean_average_precision, precision_recall_f1, truth_table
from cdul_steps.method.scoring import Scoring
from cdul_steps.method.similarity import cosine, temperature
from cdul_steps.steps.encode import encode_text
from cdul_steps.steps.similarity import read_text

COUNTS = (1, 2, 3, 5, 10, 20)
SIZES = (25, 50, 100, 200)
ALL = float("inf")
"""A weight with which every context name counts as one."""


def embed(encoder: Encoder, names: Sequence[Sequence[str]]) -> np.ndarray:
    """Unit embeddings of names, each from all its aliases: float32 (len(names), D)."""
    entries = [{"name": str(i), "aliases": list(of)} for i, of in enumerate(names)]
    with TemporaryDirectory() as folder:
        classes, output = Path(folder, "classes.yaml"), Path(folder, "text.parquet")
        classes.write_text(yaml.safe_dump(entries, allow_unicode=True), encoding="utf-8")
        encode_text(classes=classes, encoder=encoder, output=output)
        return read_text(output)[-1]


@dataclass(frozen=True)
class Images:
    """Images with truth: cosines (N, V, C) of the classes and (N, V, M) of the context.

    `near` (M, C) marks the context names that mean a class by the rule, and `same` those that have
    its name.
    """

    classes: np.ndarray
    context: np.ndarray
    near: np.ndarray
    same: np.ndarray
    truth: np.ndarray
    counted: np.ndarray
    tau: float


def read_images(folder: Path, names: ClassTable, encoder: Encoder, tau: float) -> Images:
    """All images with known truth in an encoder's results, from all splits."""
    images = folder.parent / "manifest/images.parquet"
    facts = read_facts(images)
    classes = load_classes(Path("config/classes/voc.yaml"))
    if list(classes.names) != facts["classes"]:
        sys.exit(f"{folder}: its classes are not those of config/classes/voc.yaml")
    vectors, known = [], []
    for split in facts["rows"]:
        table = read_split(images, split, ["image_id", "row"])
        rows = dict(zip(table["image_id"].to_pylist(), table["row"].to_pylist(), strict=True))
        truth = read_truth(images, list(classes.names)).to_pylist()
        known += [t for t in truth if t["image_id"] in rows]
        chosen = [rows[t["image_id"]] for t in truth if t["image_id"] in rows]
        vectors.append(open_store(folder / f"embeddings/{split}.zarr")[:][chosen])
    embeddings = np.concatenate(vectors)
    lists = [[t[key] or [] for t in known] for key in ("positive", "difficult")]
    truth, counted = truth_table(*lists, len(classes.names), "ignore")
    near, same = near_names(classes, names, encoder)
    return Images(
        # By their first names, like the encoder of the results.
        cosine(embeddings, embed(encoder, [of[:1] for of in classes.aliases])),
        cosine(embeddings, embed(encoder, names.aliases)),
        near,
        same,
        truth,
        counted,
        tau,
    )


def near_names(
    classes: ClassTable, names: ClassTable, encoder: Encoder
) -> tuple[np.ndarray, np.ndarray]:
    """Which context names mean which class, and which have its name: two bool (M, C)."""
    vectors = embed(encoder, names.aliases)
    centre = embed(encoder, [[word] for word in REFERENCE]).mean(axis=0)
    found = np.zeros((2, len(names.names), len(classes.names)), bool)
    for c, (name, of) in enumerate(zip(classes.names, classes.aliases, strict=True)):
        cosines = centred_cosine(vectors, embed(encoder, [[alias] for alias in of]), centre)
        near = find_near(
            [(n, *a) for n, a in zip(names.names, names.aliases, strict=True)],
            [(name, *of)],
            cosines.max(axis=1, keepdims=True),
        )
        for one in near:
            place = names.names.index(one.name)
            found[:, place, c] = True, one.nearness is None
    return found[0], found[1]


def labels_of(
    images: Images, chosen: np.ndarray, context: np.ndarray, weight: float, **settings: float
) -> np.ndarray:
    """Final labels (N, K) of the chosen classes, with the context names in a mask (M,)."""
    cosines = np.concatenate([images.classes[..., chosen], images.context[..., context]], axis=2)
    zeta, multiple = settings.get("zeta", 0.3), settings.get("tau", 1.0)
    labels = build_labels(
        [(0, cosines)],
        (len(cosines), len(chosen)),
        ["final"],
        scoring=Scoring(multiple * images.tau, context_weight=weight),
        zeta=zeta,
        lambda_=0.0,
        statistics=class_statistics([cosines]) if settings.get("standardise") else None,
    )["final"]
    if positives := settings.get("positives"):
        labels = rescale(labels, find_bias(labels, positives, multiple), multiple)
    return labels


def measure(labels: np.ndarray, truth: np.ndarray, counted: np.ndarray) -> list[float]:
    """mAP, and precision and recall over all labels at 0.5, in percent."""
    found = precision_recall_f1(truth, counted, labels >= 0.5)
    return [mean_average_precision(truth, counted, labels), 100 * found["OP"], 100 * found["OR"]]


def draws(classes: int, count: int, number: int) -> list[np.ndarray]:
    """Choices of `count` classes; for a count of one, each class in turn."""
    if count in (1, classes):
        return [np.arange(c, c + count) for c in range(0, classes, count)]
    random = np.random.default_rng(count)
    return [np.sort(random.choice(classes, count, replace=False)) for _ in range(number)]


def mean_of(images: Images, chosen: list[np.ndarray], labels: Callable) -> list[float]:
    """The measures' means over choices of classes."""
    return np.mean(
        [measure(labels(c), images.truth[:, c], images.counted[:, c]) for c in chosen], axis=0
    ).tolist()


def show(title: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    print(f"\n{title}\n\n| {' | '.join(header)} |\n|{'---|' * len(header)}")
    for row in rows:
        print(f"| {' | '.join(map(str, row))} |", flush=True)


def cell(values: Sequence[float]) -> str:
    mean_precision, precision, recall = values
    return f"{mean_precision:.1f}, P {precision:.0f}, R {recall:.0f}"


def by_count(images: Images, number: int) -> None:
    """K classes alone, with some everyday names that are not classes, and with the list."""
    size = len(images.near)
    none, everything = np.zeros(size, bool), np.ones(size, bool)
    others = np.flatnonzero(~images.near.any(axis=1))
    sixty = []
    for seed in range(3):
        sixty.append(none.copy())
        sixty[-1][np.random.default_rng(seed).choice(others, 60, replace=False)] = True

    def without(mask: np.ndarray, of: np.ndarray) -> Callable:
        return lambda c: mask & ~of[:, c].any(axis=1)

    ways = {
        "alone": (lambda c: none, WEIGHT),
        f"the list as {WEIGHT:g} names": (without(everything, images.near), WEIGHT),
        "every name as one": (without(everything, images.near), ALL),
        f"as {WEIGHT:g}, near names too": (lambda c: everything, WEIGHT),
        "every name as one, near names too": (lambda c: everything, ALL),
    }
    rows = []
    for count in COUNTS:
        chosen = draws(images.truth.shape[1], count, number)
        found = [
            mean_of(images, chosen, lambda c, k=keep, w=weight: labels_of(images, c, k(c), w))
            for keep, weight in ways.values()
        ]
        of_sixty = [
            mean_of(images, chosen, lambda c, m=mask: labels_of(images, c, m, ALL))
            for mask in sixty
        ]
        found.insert(1, np.mean(of_sixty, axis=0).tolist())
        rows.append([count, *map(cell, found)])
    header = ["K", *ways]
    header.insert(2, "60 of the names that are no class")
    show("K of the classes: mAP, precision and recall at 0.5", header, rows)


def by_size(images: Images, number: int) -> None:
    """Parts of the list, at several weights."""
    size, rows = len(images.near), []
    for names in (*SIZES, size):
        orders = [
            np.random.default_rng(s).permutation(size) for s in range(3 if names < size else 1)
        ]
        for weight in (25.0, 50.0, 100.0, ALL):
            if weight >= names and weight < ALL:
                continue
            row = [names, "all" if weight == ALL else f"{weight:g}"]
            for count in (1, 3, 20):
                chosen = draws(images.truth.shape[1], count, number)
                found = [
                    mean_of(
                        images,
                        chosen,
                        lambda c, o=order, w=weight, n=names: labels_of(
                            images, c, (o < n) & ~images.near[:, c].any(axis=1), w
                        ),
                    )
                    for order in orders
                ]
                row.append(cell(np.mean(found, axis=0)))
            rows.append(row)
    header = ["names of the list", "count as", *(f"K = {count}" for count in (1, 3, 20))]
    show("What the list's size does", header, rows)


def mostly_empty(images: Images, number: int, share: float = 0.9) -> None:
    """Three classes (never `person`) and images of which `share` show none of them."""
    size = len(images.near)
    ways = {
        "alone": (None, {}),
        "as 50": (50.0, {}),
        "as 50, zeta 0.05": (50.0, {"zeta": 0.05}),
        "as 25": (25.0, {}),
        "every name as one": (ALL, {}),
        "as 50, standardised": (50.0, {"standardise": 1}),
        "as 50, tau x2, zeta 0.05, positives 0.1": (
            50.0,
            {"tau": 2, "zeta": 0.05, "positives": 0.1},
        ),
        "alone, tau x2, zeta 0.05, positives 0.1": (
            None,
            {"tau": 2, "zeta": 0.05, "positives": 0.1},
        ),
    }
    random = np.random.default_rng(0)
    person = load_classes(Path("config/classes/voc.yaml")).names.index("person")
    others = np.delete(np.arange(images.truth.shape[1]), person)
    found: dict[str, list[list[float]]] = {name: [] for name in ways}
    for _ in range(number):
        chosen = np.sort(random.choice(others, 3, replace=False))
        shows = images.truth[:, chosen].any(axis=1)
        clear = images.counted[:, chosen].all(axis=1)
        some, empty = (random.permutation(np.flatnonzero(m & clear)) for m in (shows, ~shows))
        taken = min(len(some), round(len(empty) * (1 - share) / share))
        places = np.concatenate([some[:taken], empty])
        part = Images(
            images.classes[places],
            images.context[places],
            images.near,
            images.same,
            images.truth[places],
            images.counted[places],
            images.tau,
        )
        for name, (weight, settings) in ways.items():
            context = ~images.near[:, chosen].any(axis=1) & (np.zeros(size, bool) | bool(weight))
            labels = labels_of(part, chosen, context, weight or WEIGHT, **settings)
            measured = measure(labels, part.truth[:, chosen], part.counted[:, chosen])
            named = 100 * (labels[taken:] >= 0.5).any(axis=1).mean()
            found[name].append([*measured, named])
    rows = [
        [name, *(f"{value:.1f}" for value in np.nanmean(values, axis=0))]
        for name, values in found.items()
    ]
    header = ["context", "mAP", "precision", "recall", "empty images that get a label"]
    show(f"Three classes, {share:.0%} of the images show none: percent", header, rows)


def left_out(names: ClassTable, encoder: Encoder, path: Path) -> None:
    """The names that the rule leaves out for the class tables of the paper's data sets."""
    rows = []
    for data in ("voc", "coco", "nuswide"):
        classes = Path(f"config/classes/{data}.yaml")
        with TemporaryDirectory() as folder:
            output = Path(folder, "text.parquet")
            encode_text(classes=classes, encoder=encoder, output=output, context=ContextList(path))
            near = read_facts(output)["left_out"]
        told = sorted((n for n in near if n["nearness"] is not None), key=lambda n: -n["nearness"])
        rows.append(
            [
                data,
                len(load_classes(classes).names),
                sum(n["nearness"] is None for n in near),
                len(told),
                ", ".join(f"{n['name']} ({n['of']} {n['nearness']:.2f})" for n in told),
            ]
        )
    header = ["class table", "classes", "by their name", "by nearness", "which, by nearness"]
    show(f"Left out of the {len(names.names)} names, above {NEARNESS:g}", header, rows)


def by_class(images: Images) -> None:
    """One class at a time: the effect of its own names if they are not left out."""
    everything = np.ones(len(images.near), bool)
    rows = []
    for c, name in enumerate(load_classes(Path("config/classes/voc.yaml")).names):
        found = [
            mean_of(images, [np.array([c])], lambda k, m=mask: labels_of(images, k, m, WEIGHT))
            for mask in (everything, ~images.same[:, c], ~images.near[:, c])
        ]
        rows.append([name, *map(cell, found)])
    header = ["class", "all stay", "its own name left out", "near names left out"]
    show(f"One class, the list as {WEIGHT:g} names", header, rows)


def of_vectors(path: Path, number: int) -> None:
    """K classes alone, and with the other classes as context."""
    cosines, truth, counted, tau = read_vectors(path, "ignore")
    size = truth.shape[1]
    own = np.eye(size, dtype=bool)
    images = Images(cosines, cosines, own, own, truth, counted, tau)
    rows = []
    for count in COUNTS:
        chosen = draws(size, count, number)
        alone = mean_of(
            images, chosen, lambda c: labels_of(images, c, np.zeros(size, bool), WEIGHT)
        )
        beside = mean_of(
            images, chosen, lambda c: labels_of(images, c, ~own[:, c].any(axis=1), WEIGHT)
        )
        rows.append([count, cell(alone), cell(beside)])
    header = ["K", "alone", "the other classes as context"]
    show("Published vectors: mAP, precision and recall at 0.5", header, rows)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--encoder", type=Path, help="results/DATASET/ENCODER, with VOC's classes")
    parser.add_argument("--vectors", type=Path)
    parser.add_argument("--context", type=Path, default=Path("config/context/everyday.txt"))
    parser.add_argument("--draws", type=int, default=20, help="choices of K classes")
    options = parser.parse_args()
    if options.vectors:
        of_vectors(options.vectors, options.draws)
    if not options.encoder:
        return
    facts = read_facts(options.encoder / "text.parquet")
    encoder = Encoder(**{key: facts[key] for key in ("model", "pretrained", "templates")})
    names = load_classes(options.context)
    images = read_images(options.encoder, names, encoder, temperature(facts["logit_scale"]))
    by_count(images, options.draws)
    by_size(images, options.draws)
    mostly_empty(images, max(options.draws, 30))
    by_class(images)
    left_out(names, encoder, options.context)


if __name__ == "__main__":
    main()
