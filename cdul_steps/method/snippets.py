"""Views of an image: the whole and its snippets."""

import numpy as np


def view_boxes(width: int, height: int, rows: int = 3, columns: int = 3) -> np.ndarray:
    """Cut an image of `width` x `height` pixels into its views.

    Returns int32 of shape (1 + rows * columns, 4): `x0, y0, x1, y1` in pixels, half open.
    View 0 is the whole image, the others are the snippets row by row (CDUL, section 3.1). Snippet
    corners are `column * width // columns`, so the snippets tile the image and no pixel is lost.
    Where the image has fewer pixels than the grid has cells, snippets of one pixel overlap.
    Raises ValueError for a size or a grid below 1.
    """
    if min(width, height, rows, columns) < 1:
        raise ValueError(f"an image of {width} x {height} has no {rows} x {columns} grid")
    x = np.arange(columns + 1) * width // columns
    y = np.arange(rows + 1) * height // rows
    y0, x0 = (a.ravel() for a in np.meshgrid(y[:-1], x[:-1], indexing="ij"))
    y1, x1 = (a.ravel() for a in np.meshgrid(y[1:], x[1:], indexing="ij"))
    snippets = np.stack([x0, y0, np.maximum(x1, x0 + 1), np.maximum(y1, y0 + 1)], axis=1)
    return np.concatenate([[[0, 0, width, height]], snippets]).astype(np.int32)
