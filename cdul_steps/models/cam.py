"""Class activation maps: where in an image a classifier sees a class."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from captum.attr import LayerGradCam
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.hooks import RemovableHandle


def feature_layer(network: torch.nn.Module, images: Tensor) -> torch.nn.Module | None:
    """The last stage of a timm network whose output is a map (B, K, h, w) larger than a point.

    `images` (B, 3, H, W) is an input to try it on. None where there is no such stage, as in a
    transformer of tokens.
    """
    modules = dict(network.named_modules())
    channels = {
        info["module"]: info["num_chs"]
        for info in getattr(network, "feature_info", None) or ()
        if info["module"] in modules
    }
    shapes: dict[str, tuple[int, ...]] = {}

    def watch(name: str) -> RemovableHandle:
        def keep(_: torch.nn.Module, __: Any, output: Any) -> None:
            shapes[name] = tuple(getattr(output, "shape", ()))

        return modules[name].register_forward_hook(keep)

    hooks = [watch(name) for name in channels]
    try:
        with torch.no_grad():
            network(images)
    finally:
        for hook in hooks:
            hook.remove()
    # Some transformers have maps of (B, h, w, K), which Grad-CAM would misread.
    maps = [
        name
        for name, shape in shapes.items()
        if len(shape) == 4 and shape[1] == channels[name] and min(shape[2:]) > 1
    ]
    return modules[maps[-1]] if maps else None


def class_maps(network: torch.nn.Module, images: Tensor, classes: Sequence[int]) -> np.ndarray:
    """Grad-CAM (Selvaraju et al., 2017) of one class an image, by Captum, on `feature_layer`.

    `images` float32 (B, 3, H, W) as the network takes them, `classes` B indices. Returns float32
    (B, H, W) in 0..1, each map divided by its maximum (all 0 where nothing speaks for the class).
    Raises ValueError for a network without a map of features.
    """
    layer = feature_layer(network, images[:1])
    if layer is None:
        raise ValueError("the network has no map of features")
    maps = LayerGradCam(network, layer).attribute(
        images, torch.tensor(list(classes)), relu_attributions=True
    )
    maps = interpolate(maps.detach(), images.shape[2:], mode="bilinear", align_corners=False)
    maps = maps[:, 0].float()
    return (maps / maps.amax(dim=(1, 2), keepdim=True).clamp(min=1e-12)).cpu().numpy()
