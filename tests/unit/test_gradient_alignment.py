import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loss_examples import BY_NAME, pairs

from cdul_steps.method.gradient_alignment import halfway, label_step, psi, to_label, to_latent
from cdul_steps.method.loss_functions import EPSILON, kl_per_class

# The losses that a label step may reduce.
ALL_LOSSES = ["kl", "kl_reverse", "kl_classes", "bce", "asl"]
LOSSES = {name: BY_NAME[name] for name in ALL_LOSSES}
sigmas = st.sampled_from([0.05, 0.2, 0.5])


def batch(images, classes=7, seed=0):
    random = torch.Generator().manual_seed(seed)
    labels = torch.rand(images, classes, generator=random)
    return to_latent(labels), 3 * torch.randn(images, classes, generator=random)


def test_latents_are_finite_and_undo_to_the_label():
    labels = torch.tensor([[0.0, 1.0, 0.5, 0.2, 1e-9, 1 - 1e-9]])
    latents = to_latent(labels)
    assert torch.isfinite(latents).all()
    np.testing.assert_allclose(to_label(latents), labels.clamp(EPSILON, 1 - EPSILON), atol=1e-6)
    assert to_latent(labels.double()).dtype == torch.float32


@given(sigmas, st.floats(0, 0.5))
def test_psi_is_symmetric_and_largest_at_one_half(sigma, distance):
    either = psi(torch.tensor([0.5 - distance, 0.5 + distance], dtype=torch.float64), sigma)
    top = psi(torch.tensor([0.5], dtype=torch.float64), sigma)
    assert either[0] == pytest.approx(either[1].item())
    assert (either <= top).all()
    expected = math.exp(-((distance / sigma) ** 2) / 2) / (sigma * math.sqrt(2 * math.pi))
    assert either[0].item() == pytest.approx(expected)


@pytest.mark.parametrize("sigma", [0.05, 0.2, 0.5])
def test_psi_integrates_to_one(sigma):
    grid = torch.linspace(0.5 - 10 * sigma, 0.5 + 10 * sigma, 20001, dtype=torch.float64)
    assert torch.trapezoid(psi(grid, sigma), grid).item() == pytest.approx(1)


@given(example=pairs())
def test_label_step_equals_the_formula(example):
    logits, labels = example
    latents = torch.logit(labels)
    moved = label_step(latents, logits, kl_per_class, sigma=0.2, step_size=0.5)
    limit = math.log((1 - EPSILON) / EPSILON)
    for place in np.ndindex(*labels.shape):
        y, u, p = labels[place].item(), latents[place].item(), logits[place].item()
        density = math.exp(-(((y - 0.5) / 0.2) ** 2) / 2) / (0.2 * math.sqrt(2 * math.pi))
        expected = u - 0.5 * density * (u - p)
        assert moved[place].item() == pytest.approx(min(max(expected, -limit), limit), abs=1e-6)


@pytest.mark.parametrize("name", ALL_LOSSES)
@given(example=pairs())
def test_a_small_label_step_lowers_the_loss_of_every_image(name, example):
    logits, labels = example
    latents = torch.logit(labels)
    moved = label_step(latents, logits, LOSSES[name], sigma=0.5, step_size=1e-3)
    before, after = LOSSES[name](logits, labels), LOSSES[name](logits, to_label(moved))
    assert (after <= before + 1e-12).all()


@pytest.mark.parametrize("name", ALL_LOSSES)
def test_a_label_step_moves_undecided_labels_towards_the_network(name):
    logits = torch.tensor([[4.0, -4.0, 4.0, -4.0]])
    labels = torch.tensor([[0.5, 0.5, 0.999, 0.001]])
    latents = to_latent(labels)
    step = label_step(latents, logits, LOSSES[name], sigma=0.1, step_size=0.1) - latents
    assert step[0, 0] > 1e-2 and step[0, 1] < -1e-2
    assert step[0, 2:].abs().max() < 1e-4


# Not over the classes, since the scale of an image's labels is arbitrary.
@pytest.mark.parametrize("name", [name for name in ALL_LOSSES if name != "kl_classes"])
def test_a_label_at_the_end_of_its_way_can_come_back(name):
    latents = to_latent(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    logits = torch.tensor([[-3.0, 3.0], [3.0, -3.0]])
    moved = label_step(latents, logits, LOSSES[name], sigma=0.5, step_size=0.1) - latents
    assert (moved * logits > 1e-3).all()


@pytest.mark.parametrize("name", ALL_LOSSES)
def test_a_label_step_does_not_depend_on_which_images_come_with_it(name):
    settings = {"sigma": 0.2, "step_size": 0.5}
    latents, logits = batch(16)
    others = batch(16, seed=1)
    expected = label_step(latents, logits, LOSSES[name], **settings)
    for image in range(16):
        here = torch.arange(16)[:, None] == image
        mixed = [
            torch.where(here, mine, other)
            for mine, other in zip((latents, logits), others, strict=True)
        ]
        assert torch.equal(label_step(*mixed, LOSSES[name], **settings)[image], expected[image])


@pytest.mark.parametrize("name", ALL_LOSSES)
@pytest.mark.parametrize("images", [1, 2, 5, 16])
def test_a_label_step_does_not_depend_on_how_many_images_come_with_it(name, images):
    settings = {"sigma": 0.2, "step_size": 0.5}
    latents, logits = batch(64)
    together = label_step(latents, logits, LOSSES[name], **settings)
    for first in range(0, 64, images):
        part = slice(first, first + images)
        alone = label_step(latents[part], logits[part], LOSSES[name], **settings)
        # Vector arithmetic rounds the last few values of a batch differently.
        torch.testing.assert_close(alone, together[part], rtol=1e-5, atol=2e-6)


def test_a_label_step_stays_within_the_clamp_and_leaves_its_input_alone():
    latents, logits = batch(4)
    logits.requires_grad_()
    before = latents.clone()
    moved = label_step(latents, logits, kl_per_class, sigma=0.2, step_size=1e6)
    assert moved.abs().max() <= to_latent(torch.ones(1)).item() + 1e-3
    assert torch.isfinite(moved).all()
    assert torch.equal(latents, before)
    assert not moved.requires_grad and logits.grad is None


def test_a_label_step_works_where_gradients_are_off():
    latents, logits = batch(2)
    expected = label_step(latents, logits, kl_per_class, sigma=0.2, step_size=0.5)
    with torch.no_grad():
        moved = label_step(latents, logits, kl_per_class, sigma=0.2, step_size=0.5)
    assert torch.equal(moved, expected)


@given(example=pairs())
def test_halfway_keeps_the_means_of_the_first_labels(example):
    refined, labels = example
    first = to_latent(labels)
    found = halfway(first, refined.float())
    torch.testing.assert_close(to_label(found).mean(0), to_label(first).mean(0), rtol=0, atol=1e-5)
    # Within a class, all are shifted equally.
    shift = found - (first + refined.float()) / 2
    torch.testing.assert_close(shift, shift[:1].expand_as(shift), rtol=0, atol=1e-4)
    torch.testing.assert_close(halfway(first, first), first, rtol=0, atol=1e-4)
