import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from cdul_steps.method.aggregation import (
    CONSTRUCTIONS,
    aggregate,
    build_labels,
    combine,
    global_scores,
    harden,
    local_scores,
    rescale_and_harden,
)
from cdul_steps.method.calibration import class_statistics, rescale, standardise
from cdul_steps.method.scoring import Scoring
from cdul_steps.method.similarity import scores

shapes = st.tuples(st.integers(1, 5), st.integers(2, 6), st.integers(1, 5))
cosines = arrays(np.float32, shapes, elements=st.floats(-0.5, 0.5, width=32))
probabilities = arrays(np.float32, shapes, elements=st.floats(0, 1, width=32))
shares = st.floats(0, 1, width=32)
ABOVE_ONE = float(np.nextafter(np.float32(1), np.float32(2)))


def labels_of(p, name="final", *, tau=0.05, zeta=0.3, lambda_=0.0, logit_bias=None):
    blocks = [(0, p)]
    settings = {"scoring": Scoring(tau, logit_bias), "zeta": zeta, "lambda_": lambda_}
    return build_labels(blocks, (len(p), p.shape[2]), [name], **settings)[name]


def final_by_loops(s, zeta, lambda_):
    result = np.empty((len(s), s.shape[2]))
    for i, c in np.ndindex(result.shape):
        snippets = [float(s[i, v, c]) for v in range(1, s.shape[1])]
        g, alpha, beta = float(s[i, 0, c]), max(snippets), min(snippets)
        gamma = 1 if alpha >= zeta else 0
        a = gamma * alpha + (1 - gamma) * beta
        result[i, c] = (g + a + lambda_ * abs(g - a)) / 2
    return result


@given(probabilities, shares, st.sampled_from([-1.0, -0.3, 0.0, 0.5, 1.0]))
def test_final_equals_the_formula(s, zeta, lambda_):
    result = CONSTRUCTIONS["final"](s, zeta, lambda_)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, final_by_loops(s, zeta, lambda_), atol=1e-6)


@given(probabilities, shares)
def test_each_construction_by_its_name(s, zeta):
    expected = {
        "global": s[:, 0],
        "local_mean": np.stack([image[1:].mean(axis=0) for image in s]),
        "local_max": np.stack([image[1:].max(axis=0) for image in s]),
        "aggregate": aggregate(s[:, 1:], zeta),
        "final": combine(s[:, 0], aggregate(s[:, 1:], zeta)),
    }
    assert set(CONSTRUCTIONS) == set(expected)
    for name, table in expected.items():
        np.testing.assert_allclose(CONSTRUCTIONS[name](s, zeta, 0.0), table, atol=1e-6)


def test_views_are_split_into_the_whole_and_its_snippets():
    s = np.arange(24).reshape(2, 4, 3)
    assert global_scores(s).tolist() == [[0, 1, 2], [12, 13, 14]]
    assert local_scores(s)[0].tolist() == [[3, 4, 5], [6, 7, 8], [9, 10, 11]]


@given(probabilities)
def test_zeta_zero_is_the_maximum_and_above_one_the_minimum(s):
    np.testing.assert_array_equal(aggregate(s, 0.0), s.max(axis=1))
    np.testing.assert_array_equal(aggregate(s, ABOVE_ONE), s.min(axis=1))


def test_a_best_score_of_exactly_zeta_counts():
    local = np.array([[[0.1], [0.3]]], np.float32)  # 0.3 in float32 is above 0.3 in float64
    assert aggregate(local, 0.3)[0, 0] == np.float32(0.3)
    assert aggregate(np.array([[[0.0], [0.7]]], np.float32), 0.7)[0, 0] == np.float32(0.7)
    assert aggregate(local, 0.31)[0, 0] == np.float32(0.1)


@given(probabilities)
def test_lambda_chooses_between_smaller_mean_and_larger(s):
    g, a = s[:, 0], s[:, 1]
    np.testing.assert_allclose(combine(g, a, -1.0), np.minimum(g, a), atol=1e-6)
    np.testing.assert_allclose(combine(g, a), (g + a) / 2, atol=1e-6)
    np.testing.assert_allclose(combine(g, a, 1.0), np.maximum(g, a), atol=1e-6)


@given(cosines, st.sampled_from(sorted(CONSTRUCTIONS)), st.randoms())
def test_the_order_of_snippets_does_not_matter(p, name, random):
    order = [0, *random.sample(range(1, p.shape[1]), p.shape[1] - 1)]
    np.testing.assert_allclose(labels_of(p[:, order], name), labels_of(p, name), atol=1e-6)


def test_the_global_view_is_not_a_snippet():
    p = np.random.default_rng(0).uniform(-0.5, 0.5, (3, 4, 5)).astype(np.float32)
    assert not np.allclose(labels_of(p[:, [1, 0, 2, 3]]), labels_of(p))


@given(cosines, st.randoms())
def test_permuting_classes_permutes_labels(p, random):
    order = random.sample(range(p.shape[2]), p.shape[2])
    # Above 1, so that rounding cannot lift a score above zeta.
    for zeta in (0.0, ABOVE_ONE):
        permuted = labels_of(p[..., order], zeta=zeta)
        np.testing.assert_allclose(permuted, labels_of(p, zeta=zeta)[:, order], atol=1e-6)


@given(cosines, st.data())
def test_a_constant_in_a_view_changes_nothing(p, data):
    constants = arrays(np.float32, p.shape[:2], elements=st.floats(-0.5, 0.5, width=32))
    shifted = p + data.draw(constants)[..., None]
    for zeta in (0.0, ABOVE_ONE):
        np.testing.assert_allclose(
            labels_of(shifted, zeta=zeta), labels_of(p, zeta=zeta), atol=1e-4
        )


@given(cosines, st.integers(1, 5))
def test_blocks_of_any_size_give_the_same_labels(p, size):
    shape = (len(p), p.shape[2])
    settings = {"scoring": Scoring(0.01), "zeta": 0.3, "lambda_": 0.5}
    names = list(CONSTRUCTIONS)
    blocks = [(first, p[first : first + size]) for first in range(0, len(p), size)]
    at_once = build_labels([(0, p)], shape, names, **settings)
    in_blocks = build_labels(blocks, shape, names, **settings)
    assert list(in_blocks) == names
    for name in names:
        np.testing.assert_array_equal(in_blocks[name], at_once[name])
        expected = CONSTRUCTIONS[name](scores(p, 0.01), 0.3, 0.5)
        np.testing.assert_array_equal(at_once[name], expected)


@pytest.mark.parametrize("name", sorted(CONSTRUCTIONS))
def test_images_without_cosines_have_nan_and_leave_others_alone(name):
    p = np.random.default_rng(0).uniform(-0.5, 0.5, (4, 3, 5)).astype(np.float32)
    expected = labels_of(p, name)
    p[2] = np.nan
    expected[2] = np.nan
    np.testing.assert_array_equal(labels_of(p, name), expected)


def test_images_that_no_block_holds_have_nan():
    p = np.zeros((2, 3, 5), np.float32)
    settings = {"scoring": Scoring(0.01), "zeta": 0.3, "lambda_": 0}
    labels = build_labels([(1, p)], (4, 5), ["final"], **settings)["final"]
    assert np.isnan(labels).all(axis=1).tolist() == [True, False, False, True]


@pytest.mark.parametrize("name", sorted(CONSTRUCTIONS))
def test_zeta_one_takes_the_maximum_only_of_a_certain_class(name):
    s = np.array([[[0.2, 0.8], [1, 0], [0.4, 0.6]]], np.float32)
    expected = {"aggregate": [[1, 0]], "final": [[0.6, 0.4]]}
    result = CONSTRUCTIONS[name](s, 1.0, 0.0)
    np.testing.assert_allclose(result, expected.get(name, CONSTRUCTIONS[name](s, 0.0, 0.0)))


@given(cosines, st.sampled_from(sorted(CONSTRUCTIONS)))
def test_labels_of_standardised_cosines(p, name):
    statistics = class_statistics([p])
    settings = {"scoring": Scoring(0.05), "zeta": 0.3, "lambda_": 0.5}
    shape = (len(p), p.shape[2])
    labels = build_labels([(0, p)], shape, [name], **settings, statistics=statistics)[name]
    np.testing.assert_array_equal(labels, labels_of(standardise(p, statistics), name, lambda_=0.5))


# Hard labels

tables = arrays(
    np.float32, st.tuples(st.integers(1, 6), st.integers(1, 5)), elements=st.floats(0, 1, width=32)
)


@given(tables, shares)
def test_hard_labels_at_a_threshold(labels, threshold):
    result = harden(labels, threshold=threshold)
    assert result.dtype == np.float32
    expected = [[1.0 if y >= np.float32(threshold) else 0.0 for y in image] for image in labels]
    np.testing.assert_array_equal(result, expected)


@given(tables, st.integers(1, 6))
def test_hard_labels_of_the_best_classes(labels, k):
    result = harden(labels, top_k=k)
    for image, hard in zip(labels.tolist(), result.tolist(), strict=True):
        best = sorted(range(len(image)), key=lambda c: (-image[c], c))[:k]
        assert hard == [float(c in best) for c in range(len(image))]


def test_a_label_of_exactly_the_threshold_counts():
    assert harden(np.array([[0.7, 0.69]], np.float32), threshold=0.7).tolist() == [[1, 0]]


@given(tables, st.floats(-3, 3), st.sampled_from([{}, {"threshold": 0.5}, {"top_k": 1}]))
def test_labels_are_rescaled_and_then_hardened(labels, bias, hard):
    expected = rescale(labels, bias, 2.0)
    if hard:
        expected = harden(expected, **hard)
    result = np.asfortranarray(labels)
    rescale_and_harden(result, bias=bias, slope=2.0, **hard)
    np.testing.assert_array_equal(result, expected)
    untouched = labels.copy()
    rescale_and_harden(untouched)
    np.testing.assert_array_equal(untouched, labels)


# Sigmoid


def sigmoid_by_hand(p, tau, bias):
    return 1 / (1 + np.exp(-(p.astype(np.float64) / tau + bias)))


@given(cosines, st.floats(-12, 2), st.sampled_from([0.0, 0.5, -1.0]))
def test_labels_by_a_sigmoid_equal_the_formula(p, bias, lambda_):
    s = sigmoid_by_hand(p, 0.05, bias)
    alpha, beta = s[:, 1:].max(axis=1), s[:, 1:].min(axis=1)
    aggregated = np.where(alpha >= 0.3, alpha, beta)
    mean, gap = (s[:, 0] + aggregated) / 2, abs(s[:, 0] - aggregated) / 2
    expected = {
        "global": s[:, 0],
        "local_mean": s[:, 1:].mean(axis=1),
        "local_max": alpha,
        "aggregate": aggregated,
        "final": mean + lambda_ * gap,
    }
    assert set(expected) == set(CONSTRUCTIONS)
    for name, values in expected.items():
        if name in ("aggregate", "final") and np.isclose(alpha, 0.3).any():
            continue  # at zeta itself, rounding decides
        labels = labels_of(p, name, lambda_=lambda_, logit_bias=bias)
        np.testing.assert_allclose(labels, values, rtol=1e-4, atol=1e-6)


@given(cosines, st.sampled_from(sorted(CONSTRUCTIONS)), st.data())
def test_by_a_sigmoid_no_class_depends_on_another(p, name, data):
    some = data.draw(st.lists(st.integers(0, p.shape[2] - 1), min_size=1, unique=True))
    alone = labels_of(p[..., some], name, logit_bias=-3)
    np.testing.assert_allclose(alone, labels_of(p, name, logit_bias=-3)[:, some], rtol=1e-5)
