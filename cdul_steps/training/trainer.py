"""The training loop: forward, loss, step, and the state for a checkpoint."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cdul_steps.config import Training
from cdul_steps.method.calibration import match_labels
from cdul_steps.models.classifier import Card
from cdul_steps.models.device import DTYPES
from cdul_steps.progress import Progress
from cdul_steps.training.labels import FixedLabels
from cdul_steps.training.ranks import Ranks


def _learning_rate(settings: Training, step: int, steps: int) -> float:
    """Learning rate of a step; `step` counts from 0, and `steps` is the total."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    if settings.schedule == "constant":
        return settings.learning_rate
    done = (step - settings.warmup_steps) / max(1, steps - settings.warmup_steps)
    return settings.learning_rate * 0.5 * (1 + float(np.cos(np.pi * done)))


def optimizer(settings: Training, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """The optimiser for groups of parameters."""
    common = {"lr": settings.learning_rate, "weight_decay": settings.weight_decay}
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, **common)
    return torch.optim.SGD(groups, momentum=0.9, **common)


class Trainer:
    """The state of a training: network, labels, and their optimiser."""

    rounds = 1
    """Number of passes through all epochs."""
    target: FixedLabels
    """The labels that the network learns from in this round: usually `labels`."""

    def __init__(
        self,
        network: torch.nn.Module,
        card: Card,
        settings: Training,
        labels: FixedLabels,
        device: torch.device,
        ranks: Ranks,
    ) -> None:
        self.network = ranks.prepare(network.to(device))
        self.card, self.settings, self.labels, self.device = card, settings, labels, device
        self.target = labels
        self.ranks, self._training_network = ranks, ranks.wrap(self.network)
        groups = [{"params": list(self.network.parameters())}, *labels.parameter_groups()]
        self.optimizer = optimizer(settings, groups)
        self.dtype = DTYPES[settings.precision]
        self.scaler = torch.amp.GradScaler(device.type, enabled=settings.precision == "fp16")
        self.logits = torch.full_like(labels.labels, torch.nan)
        self.step = 0

    def begin_round(self, number: int) -> None:
        """Prepare for a round of epochs, counted from 0."""

    def prepare(self, images: Tensor) -> Tensor:
        """The network's input, from images as the loader yields them."""
        return self.card.normalize(images)

    def move_labels(self, epoch: int) -> None:
        """Move the labels after `epoch`, counted from 1 in its round."""
        self.labels.end_epoch(epoch, self.logits)

    @torch.no_grad()
    def match_labels(self, logits: Tensor) -> tuple[float, float] | None:
        """Rescale so that the probabilities name as many classes as the target does; see
        `calibration.match_labels`.

        `logits` (N, C) are the network's current logits for the labels' images, NaN for an unusable
        one. The returned slope and bias are built into the last layer. Returns None without a
        change if that is not a linear layer with a bias.
        """
        head = self.last_layer
        if not isinstance(head, torch.nn.Linear | torch.nn.Conv2d) or head.bias is None:
            return None
        known = logits.isfinite() & ~self.target.unknown.cpu()
        if not known.any():
            return 1.0, 0.0
        slope, bias = match_labels(logits[known].numpy(), self.target.labels.cpu()[known].numpy())
        head.weight.mul_(slope)
        head.bias.mul_(slope).add_(bias)
        return slope, bias

    @property
    def last_layer(self) -> torch.nn.Module:
        """The layer that computes the logits."""
        return self.network.get_classifier()

    def finished_network(self) -> torch.nn.Module:
        """The network to save, after the last epoch."""
        return self.network

    def _forward(self, network: torch.nn.Module, images: Tensor) -> Tensor:
        images = self.prepare(images.to(self.device, non_blocking=True))
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not torch.float32):
            return network(images).float()

    def train_epoch(self, data: Iterator[tuple[Tensor, Tensor]], steps: int, label: str) -> float:
        """One pass over the images; returns the mean loss per image.

        `data` is this rank's part of every batch; `steps` is the number of steps in the whole
        round. Keeps each image's logits for the labels.
        """
        self.network.train()
        self.logits.fill_(torch.nan)
        total, count = torch.zeros((), device=self.device), 0
        spare = torch.zeros((1, 3, *[self.card.image_size] * 2), dtype=torch.uint8)
        with Progress(label, len(self.logits), "images") as progress:
            for index, images in data:
                index, mine = self.ranks.whole(index)
                if not len(index):
                    continue
                rate = _learning_rate(self.settings, self.step, steps)
                for group in self.optimizer.param_groups:
                    group["lr"] = rate * group.get("lr_scale", 1)
                if len(index) == 1:  # batch norm needs two
                    images = torch.cat([images, images])
                if not len(images):
                    # A rank without images in this batch takes part with an earlier one, which
                    # affects only batch norm.
                    images = spare[:1]
                spare = images
                index = index.to(self.device, non_blocking=True)
                logits = self._forward(self._training_network, images)[: mine.stop - mine.start]
                logits = self.ranks.gather(logits, mine, len(index))
                loss = self.target.loss(logits, index)
                self.optimizer.zero_grad(set_to_none=True)
                self.scaler.scale(loss.mean()).backward()
                self.scaler.step(self.optimizer)
                self.scaler.update()
                self.logits[index] = logits.detach()
                total += loss.detach().sum()
                count += len(index)
                self.step += 1
                progress.update(len(index))
        return float(total) / max(count, 1)

    @torch.inference_mode()
    def predict(self, data: Iterator[tuple[Tensor, Tensor]], images: int) -> Tensor:
        """Logits float32 (images, C) on the CPU; NaN for an image that is unusable.

        `data` is this rank's part; the logits are those of all ranks.
        """
        self.network.eval()
        rows = torch.zeros(images, len(self.card.classes) + 1)
        for index, pixels in data:
            if len(index):
                rows[index, :-1] = self._forward(self.network, pixels).cpu()
                rows[index, -1] = 1
        rows = self.ranks.sum(rows)
        return rows[:, :-1].where(rows[:, -1:] == 1, torch.nan)

    @property
    def unusable(self) -> int:
        """Number of images without logits in the last epoch, because they cannot be read."""
        return int(self.logits.isnan().all(dim=1).sum())

    def is_finite(self) -> bool:
        """Whether the network's weights and statistics are finite."""
        return all(bool(t.isfinite().all()) for t in self.network.state_dict().values())

    def state(self) -> dict[str, Any]:
        """Everything that the next epoch depends on. Random numbers are seeded in each epoch."""
        return {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "latents": self.labels.latents.detach(),
            "step": self.step,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Resume from a `state`."""
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.labels.restore(state["latents"])
        self.step = state["step"]
