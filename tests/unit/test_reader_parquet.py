"""Parquet files with images, in Hugging Face's format."""

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from messages import message_of
from packed import HF_IMAGE, write_parquet
from pictures import encoded, picture

from cdul_steps.data.images import ImageError, decode
from cdul_steps.data.readers import fingerprint, read_dataset

CLASSES = ("cat", "dog", "train")
ALL = {"train": "."}
IMAGE = encoded(picture(), "JPEG")


def read(root: Path, splits=ALL, **options):
    return read_dataset("parquet", root, splits, CLASSES, **options)


def truth(root: Path, **options) -> list[tuple[int, ...] | None]:
    return [record.positive for record in read(root, **options)]


def error(root: Path, splits=ALL) -> str:
    return message_of(read, root, splits)


def test_ids_splits_and_images(tmp_path):
    images = [encoded(picture(20 + n, 10), "PNG") for n in range(5)]
    write_parquet(tmp_path / "data/train-00000-of-00001.parquet", images)
    write_parquet(tmp_path / "data/test-00000-of-00001.parquet", images[:1])
    (tmp_path / "README.md").write_text("")
    told = []
    splits = {"train": "data/train-*.parquet", "test": "data/test-{00000..00000}-of-00001.parquet"}
    records = read(tmp_path, splits, tell=told.append)
    assert [(r.split, r.image_id) for r in records] == [
        *(("train", f"data/train-00000-of-00001.parquet/{n}") for n in range(5)),
        ("test", "data/test-00000-of-00001.parquet/0"),
    ]
    assert [decode(r.path).size for r in records] == [
        (20, 10),
        *((20 + n, 10) for n in range(1, 5)),
        (20, 10),
    ]
    assert {r.positive for r in records} == {None}
    assert told == [f"{tmp_path}: left out 1 file not ending in .parquet: .md (1)"]


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
@pytest.mark.parametrize("name", ["image", "Jpg", "anything"])
def test_plain_bytes(tmp_path, kind, name):
    pq.write_table(pa.table({name: pa.array([IMAGE, IMAGE], kind)}), tmp_path / "x.parquet")
    assert [decode(r.path).size for r in read(tmp_path)] == [(48, 32)] * 2


def test_the_column_of_images_among_others(tmp_path):
    columns = {
        "mask": pa.array([{"bytes": b"x", "path": None}], HF_IMAGE),
        "thumb": pa.array([b"x"]),
        "box": pa.array([{"x": 1}]),
        "caption": ["a"],
    }
    write_parquet(tmp_path / "x.parquet", [IMAGE], **columns)
    told = []
    (record,) = read(tmp_path, tell=told.append)
    assert decode(record.path).size == (48, 32)
    assert told == [f"{tmp_path}: columns that are no class: mask, thumb, box, caption"]


@pytest.mark.parametrize(
    ("columns", "parts"),
    [
        ({"a": [b"x"], "b": [b"x"]}, ["several columns", "a, b"]),
        ({"image": [b"x"], "img": [b"x"]}, ["several columns", "image, img"]),
        ({"path": ["x"], "url": ["x"]}, ["no column of images", "path, url"]),
        ({"image": ["x.jpg"]}, ["no column of images"]),
        ({}, ["no column of images", "none"]),
    ],
)
def test_no_clear_column_of_images(tmp_path, columns, parts):
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    message = error(tmp_path)
    for part in [str(tmp_path / "x.parquet"), *parts]:
        assert part in message


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([0, 2, -1, None], [(0,), (2,), None, None]),
        (["dog", "Cat", "sofa", None], [(1,), (0,), (), None]),
        ([[2, 0], [], [1], None], [(0, 2), (), (1,), None]),
        ([["dog", "cat"], [], ["sofa"], None], [(0, 1), (), (), None]),
    ],
)
@pytest.mark.parametrize("name", ["label", "labels"])
def test_a_column_of_labels(tmp_path, labels, expected, name):
    write_parquet(tmp_path / "x.parquet", [IMAGE] * 4, **{name: labels})
    assert truth(tmp_path) == expected


@pytest.mark.parametrize(
    ("labels", "expected"), [([0, 1, -1], [(2,), (), None]), ([[0, 2], [1], []], [(1, 2), (), ()])]
)
def test_numbers_are_the_names_that_the_file_gives_them(tmp_path, labels, expected):
    names = {"label": ["train", "sofa", "dog"]}
    write_parquet(tmp_path / "x.parquet", [IMAGE] * 3, label=labels, names=names)
    told = []
    assert truth(tmp_path, tell=told.append) == expected
    assert any("labels that are no class: sofa (1)" in line for line in told)


def test_a_class_with_two_columns(tmp_path):
    path = write_parquet(tmp_path / "x.parquet", [IMAGE], dog=[1], cat=[0], train=[1])
    table = pq.read_table(path)
    pq.write_table(table.append_column("dog", table["cat"]), path)
    assert error(tmp_path) == f"{path}: 'dog' occurs twice; remove one"


def test_a_column_for_each_class(tmp_path):
    columns = {"dog": [1, 0, None], "train": [1, 1, None], "CAT": [0, 1, None], "label": [0, 0, 0]}
    write_parquet(tmp_path / "x.parquet", [IMAGE] * 3, **columns)
    assert truth(tmp_path) == [(1, 2), (0, 2), None]


@pytest.mark.parametrize(
    ("columns", "parts"),
    [
        ({"label": [3]}, ["row 0", "label 3", "0 to 2"]),
        ({"label": [-2]}, ["row 0", "label -2"]),
        ({"label": [0.5]}, ["label 0.5"]),
        ({"labels": [[0, None]]}, ["label None"]),
        ({"label": [True]}, ["label True"]),
        ({"label": [{"x": 1}]}, ["neither a name"]),
        ({"label": [0], "labels": [[0]]}, ["label and labels"]),
        ({"dog": [1], "cat": [1]}, ["no column for the classes train"]),
        ({"dog": [1], "cat": [0], "train": [2]}, ["row 0", "'train' contains '2'"]),
    ],
)
def test_labels_that_are_none(tmp_path, columns, parts):
    write_parquet(tmp_path / "x.parquet", [IMAGE], **columns)
    message = error(tmp_path)
    for part in [str(tmp_path / "x.parquet"), *parts]:
        assert part in message


@pytest.mark.parametrize("data", [b"", b"PAR1", b"Not found" * 100])
def test_a_file_that_is_no_parquet(tmp_path, data):
    (tmp_path / "x.parquet").write_bytes(data)
    message = error(tmp_path)
    assert "x.parquet: cannot be read as Parquet" in message
    assert "'exclude'" in message


def test_a_file_that_was_cut_short(tmp_path):
    path = write_parquet(tmp_path / "x.parquet", [IMAGE] * 9)
    os.truncate(path, path.stat().st_size // 2)
    assert "x.parquet: cannot be read as Parquet" in error(tmp_path)
    write_parquet(tmp_path / "y.parquet", [IMAGE])
    assert len(read(tmp_path, exclude=["x.*"])) == 1


def test_a_file_of_another_schema_among_others(tmp_path):
    write_parquet(tmp_path / "a.parquet", [IMAGE])
    pq.write_table(pa.table({"key": ["a"], "status": ["failed"]}), tmp_path / "b.parquet")
    assert "b.parquet: no column of images; exactly one of key, status" in error(tmp_path)


def test_null_empty_and_damaged_images_have_a_status(tmp_path):
    images = [None, b"", IMAGE[:300], b"Not found", IMAGE]
    path = write_parquet(tmp_path / "x.parquet", images)
    table = pq.read_table(path)
    outside = pa.array([*table["image"].to_pylist(), {"bytes": None, "path": "a.jpg"}], HF_IMAGE)
    pq.write_table(pa.table({"image": outside}), path, row_group_size=4)
    status = []
    for record in read(tmp_path):
        try:
            decode(record.path)
            status.append("ok")
        except ImageError as error:
            status.append(str(error))
    assert status[0] == status[5] == "missing: the cell is null"
    assert [text.partition(":")[0] for text in status[1:5]] == [
        "truncated",
        "truncated",
        "not_an_image",
        "ok",
    ]


def test_ids_stay_when_files_are_added_and_the_fingerprint_notices(tmp_path):
    write_parquet(tmp_path / "b.parquet", [IMAGE] * 3)
    before = read(tmp_path)
    write_parquet(tmp_path / "a.parquet", [IMAGE] * 2)
    after = read(tmp_path)
    assert after[2:] == before
    mark = fingerprint(before)
    path = tmp_path / "b.parquet"
    os.utime(path, ns=(1, path.stat().st_mtime_ns + 1))
    assert fingerprint(before) != mark
