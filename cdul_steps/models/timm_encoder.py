"""A timm network as what the engines run: from uint8 images to pooled features, or to logits."""

from collections.abc import Callable
from functools import partial

import torch
from PIL import Image
from torch import Tensor

from cdul_steps.errors import UserError
from cdul_steps.models.classifier import INTERPOLATION, Card
from cdul_steps.models.encoder import ImageEncoder, Preprocess

TOGETHER = 8
"""Images that a worker on a CPU takes together. To hand over one at a time costs a seventh of the
rate, since the process that collects them wakes up for each, on a worker's core."""


class _Tower(torch.nn.Module):
    """A network that is called as an image tower is."""

    def __init__(self, network: torch.nn.Module, forward: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.network, self.encode_image = network, forward


class TimmEncoder(ImageEncoder):
    """A timm network whose images are squashed to its input size, in float32."""

    def __init__(
        self,
        network: torch.nn.Module,
        card: Card,
        device: torch.device,
        forward: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """`forward` takes the network's input (B, 3, H, W) to (B, D); without it, to logits."""
        network = network.to(device, memory_format=torch.channels_last).eval()
        self.network = _Tower(network, forward or network)
        size = (card.image_size, card.image_size)
        self.preprocess = Preprocess(
            partial(Image.Image.resize, size=size, resample=INTERPOLATION[card.interpolation]),
            size,
            tuple(card.mean),
            tuple(card.std),
        )
        self.dtype, self.device = torch.float32, device


def pooled_features(network: torch.nn.Module) -> Callable[[Tensor], Tensor]:
    """A function from a timm network's input (B, 3, H, W) to what its last layer takes, (B, D).

    Raises UserError if the last layer is not a single linear one, which a head that was learnt
    on such features could not take the place of.
    """
    head = network.get_classifier()
    if not isinstance(head, torch.nn.Linear):
        raise UserError(
            f"training: {network.pretrained_cfg.get('architecture')} does not end in a linear "
            "layer, so its trunk cannot be frozen; use 'trunk: trained' or another model"
        )

    def forward(images: Tensor) -> Tensor:
        return network.forward_head(network.forward_features(images), pre_logits=True)

    return forward
