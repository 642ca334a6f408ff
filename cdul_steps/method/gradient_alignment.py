"""Gradient alignment: the network and its pseudo-labels refined in turn (CDUL, section 3.2)."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, log_softmax, logsigmoid

EPSILON = 1e-6
"""Labels are kept within [EPSILON, 1 - EPSILON], so that their latents stay finite."""


def to_latent(labels: Tensor) -> Tensor:
    """Latents `u = logit(y)` of labels in 0..1, clamped by EPSILON; same shape."""
    # In double precision, since 1 - EPSILON is coarse in single.
    return torch.logit(labels.double(), eps=EPSILON).float()


def to_label(latents: Tensor) -> Tensor:
    """Labels `y_u = sigmoid(u)`; same shape."""
    return torch.sigmoid(latents)


def psi(labels: Tensor, sigma: float) -> Tensor:
    """Gaussian density of mean 0.5 and deviation `sigma` at each label (CDUL, section 3.2).

    Largest at 0.5 and symmetric about it: undecided labels move, decided ones stay.
    """
    z = (labels - 0.5) / sigma
    return torch.exp(-0.5 * z * z) / (sigma * math.sqrt(2 * math.pi))


def _entropy(labels: Tensor) -> Tensor:
    return -(torch.xlogy(labels, labels) + torch.xlogy(1 - labels, 1 - labels))


def kl_per_class(logits: Tensor, labels: Tensor) -> Tensor:
    """KL(y_u || y_p) of one Bernoulli a class, summed over classes: (B, C), (B, C) to (B,).

    The default: each class is present or not by itself, as a multi-label head needs.
    """
    cross = binary_cross_entropy_with_logits(logits, labels, reduction="none")
    return (cross - _entropy(labels)).sum(dim=1)


def kl_per_class_reverse(logits: Tensor, labels: Tensor) -> Tensor:
    """KL(y_p || y_u) of one Bernoulli a class, summed over classes: (B, C), (B, C) to (B,)."""
    p = torch.sigmoid(logits)
    labels = labels.clamp(EPSILON, 1 - EPSILON)
    positive = p * (logsigmoid(logits) - labels.log())
    negative = (1 - p) * (logsigmoid(-logits) - (1 - labels).log())
    return (positive + negative).sum(dim=1)


def kl_over_classes(logits: Tensor, labels: Tensor) -> Tensor:
    """KL(y_u || y_p) of one distribution over the classes: (B, C), (B, C) to (B,).

    The labels are scaled to sum to 1 and the network's head is a softmax. Kept for comparison:
    several classes of one image then compete.
    """
    target = labels / labels.sum(dim=1, keepdim=True)
    return (torch.xlogy(target, target) - target * log_softmax(logits, dim=1)).sum(dim=1)


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "kl": kl_per_class,
    "kl_reverse": kl_per_class_reverse,
    "kl_classes": kl_over_classes,
}
"""Losses by name: logits (B, C) and labels (B, C) to one value an image (B,)."""


def label_step(
    latents: Tensor,
    logits: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    sigma: float,
    step_size: float,
) -> Tensor:
    """Move every label's latent against its own loss: `u - step_size * psi(y_u) * dL/dy_u`.

    `latents` and `logits` are float32 (B, C), the network's output being held fixed. The loss is
    taken an image at a time (its sum, never a mean), so a label's step does not depend on how
    many images come with it (CDUL, section 3.2). Returns the new latents (B, C), clamped
    to those of labels within EPSILON.
    """
    labels = to_label(latents).requires_grad_()
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(loss(logits.detach(), labels).sum(), labels)
    labels = labels.detach()
    moved = latents - step_size * psi(labels, sigma) * gradient
    limit = math.log((1 - EPSILON) / EPSILON)
    return moved.clamp(-limit, limit)
