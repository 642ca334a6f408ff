"""Every loss against a plain loop over its equation, and its properties."""

import math
from functools import partial
from inspect import signature
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loss_examples import ASL, BY_NAME, EXPECTED, pairs

from cdul_steps.config import Section, Training
from cdul_steps.method.loss_functions import (
    FUNCTIONS,
    asymmetric,
    binary_cross_entropy,
    expected_positive,
    kl_over_classes,
    kl_per_class,
    role,
    weak_assume_negative,
)
from cdul_steps.method.losses import LOSSES, LossName
from cdul_steps.method.single_positive import observed_positives, smooth

ALL_LOSSES = sorted(BY_NAME)


def example(images=3, classes=4, seed=0):
    random = torch.Generator().manual_seed(seed)
    shape = (images, classes)
    logits = 2 * torch.randn(shape, generator=random, dtype=torch.float64)
    return logits, torch.rand(shape, generator=random, dtype=torch.float64)


def example_latents(logits, seed):
    random = torch.Generator().manual_seed(seed)
    return torch.randn(logits.shape, dtype=torch.float64, generator=random)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def bernoulli_kl(p, q):
    return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))


def categorical_kl(logits, labels):
    powers = [math.exp(x) for x in logits]
    q = [power / sum(powers) for power in powers]
    p = [y / sum(labels) for y in labels]
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def by_class(term):
    """A loss from the term of one class, a function of probability and label."""
    return lambda rows: [
        sum(term(sigmoid(x), y) for x, y in zip(*row, strict=True)) for row in rows
    ]


def asl_term(p, y):
    shifted = max(p - ASL["margin"], 0)
    positive = -((1 - p) ** ASL["gamma_positive"]) * math.log(p)
    return y * positive - (1 - y) * shifted ** ASL["gamma_negative"] * math.log(1 - shifted)


def wan_rows(rows):
    others = len(rows[0][0]) - 1
    return by_class(lambda p, y: -y * math.log(p) - (1 - y) * math.log(1 - p) / others)(rows)


def epr_rows(rows):
    count = np.mean([sum(map(sigmoid, logits)) for logits, _ in rows])
    observed = by_class(lambda p, y: -y * math.log(p))(rows)
    return [value + (count - EXPECTED) ** 2 / len(rows[0][0]) for value in observed]


BY_LOOPS = {
    "kl": by_class(lambda p, y: bernoulli_kl(y, p)),
    "kl_reverse": by_class(bernoulli_kl),
    "kl_classes": lambda rows: [categorical_kl(*row) for row in rows],
    "bce": by_class(lambda p, y: -y * math.log(p) - (1 - y) * math.log(1 - p)),
    "asl": by_class(asl_term),
    "wan": wan_rows,
    "epr": epr_rows,
}


def rows_of(logits, labels):
    return list(zip(logits.tolist(), labels.tolist(), strict=True))


def test_every_loss_is_known_by_one_name_everywhere():
    assert list(LOSSES) == list(FUNCTIONS) == list(get_args(LossName))


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_names_the_settings_that_its_function_takes(name):
    """The loss settings of a training; those of `role` belong to its labels."""
    training, taken = Training(), set()
    for key in set(LOSSES[name].settings) - {"role"}:
        value = getattr(training, key)
        taken |= set(value.model_dump()) if isinstance(value, Section) else {key}
    parameters = signature(FUNCTIONS[name]).parameters.values()
    assert taken == {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}


@pytest.mark.parametrize("name", ALL_LOSSES)
@given(example=pairs())
def test_loss_equals_the_formula_and_is_never_negative(name, example):
    result = BY_NAME[name](*example)
    np.testing.assert_allclose(result, BY_LOOPS[name](rows_of(*example)), rtol=1e-6, atol=1e-9)
    assert result.shape == (len(example[0]),)
    assert (result >= -1e-9).all()


@given(example=pairs(), seed=st.integers(0, 9))
def test_role_equals_the_formula(example, seed):
    logits, labels = example
    latents = example_latents(logits, seed)
    observed = observed_positives(labels, "top1", 0.5)
    bce = BY_LOOPS["bce"]
    network = epr_rows(rows_of(logits, observed))
    estimates = epr_rows(rows_of(latents, observed))
    one = bce(rows_of(logits, torch.sigmoid(latents)))
    other = bce(rows_of(latents, torch.sigmoid(logits)))
    expected = (np.array(network) + estimates + one + other) / 2
    np.testing.assert_allclose(
        role(logits, latents, observed, expected_positives=EXPECTED), expected
    )


@pytest.mark.parametrize("name", ALL_LOSSES)
def test_gradient(name):
    logits, labels = (table.requires_grad_() for table in example())
    assert torch.autograd.gradcheck(BY_NAME[name], (logits, labels))


def test_gradient_of_role():
    """For each side it is the gradient of its own half, with the other side fixed."""
    logits, _ = example()
    latents, labels = example(seed=1)
    observed = observed_positives(labels, "top1", 0.5)

    def half(a, b):
        cross = binary_cross_entropy(a, torch.sigmoid(b))
        return (expected_positive(a, observed, expected_positives=EXPECTED) + cross) / 2

    for a, b in ((logits, latents), (latents, logits)):
        assert torch.autograd.gradcheck(partial(half, b=b), a.clone().requires_grad_())
    both = [logits.clone().requires_grad_(), latents.clone().requires_grad_()]
    found = torch.autograd.grad(role(*both, observed, expected_positives=EXPECTED).sum(), both)
    for gradient, mine, other in zip(found, both, both[::-1], strict=True):
        (expected,) = torch.autograd.grad(half(mine, other.detach()).sum(), mine)
        torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("name", ["kl", "kl_reverse"])
@given(example=pairs())
def test_loss_is_zero_where_the_network_says_the_labels(name, example):
    _, labels = example
    np.testing.assert_allclose(FUNCTIONS[name](torch.logit(labels), labels), 0, atol=1e-9)


@given(example=pairs())
def test_loss_over_classes_is_zero_where_the_network_says_the_labels(example):
    _, labels = example
    np.testing.assert_allclose(kl_over_classes(labels.log() + 3, labels), 0, atol=1e-9)


@pytest.mark.parametrize("name", ALL_LOSSES)
@pytest.mark.parametrize("size", [80.0, 500.0])
def test_loss_is_finite_for_decided_labels_and_large_logits(name, size):
    logits = torch.tensor([[size, -size, size, -size]], requires_grad=True)
    labels = torch.tensor([[1.0, 0.0, 0.0, 1.0]])
    loss = BY_NAME[name](logits, labels)
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("margin", [0.0, 0.2])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_asl_is_finite_for_large_logits(margin, gamma):
    logits = torch.tensor([[500.0, -500.0, 500.0, -500.0]], requires_grad=True)
    settings = {"gamma_positive": gamma, "gamma_negative": gamma, "margin": margin}
    asymmetric(logits, torch.tensor([[1.0, 0.0, 0.0, 1.0]]), **settings).sum().backward()
    assert torch.isfinite(logits.grad).all()


@given(example=pairs())
def test_asl_without_focus_and_margin_is_bce(example):
    plain = asymmetric(*example, gamma_positive=0, gamma_negative=0, margin=0)
    torch.testing.assert_close(plain, binary_cross_entropy(*example))


def test_asl_ignores_sure_negatives_and_minds_taken_ones():
    logits = torch.logit(torch.tensor([[0.05], [0.3], [0.9]])).requires_grad_()
    settings = {"gamma_positive": 0, "gamma_negative": 4, "margin": 0.1}
    loss = asymmetric(logits, torch.zeros(3, 1), **settings)
    loss.sum().backward()
    assert loss[0] == 0 and logits.grad[0] == 0
    assert logits.grad[2] > 100 * logits.grad[1] > 0


@given(example=pairs())
def test_bce_and_kl_are_the_same_to_the_network(example):
    logits, labels = example
    logits.requires_grad_()
    gradients = [
        torch.autograd.grad(loss(logits, labels).sum(), logits)[0]
        for loss in (binary_cross_entropy, kl_per_class)
    ]
    torch.testing.assert_close(*gradients)


@given(example=pairs())
def test_gradient_of_kl_is_the_difference_of_logits(example):
    logits, labels = example
    labels.requires_grad_()
    (gradient,) = torch.autograd.grad(kl_per_class(logits, labels).sum(), labels)
    np.testing.assert_allclose(gradient, (torch.logit(labels) - logits).detach(), atol=1e-9)


@given(example=pairs())
def test_label_smoothing_of_0_is_assume_negative(example):
    logits, labels = example
    observed = observed_positives(labels, "top1", 0.5)
    smoothed = binary_cross_entropy(logits, smooth(observed, 0, 0))
    torch.testing.assert_close(smoothed, binary_cross_entropy(logits, observed))


@given(example=pairs())
def test_label_smoothing_mixes_both_losses_of_a_label(example):
    """As in the authors' `loss_an_ls`."""
    logits, labels = example
    observed = observed_positives(labels, "threshold", 0.5)
    p = torch.sigmoid(logits)
    present, absent = -p.log(), -(1 - p).log()
    of_positives = 0.9 * present + 0.1 * absent
    of_negatives = 0.8 * absent + 0.2 * present
    expected = torch.where(observed == 1, of_positives, of_negatives).sum(dim=1)
    found = binary_cross_entropy(logits, smooth(observed, 0.1, 0.2))
    torch.testing.assert_close(found, expected)


def test_wan_of_two_classes_is_bce_and_of_one_is_finite():
    logits, labels = example(classes=2)
    torch.testing.assert_close(
        weak_assume_negative(logits, labels), binary_cross_entropy(logits, labels)
    )
    assert torch.isfinite(weak_assume_negative(logits[:, :1], labels[:, :1])).all()


def test_epr_says_nothing_of_what_is_not_observed_but_the_count():
    observed = torch.zeros(2, 3)
    # Two classes per image on average, whichever they are.
    logits = torch.tensor([[20.0, 20.0, 20.0], [20.0, -20.0, -20.0]])
    assert expected_positive(logits, observed, expected_positives=2).abs().max() < 1e-6
    assert expected_positive(logits, observed, expected_positives=1).min() > 0.3
