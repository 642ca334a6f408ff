"""A timm network in the form that the engines run: uint8 images to pooled features or logits."""

from collections.abc import Callable
from functools import partial

import torch
from PIL import Image
from torch import Tensor

from cdul_steps.errors import UserError
from cdul_steps.models.classifier import INTERPOLATION, Card
from cdul_steps.models.encoder import ImageEncoder, Preprocess

TOGETHER = 8
"""Images that a CPU worker processes together. Handing over one at a time is a seventh slower,
because the collecting process wakes up for each one, on a worker's core."""


class _Tower(torch.nn.Module):
    """A network with the interface of an image tower."""

    def __init__(self, network: torch.nn.Module, forward: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.network, self.encode_image = network, forward


class TimmEncoder(ImageEncoder):
    """A timm network in float32; images are squashed to its input size."""

    def __init__(
        self,
        network: torch.nn.Module,
        card: Card,
        device: torch.device,
        forward: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """`forward` maps the network's input (B, 3, H, W) to (B, D); by default, to logits."""
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
    """A function from a timm network's input (B, 3, H, W) to the input of its last layer, (B, D).

    Raises UserError if the last layer is not a single linear one, because a head trained on such
    features could not replace it.
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
