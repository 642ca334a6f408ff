"""Boxes of second views: the regions in which a classifier sees a class."""

import numpy as np
import torch
from torch import Tensor


def map_boxes(maps: Tensor, threshold: float, margin: float) -> Tensor:
    """The box around the strong cells of each map: (..., h, w) to float32 (..., 4).

    A cell is strong if it is at least `min + threshold * (max - min)` of its map. The box is
    extended by `margin` of its width to the left and right and of its height above and below, and
    clipped at the border. Returns `x0, y0, x1, y1` as shares of the image's width and height; a
    constant map gives the whole image.
    """
    low, high = maps.amin((-2, -1), keepdim=True), maps.amax((-2, -1), keepdim=True)
    strong = maps >= low + threshold * (high - low)
    x0, x1 = _ends(strong.any(-2))
    y0, y1 = _ends(strong.any(-1))
    x, y = margin * (x1 - x0), margin * (y1 - y0)
    return torch.stack([x0 - x, y0 - y, x1 + x, y1 + y], dim=-1).clamp(0, 1)


def _ends(strong: Tensor) -> tuple[Tensor, Tensor]:
    """The start and end of the strong cells in a line (..., n), as shares of the line."""
    cells = strong.shape[-1]
    first = strong.float().argmax(-1)
    last = cells - strong.flip(-1).float().argmax(-1)
    return first / cells, last / cells


def to_pixels(boxes: np.ndarray, width: int, height: int) -> np.ndarray:
    """Convert boxes in shares of an image to the pixels that they touch.

    `boxes` float (..., 4) are `x0, y0, x1, y1` in 0..1. Returns int32 (..., 4), half open, at least
    one pixel wide and high.
    """
    size = np.array([width, height])
    # Rounding must not extend a share of whole pixels by a pixel.
    start = np.floor(boxes[..., :2] * size + 1e-3)
    end = np.ceil(boxes[..., 2:] * size - 1e-3)
    end = np.maximum(end, start + 1)
    return np.concatenate([np.minimum(start, size - 1), np.minimum(end, size)], -1).astype(np.int32)
