import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score

from cdul_steps.method.metrics import (
    average_precision,
    average_precision_voc07,
    is_top_k,
    mean_average_precision,
    precision_recall_f1,
    truth_table,
)


@st.composite
def ranked(draw):
    """Truth with a positive, and scores with few distinct values, so that ties are common."""
    size = draw(st.integers(1, 40))
    truth = draw(st.lists(st.booleans(), min_size=size, max_size=size).filter(any))
    scores = draw(st.lists(st.integers(0, 12), min_size=size, max_size=size))
    return np.array(truth), np.array(scores) / 12


@st.composite
def tables(draw):
    """Truth, counted entries, predictions: three bool tables of one shape."""
    rows, classes = draw(st.integers(0, 6)), draw(st.integers(1, 4))
    bits = draw(st.lists(st.booleans(), min_size=3 * rows * classes, max_size=3 * rows * classes))
    return tuple(np.array(bits, bool).reshape(3, rows, classes))


def curve(truth, scores):
    """Hits and predictions at each distinct score, in decreasing order."""
    for threshold in sorted(set(scores.tolist()), reverse=True):
        said = scores >= threshold
        yield int((said & truth).sum()), int(said.sum())


@given(ranked())
def test_average_precision_equals_the_formula(example):
    truth, scores = example
    expected, earlier = 0.0, 0
    for hits, said in curve(truth, scores):
        expected += (hits - earlier) / truth.sum() * hits / said
        earlier = hits
    assert average_precision(truth, scores) == pytest.approx(expected)
    library = average_precision_score(truth, scores)
    assert average_precision(truth, scores) == pytest.approx(library, rel=1e-12)


@given(st.integers(1, 300), st.integers(1, 1000), st.integers(0, 2**31))
def test_average_precision_equals_scikit_learn_with_and_without_ties(size, values, seed):
    random = np.random.default_rng(seed)
    truth = random.random(size) < random.random()
    truth[random.integers(size)] = True
    scores = (random.integers(values, size=size) / values).astype(np.float32)
    library = average_precision_score(truth, scores)
    assert average_precision(truth, scores) == pytest.approx(library, rel=1e-12)


@given(ranked())
def test_voc07_equals_the_formula(example):
    truth, scores = example
    points = list(curve(truth, scores))
    expected = [
        max(hits / said for hits, said in points if 10 * hits >= tenth * truth.sum())
        for tenth in range(11)
    ]
    assert average_precision_voc07(truth, scores) == pytest.approx(sum(expected) / 11)


def test_voc07_by_hand():
    truth = np.array([False, True, False, True])
    scores = np.array([0.9, 0.8, 0.7, 0.6])
    assert average_precision(truth, scores) == pytest.approx(0.5)
    # The best precision at any recall is 1/2: a wrong first place counts even at recall 0.
    assert average_precision_voc07(truth, scores) == pytest.approx(0.5)
    assert average_precision_voc07(truth, -scores) == pytest.approx((6 * 1 + 5 * 2 / 3) / 11)


@pytest.mark.parametrize("function", [average_precision, average_precision_voc07])
def test_a_perfect_order_has_one_and_a_constant_the_share_of_positives(function):
    truth = np.array([True, False, True, False, False])
    assert function(truth, truth.astype(float)) == pytest.approx(1)
    assert function(truth, np.full(5, 0.3)) == pytest.approx(2 / 5)


def test_map_leaves_out_classes_without_positives_and_entries_that_do_not_count():
    rng = np.random.default_rng(0)
    truth, counted = rng.random((30, 4)) < 0.4, rng.random((30, 4)) < 0.8
    scores = rng.random((30, 4))
    truth[:, 1] = False
    counted[truth[:, 3], 3] = False  # its positives are all difficult
    expected = [
        average_precision_score(truth[counted[:, c], c], scores[counted[:, c], c]) for c in (0, 2)
    ]
    value = mean_average_precision(truth, counted, scores)
    assert value == pytest.approx(100 * sum(expected) / 2)
    assert mean_average_precision(truth[:, [1]], counted[:, [1]], scores[:, [1]]) is None


def share(part, whole):
    return part / whole if whole else 0.0


@given(tables())
def test_precision_recall_f1_equal_the_formulas(example):
    truth, counted, predicted = example
    rows, classes = truth.shape
    hit, said, there = [0] * classes, [0] * classes, [0] * classes
    for i in range(rows):
        for c in range(classes):
            if counted[i, c]:
                hit[c] += truth[i, c] and predicted[i, c]
                said[c] += predicted[i, c]
                there[c] += truth[i, c]
    has = [c for c in range(classes) if there[c]]
    cp = share(sum(share(hit[c], said[c]) for c in has), len(has))
    cr = share(sum(share(hit[c], there[c]) for c in has), len(has))
    op = share(sum(hit), sum(said))
    or_ = share(sum(hit), sum(there))
    expected = {
        "CP": cp,
        "CR": cr,
        "CF1": share(2 * cp * cr, cp + cr),
        "OP": op,
        "OR": or_,
        "OF1": share(2 * op * or_, op + or_),
    }
    result = precision_recall_f1(truth, counted, predicted)
    if not has:
        assert result == dict.fromkeys(expected)
        return
    assert result == pytest.approx(expected)
    assert all(type(value) is float for value in result.values())


def test_class_means_leave_out_classes_without_positives():
    truth = np.array([[True, False, True], [False, False, True]])
    predicted = np.array([[True, True, False], [False, True, True]])
    result = precision_recall_f1(truth, np.ones_like(truth), predicted)
    expected = {"CP": 1, "CR": 0.75, "CF1": 6 / 7, "OP": 0.5, "OR": 2 / 3, "OF1": 4 / 7}
    assert result == pytest.approx(expected)


@given(st.integers(0, 5), st.integers(1, 6), st.integers(1, 8), st.randoms())
def test_top_k_equals_the_formula(rows, classes, k, random):
    scores = np.array([[random.randint(0, 3) for _ in range(classes)] for _ in range(rows)])
    scores = scores.reshape(rows, classes) / 3
    chosen = is_top_k(scores, k)
    assert chosen.shape == (rows, classes)
    for row, picked in zip(scores.tolist(), chosen.tolist(), strict=True):
        best = sorted(range(classes), key=lambda c: (-row[c], c))[:k]
        assert [c for c in range(classes) if picked[c]] == sorted(best)


@pytest.mark.parametrize(
    ("convention", "truth", "counted"),
    [
        ("ignore", [[1, 0, 0], [0, 0, 0]], [[1, 0, 1], [0, 1, 1]]),
        ("negative", [[1, 0, 0], [0, 0, 0]], [[1, 1, 1], [1, 1, 1]]),
        ("positive", [[1, 1, 0], [1, 0, 0]], [[1, 1, 1], [1, 1, 1]]),
    ],
)
def test_conventions_for_difficult_objects(convention, truth, counted):
    found = truth_table([[0], []], [[1], [0]], 3, convention)
    np.testing.assert_array_equal(found[0], np.array(truth, bool))
    np.testing.assert_array_equal(found[1], np.array(counted, bool))


@pytest.mark.parametrize("index", [3, -1])
@pytest.mark.parametrize("convention", ["ignore", "negative", "positive"])
def test_an_index_outside_the_class_table_is_an_error(index, convention):
    with pytest.raises(IndexError):
        truth_table([[index]], [[]], 3, convention)
    if convention != "negative":
        with pytest.raises(IndexError):
            truth_table([[0]], [[index]], 3, convention)
