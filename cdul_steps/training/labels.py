"""The labels of a training: a table that computes the loss, and may move.

A variant of the training combines one of these classes with one of the losses in
`cdul_steps.method.loss_functions`; the loop in `cdul_steps.steps.train` does not depend on either.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from cdul_steps.config import Alignment, Role, Section, Training
from cdul_steps.method.gradient_alignment import label_step, to_label, to_latent
from cdul_steps.method.loss_functions import FUNCTIONS, LossFunction
from cdul_steps.method.losses import LOSSES
from cdul_steps.method.single_positive import first_estimates, observed_positives, smooth


class FixedLabels:
    """Labels that do not change; subclasses move them.

    `corrected` bool (N, C): entries given by a person, which never change. `unknown` bool (N, C):
    those of them that the person could not decide, which are not used in training.
    """

    def __init__(
        self, latents: Tensor, corrected: Tensor, unknown: Tensor, loss: LossFunction
    ) -> None:
        self.latents, self.corrected, self.unknown = latents, corrected, unknown
        self._loss = loss

    @property
    def labels(self) -> Tensor:
        """The current labels, float32 (N, C)."""
        return to_label(self.latents.detach())

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Further parameters for the network's optimiser, as torch.optim takes them."""
        return []

    def loss(self, logits: Tensor, index: Tensor) -> Tensor:
        """Losses (B,) of a batch, from the network's logits (B, C) of the images `index` (B,)."""
        unknown, held = self.unknown[index], logits.detach()
        labels = to_label(self.latents[index])
        return self._loss(
            torch.where(unknown, held, logits), torch.where(unknown, torch.sigmoid(held), labels)
        )

    def fixed(self, latents: Tensor) -> "FixedLabels":
        """Fixed labels with other `latents` (N, C), except entries given by a person."""
        kept = torch.where(self.corrected, self.latents.detach(), latents)
        return FixedLabels(kept, self.corrected, self.unknown, self._loss)

    def end_epoch(self, epoch: int, logits: Tensor) -> None:
        """Move the labels after `epoch` (from 1), given each image's logits (N, C) in it.

        The logits are NaN for an image that could not be read, whose labels do not change.
        """

    def restore(self, latents: Tensor) -> None:
        """Resume from the latents of a checkpoint."""
        with torch.no_grad():
            self.latents.copy_(latents)


class AlignedLabels(FixedLabels):
    """Gradient alignment: the labels move at regular epochs, with the network held fixed."""

    def __init__(
        self,
        latents: Tensor,
        corrected: Tensor,
        unknown: Tensor,
        loss: LossFunction,
        settings: Alignment,
    ) -> None:
        super().__init__(latents, corrected, unknown, loss)
        self._settings = settings

    def end_epoch(self, epoch: int, logits: Tensor) -> None:
        """Take a label step for every image, after warm-up and in every n-th epoch."""
        after_warmup = epoch - self._settings.warmup
        if after_warmup <= 0 or (after_warmup - 1) % self._settings.every:
            return
        seen = logits.isfinite().all(dim=1)
        moved = label_step(
            self.latents[seen],
            logits[seen],
            self._loss,
            sigma=self._settings.sigma,
            step_size=self._settings.step_size,
        )
        self.latents[seen] = torch.where(self.corrected[seen], self.latents[seen], moved)


class EstimatedLabels(FixedLabels):
    """ROLE: labels estimated from the observed positives by the network's optimiser."""

    def __init__(
        self,
        given: Tensor,
        corrected: Tensor,
        unknown: Tensor,
        loss: LossFunction,
        settings: Role,
        seed: int,
    ) -> None:
        super().__init__(torch.nn.Parameter(first_estimates(given, seed)), corrected, unknown, loss)
        self._given, self._rate = to_latent(given), settings.learning_rate_scale
        self._observed = torch.where(unknown, 0.0, given)

    @property
    def labels(self) -> Tensor:
        """The current estimates, float32 (N, C)."""
        return to_label(torch.where(self.corrected, self._given, self.latents.detach()))

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The latents, without decay, with their own learning rate."""
        return [{"params": [self.latents], "lr_scale": self._rate, "weight_decay": 0.0}]

    def loss(self, logits: Tensor, index: Tensor) -> Tensor:
        """Losses (B,) of a batch, with a gradient for its latents as well."""
        held = torch.where(self.unknown[index], logits.detach(), logits)
        latents = torch.where(self.corrected[index], self._given[index], self.latents[index])
        return self._loss(held, latents, self._observed[index])


def new_labels(pseudo_labels: Tensor, corrected: Tensor, settings: Training) -> FixedLabels:
    """The initial labels of a training, from pseudo-labels float32 (N, C) in 0..1.

    `corrected` entries, bool (N, C), are neither hardened nor smoothed. A corrected entry of 0.5
    could not be decided, and is never an image's best class.
    """
    unknown = corrected & (pseudo_labels == 0.5)
    labels = observed_positives(
        torch.where(unknown, 0.0, pseudo_labels), settings.positives, settings.threshold
    )
    of_loss = {key: getattr(settings, key) for key in LOSSES[settings.loss].settings}
    role = of_loss.pop("role", None)
    options: dict[str, Any] = {}
    for key, value in of_loss.items():
        options |= value.model_dump() if isinstance(value, Section) else {key: value}
    loss = partial(FUNCTIONS[settings.loss], **options)
    if role:
        given = torch.where(corrected, pseudo_labels, labels)
        return EstimatedLabels(given, corrected, unknown, loss, role, settings.seed)
    labels = smooth(labels, **settings.smoothing.model_dump())
    latents = to_latent(torch.where(corrected, pseudo_labels, labels))
    if settings.alignment.enabled:
        return AlignedLabels(latents, corrected, unknown, loss, settings.alignment)
    return FixedLabels(latents, corrected, unknown, loss)
