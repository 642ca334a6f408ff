"""Stage sweep: the mAP of many label settings on the stored cosines."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from cdul_steps.config import Sweep
from cdul_steps.data.files import replacing
from cdul_steps.data.labels import learn_statistics
from cdul_steps.data.manifest import check_rows, read_split, read_truth
from cdul_steps.data.stores import open_similarity, open_store, read_blocks, read_logit_bias
from cdul_steps.data.tables import describe, write_table
from cdul_steps.data.truth import AP
from cdul_steps.errors import UserError
from cdul_steps.method import metrics
from cdul_steps.method.aggregation import CONSTRUCTIONS, build_labels, seen_whole
from cdul_steps.method.choices import AveragePrecision, Construction, Difficult
from cdul_steps.method.scoring import Scoring
from cdul_steps.method.similarity import temperature
from cdul_steps.progress import Progress, note
from cdul_steps.provenance import versions

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Combination = tuple[Construction, float | None, float | None]
"""Construction, zeta and lambda, None if the construction does not use it."""
UNREACHED = 2.0
"""A zeta that no score reaches, so that the aggregator gives the smallest snippet score."""
HINT = "the sweep's taus are multiples of 1 / logit_scale: add it to the attributes in zarr.json"
SCHEMA = pa.schema(
    [
        ("split", pa.string()),
        ("construction", pa.string()),
        ("standardise", pa.bool_()),
        ("tau_multiple", pa.float64()),
        ("tau", pa.float64()),
        ("zeta", pa.float64()),
        ("lambda", pa.float64()),
        ("mAP", pa.float64()),
        ("positives", pa.float64()),
        ("images", pa.int64()),
    ]
)


FIGURES = (".svg", ".pdf", ".png")


def sweep_labels(
    *,
    similarity: dict[str, Path],
    images: Path,
    settings: Sweep,
    difficult: Difficult,
    ap: AveragePrecision,
    threads: int,
    output: Path,
    figure: Path | None,
) -> None:
    """Measure every combination of label settings on each split with truth.

    `similarity` maps splits to their stores. Writes one row per split and setting: mAP in percent,
    and `positives`, the mean sum of an image's labels; zeta and lambda are null if the construction
    does not use them. Scores are made as the model was trained; with a sigmoid, cosines are never
    standardised. `figure` is drawn from the table. Raises UserError if no split has truth.
    """
    if figure and figure.suffix not in FIGURES:
        raise UserError(f"{figure}: the name must end in {', '.join(FIGURES)}")
    first = next(iter(similarity.values()))
    logit_bias = read_logit_bias(open_store(first).attrs, first)
    choices = _standardise_choices(settings, logit_bias)
    statistics = _train_statistics(similarity, images) if True in choices else None
    combinations = list(_combinations(settings))
    steps = len(choices) * len(settings.tau) * len(combinations)
    rows: list[dict[str, Any]] = []
    for split, store in similarity.items():
        array, classes, scale = open_similarity(store, None, HINT)
        check_rows(images, split, store, array.shape[0])
        places, truth, counted = _read_truth(images, split, classes, difficult)
        if not len(places):
            note(f"sweep: {split}: no image has known truth")
            continue
        with (
            ThreadPoolExecutor(threads) as pool,
            Progress(f"sweep: {split}", steps, "settings") as progress,
        ):
            for standardise, multiple in product(choices, settings.tau):
                tau = multiple * temperature(scale)
                built = build_labels(
                    read_blocks(store, array),
                    (array.shape[0], len(classes)),
                    ["global", "local_mean", "local_max", "aggregate"],
                    scoring=Scoring(tau, logit_bias),
                    zeta=UNREACHED,
                    lambda_=0,
                    statistics=statistics if standardise else None,
                )
                built = {k: np.take(v.T, places, axis=1).T for k, v in built.items()}
                measured = _Measure(built, truth, counted, ap)
                for combination, values in zip(
                    combinations, pool.map(measured, combinations), strict=True
                ):
                    construction, zeta, lambda_ = combination
                    rows.append(
                        {
                            "split": split,
                            "construction": construction,
                            "standardise": standardise,
                            "tau_multiple": multiple,
                            "tau": tau,
                            "zeta": zeta,
                            "lambda": lambda_,
                            **values,
                        }
                    )
                    progress.update()
    if not rows:
        raise UserError(f"{images}: no image has known truth, so there is nothing to sweep")
    facts = {"difficult": difficult, "ap": ap, "settings": settings.model_dump(by_alias=True)}
    table = pa.Table.from_pylist(rows, SCHEMA)
    write_table(describe(table, "sweep", **facts, software=versions("numpy", "zarr")), output)
    if figure:
        with replacing(figure) as part:
            draw(rows).savefig(part)
    note(f"sweep: {len(rows)} settings measured, written to {output}")


def _standardise_choices(settings: Sweep, logit_bias: float | None) -> list[bool]:
    if logit_bias is None or True not in settings.standardise:
        return settings.standardise
    note("sweep: the model's scores are sigmoids, for which cosines are not standardised")
    return [False]


def _train_statistics(similarity: dict[str, Path], images: Path) -> Any:
    if "train" not in similarity:
        raise UserError("sweep: standardise needs the cosines of split 'train'")
    array = open_similarity(similarity["train"], None, HINT)[0]
    rows = read_split(images, "train", ["row"])["row"].to_numpy()
    return learn_statistics(similarity["train"], array, rows, slice(None))


def _combinations(settings: Sweep) -> Iterator[Combination]:
    for construction in settings.constructions:
        zetas = settings.zeta if construction in ("aggregate", "final") else [None]
        lambdas = settings.lambda_ if construction == "final" else [None]
        yield from product([construction], zetas, lambdas)


def _read_truth(
    images: Path, split: str, classes: list[str], difficult: Difficult
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows of the images with known truth, their truth, and what is counted, bool (N, C)."""
    table = read_split(images, split, ["image_id", "row"])
    rows = dict(zip(table["image_id"].to_pylist(), table["row"].to_pylist(), strict=True))
    known = [t for t in read_truth(images, classes).to_pylist() if t["image_id"] in rows]
    tables = metrics.truth_table(
        [t["positive"] for t in known],
        [t["difficult"] or [] for t in known],
        len(classes),
        difficult,
    )
    places = np.array([rows[t["image_id"]] for t in known], np.int64)
    return places, *tables


class _Measure:
    """mAP and mean sum of the labels of a split by a construction."""

    def __init__(
        self,
        built: dict[str, np.ndarray],
        truth: np.ndarray,
        counted: np.ndarray,
        ap: AveragePrecision,
    ) -> None:
        usable = seen_whole(built)
        self.ap = AP[ap]

        def by_class(table: np.ndarray) -> np.ndarray:
            """(N, C) to (C, N), so that each class in turn stays in the cache."""
            return np.ascontiguousarray(table[usable].T)

        self.truth, self.counted = by_class(truth), by_class(counted)
        self.local_mean = by_class(built["local_mean"])
        # To the other constructions, the best and the worst snippet are as good as all.
        names = ("global", "local_max", "aggregate")
        self.views = np.stack([by_class(built[name]) for name in names], axis=1)

    def __call__(self, combination: Combination) -> dict[str, Any]:
        construction, zeta, lambda_ = combination
        total = 0.0
        values: list[float] = []
        for c, views in enumerate(self.views):
            if construction == "local_mean":
                labels = self.local_mean[c]
            else:
                # For one class, with the images on the axis of the classes: NumPy is fast along it.
                labels = CONSTRUCTIONS[construction](views[None], zeta or 0.0, lambda_ or 0.0)[0]
            total += labels.sum(dtype=np.float64)
            truth, counted, of = (t[:, None] for t in (self.truth[c], self.counted[c], labels))
            value = metrics.mean_average_precision(truth, counted, of, self.ap)
            values += [] if value is None else [value]
        images = self.truth.shape[1]
        return {
            "mAP": float(np.mean(values)) if values else None,
            "positives": total / max(1, images),
            "images": images,
        }


def draw(rows: list[dict[str, Any]]) -> "Figure":
    """mAP against the temperature, one panel per split, with and without `standardise`.

    The labels of one kind of view are dashed; the final labels, at the lambda closest to 0, have
    one line per zeta, darker for larger values.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    splits = list(dict.fromkeys(row["split"] for row in rows))
    standardised = sorted({row["standardise"] for row in rows})
    multiples = sorted({row["tau_multiple"] for row in rows})
    finals = [row for row in rows if row["construction"] == "final"]
    zetas = sorted({row["zeta"] for row in finals})
    lambda_ = min((row["lambda"] for row in finals), key=abs, default=None)
    lines = [
        ({"construction": name}, name.replace("_", " "), "black", marker, dashes)
        for name, marker, dashes in (
            ("global", "o", (0, (5, 2))),
            ("local_mean", "v", (0, (1, 1.5))),
            ("local_max", "^", (0, (5, 1.5, 1, 1.5))),
        )
    ] + [
        (
            {"construction": "final", "zeta": zeta, "lambda": lambda_},
            f"final, lambda {lambda_:g}, zeta {zeta:g}",
            # Its colours also differ in lightness, for colour-blind readers and greyscale print.
            colormaps["plasma_r"](0.15 + 0.75 * place / max(1, len(zetas) - 1)),
            "sDPX*"[place % 5],
            "solid",
        )
        for place, zeta in enumerate(zetas)
    ]
    size = (2.8 + 2.8 * len(standardised), 0.8 + 2.6 * len(splits))
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    panels = figure.subplots(
        len(splits), len(standardised), sharex=True, sharey=True, squeeze=False
    )
    cells = list(product(splits, standardised))
    for (split, standardise), panel in zip(cells, panels.flat, strict=True):
        here = [r for r in rows if (r["split"], r["standardise"]) == (split, standardise)]
        for chosen, label, colour, marker, dashes in lines:
            line = {r["tau_multiple"]: r["mAP"] for r in here if chosen.items() <= r.items()}
            panel.plot(
                multiples,
                [line.get(multiple) for multiple in multiples],
                color=colour,
                marker=marker,
                linestyle=dashes,
                markersize=4.5,
                linewidth=1.2,
                label=label if line else None,
            )
        panel.set_xscale("log")
        panel.set_xticks(multiples, [f"{multiple:g}" for multiple in multiples])
        panel.minorticks_off()
        panel.grid(axis="y", color="0.9", linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
        panel.set_title(f"{split}{', classes standardised' if standardise else ''}", fontsize=10)
    figure.supxlabel("temperature (multiples of the model's own)", fontsize=10)
    figure.supylabel("mAP (%)", fontsize=10)
    handles, names = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right center", frameon=False, fontsize=9)
    return figure
