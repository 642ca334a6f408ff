"""The losses of logits against labels, one value per image.

All losses sum over classes, so those of Cole et al., who average, are multiplied by C.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, log_softmax, logsigmoid

from cdul_steps.method.losses import LossName

EPSILON = 1e-6
"""Labels are kept within [EPSILON, 1 - EPSILON], so that their latents stay finite."""

LossFunction = Callable[..., Tensor]
"""From logits and labels in 0..1, both (B, C), to losses (B,); ROLE also takes observed labels."""


def _entropy(labels: Tensor) -> Tensor:
    return -(torch.xlogy(labels, labels) + torch.xlogy(1 - labels, 1 - labels))


def kl_per_class(logits: Tensor, labels: Tensor) -> Tensor:
    """KL(y_u || y_p), one Bernoulli per class, summed over classes: (B, C), (B, C) to (B,).

    The paper's divergence: classes are independent, as a multi-label head requires.
    """
    cross = binary_cross_entropy_with_logits(logits, labels, reduction="none")
    return (cross - _entropy(labels)).sum(dim=1)


def kl_per_class_reverse(logits: Tensor, labels: Tensor) -> Tensor:
    """KL(y_p || y_u), one Bernoulli per class, summed over classes: (B, C), (B, C) to (B,)."""
    p = torch.sigmoid(logits)
    # Wider than the range of the labels, because a clamped label has no gradient.
    labels = labels.clamp(EPSILON / 2, 1 - EPSILON / 2)
    positive = p * (logsigmoid(logits) - labels.log())
    negative = (1 - p) * (logsigmoid(-logits) - (1 - labels).log())
    return (positive + negative).sum(dim=1)


def kl_over_classes(logits: Tensor, labels: Tensor) -> Tensor:
    """KL(y_u || y_p) of one distribution over the classes: (B, C), (B, C) to (B,).

    The labels are scaled to sum to 1, and the network's head is a softmax. This loss is for
    comparison only, because the classes of an image compete.
    """
    target = labels / labels.sum(dim=1, keepdim=True)
    return (torch.xlogy(target, target) - target * log_softmax(logits, dim=1)).sum(dim=1)


def binary_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """`-y log p - (1 - y) log(1 - p)`, summed over classes: (B, C), (B, C) to (B,).

    `kl_per_class` plus the labels' entropy: equivalent for the network, but it drives labels that
    move to 0 and 1. With hard labels it is "assume negative" (Cole et al., CVPR 2021).
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

    Summed over classes: (B, C), (B, C) to (B,). Confident negatives have little weight
    (`gamma_negative`), the most confident none (`margin`). With all three at 0 it equals
    `binary_cross_entropy`. Source: Ridnik et al., ICCV 2021, section 2.
    """
    p = torch.sigmoid(logits)
    # log(1 - p_m) = log(min(1 - p + margin, 1)), finite for any logit.
    log_absent = torch.logaddexp(logsigmoid(-logits), logits.new_tensor(margin).log()).clamp(max=0)
    # Kept away from 0, where a power below 1 has no gradient.
    positive = (1 - p).clamp(min=EPSILON) ** gamma_positive * logsigmoid(logits)
    negative = (p - margin).clamp(min=EPSILON) ** gamma_negative * log_absent
    return -(labels * positive + (1 - labels) * negative).sum(dim=1)


def weak_assume_negative(logits: Tensor, labels: Tensor) -> Tensor:
    """WAN, `-y log p - (1 - y) log(1 - p) / (C - 1)`, summed over classes: (B, C), (B, C) to (B,).

    The one observed positive weighs as much as all classes assumed absent. Source: Cole et al.,
    CVPR 2021, and `loss_wan` in their code.
    """
    absent = (1 - labels) * logsigmoid(-logits) / max(labels.shape[1] - 1, 1)
    return -(labels * logsigmoid(logits) + absent).sum(dim=1)


def expected_positive(logits: Tensor, labels: Tensor, *, expected_positives: float) -> Tensor:
    """EPR, `-y log p` summed over classes, `+ (mean_b sum_c p - expected_positives)^2 / C`.

    (B, C), (B, C) to (B,); the second term belongs to the batch and is added to every image's
    value. Only the mean number of classes per image, `expected_positives`, is assumed about classes
    that are not observed. Source: Cole et al., CVPR 2021, and `loss_epr` in their code.
    """
    count = torch.sigmoid(logits).sum(dim=1).mean()
    regularisation = (count - expected_positives) ** 2 / labels.shape[1]
    return -(labels * logsigmoid(logits)).sum(dim=1) + regularisation


def role(logits: Tensor, latents: Tensor, observed: Tensor, *, expected_positives: float) -> Tensor:
    """ROLE: network and label estimates `sigmoid(latents)` learn from each other, (B,).

    All tables are (B, C). The mean of two symmetric halves, `EPR(a, observed) + BCE(a, sigmoid(b))`
    with b held fixed: a is the network and b the estimates, and vice versa. Source: Cole et al.,
    CVPR 2021, and `loss_role` in their code.
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
"""The function of each of `losses.LOSSES`; it takes the loss's settings as keyword arguments."""
