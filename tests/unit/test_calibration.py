import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from cdul_steps.method.calibration import (
    ClassStatistics,
    class_statistics,
    find_bias,
    odds_against,
    pieces,
    rescale,
    standardise,
)
from cdul_steps.method.similarity import scores, sigmoid_scores

shapes = st.tuples(st.integers(2, 6), st.integers(2, 5), st.integers(2, 5))
cosines = arrays(np.float32, shapes, elements=st.floats(-1, 1, width=32))
tables = arrays(
    np.float32,
    st.tuples(st.integers(1, 6), st.integers(1, 5)),
    elements=st.floats(0, 1, width=32),
)


def random(*shape, seed=0):
    return np.random.default_rng(seed).uniform(-0.5, 0.5, shape).astype(np.float32)


def logit(y):
    return np.log(y) - np.log1p(-y)


def sigmoid(u):
    return 1 / (1 + np.exp(-u))


# Statistics and standardisation


@given(cosines, st.integers(1, 6))
def test_statistics_equal_numpy_over_whole_images_and_over_snippets(p, size):
    blocks = [p[first : first + size] for first in range(0, len(p), size)]
    mean, deviation = class_statistics(blocks)
    for kind, views in enumerate((p[:, :1], p[:, 1:])):
        flat = views.reshape(-1, p.shape[2]).astype(np.float64)
        np.testing.assert_allclose(mean[kind], flat.mean(axis=0), atol=1e-12)
        np.testing.assert_allclose(deviation[kind], flat.std(axis=0), atol=1e-7)


def test_images_without_cosines_do_not_count():
    p = random(5, 4, 3)
    expected = class_statistics([p[[0, 2, 4]]])
    p[1], p[3, 2, 1] = np.nan, np.nan
    np.testing.assert_allclose(class_statistics([p]), expected)
    with pytest.raises(ValueError, match="no image"):
        class_statistics([p[1:2]])
    with pytest.raises(ValueError, match="no image"):
        class_statistics([])


def test_standardised_cosines_equal_the_formula():
    p, (mean, deviation) = random(4, 3, 5), class_statistics([random(9, 3, 5, seed=1)])
    expected = np.empty(p.shape)
    for i, v, c in np.ndindex(p.shape):
        kind = 0 if v == 0 else 1
        unit = sum(deviation[kind]) / 5
        expected[i, v, c] = (p[i, v, c] - mean[kind, c]) / deviation[kind, c] * unit
    result = standardise(p, ClassStatistics(mean.tolist(), deviation.tolist()))
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, expected, atol=1e-6)


def test_standardised_classes_have_one_mean_and_one_deviation():
    p = random(50, 4, 3) * [0.1, 0.5, 2] + [3, 0, -1]
    mean, deviation = class_statistics([standardise(p, class_statistics([p]))])
    np.testing.assert_allclose(mean, 0, atol=1e-6)
    np.testing.assert_allclose(
        deviation, class_statistics([p])[1].mean(1, keepdims=True) + 0 * mean
    )


@given(cosines, st.integers(0, 4), st.floats(-1, 1, width=32))
def test_what_a_class_has_in_every_image_changes_nothing(p, c, constant):
    shifted = p.astype(np.float64)
    shifted[:, :, c % p.shape[2]] += constant
    result = standardise(shifted, class_statistics([shifted]))
    # A class with the same value everywhere has a deviation of 0, except for rounding.
    steady = class_statistics([p]).deviation < 1e-3
    expected = standardise(p, class_statistics([p]))
    for kind, views in enumerate((slice(0, 1), slice(1, None))):
        np.testing.assert_allclose(
            result[:, views][..., ~steady[kind]], expected[:, views][..., ~steady[kind]], atol=2e-2
        )


def test_a_class_without_deviation_becomes_zero():
    p = random(4, 3, 2)
    p[..., 1] = 0.25
    result = standardise(p, class_statistics([p]))
    assert (result[..., 1] == 0).all() and np.isfinite(result).all()


# Bias


@given(cosines, st.floats(-5, 5))
def test_a_softmax_with_a_bias_is_the_sigmoid_of_its_own_logit(p, bias):
    logits = p.astype(np.float64) / 0.2
    expected = np.empty(p.shape)
    for i, v, c in np.ndindex(p.shape):
        others = np.delete(logits[i, v], c)
        expected[i, v, c] = sigmoid(logits[i, v, c] - np.logaddexp.reduce(others) + bias)
    np.testing.assert_allclose(rescale(scores(p, 0.2), bias), expected, atol=1e-5)


@given(cosines, st.floats(-5, 5), st.floats(1, 4))
def test_a_sharpened_warm_softmax_keeps_its_logit_and_pools_the_others_warmly(p, bias, slope):
    logits = p.astype(np.float64) / 0.2
    expected = np.empty(p.shape)
    for i, v, c in np.ndindex(p.shape):
        others = slope * np.logaddexp.reduce(np.delete(logits[i, v], c) / slope)
        expected[i, v, c] = sigmoid(logits[i, v, c] - others + bias)
    np.testing.assert_allclose(rescale(scores(p, 0.2 * slope), bias, slope), expected, atol=1e-4)


@given(cosines, st.floats(-5, 5), st.floats(1, 4), st.floats(-6, 0))
def test_a_sharpened_warm_sigmoid_is_one_of_the_models_temperature(p, bias, slope, own):
    expected = sigmoid(p.astype(np.float64) / 0.2 + slope * own + bias)
    warm = sigmoid_scores(p, 0.2 * slope, own)
    np.testing.assert_allclose(rescale(warm, bias, slope), expected, rtol=1e-3, atol=1e-6)


@given(cosines, st.floats(-8, 0))
def test_sigmoid_scores_are_raised_to_a_number_of_positives(p, own):
    labels = sigmoid_scores(p, 0.2, own)[:, 0]
    positives = 0.4 * p.shape[2]
    raised = rescale(labels, find_bias(labels, positives))
    np.testing.assert_allclose(raised.sum(axis=1).mean(), positives, rtol=1e-3)


@given(tables, st.floats(-5, 5), st.floats(0.5, 5))
def test_rescale_works_on_the_logit_and_keeps_zero_and_one(labels, bias, slope):
    result = rescale(labels, bias, slope)
    assert result.dtype == np.float32
    inside = (labels > 1e-6) & (labels < 1 - 1e-6)
    expected = sigmoid(slope * logit(labels[inside].astype(np.float64)) + bias)
    np.testing.assert_allclose(result[inside], expected, rtol=1e-3, atol=1e-6)
    for value in (0, 1):
        assert (result[labels == value] == value).all()
    assert (result >= 0).all() and (result <= 1).all()
    np.testing.assert_allclose(rescale(labels, 0.0), labels, rtol=1e-6, atol=1e-7)


@given(tables, st.floats(-3, 3), st.floats(0.5, 5))
def test_rescale_keeps_the_order(labels, bias, slope):
    ordered = np.sort(labels, axis=0)
    assert (np.diff(rescale(ordered, bias, slope), axis=0) >= -1e-7).all()


@pytest.mark.filterwarnings("error")
def test_odds_against():
    labels = np.array([0, 0.2, 0.5, 1], np.float32)
    np.testing.assert_allclose(odds_against(labels), [np.inf, 4, 1, 0], rtol=1e-6)
    np.testing.assert_allclose(odds_against(labels, 3), [np.inf, 64, 1, 0], rtol=1e-6)


@pytest.mark.parametrize("slope", [1, 3])
@pytest.mark.parametrize("positives", [0.3, 1.0, 2.5, 4.9])
def test_the_bias_meets_the_target(positives, slope):
    labels = scores(random(40, 5), 0.1)
    rescaled = rescale(labels, find_bias(labels, positives, slope), slope)
    assert rescaled.sum(axis=1).mean() == pytest.approx(positives, rel=1e-5)


def test_labels_that_meet_the_target_need_no_bias():
    labels = scores(random(40, 5), 0.1)
    assert find_bias(labels, 1.0) == pytest.approx(0, abs=1e-4)


def test_the_bias_is_the_same_with_an_array_for_scratch_values():
    labels = np.asfortranarray(scores(random(40, 5), 0.1))
    before, scratch = labels.copy(), np.empty_like(labels)
    assert find_bias(labels, 2.0, 3.0, scratch=scratch) == find_bias(labels, 2.0, 3.0)
    assert np.array_equal(labels, before) and not np.array_equal(scratch, before)


@pytest.mark.parametrize("positives", [0.5, 3.0, 4.0])
def test_a_target_that_no_bias_can_meet(positives):
    labels = np.array([[1, 0.5, 0.2, 0], [0, 0.1, 0.7, 0.1]], np.float32)
    with pytest.raises(ValueError, match=r"is not in 0\.5\.\.3"):
        find_bias(labels, positives)


@given(st.integers(0, 20), st.integers(1, 200))
def test_pieces_are_the_whole(rows, size):
    array = np.arange(3 * rows).reshape(rows, 3)
    found = list(pieces(array, size))
    assert sum(map(len, found)) == rows
    assert all(np.shares_memory(piece, array) for piece in found)
    assert not found or np.array_equal(np.concatenate(found), array)
