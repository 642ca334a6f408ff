"""Class activation maps: the regions of an image in which a classifier sees a class."""

from collections.abc import Sequence

import numpy as np
import torch
from captum.attr import LayerGradCam
from torch import Tensor, nn
from torch.nn.functional import interpolate


class _Head(nn.Module):
    """The head of a timm network, with its input features as a separate layer."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.features = network, nn.Identity()

    def forward(self, features: Tensor) -> Tensor:
        return self.network.forward_head(self.features(features))


def map_shape(network: nn.Module, images: Tensor) -> torch.Size | None:
    """The shape (K, h, w) of an image's map of features, for images (B, 3, H, W).

    None if the features are no map of more than one cell: a transformer's are tokens (B, N, K), or
    a map with channels last, which Grad-CAM would misread.
    """
    with torch.no_grad():
        features = network.forward_features(images)
    return features.shape[1:] if _is_map(network, features) else None


def _is_map(network: nn.Module, features: object) -> bool:
    shape: tuple[int, ...] = getattr(features, "shape", ())
    return len(shape) == 4 and shape[1] == network.num_features and min(shape[2:]) > 1


def activation_maps(network: nn.Module, features: Tensor, class_indices: Tensor) -> Tensor:
    """Grad-CAM (Selvaraju et al., 2017) before its ReLU, by Captum.

    For a head with a mean and a linear layer this is the class activation map itself, up to a
    factor (Zhou et al., 2016). `features` (B, D, h, w) are the network's, `class_indices` is
    int (B, K). Returns (B, K, h, w).
    """
    head = _Head(network)
    cam = LayerGradCam(head, head.features)
    maps = [cam.attribute(features, of_image) for of_image in class_indices.unbind(1)]
    return torch.cat(maps, dim=1).detach()


def class_maps(network: nn.Module, image: Tensor, class_indices: Sequence[int]) -> np.ndarray:
    """Where an image shows some classes: `activation_maps`, enlarged and made comparable.

    `image` is the network's input, float32 (1, 3, H, W); `class_indices` has K entries. Returns
    float32 (K, H, W) in 0..1, each map divided by its maximum (all 0 without evidence for the
    class). Raises ValueError for a network without a feature map.
    """
    with torch.no_grad():
        features = network.forward_features(image)
    if not _is_map(network, features):
        raise ValueError("the network has no feature map")
    maps = activation_maps(network, features, torch.tensor([list(class_indices)])).clamp(min=0)
    maps = interpolate(maps, image.shape[2:], mode="bilinear")[0].float()
    return (maps / maps.amax(dim=(1, 2), keepdim=True).clamp(min=1e-12)).cpu().numpy()
