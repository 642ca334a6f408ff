import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from messages import message_of

from cdul_steps.data import tables
from cdul_steps.data.tables import (
    KEY,
    SCHEMA_VERSION,
    describe,
    read_facts,
    read_scores,
    read_table,
    score_table,
    to_bytes,
    write_scores,
    write_table,
)

CLASSES = ["dog", "cat", "naïve café"]


def scored(scores, classes=CLASSES):
    ids = pa.array([f"image{i}" for i in range(len(scores))])
    paths = pa.array([f"/images/{i}.jpg" for i in range(len(scores))])
    return score_table(ids, paths, classes, np.asarray(scores))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "table.parquet"


def test_the_same_table_gives_the_same_bytes(path):
    table = describe(scored(np.arange(12).reshape(4, 3) / 12), "scores", classes=CLASSES)
    assert to_bytes(table) == to_bytes(table)
    write_table(table, path)
    assert path.read_bytes() == to_bytes(table)
    assert to_bytes(pq.read_table(path)) == to_bytes(table)


def test_facts_round_trip(path):
    facts = {"classes": CLASSES, "tau": 0.01, "none": None, "nested": {"a": [1, 2]}}
    write_table(describe(scored(np.ones((2, 3))), "scores", **facts), path)
    expected = {"kind": "scores", "schema_version": SCHEMA_VERSION, **facts}
    assert read_facts(path) == expected
    # Any Parquet reader finds them, as readable JSON.
    text = pq.read_schema(path).metadata[KEY].decode()
    assert json.loads(text) == expected
    assert "naïve café" in text


@pytest.mark.parametrize("together", [2, 5])
def test_scores_are_written_a_row_group_at_a_time(path, monkeypatch, together):
    monkeypatch.setattr(tables, "_ROW_GROUP", together)
    table = scored(np.arange(15).reshape(5, 3) / 15)
    corrected = pa.array([[], ["dog"], [], [], ["cat"]], pa.list_(pa.string()))
    images = table.select(["image_id", "path"]).append_column("corrected", corrected)
    values = np.stack([table[name] for name in CLASSES], axis=1)
    write_scores(images, CLASSES, values, path, tau=0.01)
    assert pq.read_metadata(path).num_row_groups == (3 if together == 2 else 1)
    expected = table.append_column("corrected", corrected)
    assert pq.read_table(path).replace_schema_metadata(None) == expected
    if together == 5:
        whole = describe(expected, "scores", classes=CLASSES, tau=0.01)
        assert path.read_bytes() == to_bytes(whole)


def test_describe_keeps_other_metadata():
    table = pa.table({"a": [1]}).replace_schema_metadata({"other": "kept"})
    assert describe(table, "kind").schema.metadata[b"other"] == b"kept"


@pytest.mark.parametrize("version", [SCHEMA_VERSION + 1, SCHEMA_VERSION - 1, "new", None])
def test_another_schema_is_refused(path, version):
    table = pa.table({"image_id": ["a"]})
    other = json.dumps({"schema_version": version}).encode()
    write_table(table.replace_schema_metadata({KEY: other}), path)
    for function in (read_facts, read_scores, lambda p: read_table(p, ["image_id"])):
        message = message_of(function, path)
        assert str(path) in message
        assert f"another version of this software (schema {version!r}" in message
        assert "run 'cdul run'" in message


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", '{"classes": 5}', '{"classes": [1]}'])
def test_metadata_that_is_no_mapping(path, text):
    write_table(pa.table({"image_id": ["a"]}).replace_schema_metadata({KEY: text}), path)
    message = message_of(read_facts, path)
    assert str(path) in message and "metadata" in message


@pytest.mark.parametrize(
    ("column", "values"), [("row", ["one"]), ("image_id", [[1]]), ("row", [None]), ("row", [0.5])]
)
def test_a_column_that_holds_something_else(path, column, values):
    write_table(pa.table({column: values}), path)
    message = message_of(read_table, path, [column])
    start = f"{path}: column {column!r} "
    assert message.startswith((f"{start}contains ", f"{start}has blanks"))


def test_columns_of_other_software_get_our_types(path):
    ids = pa.array(["a", "b"], pa.large_string()).dictionary_encode()
    write_table(pa.table({"image_id": ids, "row": pa.array([0, 1], pa.uint8())}), path)
    table = read_table(path, ["image_id", "row"])
    assert table.schema.types == [pa.string(), pa.int64()]


def test_damage_behind_a_whole_footer(path):
    write_table(scored(np.random.default_rng(0).random((1000, 3))), path)
    data = bytearray(path.read_bytes())
    data[100:3000] = bytes(2900)
    path.write_bytes(data)
    assert f"{path}: corrupt" in message_of(read_scores, path)


def test_a_missing_column_is_named_with_those_there(path):
    write_table(pa.table({"image_id": ["a"], "row": [0]}), path)
    message = message_of(read_table, path, ["image_id", "split"])
    assert message == f"{path}: no column 'split'; it has image_id, row"


def test_optional_columns_may_be_absent(path):
    write_table(pa.table({"b": [1], "a": [2], "c": [3]}), path)
    assert read_table(path, ["a"], ["x", "b"]).column_names == ["a", "b"]


def test_a_file_that_is_no_table(path, tmp_path):
    assert "no such file" in message_of(read_facts, path)
    path.write_text("image_id,path\n")
    assert f"{path}: not a readable Parquet file" in message_of(read_facts, path)
    write_table(scored(np.ones((100, 3))), path)
    path.write_bytes(path.read_bytes()[:-10])
    assert f"{path}: not a readable Parquet file" in message_of(read_facts, path)
    assert str(tmp_path) in message_of(read_facts, tmp_path)


def test_scores_are_one_float32_column_a_class(path):
    scores = np.random.default_rng(0).random((4, 3))
    write_table(scored(scores), path)
    schema = pq.read_schema(path)
    assert schema.names == ["image_id", "path", *CLASSES]
    assert [schema.field(name).type for name in CLASSES] == [pa.float32()] * 3
    table, classes, found = read_scores(path)
    assert classes == CLASSES
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, scores.astype(np.float32))
    assert table.column_names == ["image_id", "path"]


def test_rows_without_scores_are_left_out(path):
    scores = np.ones((4, 3))
    scores[1, 2], scores[3] = np.nan, np.inf
    write_table(describe(scored(scores), "scores", classes=CLASSES), path)
    table, _, found = read_scores(path)
    assert table["image_id"].to_pylist() == ["image0", "image2"]
    assert found.shape == (2, 3)


def test_classes_in_another_order_than_the_facts_say(path):
    write_table(describe(scored(np.ones((1, 3))), "scores", classes=CLASSES[::-1]), path)
    message = message_of(read_scores, path)
    assert str(path) in message
    assert "dog, cat" in message and "café, cat" in message


def test_a_class_without_column(path):
    write_table(describe(scored(np.ones((1, 3))), "scores", classes=[*CLASSES, "owl"]), path)
    assert "owl" in message_of(read_scores, path)


def test_columns_beyond_the_classes_are_ignored(path):
    table = scored(np.ones((2, 3))).append_column("note", pa.array(["x", "y"]))
    write_table(describe(table, "scores", classes=CLASSES), path)
    _, classes, found = read_scores(path)
    assert classes == CLASSES
    assert found.shape == (2, 3)


def test_a_table_from_elsewhere(path):
    columns = {"dog": [1, 0], "image_id": ["a", "b"], "cat": [0.25, None]}
    write_table(pa.table(columns), path)
    table, classes, found = read_scores(path)
    assert classes == ["dog", "cat"]
    assert found.tolist() == [[1.0, 0.25]]
    assert table["image_id"].to_pylist() == ["a"]


def test_a_class_column_of_text(path):
    write_table(pa.table({"image_id": ["a"], "dog": ["yes"]}), path)
    assert f"{path}: a class column does not contain numbers" in message_of(read_scores, path)


def test_a_table_without_classes(path):
    write_table(pa.table({"image_id": ["a"], "path": ["a.jpg"]}), path)
    assert str(path) in message_of(read_scores, path)
