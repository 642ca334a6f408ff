"""Class activation maps: where in an image a classifier sees a class."""

from collections.abc import Sequence

import numpy as np
import torch
from captum.attr import LayerGradCam
from torch import Tensor, nn
from torch.nn.functional import interpolate


class Parted(nn.Module):
    """A timm network whose features, between its body and its head, are a layer of their own."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.features = network, nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, C) of images (B, 3, H, W)."""
        return self.network.forward_head(self.features(self.network.forward_features(images)))


def has_map(network: nn.Module, images: Tensor) -> bool:
    """Whether the features of images (B, 3, H, W) are a map (B, K, h, w) of more than a point.

    Those of a transformer are tokens (B, N, K), or a map with its channels last, which Grad-CAM
    would misread.
    """
    with torch.no_grad():
        shape: tuple[int, ...] = getattr(network.forward_features(images), "shape", ())
    return len(shape) == 4 and shape[1] == network.num_features and min(shape[2:]) > 1


def class_maps(network: nn.Module, images: Tensor, classes: Sequence[int]) -> np.ndarray:
    """Grad-CAM (Selvaraju et al., 2017) of one class an image, by Captum.

    For a head of a mean and a linear layer this is the class activation map itself (Zhou et al.,
    2016). `images` are float32 (B, 3, H, W) as the network takes them, `classes` B indices.
    Returns float32 (B, H, W) in 0..1, each map divided by its maximum (all 0 where nothing speaks
    for the class). Raises ValueError for a network without a map of features.
    """
    if not has_map(network, images[:1]):
        raise ValueError("the network has no map of features")
    parted = Parted(network)
    maps = LayerGradCam(parted, parted.features).attribute(
        images, torch.tensor(list(classes)), relu_attributions=True
    )
    maps = interpolate(maps.detach(), images.shape[2:], mode="bilinear")[:, 0].float()
    return (maps / maps.amax(dim=(1, 2), keepdim=True).clamp(min=1e-12)).cpu().numpy()
