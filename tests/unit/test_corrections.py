"""Corrections are read from CSV, applied to labels, and kept during training."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from messages import message_of

from cdul_steps.data.corrections import (
    UNKNOWN,
    apply_corrections,
    corrected_entries,
    read_corrections,
    write_corrections,
)

IDS, CLASSES = ["a", "b/c.jpg", "d"], ["dog", "cat, big"]
ENTRIES = st.tuples(st.sampled_from(IDS), st.sampled_from(CLASSES))
CORRECTIONS = st.dictionaries(ENTRIES, st.sampled_from([0.0, 1.0, UNKNOWN]))


@given(CORRECTIONS)
def test_a_file_holds_what_was_written(tmp_path_factory, corrections):
    path = tmp_path_factory.mktemp("corrections") / "c.csv"
    write_corrections(path, corrections)
    assert read_corrections(path) == corrections


@given(CORRECTIONS)
def test_only_corrected_entries_change(corrections):
    before = np.random.default_rng(0).random((3, 2)).astype(np.float32)
    labels = before.copy()
    column = apply_corrections(labels, IDS, CLASSES, corrections, Path("c.csv"))
    mask = corrected_entries(pa.table({"corrected": column}), CLASSES)
    assert mask.sum() == len(corrections)
    assert np.array_equal(labels[~mask], before[~mask])
    for (image_id, name), value in corrections.items():
        place = IDS.index(image_id), CLASSES.index(name)
        assert mask[place] and labels[place] == value


def test_a_table_without_corrections_has_none():
    assert not corrected_entries(pa.table({"image_id": IDS}), CLASSES).any()


def test_other_columns_and_blank_values_are_ignored(tmp_path):
    path = tmp_path / "c.csv"
    path.write_text("\ufeffvalue,image_id,score,class\n 1 ,a,0.3,dog\n,a,,cat\nUnknown,d,,dog\n")
    assert read_corrections(path) == {("a", "dog"): 1.0, ("d", "dog"): UNKNOWN}


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("image_id,class\na,dog\n", ["c.csv: no column 'value'"]),
        ("", ["no column 'image_id'"]),
        ("image_id,class,value\na,dog,1\na,dog,yes\n", ["line 3", "'yes'", "1, 0 or unknown"]),
        ("image_id,class,value\na,dog,1\na,dog,0\n", ["line 3", "'dog' of image 'a'"]),
        ('image_id,class,value\n"a,dog,1\n', ["cannot be read"]),
        (b"image_id,class,value\n\xff,dog,1\n", ["c.csv: not in UTF-8; save it as CSV in UTF-8"]),
    ],
)
def test_mistakes_in_the_file_are_one_line(tmp_path, text, parts):
    path = tmp_path / "c.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    message = message_of(read_corrections, path)
    assert all(part in message for part in parts), message


def test_a_file_that_is_not_there(tmp_path):
    assert "No such file" in message_of(read_corrections, tmp_path / "none.csv")


@pytest.mark.parametrize(
    ("entry", "part"),
    [
        (("z", "dog"), "'z', which is not one of the 3 labelled images"),
        (("a", "owl"), "'owl' of 'a', which is not one of the classes; they are dog, cat, big"),
    ],
)
def test_an_entry_that_is_not_there(entry, part):
    labels = np.zeros((3, 2), np.float32)
    message = message_of(apply_corrections, labels, IDS, CLASSES, {entry: 1.0}, Path("c.csv"))
    assert message.startswith("c.csv: corrects ") and part in message
