"""Samples of a table of scores: which entries are drawn, how often, and how samples grow."""

import numpy as np
import pytest

from cdul_steps.method.sampling import (
    NAMED_SHARE,
    band_shifts,
    design,
    horvitz_thompson,
    permanent_numbers,
)

CLASSES = ["boat", "cat", "dog"]
IDS = [f"{i}.jpg" for i in range(200)]
SCORES = np.random.default_rng(0).beta(0.15, 1.0, (len(IDS), len(CLASSES)))
THRESHOLD = np.array([0.5, 0.5, 0.3])
ALL = np.ones(SCORES.shape, bool)


def plan(seed: int, open_: np.ndarray = ALL):
    numbers = permanent_numbers(seed, IDS, CLASSES)
    return design(SCORES, numbers, band_shifts(seed, CLASSES), THRESHOLD, open_)


def pairs(of, size: int) -> list[tuple[int, int]]:
    return list(zip(*(part.tolist() for part in of.sample(size)), strict=True))


def test_numbers_are_uniform_and_depend_on_the_two_names_alone():
    numbers = permanent_numbers(3, IDS, CLASSES)
    assert numbers.min() > 0 and numbers.max() < 1
    counts, _ = np.histogram(numbers, 10, (0, 1))
    assert (abs(counts - numbers.size / 10) < 4 * np.sqrt(numbers.size / 10)).all()
    again = permanent_numbers(3, IDS[::-1][:50], ["new", "dog"])
    assert (again[:, 1] == numbers[::-1][:50, 2]).all()
    assert not (permanent_numbers(4, IDS, CLASSES) == numbers).any()


def test_a_larger_sample_contains_the_smaller_and_begins_with_it():
    of = plan(0)
    larger = pairs(of, 150)
    assert len(set(larger)) == 150
    assert pairs(of, 40) == larger[:40]
    assert len(pairs(of, 10_000)) == SCORES.size


def test_inclusion_probabilities_are_those_of_many_seeds():
    size, seeds = 60, 200
    drawn = np.zeros(SCORES.shape)
    for seed in range(seeds):
        drawn[plan(seed).sample(size)] += 1
    expected = plan(0).inclusion(size)
    assert expected.sum() == pytest.approx(size)
    # In 20 groups of similar probability, the mean is within four standard errors.
    order = np.argsort(expected, axis=None).reshape(20, -1)
    found, wanted = (part.ravel()[order].mean(axis=1) for part in (drawn / seeds, expected))
    deviation = np.sqrt(wanted * (1 - wanted) / (seeds * order.shape[1]))
    assert (abs(found - wanted) < 4 * deviation + 0.002).all()


def test_certain_entries_have_probability_1_and_the_others_share_the_rest():
    inclusion = plan(0).inclusion(500)
    assert inclusion.max() == 1 and inclusion.sum() == pytest.approx(500)
    assert (plan(0).inclusion(600) == 1).all()


def test_total_is_without_bias():
    truth = np.random.default_rng(1).random(SCORES.shape) < SCORES
    totals = []
    for seed in range(150):
        of = plan(seed)
        entries = of.sample(80)
        totals.append(horvitz_thompson(truth[entries], of.inclusion(80)[entries]))
    scatter = np.std(totals) / np.sqrt(len(totals))
    assert abs(np.mean(totals) - truth.sum()) < 4 * scatter


def test_named_entries_get_their_share_and_every_class_its_own():
    of = plan(0)
    rows, columns = of.sample(120)
    named = (SCORES >= THRESHOLD)[rows, columns].mean()
    assert abs(named - NAMED_SHARE) < 0.08
    expected = of.inclusion(120).sum(axis=0)
    assert (abs(np.bincount(columns) - expected) < 10).all()


def test_decided_entries_are_not_drawn():
    open_ = np.random.default_rng(2).random(SCORES.shape) < 0.5
    of = plan(0, open_)
    entries = of.sample(10_000)
    assert len(entries[0]) == open_.sum() and open_[entries].all()
    assert (of.inclusion(100)[~open_] == 0).all()
    assert of.inclusion(100).sum() == pytest.approx(100)
