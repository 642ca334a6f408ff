"""Estimates from a sample's answers, against populations whose truth is known."""

import numpy as np
import pytest
from scipy.special import expit

from cdul_steps.method.checking import (
    DRAWS,
    STEPS,
    cells_of_class,
    draw_positives,
    find_threshold,
    fit_chances,
    interval,
    make_cells,
    measure,
    measure_at,
)
from cdul_steps.method.metrics import average_precision, mean_average_precision
from cdul_steps.method.sampling import band_shifts, design, permanent_numbers

THRESHOLD = np.array([0.5, 0.5, 0.3, 0.5])


def population(seed: int = 0, images: int = 400) -> tuple[np.ndarray, np.ndarray]:
    """Scores and truth (N, 4): classes differ in level, and scores are not calibrated."""
    random = np.random.default_rng(seed)
    logits = random.normal([-3.0, -2, -4, -3], 2.5, (images, 4))
    truth = random.random(logits.shape) < expit(0.8 * logits + [0.0, 1, -0.5, 0.5])
    return expit(logits), truth


SCORES, TRUTH = population()
ALL = np.ones(SCORES.shape, bool)


def true_measures(scores: np.ndarray, truth: np.ndarray, threshold: np.ndarray) -> list[np.ndarray]:
    named = scores >= threshold
    hits, said, there = (
        np.append(part.sum(axis=0), part.sum()) for part in (truth & named, named, truth)
    )
    ap = [average_precision(t, s) for t, s in zip(truth.T, scores.T, strict=True)]
    ap.append(mean_average_precision(truth, np.ones_like(truth), scores) / 100)
    return [hits / said, hits / there, 2 * hits / (said + there), np.array(ap)]


def sample(seed: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    names = [str(c) for c in range(4)]
    numbers = permanent_numbers(seed, [str(i) for i in range(len(SCORES))], names)
    return design(SCORES, numbers, band_shifts(seed, names), THRESHOLD, ALL).sample(size)


def test_cells_part_the_entries_and_span_no_threshold():
    counted = np.random.default_rng(1).random(SCORES.shape) < 0.9
    cells = make_cells(np.round(SCORES, 2), counted, THRESHOLD)
    assert ((cells.of >= 0) == counted).all()
    assert (np.bincount(cells.of[counted]) == cells.entries).all()
    for cell, (column, lowest) in enumerate(zip(cells.column, cells.lowest, strict=True)):
        inside = np.argwhere(cells.of == cell)
        assert (inside[:, 1] == column).all()
        values = np.round(SCORES, 2)[tuple(inside.T)]
        assert values.min() == lowest
        for step in (*STEPS, THRESHOLD[column]):
            assert (values >= step).all() or (values < step).all()


@pytest.mark.parametrize("digits", [8, 1])
def test_measures_of_the_truth_are_the_true_ones(digits):
    scores = np.round(SCORES, digits)
    cells = make_cells(scores, ALL, THRESHOLD)
    positives = np.bincount(cells.of.ravel(), weights=TRUTH.ravel()).astype(int)[:, None]
    found = measure(cells, positives, THRESHOLD)
    for name, of, expected in zip(
        found._fields, found, true_measures(scores, TRUTH, THRESHOLD), strict=True
    ):
        # Average precision is measured over cells.
        np.testing.assert_allclose(of[:, 0], expected, atol=0.01 if name == "ap" else 1e-12)


def drawn(cells, answered, yes, seed=0, draws=DRAWS):
    """Draws of the positives of all entries."""
    random = np.random.default_rng(seed)
    chances = fit_chances(cells, answered, yes, THRESHOLD, random, draws)
    return draw_positives(cells, chances, answered, yes, random)


def test_answers_to_everything_leave_no_doubt():
    cells = make_cells(SCORES, ALL, THRESHOLD)
    positives = drawn(cells, cells.of.ravel(), TRUTH.ravel(), draws=5)
    assert (positives == positives[:, :1]).all()
    assert positives[:, 0].sum() == TRUTH.sum()


def test_other_images_vary_even_if_all_of_these_are_known():
    cells = make_cells(SCORES, ALL, THRESHOLD)
    random = np.random.default_rng(0)
    answers = cells.of.ravel(), TRUTH.ravel()
    chances = fit_chances(cells, *answers, THRESHOLD, random)
    draws = draw_positives(cells, chances, *(part[:0] for part in answers), random)
    # Of binomial numbers with these chances, the total has a deviation of at most its root.
    total = draws.sum(axis=0)
    assert total.mean() == pytest.approx(TRUTH.sum(), rel=0.05)
    assert 0.5 < total.std() / TRUTH.sum() ** 0.5 < 2
    assert (draws <= cells.entries[:, None]).all()


def test_intervals_hold_the_truth_and_shrink_with_answers():
    expected = true_measures(SCORES, TRUTH, THRESHOLD)
    cells = make_cells(SCORES, ALL, THRESHOLD)
    width, held = {}, 0
    for size in (100, 400):
        spans = []
        for seed in range(4):
            rows, columns = sample(seed, size)
            draws = drawn(cells, cells.of[rows, columns], TRUTH[rows, columns], seed)
            for of, true in zip(measure(cells, draws, THRESHOLD), expected, strict=True):
                bounds = interval(of[-1])
                held += bounds.low <= true[-1] <= bounds.high
                spans.append(bounds.high - bounds.low)
        width[size] = np.mean(spans)
    assert width[400] < 0.7 * width[100]
    # 32 intervals of 90 %; they contain or miss their values together.
    assert held >= 23


def test_a_class_without_a_yes_is_absent_in_most_draws():
    truth = TRUTH.copy()
    truth[:, 1] = False
    cells = make_cells(SCORES, ALL, THRESHOLD)
    rows, columns = sample(0, 300)
    draws = drawn(cells, cells.of[rows, columns], truth[rows, columns])
    absent = [(draws[cells.column == column] == 0).all(axis=0).mean() for column in range(4)]
    assert absent[1] > 0.5
    assert max(absent[0], absent[2], absent[3]) == 0


def test_a_class_alone_has_its_own_cells():
    cells = make_cells(SCORES, ALL, THRESHOLD)
    alone = cells_of_class(cells, 2)
    assert (alone.column == 0).all() and alone.of.shape == (len(SCORES), 1)
    assert (np.bincount(alone.of[:, 0]) == alone.entries).all()
    positives = np.bincount(alone.of[:, 0], weights=TRUTH[:, 2]).astype(int)[:, None]
    found = measure(alone, positives, THRESHOLD[[2]])
    assert found.recall[0, 0] == true_measures(SCORES, TRUTH, THRESHOLD)[1][2]


def test_threshold_has_the_wanted_precision_and_the_most_recall():
    cells = make_cells(SCORES, ALL, THRESHOLD)
    positives = np.bincount(cells.of.ravel(), weights=TRUTH.ravel()).astype(int)[:, None]
    steps = np.array(STEPS)
    choice = find_threshold(cells, positives, 0.8, steps)
    precision = np.array([TRUTH[step <= SCORES].mean() for step in steps])
    assert choice.threshold == steps[np.argmax(precision >= 0.8)]
    assert choice.precision.middle == pytest.approx(precision[precision >= 0.8][0])
    assert find_threshold(cells, positives, 1.0, steps[:10]) is None

    f1 = [
        2 * TRUTH[step <= SCORES].sum() / ((step <= SCORES).sum() + TRUTH.sum()) for step in steps
    ]
    assert find_threshold(cells, positives, None, steps).threshold == steps[np.argmax(f1)]


def test_measures_at_thresholds_are_those_of_one_common_threshold():
    cells = make_cells(SCORES, ALL, THRESHOLD)
    positives = np.random.default_rng(0).integers(
        0, cells.entries[:, None] + 1, (len(cells.entries), 3)
    )
    positives[:, 0] = 0
    steps = np.array([*STEPS, 1.0])
    found = measure_at(cells, positives, steps)
    for place, step in enumerate(steps):
        expected = measure(cells, positives, np.full(4, step))
        for of, draws in zip(found, expected, strict=False):
            np.testing.assert_allclose(of[place], draws[-1])
    assert np.isnan(found.recall[:, 0]).all() and np.isnan(found.precision[-1]).all()


def test_classes_and_scores_of_one_kind():
    """Hard labels, no positive answer, a class without answers, and a class without images."""
    hard = (SCORES >= THRESHOLD).astype(float)
    counted = ALL.copy()
    counted[:, 1] = False
    cells = make_cells(hard, counted, THRESHOLD)
    assert len(cells.entries) <= 6
    rows = np.arange(40)
    draws = drawn(cells, cells.of[rows, 0], np.zeros(40, bool), draws=50)
    found = measure(cells, draws, THRESHOLD)
    assert interval(found.precision[1]) is None
    assert interval(found.recall[0]).low == 0
    assert ((draws >= 0) & (draws <= cells.entries[:, None])).all()
