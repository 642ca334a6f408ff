"""How a network learns from labels: losses of logits against labels, one value an image.

All sum over classes, so that a loss of Cole et al., who average, is C times theirs.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, log_softmax, logsigmoid

from cdul_steps.method.losses import LossName

EPSILON = 1e-6
"""Labels are kept within [EPSILON, 1 - EPSILON], so that their latents stay finite."""

LossFunction = Callable[..., Tensor]
"""From logits and labels in 0..1, both (B, C), to losses (B,); ROLE takes observed labels too."""


def _entropy(labels: Tensor) -> Tensor:
    return -(torch.xlogy(labels, labels) + torch.xlogy(1 - labels, 1 - labels))


def kl_per_class(logits: Tensor, labels: Tensor) -> Tensor:
    """KL(y_u || y_p) of one Bernoulli a class, summed over classes: (B, C), (B, C) to (B,).

    The paper's divergence: each class is present or not by itself, as a multi-label head needs.
    """
    cross = binary_cross_entropy_with_logits(logits, labels, reduction="none")
    return (cross - _entropy(labels)).sum(dim=1)


def kl_per_class_reverse(logits: Tensor, labels: Tensor) -> Tensor:
    """KL(y_p || y_u) of one Bernoulli a class, summed over classes: (B, C), (B, C) to (B,)."""
    p = torch.sigmoid(logits)
    # Beyond where labels are kept, since a clamped label has no gradient.
    labels = labels.clamp(EPSILON / 2, 1 - EPSILON / 2)
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


def binary_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """`-y log p - (1 - y) log(1 - p)`, summed over classes: (B, C), (B, C) to (B,).

    The default: `kl_per_class` plus the labels' entropy, so the same to the network and another to
    the labels, which it drives to 0 and 1. With hard labels it is "assume negative" (Cole et al.,
    CVPR 2021).
    """
    return binary_cross_entropy_with_logits(logits, labels, reduction="none").sum(dim=1)


def asymmetric(
    logits: Tensor,
    labels: Tensor,
    *,
    gamma_positive: float,
    gamma_negative: float,
    margin: float,
) -> Tensor:
    """ASL, `-y (1-p)^g+ log p - (1-y) p_m^g- log(1 - p_m)`, `p_m = max(p - margin, 0)`.

    Summed over classes: (B, C), (B, C) to (B,). Sure negatives count little (`gamma_negative`),
    the surest nothing (`margin`). All three 0 give `binary_cross_entropy`. Source: Ridnik et al.,
    ICCV 2021, section 2.
    """
    p = torch.sigmoid(logits)
    # log(1 - p_m) = log(min(1 - p + margin, 1)), finite for any logit.
    log_absent = torch.logaddexp(logsigmoid(-logits), logits.new_tensor(margin).log()).clamp(max=0)
    # Kept from 0, where a power below 1 has no gradient.
    positive = (1 - p).clamp(min=EPSILON) ** gamma_positive * logsigmoid(logits)
    negative = (p - margin).clamp(min=EPSILON) ** gamma_negative * log_absent
    return -(labels * positive + (1 - labels) * negative).sum(dim=1)


def weak_assume_negative(logits: Tensor, labels: Tensor) -> Tensor:
    """WAN, `-y log p - (1 - y) log(1 - p) / (C - 1)`, summed over classes: (B, C), (B, C) to (B,).

    The one observed positive weighs as much as all the classes taken for absent. Source: Cole et
    al., CVPR 2021, and `loss_wan` of their code.
    """
    absent = (1 - labels) * logsigmoid(-logits) / max(labels.shape[1] - 1, 1)
    return -(labels * logsigmoid(logits) + absent).sum(dim=1)


def expected_positive(logits: Tensor, labels: Tensor, *, expected_positives: float) -> Tensor:
    """EPR, `-y log p` summed over classes, `+ (mean_b sum_c p - expected_positives)^2 / C`.

    (B, C), (B, C) to (B,); the second term, which is the batch's, is in every image's value.
    Nothing is said of the classes that are not observed but how many an image shows on the
    average, `expected_positives`. Source: Cole et al., CVPR 2021, and `loss_epr` of their code.
    """
    count = torch.sigmoid(logits).sum(dim=1).mean()
    regularisation = (count - expected_positives) ** 2 / labels.shape[1]
    return -(labels * logsigmoid(logits)).sum(dim=1) + regularisation


def role(logits: Tensor, latents: Tensor, observed: Tensor, *, expected_positives: float) -> Tensor:
    """ROLE: network and label estimates `sigmoid(latents)` learn from each other, (B,).

    All tables are (B, C). The mean of two equal halves, `EPR(a, observed) + BCE(a, sigmoid(b))`
    with b held fixed: a is the network and b the estimates, and the other way round. Source: Cole
    et al., CVPR 2021, and `loss_role` of their code.
    """

    def half(a: Tensor, b: Tensor) -> Tensor:
        cross = binary_cross_entropy(a, torch.sigmoid(b.detach()))
        return expected_positive(a, observed, expected_positives=expected_positives) + cross

    return (half(logits, latents) + half(latents, logits)) / 2


FUNCTIONS: dict[LossName, Callable[..., Tensor]] = {
    "kl": kl_per_class,
    "kl_reverse": kl_per_class_reverse,
    "kl_classes": kl_over_classes,
    "bce": binary_cross_entropy,
    "asl": asymmetric,
    "wan": weak_assume_negative,
    "epr": expected_positive,
    "role": role,
}
"""The function of each of `losses.LOSSES`; it takes the loss's settings by keyword."""
