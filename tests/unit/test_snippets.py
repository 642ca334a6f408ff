from fractions import Fraction
from math import floor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdul_steps.method.snippets import as_grids, grid_views, view_boxes

sizes = st.integers(1, 60)
sides = st.integers(1, 8)
grids = st.tuples(sides, sides)
overlaps = st.sampled_from([0.0, 0.1, 0.25, 1 / 3, 0.5, 0.9])


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


def test_half_overlapping_snippets():
    # Three with sides of 200 pixels; each begins at the middle of the previous one.
    boxes = view_boxes(400, 400, (1, 3), 0.5)
    assert boxes[1:].tolist() == [[0, 0, 200, 400], [100, 0, 300, 400], [200, 0, 400, 400]]


@given(sizes, sizes, grids)
def test_equals_the_formula(width, height, grid):
    rows, columns = grid
    expected = [(0, 0, width, height)]
    for r in range(rows):
        for c in range(columns):
            x0, y0 = c * width // columns, r * height // rows
            x1, y1 = (c + 1) * width // columns, (r + 1) * height // rows
            expected.append((x0, y0, max(x1, x0 + 1), max(y1, y0 + 1)))
    boxes = view_boxes(width, height, grid)
    assert boxes.dtype == np.int32
    assert [tuple(box) for box in boxes.tolist()] == expected


@given(st.integers(1, 2**30), sides, overlaps)
def test_overlapping_spans_equal_the_formula_in_fractions(width, columns, overlap):
    share = Fraction(overlap).limit_denominator(100)
    side = width / (columns - (columns - 1) * share)
    boxes = view_boxes(width, 1, (1, columns), overlap)[1:]
    for c, (x0, _, x1, _) in enumerate(boxes.tolist()):
        start = floor(c * (1 - share) * side)
        assert (x0, x1) == (start, max(start + 1, floor((c * (1 - share) + 1) * side)))


@given(sizes, sizes, st.lists(grids, min_size=1, max_size=3), overlaps)
def test_boxes_are_inside_and_not_empty(width, height, several, overlap):
    x0, y0, x1, y1 = view_boxes(width, height, several, overlap).T
    assert (x0 >= 0).all() and (x0 < x1).all() and (x1 <= width).all()
    assert (y0 >= 0).all() and (y0 < y1).all() and (y1 <= height).all()


def times_covered(width, height, boxes):
    count = np.zeros((height, width), int)
    for x0, y0, x1, y1 in boxes:
        count[y0:y1, x0:x1] += 1
    return count


@given(sizes, sizes, grids, overlaps)
def test_every_pixel_is_in_a_snippet(width, height, grid, overlap):
    assert times_covered(width, height, view_boxes(width, height, grid, overlap)[1:]).min() >= 1


@given(st.data(), grids)
def test_snippets_tile_a_large_enough_image(data, grid):
    width, height = data.draw(st.integers(grid[1], 60)), data.draw(st.integers(grid[0], 60))
    assert (times_covered(width, height, view_boxes(width, height, grid)[1:]) == 1).all()


@given(sizes, sizes, st.lists(grids, min_size=1, max_size=3), overlaps)
def test_several_grids_come_one_after_the_other_and_can_be_told_apart(
    width, height, several, overlap
):
    together = view_boxes(width, height, several, overlap)
    alone = [view_boxes(width, height, grid, overlap) for grid in several]
    np.testing.assert_array_equal(
        together, np.concatenate([alone[0], *(boxes[1:] for boxes in alone[1:])])
    )
    for grid, boxes in zip(several, alone, strict=True):
        np.testing.assert_array_equal(together[grid_views(several, grid)], boxes)


def test_a_grid_that_is_not_there():
    with pytest.raises(ValueError):
        grid_views([(2, 2), (3, 3)], (2, 3))


def test_one_grid_or_several():
    assert as_grids((2, 3)) == as_grids([2, 3]) == as_grids([[2, 3]]) == [(2, 3)]
    assert as_grids([[2, 2], (3, 3)]) == [(2, 2), (3, 3)]


def test_large_sizes_do_not_overflow():
    assert view_boxes(2**30, 2**30, (8, 8))[-1].tolist() == [7 * 2**27, 7 * 2**27, 2**30, 2**30]


@pytest.mark.parametrize(
    "arguments",
    [(0, 5), (5, 0), (-1, 5), (5, 5, (0, 3)), (5, 5, (3, 0)), (5, 5, [(3, 3), (0, 1)])],
)
def test_no_pixels_or_no_cells(arguments):
    with pytest.raises(ValueError, match="has no"):
        view_boxes(*arguments)


@pytest.mark.parametrize("overlap", [-0.1, 1, float("nan")])
def test_an_overlap_that_cannot_be(overlap):
    with pytest.raises(ValueError, match="cannot overlap"):
        view_boxes(5, 5, (3, 3), overlap)
