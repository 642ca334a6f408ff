"""Gradient alignment: refine the network and its pseudo-labels in turn (CDUL, section 3.2)."""

import math

import torch
from torch import Tensor

from cdul_steps.method.loss_functions import EPSILON, LossFunction


def to_latent(labels: Tensor) -> Tensor:
    """Latents `u = logit(y)` of labels in 0..1, clamped by EPSILON; float32 of the same shape."""
    # In double precision, because 1 - EPSILON is coarse in single precision.
    return torch.logit(labels.double(), eps=EPSILON).float()


def to_label(latents: Tensor) -> Tensor:
    """Labels `y_u = sigmoid(u)` of float latents; same shape and dtype."""
    return torch.sigmoid(latents)


def psi(labels: Tensor, sigma: float) -> Tensor:
    """Gaussian density with mean 0.5 and deviation `sigma` at each label (CDUL, section 3.2).

    Same shape and dtype as `labels`. It is largest at 0.5 and symmetric about it: undecided labels
    move, decided ones do not.
    """
    z = (labels - 0.5) / sigma
    return torch.exp(-0.5 * z * z) / (sigma * math.sqrt(2 * math.pi))


def label_step(
    latents: Tensor,
    logits: Tensor,
    loss: LossFunction,
    *,
    sigma: float,
    step_size: float,
) -> Tensor:
    """Move every label's latent against its own loss: `u - step_size * psi(y_u) * dL/dy_u`.

    `latents` and `logits` are float32 (B, C); the network's output is held fixed. The losses of the
    images are summed, never averaged, so a label's step does not depend on the batch size (CDUL,
    section 3.2). Returns the new latents (B, C), clamped to those of labels within EPSILON.
    """
    labels = to_label(latents).requires_grad_()
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(loss(logits.detach(), labels).sum(), labels)
    labels = labels.detach()
    moved = latents - step_size * psi(labels, sigma) * gradient
    limit = math.log((1 - EPSILON) / EPSILON)
    return moved.clamp(-limit, limit)


def halfway(first: Tensor, refined: Tensor) -> Tensor:
    """Latents midway between the `first` and the `refined` ones, with the first labels' means.

    `u[i,c] = (first[i,c] + refined[i,c]) / 2 + b[c]`, where the bias `b` of each class preserves
    the mean of its labels over the images. Alignment pulls the labels, and with them the number of
    positives, towards what the network can express; this keeps half of what the teacher knows
    beyond the network, and its full information on class frequencies. All are float32 (N, C).
    """
    middle = (first.double() + refined.double()) / 2
    mean = to_label(first.double()).mean(dim=0)
    low = torch.full_like(mean, -2 * math.log(1 / EPSILON))
    high = -low
    for _ in range(60):
        bias = (low + high) / 2
        below = to_label(middle + bias).mean(dim=0) < mean
        low, high = torch.where(below, bias, low), torch.where(below, high, bias)
    return (middle + bias).float()
