import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdul_steps.method.snippets import view_boxes

sizes = st.integers(1, 60)
grids = st.integers(1, 8)


def test_three_by_three_row_by_row():
    assert view_boxes(500, 375).tolist() == [
        [0, 0, 500, 375],
        [0, 0, 166, 125],
        [166, 0, 333, 125],
        [333, 0, 500, 125],
        [0, 125, 166, 250],
        [166, 125, 333, 250],
        [333, 125, 500, 250],
        [0, 250, 166, 375],
        [166, 250, 333, 375],
        [333, 250, 500, 375],
    ]


@given(sizes, sizes, grids, grids)
def test_equals_the_formula(width, height, rows, columns):
    expected = [(0, 0, width, height)]
    for r in range(rows):
        for c in range(columns):
            x0, y0 = c * width // columns, r * height // rows
            x1, y1 = (c + 1) * width // columns, (r + 1) * height // rows
            expected.append((x0, y0, max(x1, x0 + 1), max(y1, y0 + 1)))
    boxes = view_boxes(width, height, rows, columns)
    assert boxes.dtype == np.int32
    assert [tuple(box) for box in boxes.tolist()] == expected


@given(sizes, sizes, grids, grids)
def test_boxes_are_inside_and_not_empty(width, height, rows, columns):
    x0, y0, x1, y1 = view_boxes(width, height, rows, columns).T
    assert (x0 >= 0).all() and (x0 < x1).all() and (x1 <= width).all()
    assert (y0 >= 0).all() and (y0 < y1).all() and (y1 <= height).all()


@given(st.data(), grids, grids)
def test_snippets_tile_a_large_enough_image(data, rows, columns):
    width, height = data.draw(st.integers(columns, 60)), data.draw(st.integers(rows, 60))
    times_covered = np.zeros((height, width), int)
    for x0, y0, x1, y1 in view_boxes(width, height, rows, columns)[1:]:
        times_covered[y0:y1, x0:x1] += 1
    assert (times_covered == 1).all()


def test_large_sizes_do_not_overflow():
    assert view_boxes(2**30, 2**30, 8, 8)[-1].tolist() == [7 * 2**27, 7 * 2**27, 2**30, 2**30]


@pytest.mark.parametrize("arguments", [(0, 5), (5, 0), (-1, 5), (5, 5, 0, 3), (5, 5, 3, 0)])
def test_no_pixels_or_no_cells(arguments):
    with pytest.raises(ValueError, match="has no"):
        view_boxes(*arguments)
