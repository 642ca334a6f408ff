import numpy as np
import pyarrow as pa
import pytest
import zarr

from cdul_steps.data.outcomes import check_failures
from cdul_steps.data.stores import context_of, shard_file, write_shard
from cdul_steps.data.tables import describe, read_table, write_table
from cdul_steps.errors import UserError
from cdul_steps.method.similarity import cosine
from cdul_steps.steps.similarity import make_similarity, write_store

CLASSES = ["dog", "cat", "owl"]
SHARD, VIEWS, WIDTH = 2, 5, 4


@pytest.fixture
def encoded(tmp_path):
    """Five images in three shards, as the encoder writes them; c could not be read."""
    random = np.random.default_rng(0)
    images = pa.table({"image_id": list("abcde"), "split": ["train"] * 5, "row": range(5)})
    layout = {"grid": [[2, 2]], "views": VIEWS, "shard_size": SHARD}
    write_table(
        describe(images, "images", rows={"train": 5}, layout=layout), tmp_path / "images.parquet"
    )
    text = pa.table({"class": CLASSES, "embedding": random.random((3, WIDTH)).tolist()})
    facts = {"logit_scale": 50.0, "model": "m", "pretrained": "p", "templates": ["a {}"]}
    write_table(describe(text, "text", **facts), tmp_path / "text.parquet")
    write_store(
        images=tmp_path / "images.parquet",
        split="train",
        text=tmp_path / "text.parquet",
        store=tmp_path / "e.zarr",
    )
    vectors = random.normal(size=(5, VIEWS, WIDTH)).astype(np.float16)
    vectors[2] = np.nan
    for shard in range(3):
        rows = range(5)[shard * SHARD : (shard + 1) * SHARD]
        write_shard(tmp_path / "e.zarr", shard, vectors[rows.start : rows.stop], SHARD)
        status = ["missing" if row == 2 else "ok" for row in rows]
        outcome = pa.table({"row": rows, "status": status, "error": [""] * len(rows)})
        write_table(outcome, tmp_path / f"{shard}.parquet")
    return tmp_path, vectors


def similarity(folder, **changes):
    arguments = {
        "store": folder / "e.zarr",
        "text": folder / "text.parquet",
        "images": folder / "images.parquet",
        "split": "train",
        "tables": [folder / f"{shard}.parquet" for shard in range(3)],
        "max_failed_share": 0.5,
        "output": folder / "sim.zarr",
    }
    make_similarity(**{**arguments, **changes})
    return zarr.open_array(folder / "sim.zarr", mode="r")


def test_the_store_fits_the_manifest_and_the_text(encoded):
    folder, vectors = encoded
    array = zarr.open_array(folder / "e.zarr", mode="r")
    assert (array.shape, array.shards) == ((5, VIEWS, WIDTH), (SHARD, VIEWS, WIDTH))
    np.testing.assert_array_equal(array[:], vectors)


def test_cosines_of_every_view_and_nan_for_what_has_none(encoded):
    folder, vectors = encoded
    array = similarity(folder)
    assert (array.shape, array.dtype) == ((5, VIEWS, 3), np.float32)
    text = np.array(read_table(folder / "text.parquet", ["embedding"])["embedding"].to_pylist())
    np.testing.assert_allclose(array[:], cosine(vectors, text), atol=1e-6)
    assert np.isnan(array[2]).all()
    assert not np.isnan(array[[0, 1, 3, 4]]).any()


def test_attributes_say_what_was_compared(encoded):
    attributes = dict(similarity(encoded[0]).attrs)
    assert attributes["classes"] == CLASSES
    assert attributes["logit_scale"] == 50.0
    assert attributes["templates"] == ["a {}"]


def test_the_failed_are_listed(encoded):
    folder, _ = encoded
    tables = [folder / f"{shard}.parquet" for shard in range(3)]
    failed = check_failures(folder / "images.parquet", "train", tables, 0.2)
    assert failed.to_pylist() == [{"image_id": "c", "status": "missing", "error": ""}]


def test_an_image_that_no_job_names_counts_as_failed(encoded):
    folder, _ = encoded
    tables = [folder / "0.parquet", folder / "1.parquet"]
    failed = check_failures(folder / "images.parquet", "train", tables, 0.4)
    assert failed["image_id"].to_pylist() == ["c", "e"]
    assert failed["status"].to_pylist() == ["missing", "absent"]


def test_too_many_failed_are_an_error_that_names_them(encoded):
    folder, _ = encoded
    with pytest.raises(UserError) as caught:
        similarity(folder, max_failed_share=0.19)
    message = str(caught.value)
    assert message.startswith("train: 1 of 5 images cannot be used")
    assert "max_failed_share = 0.19" in message
    assert "c: missing" in message
    assert not (folder / "sim.zarr").exists()


def test_another_encoder_is_refused(encoded):
    folder, _ = encoded
    text = pa.table({"class": CLASSES, "embedding": [[1.0, 0.0]] * 3})
    facts = {"logit_scale": 50.0, "model": "m", "pretrained": "p", "templates": ["a {}"]}
    write_table(describe(text, "text", **facts), folder / "text.parquet")
    with pytest.raises(UserError, match="different encoders"):
        similarity(folder)


def test_a_torn_shard_leaves_the_earlier_similarity(encoded):
    folder, _ = encoded
    before = similarity(folder)[:]
    torn = shard_file(folder / "e.zarr", 1)
    torn.write_bytes(torn.read_bytes()[:-1])
    with pytest.raises(UserError, match="corrupt"):
        similarity(folder)
    np.testing.assert_array_equal(zarr.open_array(folder / "sim.zarr", mode="r")[:], before)


def test_context_lies_behind_the_classes(encoded):
    folder, _ = encoded
    alone = np.asarray(similarity(folder)[:])
    text = read_table(folder / "text.parquet", ["class", "embedding"])
    context = np.random.default_rng(1).random((2, WIDTH))
    names = [*CLASSES, "tree", "river"]
    both = pa.table(
        {
            "class": names,
            "embedding": [*text["embedding"].to_pylist(), *context.tolist()],
            "context": [False] * 3 + [True] * 2,
        }
    )
    facts = {"logit_scale": 50.0, "model": "m", "pretrained": "p", "templates": ["a {}"]}
    write_table(describe(both, "text", **facts), folder / "text.parquet")
    array = similarity(folder)
    assert array.attrs["classes"] == CLASSES
    assert context_of(array) == ["tree", "river"]
    np.testing.assert_array_equal(array[..., :3], alone)
    vectors = np.asarray(zarr.open_array(folder / "e.zarr", mode="r")[:])
    np.testing.assert_allclose(array[..., 3:], cosine(vectors, context), atol=1e-6)
