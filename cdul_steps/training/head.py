"""Training of only the last layer, on standardised features of a frozen trunk."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cdul_steps.config import Training
from cdul_steps.method.gradient_alignment import halfway
from cdul_steps.models.classifier import Card, start_head
from cdul_steps.training.features import Standardised, read_features
from cdul_steps.training.labels import AlignedLabels, FixedLabels
from cdul_steps.training.ranks import Ranks
from cdul_steps.training.trainer import Trainer, optimizer


class HeadTrainer(Trainer):
    """Trains a head, a linear layer on features; its images are feature vectors.

    Labels that move do so in a first round of epochs, with a head that starts at each class's mean
    label and whose bias does not decay. The final head is trained in the last round, on fixed
    labels: those `halfway` between the first and the refined ones. It has no bias, so that its
    logits stay where the sigmoid is almost linear and noise in the labels does least harm.
    `match_labels` adds the class frequencies to its probabilities at the end.
    """

    def __init__(
        self,
        store: Path,
        rows: np.ndarray,
        whole: torch.nn.Module,
        card: Card,
        settings: Training,
        labels: FixedLabels,
        scratch: Path,
    ) -> None:
        """`rows` int (N,) are the rows of the labels' images in the feature store of the `whole`
        network's trunk. The features are kept in a nameless file in the folder `scratch`."""
        features = read_features(store, rows, scratch)
        both = settings.model_args.get("global_pool") == "catavgmax"
        self.standardise = Standardised(features, poolings=2 if both else 1)
        self.features = self.standardise(features, scratch)
        head = torch.nn.Linear(self.features.shape[1], len(card.classes))
        super().__init__(head, card, settings, labels, torch.device("cpu"), Ranks())
        self.rounds = 2 if isinstance(labels, AlignedLabels) else 1
        self._first = labels.latents.detach().clone()
        self._whole = whole

    def begin_round(self, number: int) -> None:
        """Start with a new head."""
        self.step, self._last = 0, number == self.rounds - 1
        head = self.network
        torch.nn.init.zeros_(head.weight)
        torch.nn.init.zeros_(head.bias)
        head.bias.requires_grad_(not self._last)
        groups: list[dict[str, Any]] = [{"params": [head.weight]}]
        if not self._last:
            start_head(head, self.labels.labels)
            groups.append({"params": [head.bias], "weight_decay": 0.0})
        self.optimizer = optimizer(self.settings, [*groups, *self.labels.parameter_groups()])
        self._set_target()

    def restore(self, state: dict[str, Any]) -> None:
        """Resume from a `state`."""
        super().restore(state)
        self._set_target()

    def _set_target(self) -> None:
        if self.rounds == 2 and self._last:
            latents = halfway(self._first, self.labels.latents)
            self.target = self.labels.fixed(latents)

    def prepare(self, images: Tensor) -> Tensor:
        """The features, unchanged."""
        return images

    def move_labels(self, epoch: int) -> None:
        """Move the labels in the first of two rounds."""
        if self.rounds == 1 or not self._last:
            super().move_labels(epoch)

    @property
    def last_layer(self) -> torch.nn.Module:
        """The head, which is the only layer."""
        return self.network

    def finished_network(self) -> torch.nn.Module:
        """The whole network, with the head on its trunk."""
        self.standardise.fold(self.network, self._whole.get_classifier())
        return self._whole
