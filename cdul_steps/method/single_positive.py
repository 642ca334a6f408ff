"""Observed positives from pseudo-labels, for single-positive learning (Cole et al., CVPR 2021)."""

import math

import torch
from torch import Tensor

from cdul_steps.method.choices import Positives


def observed_positives(labels: Tensor, positives: Positives, threshold: float) -> Tensor:
    """Labels (N, C) in 0..1 as observed positives: 1, and 0 where nothing is observed.

    "top1" observes the best class of each image (the first if tied; none if all labels are 0), as
    in single-positive learning; "threshold" observes every class from `threshold` on, possibly
    none; "soft" does not change the labels.
    """
    if positives == "soft":
        return labels
    if positives == "threshold":
        return (labels >= threshold).to(labels.dtype)
    best = labels.max(dim=1, keepdim=True)
    return torch.zeros_like(labels).scatter_(1, best.indices, (best.values > 0).to(labels.dtype))


def smooth(labels: Tensor, positive: float, negative: float) -> Tensor:
    """Label smoothing, `y (1 - positive) + (1 - y) negative`; same shape.

    A label of 1 becomes `1 - positive`, a label of 0 `negative`. Equal values are the label
    smoothing in Cole et al.'s code (`loss_an_ls`); `positive` 0 smooths only assumed negatives.
    """
    return labels * (1 - positive) + (1 - labels) * negative


def first_estimates(observed: Tensor, seed: int) -> Tensor:
    """The initial latents (N, C) of ROLE.

    They correspond to labels of 0.995 where a positive is observed; otherwise they are drawn
    uniformly from those of labels 0.4 to 0.6 (`LabelEstimator` in Cole et al.'s code).
    """
    draw = torch.rand(observed.shape, generator=torch.Generator().manual_seed(seed))
    undecided = math.log(0.6 / 0.4) * (2 * draw.to(observed.device) - 1)
    return torch.where(observed == 1, math.log(0.995 / 0.005), undecided)
