"""The report's figures: the computation of each, as pure functions on arrays, and its drawing.

The colours are those of Okabe and Ito, which colour-blind readers can distinguish. Lines also
differ in their dashes and bars in their hatching, so that a black-and-white print is readable.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from sklearn.metrics import precision_recall_curve

WIDTH = 7.2
"""Inches: the text width of an A4 page."""
MAX_CLASSES = 80
"""Maximum number of bars or matrix rows; a figure shows only the most frequent classes."""
LINES = (("#0072B2", "-"), ("#D55E00", "--"), ("#009E73", "-."), ("#000000", ":"))
BARS = (("#56B4E9", "////"), ("#D55E00", ""))
SCORE_BINS = np.linspace(0, 1, 41)
STYLE = {
    "font.size": 8.5,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "legend.edgecolor": "none",
    "hatch.linewidth": 0.5,
    # Names of classes and files are plain text, whatever characters they contain.
    "text.parse_math": False,
    # Text stays text: it can be searched, and the viewer chooses fonts that have the characters.
    "svg.fonttype": "none",
    "svg.hashsalt": "cdul",
}


@contextmanager
def style() -> Iterator[None]:
    """The style of all figures."""
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        # The SVG viewer chooses the font; matplotlib's own lacks Chinese, for example.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def save(figure: Figure, path: Path) -> None:
    """Write a figure in the format of its suffix: SVG, or JPEG for photographs."""
    if path.suffix == ".svg":
        figure.savefig(path, metadata={"Date": None, "Creator": None})
    else:
        figure.savefig(path, dpi=130, pil_kwargs={"quality": 85})


# Scores


def count_scores(scores: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Counts in SCORE_BINS of the finite `scores` (N, C) or (N, S, C) where `chosen` (N, C)."""
    chosen = np.broadcast_to(chosen if scores.ndim == 2 else chosen[:, None], scores.shape)
    values = scores[chosen & np.isfinite(scores)]
    return np.histogram(values, SCORE_BINS)[0]


def draw_scores(panels: dict[str, dict[str, np.ndarray]], zeta: float | None) -> Figure:
    """Distributions of scores: panel title to curve name to counts in SCORE_BINS."""
    figure = Figure((WIDTH, 3.2), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, (title, curves) in zip(axes, panels.items(), strict=True):
        for (name, counts), (colour, dashes) in zip(curves.items(), LINES, strict=False):
            share = 100 * counts / max(counts.sum(), 1)
            axis.stairs(
                share, SCORE_BINS, baseline=None, label=name, color=colour, ls=dashes, lw=1.4
            )
        if zeta is not None:
            axis.axvline(zeta, color="#555555", ls=":", lw=1)
        axis.set(yscale="log", xlim=(0, 1), title=title, xlabel="score (probability, 0 to 1)")
    axes[0].set_ylabel("share of scores (%, logarithmic)")
    axes[0].yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    # Outside the axes, as in the other figures, because the curves may be anywhere.
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=len(names))
    return figure


# Average precision


def draw_average_precision(
    classes: Sequence[str],
    positives: Sequence[int],
    values: Mapping[str, Sequence[float | None]],
) -> Figure:
    """Bars of AP (percent) by class: name of the scores to one value per class, or None.

    Sorted by the last scores; at most MAX_CLASSES classes, the most frequent ones.
    """
    # A class with positives has an average precision.
    known = {name: [np.nan if v is None else v for v in of] for name, of in values.items()}
    *_, last = known.values()
    shown = [c for c in range(len(classes)) if positives[c]]
    shown = sorted(sorted(shown, key=lambda c: -positives[c])[:MAX_CLASSES], key=lambda c: last[c])
    figure = Figure((WIDTH, 1.1 + 0.24 * len(shown)), layout="constrained")
    axis = figure.subplots()
    places, height = np.arange(len(shown)), 0.8 / len(values)
    for i, ((name, ap), (colour, hatch)) in enumerate(zip(known.items(), BARS, strict=False)):
        mean = float(np.nanmean(ap))
        axis.barh(
            places + ((len(values) - 1) / 2 - i) * height,
            [ap[c] for c in shown],
            height,
            label=f"{name}, mAP {mean:.1f}",
            color=colour,
            hatch=hatch,
            edgecolor="#222222",
            linewidth=0.4,
        )
        axis.axvline(mean, color="#222222", ls=(":", "--")[i], lw=1)
    axis.set_yticks(places, [f"{classes[c]} ({positives[c]})" for c in shown])
    axis.set(xlim=(0, 100), ylim=(-0.6, len(shown) - 0.4), xlabel="average precision (%)")
    axis.set_ylabel("class (images with it)")
    axis.grid(axis="y", visible=False)
    figure.legend(loc="outside upper center", ncols=len(values))
    return figure


# Precision and recall


def precision_recall(
    truth: np.ndarray, scores: np.ndarray, points: int = 200
) -> tuple[np.ndarray, np.ndarray]:
    """`(recall, precision)` in 0..1 over all thresholds, in order of recall.

    `truth` bool (N,) with at least one True, `scores` float (N,). Each recall above 0 occurs once,
    with its best precision; thinned evenly to at most `points`. Ties are one threshold. Source:
    scikit-learn.
    """
    precision, recall, _ = precision_recall_curve(truth, scores)
    # The last point, precision 1 at recall 0, does not come from the data.
    precision, recall = precision[-2::-1], recall[-2::-1]
    # Thresholds that only add wrong labels lie below the first one of their recall.
    first = np.flatnonzero(np.diff(recall, prepend=0))
    kept = first[np.unique(np.linspace(0, len(first) - 1, points).astype(int))]
    return recall[kept], precision[kept]


def at_threshold(
    truth: np.ndarray, scores: np.ndarray, threshold: float
) -> tuple[float, float] | None:
    """`(recall, precision)` of the scores at or above a threshold; None if there are none."""
    predicted = scores >= threshold
    if not predicted.any():
        return None
    hits = (truth & predicted).sum()
    return hits / truth.sum(), hits / predicted.sum()


def draw_precision_recall(
    scores: dict[str, np.ndarray],
    truth: np.ndarray,
    counted: np.ndarray,
    classes: Sequence[str],
    ap: Sequence[float | None],
    threshold: float,
) -> Figure:
    """Curves over all labels for each of `scores` (N, C), and for each class of the last scores.

    `truth` and `counted` are bool (N, C), `ap` the last scores' average precision by class.
    """
    figure = Figure((WIDTH, 4), layout="constrained")
    together, single = figure.subplots(1, 2, sharey=True)
    for (name, values), (colour, dashes) in zip(scores.items(), LINES, strict=False):
        recall, precision = precision_recall(truth[counted], values[counted])
        together.plot(100 * recall, 100 * precision, color=colour, ls=dashes, lw=1.4, label=name)
        point = at_threshold(truth[counted], values[counted], threshold)
        if point:
            together.plot(100 * point[0], 100 * point[1], "o", color=colour, ms=4)
    together.set(title="All classes together", ylabel="precision (%)")
    name, values = list(scores.items())[-1]
    known = {c: value for c, value in enumerate(ap) if value is not None}
    order = sorted(known, key=lambda c: -known[c])
    named = dict.fromkeys((order[0], order[len(order) // 2], order[-1]))
    for c in [*order, *named]:
        here = counted[:, c]
        recall, precision = precision_recall(truth[here, c], values[here, c])
        single.plot(100 * recall, 100 * precision, color="#bbbbbb", lw=0.7, zorder=1)
    for c, (colour, dashes) in zip(named, LINES, strict=False):
        here = counted[:, c]
        recall, precision = precision_recall(truth[here, c], values[here, c])
        label = f"{classes[c]} (AP {ap[c]:.0f})"
        single.plot(100 * recall, 100 * precision, color=colour, ls=dashes, lw=1.4, label=label)
    single.set(title=f"{name}, each class")
    for axis in (together, single):
        axis.set(xlim=(0, 100), ylim=(0, 102), xlabel="recall (%)")
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16))
    return figure


# Estimates from answers


def draw_estimate(
    panels: Sequence[tuple[str, Sequence[Mapping[str, Any]], float | None]],
) -> Figure:
    """Precision and recall against the threshold; a panel is its title, points, threshold in use.

    A point has `threshold` and the bounds `precision` and `recall`, each `[low, middle, high]` in
    0..1, or None if there are too few answers.
    """
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure((WIDTH, 0.6 + 2.1 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axis, (title, points, in_use) in zip(axes.flat, panels, strict=False):
        steps = [point["threshold"] for point in points]
        for name, (colour, dashes) in zip(("precision", "recall"), LINES, strict=False):
            unknown = [np.nan] * 3
            low, middle, high = 100 * np.array([point[name] or unknown for point in points]).T
            axis.fill_between(steps, low, high, color=colour, alpha=0.2, lw=0)
            axis.plot(steps, middle, color=colour, ls=dashes, lw=1.4, label=name)
        if in_use is not None:
            axis.axvline(in_use, color="#555555", ls=":", lw=1)
        axis.set(title=title, xlim=(0, 1), ylim=(0, 102))
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis in axes.flat[: len(panels)][-columns:]:
        axis.set_xlabel("threshold (score, 0 to 1)")
        axis.tick_params(labelbottom=True)
    for axis in axes[:, 0]:
        axis.set_ylabel("estimate (%)")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return figure


# Learning


def draw_learning(history: Mapping[str, Sequence[float | None]], loss_unit: str) -> Figure:
    """Curves over `epoch` of the columns of `history.parquet` that contain values."""

    def known(name: str) -> bool:
        return any(value is not None for value in history.get(name, ()))

    quality = {
        "label_mAP": "pseudo-labels, train",
        "train_mAP": "classifier, train",
        "test_mAP": "classifier, test",
    }
    panels = [
        ({"loss": ""}, f"mean loss per\nimage ({loss_unit})"),
        ({name: text for name, text in quality.items() if known(name)}, "mAP (%)"),
        ({"label_movement": ""}, "mean change of\na label (0 to 1)"),
    ]
    panels = [(columns, label) for columns, label in panels if any(map(known, columns))]
    figure = Figure((WIDTH, 0.8 + 1.6 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axis, (columns, label) in zip(axes, panels, strict=True):
        for (name, text), (colour, dashes) in zip(columns.items(), LINES, strict=False):
            values = np.array(history[name], dtype=float)
            axis.plot(
                history["epoch"], values, color=colour, ls=dashes, lw=1.4, marker=".", label=text
            )
        if any(columns.values()):
            axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=len(columns))
        else:
            least, most = min(0, np.nanmin(values)), np.nanmax(values)
            axis.set_ylim(least, most + 0.08 * (most - least or 1))
        axis.set_ylabel(label)
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[-1].set_xlabel("epoch (passes over the train split)")
    figure.align_ylabels(axes)
    return figure


# Labels that occur together


def cooccurrence(labels: np.ndarray) -> np.ndarray:
    """Number of images with both of two labels: bool (N, C) to int64 (C, C), symmetric."""
    counts = labels.astype(np.int64)
    return counts.T @ counts


def draw_cooccurrence(counts: dict[str, np.ndarray], classes: Sequence[str]) -> Figure:
    """Matrices of shares by row, one per title, from the counts (C, C) of `cooccurrence`.

    At most MAX_CLASSES classes, the most frequent ones.
    """
    total = sum(np.diag(matrix) for matrix in counts.values())
    shown = np.sort(np.argsort(-total, kind="stable")[:MAX_CLASSES])
    names = [classes[c] for c in shown]
    # Side by side, as long as the numbers in the cells are readable.
    beside = len(counts) > 1 and len(shown) <= 12
    height = WIDTH / 2 if beside else min(6.5, 1.6 + 0.24 * len(shown))
    shape = (1, len(counts)) if beside else (len(counts), 1)
    figure = Figure((WIDTH, (height + 0.4) * shape[0]), layout="constrained")
    axes = figure.subplots(*shape, squeeze=False).ravel()
    for axis, (title, matrix) in zip(axes, counts.items(), strict=True):
        _draw_matrix(axis, matrix[np.ix_(shown, shown)], names, title)
    figure.colorbar(
        axes[0].images[0],
        ax=axes,
        label="share of the row's images (%)",
        format=PercentFormatter(symbol="", decimals=0),
        shrink=0.7 / shape[0],
        aspect=20,
    )
    if beside:
        axes[1].set_yticklabels([])
        axes[1].set_ylabel("")
    return figure


def _draw_matrix(axis: Axes, counts: np.ndarray, names: list[str], title: str) -> None:
    images = np.diag(counts)
    share = np.divide(
        100 * counts,
        images[:, None],
        out=np.full(counts.shape, np.nan),
        where=images[:, None] > 0,
    )
    np.fill_diagonal(share, 0)
    colours = matplotlib.colormaps["Blues"].with_extremes(bad="#dddddd")
    axis.imshow(share, cmap=colours, vmin=0, vmax=100)
    places = np.arange(len(names))
    axis.set_xticks(places, names, rotation=90)
    axis.set_yticks(places, names)
    axis.set(title=title, ylabel="label", xlabel="label that the image also has")
    axis.grid(visible=False)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    if len(names) > 25:
        axis.tick_params(labelsize=min(5, 250 / len(names)))
        return
    for row, column in np.ndindex(counts.shape):
        value = share[row, column]
        if row == column:
            axis.text(column, row, f"{images[row]}", ha="center", va="center", fontsize=5)
            axis.add_patch(
                matplotlib.patches.Rectangle(
                    (column - 0.5, row - 0.5), 1, 1, fill=False, ec="#222222", lw=0.6
                )
            )
        elif value >= 0.5:
            colour = "white" if value > 60 else "black"
            text = f"{value:.0f}"
            axis.text(column, row, text, ha="center", va="center", fontsize=5.5, color=colour)


# Class activation maps


def fade(pixels: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Fade uint8 pixels (H, W, 3) to white where `weight` (H, W) in 0..1 is small."""
    keep = (0.15 + 0.85 * weight)[..., None]
    return np.round(255 - keep * (255.0 - pixels)).astype(np.uint8)


def draw_class_maps(rows: Sequence[dict[str, Any]]) -> Figure:
    """One row per image: `name`, `pixels` uint8 (H, W, 3), `labels` and their `maps` (H, W)."""
    columns = 1 + max(len(row["maps"]) for row in rows)
    heights = [row["pixels"].shape[0] / row["pixels"].shape[1] for row in rows]
    height = sum(0.25 + WIDTH / columns * share for share in heights)
    figure = Figure((WIDTH, height), layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False, height_ratios=heights)
    for line, row in zip(axes, rows, strict=True):
        line[0].imshow(row["pixels"])
        line[0].set_title(row["name"], fontsize=7)
        for axis, label, weight in zip(line[1:], row["labels"], row["maps"], strict=False):
            axis.imshow(fade(row["pixels"], weight))
            if weight.max() > 0:
                axis.contour(weight, [0.5], colors="#D55E00", linewidths=1)
            axis.set_title(label, fontsize=7)
    for axis in axes.flat:
        axis.set_axis_off()
    return figure
