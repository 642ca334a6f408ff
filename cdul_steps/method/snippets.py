"""Views of an image: the whole image and its snippets."""

from collections.abc import Sequence
from typing import Any

import numpy as np

Grid = tuple[int, int]


def as_grids(grid: Grid | Sequence[Grid]) -> list[Grid]:
    """One or several grids, `(rows, columns)`, as a list of grids."""
    grids: Any = [grid] if isinstance(grid[0], int) else grid
    return [(rows, columns) for rows, columns in grids]


def _spans(length: int, count: int, overlap: float) -> tuple[np.ndarray, np.ndarray]:
    """Starts and ends of `count` equal spans over `length` pixels, as integers.

    Spans of side `s` start at multiples of `(1 - overlap) * s`, and the last ends at `length`:
    `s = length / (count - (count - 1) * overlap)`.
    """
    index = np.arange(count)
    sides = count - (count - 1) * overlap
    # Far above the rounding error of doubles for any image size, far below the size of a pixel.
    start = np.floor(index * (1 - overlap) * length / sides + 1e-6).astype(np.int64)
    end = np.floor((index * (1 - overlap) + 1) * length / sides + 1e-6).astype(np.int64)
    return start, np.maximum(end, start + 1)


def view_boxes(
    width: int, height: int, grid: Grid | Sequence[Grid] = (3, 3), overlap: float = 0.0
) -> np.ndarray:
    """Cut an image of `width` x `height` pixels into its views.

    Returns int32 of shape (1 + S, 4): `x0, y0, x1, y1` in pixels, half open. View 0 is the whole
    image, the others are the snippets row by row (CDUL, section 3.1), one `grid` of (rows, columns)
    after the other. `overlap` (0 <= overlap < 1) is the share of a snippet's side that it shares
    with the next. Without it, corners are at `column * width // columns`, so the snippets of a grid
    tile the image; with it, they cover the image. No pixel is lost. If the image has fewer pixels
    than the grid has cells, snippets of one pixel overlap.
    Raises ValueError for a size or a grid below 1, or an overlap outside 0..1.
    """
    grids = as_grids(grid)
    if min(width, height, *(side for one in grids for side in one)) < 1:
        raise ValueError(f"an image of {width} x {height} has no snippets by {grids}")
    if not 0 <= overlap < 1:
        raise ValueError(f"snippets cannot overlap by {overlap:g} of their side")
    boxes = [np.array([[0, 0, width, height]])]
    for rows, columns in grids:
        left, right = _spans(width, columns, overlap)
        top, bottom = _spans(height, rows, overlap)
        x0, y0 = np.meshgrid(left, top)
        x1, y1 = np.meshgrid(right, bottom)
        boxes.append(np.stack([x0, y0, x1, y1], axis=-1).reshape(-1, 4))
    return np.concatenate(boxes).astype(np.int32)


def view_cells(
    rows: int, columns: int, grid: Grid | Sequence[Grid] = (3, 3), overlap: float = 0.0
) -> np.ndarray:
    """The share of each view of an image that is in each cell of a feature map.

    The cells of the map, `rows` x `columns`, tile the image; the views are those of `view_boxes`,
    but not rounded to pixels. Returns float32 (1 + S, rows * columns) whose rows sum to 1: the
    matrix product with a map's cells gives each view's mean over the area that it covers. Raises
    ValueError as `view_boxes` does.
    """
    # In an image of this size, rounding views to whole pixels is negligible.
    fine = 1 << 20
    x0, y0, x1, y1 = view_boxes(fine, fine, grid, overlap).T.astype(np.float64) / fine

    def covered(low: np.ndarray, high: np.ndarray, count: int) -> np.ndarray:
        edges = np.arange(count + 1) / count
        inside = np.minimum(high[:, None], edges[1:]) - np.maximum(low[:, None], edges[:-1])
        return np.maximum(inside, 0) / (high - low)[:, None]

    shares = covered(y0, y1, rows)[:, :, None] * covered(x0, x1, columns)[:, None, :]
    return shares.reshape(len(x0), -1).astype(np.float32)


def grid_views(grids: Sequence[Grid], chosen: Grid) -> np.ndarray:
    """The views of an image that a single grid uses: 0, the whole image, and its own snippets.

    Returns int64 (1 + rows * columns,). Raises ValueError if `chosen` is not one of `grids`.
    """
    place = as_grids(grids).index((chosen[0], chosen[1]))
    first = 1 + sum(rows * columns for rows, columns in grids[:place])
    return np.concatenate([[0], first + np.arange(chosen[0] * chosen[1])])
