import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from cdul_steps.method.similarity import (
    class_embedding,
    cosine,
    scores,
    sigmoid_scores,
    temperature,
    unit,
)

values = st.floats(-1, 1, width=32)
cosines = arrays(np.float32, array_shapes(min_dims=3, max_dims=3, max_side=5), elements=values)
taus = st.sampled_from([0.01, 0.02, 0.05, 0.5, 4.6])


def unit_vector(vector):
    norm = math.sqrt(sum(float(x) ** 2 for x in vector))
    return [float(x) / norm for x in vector]


def softmax(row, tau):
    powers = [math.exp((float(x) - max(map(float, row))) / tau) for x in row]
    return [power / sum(powers) for power in powers]


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_unit_equals_the_formula():
    vectors = random(4, 3, 7)
    expected = [[unit_vector(v) for v in row] for row in vectors]
    np.testing.assert_allclose(unit(vectors), expected, rtol=1e-6)
    assert unit(vectors).dtype == np.float32


@pytest.mark.filterwarnings("error")
def test_a_vector_without_direction_is_nan_and_spreads_no_further():
    vectors = random(4, 7)
    vectors[1], vectors[2, 3] = 0, np.nan
    result = unit(vectors)
    assert np.isnan(result[1:3]).all()
    np.testing.assert_array_equal(result[[0, 3]], unit(vectors[[0, 3]]))


def test_half_precision_is_normalised_in_single():
    vectors = np.full((1, 1024), 300, np.float16)  # the sum of squares overflows float16
    np.testing.assert_allclose(np.linalg.norm(unit(vectors), axis=1), 1, rtol=1e-6)


def test_class_embedding_is_the_normalised_mean_of_unit_vectors():
    prompts = random(3, 8) * np.array([[1], [10], [100]], np.float32)
    mean = [sum(column) / 3 for column in zip(*map(unit_vector, prompts), strict=True)]
    np.testing.assert_allclose(class_embedding(prompts), unit_vector(mean), rtol=1e-5)
    np.testing.assert_allclose(class_embedding(prompts[:1]), unit(prompts[0]), rtol=1e-6)


def test_cosine_equals_the_formula():
    images, classes = random(3, 2, 6), 5 * random(4, 6, seed=1)
    expected = np.empty((3, 2, 4))
    for i, v, c in np.ndindex(expected.shape):
        pairs = zip(unit_vector(images[i, v]), unit_vector(classes[c]), strict=True)
        expected[i, v, c] = sum(x * y for x, y in pairs)
    result = cosine(images, classes)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, expected, atol=1e-6)
    np.testing.assert_allclose(cosine(images.astype(np.float16), classes), expected, atol=2e-3)


@given(cosines, taus)
def test_scores_equal_the_formula(p, tau):
    expected = np.empty(p.shape)
    for i, v in np.ndindex(p.shape[:2]):
        expected[i, v] = softmax(p[i, v], tau)
    result = scores(p, tau)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, expected, rtol=2e-4, atol=1e-6)
    np.testing.assert_allclose(result.sum(axis=-1), 1, rtol=1e-5)


@given(cosines, st.floats(-1, 1, width=32))
def test_a_constant_in_a_view_changes_nothing(p, constant):
    shifted = p.copy()
    shifted[:, 0] += np.float32(constant)
    np.testing.assert_allclose(scores(shifted, 0.05), scores(p, 0.05), atol=1e-4)


@given(cosines, st.randoms())
def test_permuting_classes_permutes_scores(p, random):
    order = random.sample(range(p.shape[2]), p.shape[2])
    np.testing.assert_allclose(scores(p[..., order], 0.01), scores(p, 0.01)[..., order], rtol=1e-5)


@pytest.mark.filterwarnings("error")
def test_scores_of_large_logits_are_finite():
    p = np.array([[[1e4, -1e4, 0], [-1e4, -1e4, -1e4]]], np.float32)
    np.testing.assert_allclose(scores(p, 0.001), [[[1, 0, 0], [1 / 3, 1 / 3, 1 / 3]]], rtol=1e-6)


def test_nan_stays_in_its_view():
    p = np.random.default_rng(0).uniform(-1, 1, (3, 4, 5)).astype(np.float32)
    expected = scores(p, 0.1)
    p[1, 2, 0] = np.nan
    result = scores(p, 0.1)
    assert np.isnan(result[1, 2]).all()
    expected[1, 2] = np.nan
    np.testing.assert_array_equal(result, expected)


def test_the_input_is_left_alone():
    p = random(2, 3, 4)
    before = p.copy()
    scores(p, 0.01)
    sigmoid_scores(p, 0.01, -10)
    unit(p)
    np.testing.assert_array_equal(p, before)


def test_temperature_takes_the_factor_not_its_logarithm():
    p = np.array([[[0.25, 0.20, 0.18, 0.15]]], np.float32)
    assert temperature(100.0) == 0.01
    np.testing.assert_allclose(temperature(math.exp(4.6052)), 0.01, rtol=1e-4)
    assert scores(p, temperature(100.0))[0, 0, 0] > 0.99
    flat = scores(p, math.log(100))  # the logarithm as a divisor: every score is near 1/C
    np.testing.assert_allclose(flat, 0.25, atol=0.005)


def sigmoid(logit):
    """In double precision, without overflow for either sign."""
    return 1 / (1 + math.exp(-logit)) if logit > 0 else math.exp(logit) / (1 + math.exp(logit))


@given(cosines, taus, st.floats(-20, 5))
def test_sigmoid_scores_equal_the_formula(p, tau, bias):
    expected = np.empty(p.shape)
    for place in np.ndindex(p.shape):
        expected[place] = sigmoid(float(p[place]) / tau + bias)
    result = sigmoid_scores(p, tau, bias)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, expected, rtol=2e-4, atol=1e-37)


@pytest.mark.filterwarnings("error")
def test_sigmoid_scores_of_large_logits_and_of_nan():
    p = np.array([[[1e4, -1e4, 0.01, np.nan]]], np.float32)
    expected = [[[1, 0, 0.5, np.nan]]]
    np.testing.assert_allclose(sigmoid_scores(p, 0.001, -10), expected, rtol=1e-5)
