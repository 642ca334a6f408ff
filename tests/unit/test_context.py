"""Context names: their weight in the softmax, and which of them mean a class."""

import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from cdul_steps.method.aggregation import CONSTRUCTIONS, build_labels
from cdul_steps.method.calibration import class_statistics, standardise
from cdul_steps.method.context import (
    REFERENCE,
    Near,
    centred_cosine,
    context_bias,
    find_near,
    largest_context,
    plain_name,
)
from cdul_steps.method.scoring import Scoring
from cdul_steps.method.similarity import scores

TAU = 0.05
shapes = st.tuples(st.integers(1, 4), st.integers(2, 5), st.integers(2, 9))
cosines = arrays(np.float32, shapes, elements=st.floats(-0.5, 0.5, width=32))
weights = st.floats(0.5, 20)


def labels_of(p, classes, weight, name="final", statistics=None):
    scoring = Scoring(TAU, context_weight=weight)
    settings = {"scoring": scoring, "zeta": 0.3, "lambda_": 0.0, "statistics": statistics}
    return build_labels([(0, p)], (len(p), classes), [name], **settings)[name]


def scores_by_hand(p, classes, weight):
    """The softmax in double precision; each context name counts min(1, weight / M) times."""
    counted = np.ones(p.shape[2])
    names = p.shape[2] - classes
    counted[classes:] = min(1, weight / names) if names else 1
    powers = counted * np.exp(p.astype(float) / TAU)
    return (powers / powers.sum(axis=2, keepdims=True))[..., :classes]


@given(cosines, weights, st.data())
def test_labels_with_context_equal_the_formula(p, weight, data):
    classes = data.draw(st.integers(1, p.shape[2]))
    by_hand = scores_by_hand(p, classes, weight)
    for name, construct in CONSTRUCTIONS.items():
        if name in ("aggregate", "final") and np.isclose(by_hand.max(axis=1), 0.3).any():
            continue  # at zeta itself, rounding decides
        expected = construct(by_hand.astype(np.float32), 0.3, 0.0)
        found = labels_of(p, classes, weight, name)
        assert found.shape == (len(p), classes)
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)


@given(cosines, weights, st.data())
def test_context_takes_from_every_class_in_the_same_proportion(p, weight, data):
    classes = data.draw(st.integers(1, p.shape[2] - 1))
    alone = scores(p[..., :classes], TAU)
    bias = context_bias(p.shape[2] - classes, weight)
    beside = scores(p, TAU, classes, bias)[..., :classes]
    share = beside.sum(axis=2, keepdims=True)
    assert (share <= 1 + 1e-5).all()
    np.testing.assert_allclose(beside, alone * share, rtol=1e-3, atol=1e-6)


@given(cosines, st.floats(-12, 2), st.data())
def test_context_takes_no_part_in_a_sigmoid(p, bias, data):
    classes = data.draw(st.integers(1, p.shape[2]))
    scoring = Scoring(TAU, bias, context_weight=data.draw(weights))
    expected = 1 / (1 + np.exp(-(p[..., :classes].astype(float) / TAU + bias)))
    found = scoring(p, classes)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert largest_context(found[:, 0], classes, 3).names.shape == (len(p), 0)


@given(cosines, st.data())
def test_a_list_weighs_the_same_however_often_it_is_repeated(p, data):
    classes = data.draw(st.integers(1, p.shape[2] - 1))
    names = p.shape[2] - classes
    repeated = np.concatenate([p, p[..., classes:], p[..., classes:]], axis=2)
    once = labels_of(p, classes, names, "local_mean")
    np.testing.assert_allclose(
        labels_of(repeated, classes, names, "local_mean"), once, rtol=1e-3, atol=1e-6
    )


@given(cosines)
def test_without_context_the_weight_changes_not_a_bit(p):
    classes = p.shape[2]
    found = labels_of(p, classes, 0.001)
    np.testing.assert_array_equal(found, labels_of(p, classes, 50))
    np.testing.assert_array_equal(scores(p, TAU, classes, -1.0), scores(p, TAU))


def test_one_class_with_context_has_labels_of_its_own():
    p = np.array([[[0.3, 0.1, 0.0]] * 5, [[0.0, 0.1, 0.3]] * 5], np.float32)
    found = labels_of(p, 1, 50)[:, 0]
    assert found[0] > 0.9
    assert found[1] < 0.1


def test_statistics_are_of_all_columns():
    p = np.random.default_rng(0).normal(0, 0.1, (20, 5, 6)).astype(np.float32)
    statistics = class_statistics([p])
    assert statistics.mean.shape == (2, 6)
    expected = scores_by_hand(standardise(p, statistics), 2, 3)[:, 0]
    found = labels_of(p, 2, 3, "global", statistics)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-6)


def test_an_image_that_is_not_known_is_nan_and_spreads_no_further():
    p = np.random.default_rng(0).normal(0, 0.1, (3, 5, 6)).astype(np.float32)
    expected = labels_of(p, 2, 3)
    p[1, 2, 4] = np.nan
    found = labels_of(p, 2, 3)
    assert np.isnan(found[1]).all()
    np.testing.assert_array_equal(found[[0, 2]], expected[[0, 2]])


@pytest.mark.parametrize("names", [1, 49, 50])
def test_a_short_list_weighs_what_it_weighs(names):
    assert context_bias(names, 50) == 0
    assert context_bias(0, 50) == 0
    assert context_bias(100, 50) == pytest.approx(np.log(0.5))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("dog", "Dogs"),
        ("potted plant", "potted-plants"),
        ("berry", "berries"),
        ("glass", "Glasses"),
        ("bench", "benches"),
        ("dish", "dishes"),
        ("box", "boxes"),
        ("caf\u00e9", "cafe\u0301s"),
        ("STRASSE", "stra\u00dfe"),
        ("\u72ac", "\u72ac"),
    ],
)
def test_names_that_are_the_same_but_for_case_and_plural(one, other):
    assert plain_name(one) == plain_name(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [("glass", "glas"), ("cat", "car"), ("bus", "bu"), ("bow", "bow tie"), ("!", "?")],
)
def test_names_that_are_not_the_same(one, other):
    assert plain_name(one) != plain_name(other)


@given(st.text(min_size=1))
def test_plain_names_do_not_depend_on_how_letters_are_composed(name):
    forms = {plain_name(unicodedata.normalize(form, name)) for form in ("NFC", "NFD")}
    assert len(forms) == 1
    assert plain_name(name)


def test_centred_cosine_equals_the_formula():
    random = np.random.default_rng(0)
    context, classes, centre = random.normal(size=(4, 6)), random.normal(size=(3, 6)), np.ones(6)
    found = centred_cosine(context, classes, centre)
    for (m, c), value in np.ndenumerate(found):
        a, b = context[m] - centre, classes[c] - centre
        expected = a @ b / np.sqrt((a @ a) * (b @ b))
        assert value == pytest.approx(expected, abs=1e-5)


CONTEXT = [("sofa",), ("Dogs",), ("puppy",), ("tree",), ("settee", "couches")]
NAMES = [("dog", "dog", "hound"), ("couch", "couch", "sofa")]


def test_near_names_are_those_of_a_class_and_those_too_near():
    nearness = np.array([[0, 0.1], [0.9, 0], [0.7, 0.2], [0.6, 0.5], [0.1, 0.2]], np.float32)
    assert find_near(CONTEXT, NAMES, nearness, 0.6) == [
        Near("sofa", "couch", None),
        Near("Dogs", "dog", None),
        Near("puppy", "dog", pytest.approx(0.7)),
        Near("settee", "couch", None),
    ]
    # A name left out because it equals a class name is left out with every limit.
    assert [n.name for n in find_near(CONTEXT, NAMES, nearness, 1.0)] == ["sofa", "Dogs", "settee"]


@given(arrays(np.float32, (5, 2), elements=st.floats(-1, 1, width=32)), st.floats(-1, 1), st.data())
def test_each_name_is_judged_by_itself(nearness, limit, data):
    order = data.draw(st.permutations(range(5)))[: data.draw(st.integers(1, 5))]
    near = {n.name for n in find_near(CONTEXT, NAMES, nearness, limit)}
    some = find_near([CONTEXT[i] for i in order], NAMES, nearness[order], limit)
    assert [n.name for n in some] == [CONTEXT[i][0] for i in order if CONTEXT[i][0] in near]
    high = {CONTEXT[i][0] for i in range(5) if nearness[i].max() > limit}
    assert near == high | {"sofa", "Dogs", "settee"}


def test_the_reference_is_a_list_of_plain_names():
    assert len(set(map(plain_name, REFERENCE))) == len(REFERENCE) > 40


@given(arrays(np.float32, (4, 6), elements=st.floats(0, 1, width=32)), st.integers(0, 6))
def test_what_goes_to_context(s, classes):
    found = largest_context(s, classes, 3)
    for i, row in enumerate(s):
        names = sorted(range(classes, 6), key=lambda c: -row[c])[:3]
        assert found.names[i].tolist() == names
        assert found.scores[i].tolist() == row[names].tolist()
        assert found.share[i] == pytest.approx(sum(row[classes:].tolist()), abs=1e-5)
