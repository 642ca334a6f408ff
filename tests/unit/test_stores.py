import json

import numpy as np
import pytest
import zarr
from messages import message_of

from cdul_steps.data.stores import (
    context_of,
    new_store,
    open_similarity,
    open_store,
    read_blocks,
    shard_file,
    shard_rows,
    write_metadata,
    write_shard,
)

SHARD = 4
VIEWS, VALUES = 3, 5


def vectors(rows, seed=0):
    return np.random.default_rng(seed).random((rows, VIEWS, VALUES)).astype(np.float16)


def make_store(path, rows, written, attributes=None):
    """Make a store of `rows` images with the shards in `written`; returns its content."""
    write_metadata(path, (rows, VIEWS, VALUES), SHARD, "float16", attributes or {})
    expected = np.full((rows, VIEWS, VALUES), np.nan, np.float16)
    for shard in written:
        part = slice(shard * SHARD, min((shard + 1) * SHARD, rows))
        expected[part] = vectors(part.stop - part.start, seed=shard)
        write_shard(path, shard, expected[part], SHARD)
    return expected


def read(path):
    return np.concatenate([rows for _, rows in read_blocks(path, open_store(path))])


@pytest.fixture
def path(tmp_path):
    return tmp_path / "store.zarr"


def test_shards_open_as_one_array(path):
    expected = make_store(path, 10, [0, 1, 2], {"kind": "embeddings"})
    array = zarr.open_array(path, mode="r")
    assert array.shape == (10, VIEWS, VALUES)
    assert array.dtype == np.float16
    assert array.shards == (SHARD, VIEWS, VALUES)
    assert shard_rows(array) == SHARD
    assert dict(array.attrs) == {"schema_version": 1, "kind": "embeddings"}
    np.testing.assert_array_equal(array[:], expected)
    np.testing.assert_array_equal(read(path), expected)


def test_one_object_a_shard_and_nothing_else(path):
    make_store(path, 10, [0, 1, 2])
    files = [p for p in path.parent.rglob("*") if p.is_file()]
    assert sorted(files) == sorted([path / "zarr.json", *(shard_file(path, k) for k in range(3))])
    assert shard_file(path, 1) == path / "c" / "1" / "0" / "0"


def test_what_was_never_written_is_nan(path):
    expected = make_store(path, 10, [0, 2])
    np.testing.assert_array_equal(read(path), expected)
    assert np.isnan(read(path)[SHARD : 2 * SHARD]).all()


def test_a_short_shard_is_nan_beyond_its_rows(path):
    write_metadata(path, (SHARD, VIEWS, VALUES), SHARD, "float16", {})
    write_shard(path, 0, vectors(2), SHARD)
    assert np.isnan(read(path)).all(axis=(1, 2)).tolist() == [False, False, True, True]


@pytest.mark.parametrize("rows", [0, 1, SHARD])
def test_a_shard_of_nan_still_makes_a_file(path, rows):
    write_metadata(path, (SHARD, VIEWS, VALUES), SHARD, "float16", {})
    write_shard(path, 0, np.full((rows, VIEWS, VALUES), np.nan, np.float16), SHARD)
    assert shard_file(path, 0).stat().st_size > 0
    assert np.isnan(read(path)).all()


def test_an_object_depends_on_its_own_rows_only(tmp_path):
    make_store(tmp_path / "short", 6, [0, 1])
    make_store(tmp_path / "long", 50, [1])
    rows = vectors(2, seed=1)
    write_shard(tmp_path / "alone", 1, rows, SHARD)
    write_shard(tmp_path / "long", 1, rows, SHARD)
    expected = shard_file(tmp_path / "short", 1).read_bytes()
    for other in ("alone", "long"):
        assert shard_file(tmp_path / other, 1).read_bytes() == expected


def test_metadata_leaves_shards_alone(path):
    expected = make_store(path, 6, [0, 1])
    object_ = shard_file(path, 0)
    before = object_.read_bytes(), object_.stat().st_mtime_ns
    write_metadata(path, (9, VIEWS, VALUES), SHARD, "float16", {})
    assert (object_.read_bytes(), object_.stat().st_mtime_ns) == before
    longer = read(path)
    np.testing.assert_array_equal(longer[:6], expected)
    assert np.isnan(longer[6:]).all()


def test_metadata_is_written_before_or_after_the_shards(tmp_path):
    rows = vectors(SHARD)
    write_shard(tmp_path / "store", 0, rows, SHARD)
    write_metadata(tmp_path / "store", rows.shape, SHARD, "float16", {})
    np.testing.assert_array_equal(read(tmp_path / "store"), rows)


def test_large_shards_have_inner_chunks_that_fit(tmp_path):
    shape = (96, 10, 2048)
    write_metadata(tmp_path / "store", shape, 96, "float16", {})
    array = open_store(tmp_path / "store")
    assert array.shards == shape
    assert 96 % array.chunks[0] == 0
    assert array.chunks[0] < 96
    rows = np.random.default_rng(0).random(shape).astype(np.float16)
    write_shard(tmp_path / "store", 0, rows, 96)
    np.testing.assert_array_equal(read(tmp_path / "store"), rows)


def test_blocks_cover_the_store_in_order(path, monkeypatch):
    expected = make_store(path, 18, range(5))
    row_bytes = VIEWS * VALUES * 2
    for budget in (1, 3 * row_bytes, 9 * row_bytes, 1 << 20):
        monkeypatch.setattr("cdul_steps.data.stores.BLOCK_BYTES", budget)
        blocks = list(read_blocks(path, open_store(path)))
        lengths = [len(rows) for _, rows in blocks]
        assert [first for first, _ in blocks] == [sum(lengths[:i]) for i in range(len(lengths))]
        assert max(lengths) * row_bytes <= max(budget, row_bytes)
        np.testing.assert_array_equal(np.concatenate([rows for _, rows in blocks]), expected)


def cut(data):
    return data[: len(data) // 2]


def flip(data):
    return bytes([data[0] ^ 1, *data[1:]])


@pytest.mark.parametrize("damage", [cut, flip, lambda data: b""], ids=["cut", "flip", "empty"])
@pytest.mark.parametrize("shard", [0, 1, 2])
def test_a_torn_shard_is_named(path, damage, shard):
    make_store(path, 10, [0, 1, 2])
    torn = shard_file(path, shard)
    torn.write_bytes(damage(torn.read_bytes()))
    message = message_of(read, path)
    assert message.startswith(f"{torn}: corrupt")
    assert "delete it" in message


def test_an_error_of_the_reader_is_not_taken_for_a_torn_shard(path):
    make_store(path, 10, [0, 1, 2])
    blocks = read_blocks(path, open_store(path))
    next(blocks)
    with pytest.raises(ZeroDivisionError):
        blocks.throw(ZeroDivisionError)


def test_a_new_store_appears_once_it_is_complete(path):
    with new_store(path, (6, VIEWS, VALUES), SHARD, "float32", {"a": 1}) as array:
        array[:] = np.ones((6, VIEWS, VALUES))
        assert not path.exists()
    assert (read(path) == 1).all()
    with (
        pytest.raises(ValueError, match="stop"),
        new_store(path, (9, VIEWS, VALUES), SHARD, "float32", {}),
    ):
        raise ValueError("stop")
    assert open_store(path).shape == (6, VIEWS, VALUES)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_what_is_no_store(path):
    assert str(path) in message_of(open_store, path)
    path.mkdir()
    assert str(path) in message_of(open_store, path)
    (path / "zarr.json").write_text("{")
    assert str(path) in message_of(open_store, path)
    zarr.create_group(path, overwrite=True)
    assert str(path) in message_of(open_store, path)
    zarr.create_array(path, shape=(2, 3), dtype="f4", overwrite=True)
    assert "(images, views, values)" in message_of(open_store, path)


def test_attributes_that_are_no_mapping(path):
    write_metadata(path, (4, 2, 3), 2, "float32", {})
    open_store(path)
    metadata = json.loads((path / "zarr.json").read_text(encoding="utf-8"))
    (path / "zarr.json").write_text(json.dumps(metadata | {"attributes": []}), encoding="utf-8")
    assert message_of(open_store, path) == f"{path}: not a Zarr array (of format 3)"


CLASSES = list("abcde")


@pytest.mark.parametrize(
    ("attributes", "part"),
    [
        ({"logit_scale": 100}, "'classes' must name its 5 classes"),
        ({"logit_scale": 100, "classes": CLASSES[:4]}, "'classes' must name its 5 classes"),
        ({"logit_scale": 100, "classes": "abcde"}, "'classes' must name its 5 classes"),
        ({"logit_scale": 100, "classes": list("abcda")}, "'classes' must name its 5 classes"),
        ({"logit_scale": 100, "classes": [1, 2, 3, 4, 5]}, "'classes' must name its 5 classes"),
        ({"classes": CLASSES, "context": ["f"]}, "'classes' must name its 4 classes"),
        ({"classes": CLASSES[:4], "context": CLASSES[:1]}, "must name its 4 classes"),
        ({"classes": [], "context": CLASSES}, "'classes' must name its 0 classes"),
        ({"classes": CLASSES}, "no attribute 'logit_scale'; give --tau"),
        ({"classes": CLASSES, "logit_scale": "hot"}, "'logit_scale'"),
        ({"classes": CLASSES, "logit_scale": 0}, "'logit_scale'"),
    ],
)
def test_a_similarity_needs_its_attributes(path, attributes, part):
    make_store(path, 4, [0], attributes)
    message = message_of(open_similarity, path, None)
    assert str(path) in message
    assert part in message


def test_a_similarity_says_its_classes_and_scale(path):
    make_store(path, 4, [0], {"classes": CLASSES, "logit_scale": 100})
    _, classes, scale = open_similarity(path, None)
    assert (classes, scale) == (CLASSES, 100.0)
    make_store(path, 4, [0], {"classes": CLASSES})
    assert np.isnan(open_similarity(path, 0.01)[2])


def test_a_similarity_with_context(path):
    attributes = {"classes": CLASSES[:1], "context": CLASSES[1:], "logit_scale": 100}
    make_store(path, 4, [0], attributes)
    array, classes, _ = open_similarity(path, None)
    assert (classes, context_of(array)) == (CLASSES[:1], CLASSES[1:])


def test_a_similarity_needs_snippets(path):
    attributes = {"classes": CLASSES, "logit_scale": 100}
    write_metadata(path, (4, 1, VALUES), SHARD, "float32", attributes)
    assert "no snippets" in message_of(open_similarity, path, None)


def test_metadata_is_plain_json(path):
    make_store(path, 4, [], {"classes": ["Müller"]})
    metadata = json.loads((path / "zarr.json").read_text(encoding="utf-8"))
    assert metadata["zarr_format"] == 3
    assert metadata["fill_value"] == "NaN"
    assert metadata["attributes"] == {"schema_version": 1, "classes": ["Müller"]}
