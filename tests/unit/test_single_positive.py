import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from cdul_steps.method.single_positive import first_estimates, observed_positives, smooth

tables = arrays(
    np.float32, st.tuples(st.integers(1, 5), st.integers(1, 5)), elements=st.floats(0, 1, width=32)
)
shares = st.floats(0, 0.5)


@given(tables)
def test_the_best_class_of_each_image_is_its_positive(labels):
    found = observed_positives(torch.from_numpy(labels), "top1", 0.9).numpy()
    best = labels.max(axis=1)
    assert set(np.unique(found)) <= {0, 1}
    np.testing.assert_array_equal(found.sum(axis=1), best > 0)
    assert (labels[found == 1] == best[best > 0]).all()


@given(tables, st.floats(0.1, 0.9))
def test_classes_from_the_threshold_on_are_positives(labels, threshold):
    found = observed_positives(torch.from_numpy(labels), "threshold", threshold)
    np.testing.assert_array_equal(found, labels >= np.float32(threshold))


@given(tables)
def test_soft_labels_stay(labels):
    table = torch.from_numpy(labels)
    assert torch.equal(observed_positives(table, "soft", 0.5), table)


@given(tables, shares, shares)
def test_smoothing_keeps_the_order_of_labels_and_moves_the_ends(labels, positive, negative):
    table = torch.from_numpy(labels)
    found = smooth(table, positive, negative)
    expected = labels * (1 - positive) + (1 - labels) * negative
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert smooth(torch.ones(1), positive, negative) == pytest.approx(1 - positive)
    assert smooth(torch.zeros(1), positive, negative) == pytest.approx(negative)
    assert torch.equal(smooth(table, 0, 0), table)


def test_estimates_start_sure_of_the_positives_and_undecided_else():
    observed = observed_positives(torch.rand(200, 7, generator=torch.Generator()), "top1", 0.5)
    labels = torch.sigmoid(first_estimates(observed, seed=3))
    torch.testing.assert_close(labels[observed == 1], torch.full((200,), 0.995))
    others = labels[observed == 0]
    assert 0.4 <= others.min() < 0.41 and 0.59 < others.max() <= 0.6
    assert torch.equal(first_estimates(observed, 3), first_estimates(observed, 3))
    assert not torch.equal(first_estimates(observed, 3), first_estimates(observed, 4))
