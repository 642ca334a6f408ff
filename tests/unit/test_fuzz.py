"""Arbitrary input gives a value or a one-line error, never a traceback."""

import copy
import json
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import tiny
import torch
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from networks import CLASSES, CPU, MODEL, card

from cdul_steps.config import load, read_training
from cdul_steps.data.classes import load_classes
from cdul_steps.data.manifest import check_rows, read_shard, read_split, read_truth
from cdul_steps.data.readers import read_dataset
from cdul_steps.data.stores import open_similarity, read_blocks, write_metadata, write_shard
from cdul_steps.data.tables import KEY, describe, read_scores, score_table, write_table
from cdul_steps.errors import UserError
from cdul_steps.models.classifier import load_classifier, new_classifier, save_classifier
from cdul_steps.tools.summary import summarise

ROOT = Path(__file__).parents[2]
BASE = yaml.safe_load((ROOT / "config/config.yaml").read_text(encoding="utf-8"))
OFTEN = settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
SELDOM = settings(OFTEN, max_examples=40)

SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.just("1e-5")
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)


def told(function, *arguments) -> None:
    """Call a function that may refuse its input with a one-line error."""
    try:
        function(*arguments)
    except UserError as error:
        assert str(error).strip() and len(str(error)) < 20_000


def places(value: object, here: tuple = ()) -> list[tuple]:
    """The paths of all values inside a JSON value, including itself."""
    inner = value.items() if isinstance(value, dict) else ()
    inner = enumerate(value) if isinstance(value, list) else inner
    return [here, *(p for key, item in inner for p in places(item, (*here, key)))]


def changed(data: st.DataObject, value: object) -> object:
    """A JSON value with one to three places removed, replaced, or given a new key."""
    value = copy.deepcopy(value)
    for _ in range(data.draw(st.integers(1, 3))):
        *parents, last = data.draw(st.sampled_from(places(value)[1:] or [("",)]))
        section = value
        for key in parents:
            section = section[key]
        match data.draw(st.sampled_from(["out", "other", "new"])):
            case "out":
                with suppress(KeyError):
                    del section[last]
            case "new" if isinstance(section, dict):
                section[data.draw(st.text(max_size=5))] = data.draw(VALUES)
            case _ if section:
                section[last] = data.draw(VALUES)
    return value


def mutated(data: st.DataObject, content: bytes) -> bytes:
    """Bytes with a few changes, or truncated."""
    content = bytearray(content)
    for _ in range(data.draw(st.integers(0, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.none() | st.integers(0, len(content)))
    return bytes(content[:cut])


def test_images_of_every_format(tmp_path):
    command = [sys.executable, ROOT / "tests/robustness/fuzz_images.py", "--count", "300"]
    done = subprocess.run(
        [*command, "--seed", "1", "--keep", tmp_path / "faults"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout)
    assert result["faults"] == [] and result["lines_on_stderr"] == 0
    assert sum(n for found in result["statuses"].values() for n in found.values()) == 300


@OFTEN
@given(data=st.data())
def test_a_config(data):
    told(load, changed(data, BASE))


@OFTEN
@given(values=st.dictionaries(st.sampled_from(list(BASE)), VALUES))
def test_a_config_of_anything(values):
    told(load, values)


@OFTEN
@given(text=st.text() | VALUES.map(lambda value: json.dumps({"epochs": value})))
@example(text="0" * 1000)
def test_settings_of_a_training(text):
    told(read_training, text)


@OFTEN
@given(data=st.binary() | st.text().map(str.encode) | VALUES.map(yaml.safe_dump).map(str.encode))
@pytest.mark.parametrize("name", ["classes.yaml", "classes.txt"])
def test_a_class_table(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    told(load_classes, tmp_path / name)


CELLS = st.sampled_from(["path", "image_id", "split", "dog", "cat", "a.png", "1", "0", "train", ""])
LINES = st.lists(st.lists(CELLS | st.text(max_size=4), max_size=5).map(",".join), max_size=5)


@OFTEN
@given(data=st.binary() | LINES.map("\n".join).map(str.encode))
def test_a_table_of_images(tmp_path, data):
    (tmp_path / "t.csv").write_bytes(data)
    told(read_dataset, "table", tmp_path / "t.csv", {"train": "train"}, ["dog", "cat"])


@OFTEN
@given(
    ids=st.binary(max_size=40) | st.text(max_size=20).map(str.encode),
    truth=st.binary(max_size=40) | st.just(b"a 1\nb -1\n"),
    annotation=st.binary(max_size=60) | st.text(max_size=40).map(lambda t: f"<a>{t}</a>".encode()),
)
def test_a_data_set_in_vocs_layout(tmp_path, ids, truth, annotation):
    lists = tmp_path / "ImageSets/Main"
    lists.mkdir(parents=True, exist_ok=True)
    for folder in ("JPEGImages", "Annotations"):
        (tmp_path / folder).mkdir(exist_ok=True)
    (lists / "train.txt").write_bytes(ids)
    (lists / "dog_train.txt").write_bytes(truth)
    (tmp_path / "Annotations/a.xml").write_bytes(annotation)
    told(read_dataset, "voc", tmp_path, {"train": "train"}, ["dog"])
    (lists / "dog_train.txt").unlink()
    (lists / "train.txt").write_text("a\n")
    told(read_dataset, "voc", tmp_path, {"train": "train"}, ["dog"])


@pytest.fixture(scope="module")
def tables(tmp_path_factory) -> Path:
    """A manifest, a shard of it, and a table of scores."""
    folder = tmp_path_factory.mktemp("tables")
    for i in range(3):
        tiny.noise(folder / f"images/{i}.png", i)
    tiny.folder_manifest(folder / "images", folder / "manifest")
    ids = pa.array(["a", "b"])
    table = score_table(ids, ids, ["dog", "cat"], np.ones((2, 2)))
    write_table(describe(table, "scores", classes=["dog", "cat"]), folder / "scores.parquet")
    return folder


READERS = {
    "manifest/images.parquet": lambda p: (
        read_split(p, "train", ["image_id", "path", "row"]),
        read_truth(p, ["cat", "dog", "bird"]),
        check_rows(p, "train", p, 3),
    ),
    "manifest/train/0.parquet": read_shard,
    "scores.parquet": read_scores,
}


@pytest.mark.parametrize("name", READERS)
@OFTEN
@given(data=st.data())
def test_a_parquet_file(tables, tmp_path, name, data):
    (tmp_path / "t.parquet").write_bytes(mutated(data, (tables / name).read_bytes()))
    told(READERS[name], tmp_path / "t.parquet")


@pytest.mark.parametrize("name", READERS)
@OFTEN
@given(data=st.data())
def test_the_facts_of_a_parquet_file(tables, tmp_path, name, data):
    table = pa.parquet.read_table(tables / name)
    facts = changed(data, json.loads(table.schema.metadata[KEY]))
    write_table(table.replace_schema_metadata({KEY: json.dumps(facts)}), tmp_path / "t.parquet")
    told(READERS[name], tmp_path / "t.parquet")


def test_text_that_is_no_text_and_a_number_that_is_none(tables, tmp_path):
    table = pa.parquet.read_table(tables / "manifest/images.parquet")
    damaged = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\x80")]
    )
    splits = pa.concat_arrays([damaged] * len(table))
    place = table.column_names.index("split")
    write_table(table.set_column(place, "split", splits), tmp_path / "t.parquet")
    with pytest.raises(UserError, match=r"t\.parquet: corrupt"):
        read_split(tmp_path / "t.parquet", "train", ["image_id"])
    table = pa.parquet.read_table(tables / "manifest/train/0.parquet")
    facts = {**json.loads(table.schema.metadata[KEY]), "views": True}
    write_table(table.replace_schema_metadata({KEY: json.dumps(facts)}), tmp_path / "s.parquet")
    with pytest.raises(UserError, match="not complete images of the shard"):
        read_shard(tmp_path / "s.parquet")


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("store") / "s.zarr"
    attributes = {"classes": ["dog", "cat", "owl"], "logit_scale": 100.0}
    write_metadata(folder, (5, 3, 3), 4, "float32", attributes)
    for shard in range(2):
        write_shard(folder, shard, np.random.default_rng(0).random((4, 3, 3), np.float32), 4)
    return folder


def read_store(path: Path) -> None:
    array, _, _ = open_similarity(path, None)
    if np.prod(array.shape, dtype=float) < 1e6:
        for _ in read_blocks(path, array):
            pass


@SELDOM
@given(data=st.data())
def test_the_metadata_of_a_store(store, tmp_path, data):
    shutil.copytree(store, tmp_path / "s.zarr", dirs_exist_ok=True)
    metadata = changed(data, json.loads((store / "zarr.json").read_text()))
    (tmp_path / "s.zarr/zarr.json").write_text(json.dumps(metadata))
    told(read_store, tmp_path / "s.zarr")


@SELDOM
@given(data=st.data())
@pytest.mark.parametrize("name", ["zarr.json", "c/0/0/0"])
def test_the_bytes_of_a_store(store, tmp_path, name, data):
    shutil.copytree(store, tmp_path / "s.zarr", dirs_exist_ok=True)
    (tmp_path / "s.zarr" / name).write_bytes(mutated(data, (store / name).read_bytes()))
    told(read_store, tmp_path / "s.zarr")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(1)
    save_classifier(new_classifier(MODEL, CLASSES, {}, None)[0], card(), folder)
    return folder


@SELDOM
@given(data=st.data())
def test_the_card_of_a_model(model, tmp_path, data):
    shutil.copy(model / "model.safetensors", tmp_path)
    values = changed(data, json.loads((model / "model.json").read_text()))
    (tmp_path / "model.json").write_text(json.dumps(values))
    told(load_classifier, tmp_path, CPU)


@SELDOM
@given(data=st.data())
def test_the_weights_of_a_model(model, tmp_path, data):
    shutil.copy(model / "model.json", tmp_path)
    content = (model / "model.safetensors").read_bytes()
    head = 8 + int.from_bytes(content[:8], "little")
    (tmp_path / "model.safetensors").write_bytes(mutated(data, content[:head]) + content[head:])
    told(load_classifier, tmp_path, CPU)


@OFTEN
@given(value=VALUES | st.fixed_dictionaries({"splits": VALUES}))
def test_measures(tmp_path, value):
    folder = tmp_path / "data/clip/final"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "quality.json").write_text(json.dumps(value))
    told(lambda: summarise(tmp_path, as_json=False))
