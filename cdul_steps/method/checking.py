"""Estimates the quality of scores from a person's answers on a sample, by posterior draws."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.linalg import cho_solve, solve_triangular
from scipy.special import expit, log_expit, logit, logsumexp
from scipy.stats import norm, rankdata

LEVEL = 0.9
"""Coverage probability of an interval."""
DRAWS = 400
STEPS = tuple(k / 50 for k in range(1, 50))
"""Thresholds of a curve; cells start at each."""
TRUST = 0.8
"""Weight of an answer below the threshold. There, each represents many entries, so that errors of
the model matter most: with 1, intervals of recall were too narrow (docs/results-labels.md)."""
ABSENT = 0.1
"""Prior probability that no image shows a class."""
MISTAKES = (0.0001, 0.03)
"""Assumed probability of a wrong yes: below the threshold, where a yes is asked again until it is
certain, and for a named entry."""
_KNOTS = 10
_PRIORS = 8
"""Draws of a class's level and slope from their prior for each draw from the posterior."""
_EVERY = 4
"""Draws from the approximation for each draw that is kept."""
# Deviations, in logits, of the curve's bends, the classes' levels, and their slopes.
_SPREADS = [(f, a, b) for f in (0.6, 2.0) for a in (0.8, 1.6, 3.2) for b in (0.4, 1.2)]
_LEVEL_PRIOR, _SLOPE_PRIOR = (-3.0, 3.0), (0.8, 4.0)


class Cells(NamedTuple):
    """Cells of entries of one class with adjacent scores; (J,), by class, then by score.

    `of` int (N, C): the cell of an entry, -1 for one left out. `column`: the class. `entries`: the
    number of entries. `lowest`: the lowest score. `score`, `rank`: means of the logit of the score,
    and of the normal score of the rank within the class, both with deviation of about 1. `tied`:
    whether all scores are equal.
    """

    of: np.ndarray
    column: np.ndarray
    entries: np.ndarray
    lowest: np.ndarray
    score: np.ndarray
    rank: np.ndarray
    tied: np.ndarray


def make_cells(scores: np.ndarray, counted: np.ndarray, threshold: np.ndarray) -> Cells:
    """Cells of scores (N, C) in 0..1 of the entries `counted`; none spans a threshold (C,).

    The first entries of a class have one cell each, and later cells grow with the rank, because
    average precision depends most on the first entries. No cell spans any of STEPS.
    """
    values = logit(np.clip(scores, 1e-6, 1 - 1e-6))
    low, high = np.quantile(values[counted], [0.01, 0.999])
    values = np.clip(values, low, high)
    spread = values[counted].std()
    values = (values - values[counted].mean()) / (spread if spread > 1e-9 else 1)
    of = np.full(scores.shape, -1)
    parts: list[tuple[np.ndarray, ...]] = []
    size = 0
    for column in range(scores.shape[1]):
        rows = np.flatnonzero(counted[:, column])
        rows = rows[np.argsort(-scores[rows, column], kind="stable")]
        if not len(rows):
            continue
        of_class = scores[rows, column]
        ranks = norm.ppf((rankdata(of_class) - 0.5) / len(rows))
        starts = _starts(of_class, (*STEPS, threshold[column]))
        count = np.diff(np.append(starts, len(rows)))
        of[rows, column] = size + np.repeat(np.arange(len(starts)), count)
        size += len(starts)
        last = of_class[starts + count - 1]
        parts.append(
            (
                np.full(len(starts), column),
                count,
                last,
                np.add.reduceat(values[rows, column], starts) / count,
                np.add.reduceat(ranks, starts) / count,
                of_class[starts] == last,
            )
        )
    return Cells(of, *(np.concatenate(part) for part in zip(*parts, strict=True)))


def _starts(falling: np.ndarray, steps: tuple[float, ...]) -> np.ndarray:
    """The starts of cells in a class's descending scores; equal scores stay together."""
    size = len(falling)
    growing = np.rint(12 * 1.15 ** np.arange(np.log(size + 12) / np.log(1.15)))
    rising = falling[::-1]
    cuts = np.concatenate(
        [np.arange(12), growing, size - np.searchsorted(rising, steps)],
    ).astype(int)
    cuts = cuts[cuts < size]
    return np.unique(size - np.searchsorted(rising, falling[cuts], side="right"))


def _features(score: np.ndarray, rank: np.ndarray, place: np.ndarray, size: int) -> np.ndarray:
    """Features (n, 3 + _KNOTS + 2 size) of entries; `place` is their class's index, -1 for none."""
    knots = np.linspace(-2, 4, _KNOTS)
    features = np.zeros((len(score), 3 + _KNOTS + 2 * size))
    features[:, 0], features[:, 1], features[:, 2] = 1, score, rank
    width = knots[1] - knots[0]
    features[:, 3 : 3 + _KNOTS] = np.exp(-0.5 * ((score[:, None] - knots) / width) ** 2)
    rows = np.flatnonzero(place >= 0)
    features[rows, 3 + _KNOTS + place[rows]] = 1
    features[rows, 3 + _KNOTS + size + place[rows]] = rank[rows]
    return features


class _Fit(NamedTuple):
    """The mode (K,) of a posterior, a root of its precision (K, K), prior precision, evidence."""

    mode: np.ndarray
    root: np.ndarray
    precision: np.ndarray
    evidence: float


class _Data(NamedTuple):
    """Features (n, K) of answers, the answers (n,), and the weight of each (n,)."""

    features: np.ndarray
    yes: np.ndarray
    trust: np.ndarray


def _fit(data: _Data, mean: np.ndarray, precision: np.ndarray, at: np.ndarray) -> _Fit:
    """Laplace approximation of a logistic regression with a Gaussian prior, by Newton steps."""
    weights = at.copy()
    for _ in range(60):
        chance = expit(data.features @ weights)
        residual = data.trust * (data.yes - chance)
        gradient = data.features.T @ residual - precision * (weights - mean)
        curvature = data.trust * chance * (1 - chance)
        hessian = (data.features * curvature[:, None]).T @ data.features
        hessian[np.diag_indices(len(mean))] += precision
        root = np.linalg.cholesky(hessian)
        step = cho_solve((root, True), gradient)
        largest = float(np.abs(step).max())
        weights = weights + step * min(1, 4 / max(largest, 1e-12))
        if largest < 1e-4:
            break
    evidence = (
        _log_posterior(data, mean, precision, weights[:, None])[0]
        + 0.5 * np.log(precision).sum()
        - np.log(np.diag(root)).sum()
    )
    return _Fit(weights, root, precision, evidence)


def _log_posterior(
    data: _Data, mean: np.ndarray, precision: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """The log posterior of weights (K, M), up to a constant: (M,)."""
    logits = data.features @ weights
    prior = 0.5 * (precision[:, None] * (weights - mean[:, None]) ** 2).sum(axis=0)
    likelihood = log_expit(np.where(data.yes[:, None], logits, -logits))
    return data.trust @ likelihood - prior


class Chances(NamedTuple):
    """What a sample says about entries and classes.

    Float64. `positive` (J, draws): draws of the chance that an entry of a cell shows its class, if
    any image does. `present` (C,): the probability that one does.
    """

    positive: np.ndarray
    present: np.ndarray


def fit_chances(
    cells: Cells,
    answered: np.ndarray,
    yes: np.ndarray,
    threshold: np.ndarray,
    random: np.random.Generator,
    draws: int = DRAWS,
) -> Chances:
    """Draws from the posterior of the chances of all entries, given the answers to a sample.

    `answered` int (n,) is the cell of each answer, `yes` bool (n,) the answer. The chance of a yes
    is a logistic regression on the logit of the score, with bends, and on the rank within the
    class; a class's level and slope are normally distributed about the common ones. The sampling
    depends only on score and class, which the model knows, so the design needs no weights (Rubin,
    1976). Spreads are averaged by their evidence, and draws from the Laplace approximation are
    resampled by importance.

    With several classes, a class may be absent: no entry shows it, and a yes is a mistake. The
    probability follows from ABSENT, MISTAKES and the class's answers.
    """
    classes, place = np.unique(cells.column[answered], return_inverse=True)
    size = len(classes) if len(np.unique(cells.column)) > 1 else 0
    place = place if size else np.full(len(answered), -1)
    features = _features(cells.score[answered], cells.rank[answered], place, size)
    named = cells.lowest[answered] >= threshold[cells.column[answered]]
    data = _Data(features, yes, np.where(named, 1, TRUST))
    mean = np.zeros(features.shape[1])
    mean[:3] = _LEVEL_PRIOR[0], _SLOPE_PRIOR[0], _SLOPE_PRIOR[0]
    common = [_LEVEL_PRIOR[1], _SLOPE_PRIOR[1], _SLOPE_PRIOR[1]]
    spreads = _SPREADS if size else sorted({(f, 1.0, 1.0) for f, _, _ in _SPREADS})
    deviations = [np.repeat([*common, *s], [1, 1, 1, _KNOTS, size, size]) for s in spreads]
    precisions = [deviation**-2 for deviation in deviations]
    chosen, spread = _draw_weights(data, mean, precisions, random, draws)
    deviations_of = np.array(spreads)[spread, 1:]
    place_of = np.full(int(cells.column.max()) + 1, -1)
    present = np.ones(len(place_of))
    if size:
        of_class = _presence(data, place, named, chosen, deviations_of, random)
        if of_class.min() < 0.5:
            # Answers about an absent class say nothing about the others.
            data = data._replace(trust=data.trust * of_class[place])
            chosen, spread = _draw_weights(data, mean, precisions, random, draws)
            deviations_of = np.array(spreads)[spread, 1:]
        place_of[classes] = np.arange(size)
        present[:] = 1 - ABSENT
        present[classes] = of_class
    where = place_of[cells.column]
    logits = _features(cells.score, cells.rank, where, size) @ chosen
    if size:
        # The level and slope of a class without answers are drawn from their prior.
        others, other = np.unique(cells.column[where < 0], return_inverse=True)
        own = random.standard_normal((2, len(others), draws)) * deviations_of.T[:, None]
        logits[where < 0] += own[0, other] + own[1, other] * cells.rank[where < 0, None]
    return Chances(expit(logits), present)


def draw_positives(
    cells: Cells,
    chances: Chances,
    answered: np.ndarray,
    yes: np.ndarray,
    random: np.random.Generator,
) -> np.ndarray:
    """How many entries of each cell show their class: draws from the posterior, int (J, draws).

    The entries with an answer, `yes` bool (n,) in the cells `answered` int (n,), count as answered;
    the number among the others is binomial. Without answers (n = 0), the draws are for as many
    other images with the same scores. A class has no positives in draws in which it is absent.
    """
    seen = np.bincount(answered, minlength=len(cells.entries))
    positive = np.bincount(answered, weights=yes, minlength=len(cells.entries)).astype(int)
    unseen = (cells.entries - seen)[:, None]
    found = positive[:, None] + random.binomial(unseen, chances.positive)
    if (chances.present < 1).any():
        drawn = random.random((len(chances.present), found.shape[1]))
        found[(drawn >= chances.present[:, None])[cells.column]] = 0
    return found


def _presence(
    data: _Data,
    place: np.ndarray,
    named: np.ndarray,
    chosen: np.ndarray,
    deviations: np.ndarray,
    random: np.random.Generator,
) -> np.ndarray:
    """The probability that some image shows a class, for each class with answers (size,).

    Compares the likelihood of the class's answers if its level and slope are drawn from their
    prior, with `deviations` (draws, 2) around the common ones in `chosen` (K, draws), with that of
    mistakes.
    """
    size, common = int(place.max()) + 1, 3 + _KNOTS
    rank = data.features[:, 2]
    logits = data.features[:, :common] @ chosen[:common]
    of_class = np.equal.outer(np.arange(size), place).astype(float)
    fits = []
    for _ in range(_PRIORS):
        own = random.standard_normal((2, size, logits.shape[1])) * deviations.T[:, None]
        drawn = logits + own[0, place] + own[1, place] * rank[:, None]
        right = log_expit(np.where(data.yes[:, None], drawn, -drawn))
        fits.append(of_class @ (data.trust[:, None] * right))
    present = logsumexp(np.concatenate(fits, axis=1), axis=1) - np.log(_PRIORS * logits.shape[1])
    mistake = np.where(named, MISTAKES[1], MISTAKES[0])
    absent = of_class @ np.log(np.where(data.yes, mistake, 1 - mistake))
    return expit(present - absent + logit(1 - ABSENT))


def _draw_weights(
    data: _Data,
    mean: np.ndarray,
    precisions: Sequence[np.ndarray],
    random: np.random.Generator,
    draws: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Draws (K, draws) of weights for several prior precisions, and the prior of each draw."""
    fits: list[_Fit] = []
    for precision in precisions:
        fits.append(_fit(data, mean, precision, fits[-1].mode if fits else mean))
    return _resample(fits, data, mean, random, draws)


def _resample(
    fits: list[_Fit],
    data: _Data,
    mean: np.ndarray,
    random: np.random.Generator,
    draws: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Draws (K, draws) from the posterior, by importance, and the fit that each came from."""
    evidence = np.array([fit.evidence for fit in fits])
    chance = np.exp(evidence - evidence.max())
    numbers = random.multinomial(_EVERY * draws, chance / chance.sum())
    found, ratios = [], []
    for number, fit in zip(numbers, fits, strict=True):
        noise = random.standard_normal((len(mean), number))
        weights = fit.mode[:, None] + solve_triangular(fit.root.T, noise, lower=False)
        both = np.column_stack([fit.mode, weights])
        posterior = _log_posterior(data, mean, fit.precision, both)
        found.append(weights)
        ratios.append(posterior[1:] - posterior[0] + 0.5 * (noise**2).sum(axis=0))
    ratio = np.concatenate(ratios)
    # Otherwise a few draws with a large ratio would dominate.
    ratio = np.exp(np.minimum(ratio, np.quantile(ratio, 0.99)) - ratio.max())
    chosen = random.choice(len(ratio), draws, p=ratio / ratio.sum())
    return np.concatenate(found, axis=1)[:, chosen], np.repeat(np.arange(len(fits)), numbers)[
        chosen
    ]


class Measures(NamedTuple):
    """Draws of measures in 0..1, float64 (C + 1, draws): per class, and in the last row overall.

    `ap` is a class's average precision; the last row is the mean over the classes with a positive.
    NaN if a measure is not defined: no entry is named, or there is no positive.
    """

    precision: np.ndarray
    recall: np.ndarray
    f1: np.ndarray
    ap: np.ndarray


def measure(cells: Cells, positives: np.ndarray, threshold: np.ndarray) -> Measures:
    """Measures of draws (J, draws) of positives; a class is named from its `threshold` (C,) on."""
    named = cells.lowest >= threshold[cells.column]
    hits = _by_class(cells, positives * named[:, None], len(threshold))
    there = _by_class(cells, positives, len(threshold))
    said = _by_class(cells, (cells.entries * named)[:, None], len(threshold))
    with np.errstate(invalid="ignore"):
        shares = hits / said, hits / there, 2 * hits / (said + there)
    return Measures(*shares, _average_precisions(cells, positives, len(threshold)))


def _by_class(cells: Cells, values: np.ndarray, class_count: int) -> np.ndarray:
    """Sums of values (J, n) over the cells of each class; the last row is the total: (C + 1, n)."""
    total = np.zeros((class_count + 1, values.shape[1]))
    starts = np.flatnonzero(np.diff(cells.column, prepend=-1))
    total[cells.column[starts]] = np.add.reduceat(values, starts, axis=0)
    total[-1] = values.sum(axis=0)
    return total


def _average_precisions(cells: Cells, positives: np.ndarray, class_count: int) -> np.ndarray:
    """Average precision of each class, with their mean in the last row: float64 (C + 1, draws).

    Positives are spread evenly in a cell, so their mean precision is about that of the middle one.
    Entries with the same score are predicted together.
    """
    found = np.full((class_count + 1, positives.shape[1]), np.nan)
    for column in np.unique(cells.column):
        here = cells.column == column
        inside, count = positives[here], cells.entries[here, None]
        before, above = inside.cumsum(axis=0) - inside, count.cumsum(axis=0) - count
        tied = cells.tied[here, None]
        precision = np.where(
            tied,
            (before + inside) / (above + count),
            (before + (inside + 1) / 2) / (above + (count + 1) / 2),
        )
        total = inside.sum(axis=0)
        some = total > 0
        found[column, some] = (inside * precision).sum(axis=0)[some] / total[some]
    has = ~np.isnan(found[:-1])
    number = has.sum(axis=0)
    found[-1, number > 0] = (np.where(has, found[:-1], 0).sum(axis=0) / np.maximum(number, 1))[
        number > 0
    ]
    return found


def cells_of_class(cells: Cells, column: int) -> Cells:
    """The cells of a single class; `of` (N, 1) numbers them from 0."""
    here = np.flatnonzero(cells.column == column)
    own = cells.of[:, [column]]
    of = np.where(own < 0, -1, own - here[0])
    return Cells(of, np.zeros(len(here), int), *(part[here] for part in cells[2:]))


class Interval(NamedTuple):
    """The median of draws, and the bounds that contain LEVEL of them."""

    low: float
    middle: float
    high: float


def interval(draws: np.ndarray) -> Interval | None:
    """The interval of draws (n,) without NaN; None if none is left."""
    some = draws[~np.isnan(draws)]
    if not len(some):
        return None
    tail = (1 - LEVEL) / 2
    return Interval(*np.quantile(some, [tail, 0.5, 1 - tail]).tolist())


class Curve(NamedTuple):
    """Draws of precision, recall and F1 from each of n thresholds on, float64 (n, draws).

    NaN if a measure is not defined: no entry is named, or there is no positive.
    """

    precision: np.ndarray
    recall: np.ndarray
    f1: np.ndarray


def measure_at(cells: Cells, positives: np.ndarray, steps: np.ndarray) -> Curve:
    """Measures over all cells, which are named from each of the thresholds `steps` (n,) on.

    `positives` are draws (J, draws); no cell spans a threshold.
    """
    order = np.argsort(-cells.lowest, kind="stable")
    named = len(order) - np.searchsorted(cells.lowest[order][::-1], steps)
    hits = np.vstack([np.zeros_like(positives[:1]), positives[order].cumsum(axis=0)])
    said = np.append(0, cells.entries[order].cumsum())[named, None]
    there, hits = hits[-1], hits[named]
    with np.errstate(invalid="ignore"):
        return Curve(hits / said, hits / there, 2 * hits / (said + there))


class ChosenThreshold(NamedTuple):
    """A threshold with its precision and recall."""

    threshold: float
    precision: Interval
    recall: Interval


def find_threshold(
    cells: Cells, positives: np.ndarray, precision: float | None, steps: np.ndarray
) -> ChosenThreshold | None:
    """The lowest of the thresholds `steps` (n,) whose median precision is at least `precision`.

    Without a `precision`, the threshold with the best F1. `positives` are draws (J, draws); no cell
    spans a threshold. None if there is no such threshold.
    """
    steps = np.unique(steps[steps <= cells.lowest.max(initial=-np.inf)])
    if not len(steps):
        return None
    curve = measure_at(cells, positives, steps)
    best = int(np.argmax(np.median(curve.f1, axis=1)))
    if precision is not None:
        fits = np.flatnonzero(np.median(curve.precision, axis=1) >= precision)
        if not len(fits):
            return None
        best = int(fits[0])
    of_precision, of_recall = interval(curve.precision[best]), interval(curve.recall[best])
    if of_precision is None or of_recall is None:
        return None
    return ChosenThreshold(float(steps[best]), of_precision, of_recall)
