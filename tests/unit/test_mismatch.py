"""Files that do not belong together: the first stage that can notice it names both."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from messages import message_of
from networks import CLASSES, CPU, MODEL, card
from training_runs import history, make_data, refined, write_labels
from training_runs import run as train

from cdul_steps.config import Encoder, Labels
from cdul_steps.data.files import SCHEMA_VERSION
from cdul_steps.data.manifest import read_shard
from cdul_steps.data.stores import open_similarity, open_store, shard_file, write_metadata
from cdul_steps.data.tables import KEY, describe, read_facts, read_scores, write_table
from cdul_steps.models.classifier import load_classifier, new_classifier, save_classifier
from cdul_steps.steps import train as train_step
from cdul_steps.steps.encode import encode_shard, encode_text
from cdul_steps.steps.evaluate import evaluate_labels
from cdul_steps.steps.label import make_labels
from cdul_steps.steps.similarity import make_similarity, write_store
from cdul_steps.tools.summary import summarise

SHARD = 5


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    """Eight images in two shards, encoded, with their classes, as the stages write them."""
    folder = tmp_path_factory.mktemp("original")
    for i in range(8):
        tiny.noise(folder / f"images/{i}.png", i)
    tiny.folder_manifest(folder / "images", folder / "manifest", SHARD)
    clip = tiny.make_clip(folder / "clip")
    embed_images(folder, clip)
    embed_text(folder, clip)
    inputs = {"images": folder / "manifest/images.parquet", "text": folder / "text.parquet"}
    write_store(**inputs, split="train", store=folder / "e.zarr")
    similarity(folder)
    label(folder)
    return folder


@pytest.fixture
def made(original, tmp_path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "made"))


def embed_images(folder: Path, clip: str, precision: str = "fp32", shards=(0, 1)) -> None:
    for shard in shards:
        encode_shard(
            manifest=folder / f"manifest/train/{shard}.parquet",
            store=folder / "e.zarr",
            table=folder / f"{shard}.parquet",
            encoder=Encoder(model=clip, precision=precision),
            max_pixels=tiny.MAX_PIXELS,
            machine=tiny.MACHINE,
        )


def embed_text(folder: Path, clip: str, classes="cat\ndog\nbird\n") -> None:
    (folder / "classes.txt").write_text(classes)
    encode_text(
        classes=folder / "classes.txt",
        encoder=Encoder(model=clip, templates=["a {}"]),
        output=folder / "text.parquet",
    )


def similarity(folder: Path) -> None:
    make_similarity(
        store=folder / "e.zarr",
        text=folder / "text.parquet",
        images=folder / "manifest/images.parquet",
        split="train",
        tables=[folder / "0.parquet", folder / "1.parquet"],
        max_failed_share=0,
        output=folder / "s.zarr",
    )


def label(folder: Path) -> None:
    make_labels(
        similarity=folder / "s.zarr",
        images=folder / "manifest/images.parquet",
        split="train",
        settings=Labels(),
        output=folder / "labels.parquet",
    )


def quality(folder: Path) -> None:
    evaluate_labels(
        similarity={"train": folder / "s.zarr"},
        images=folder / "manifest/images.parquet",
        labels=folder / "labels.parquet",
        difficult="ignore",
        ap="all",
        output=folder / "quality.json",
    )


def with_facts(path: Path, **facts: object) -> None:
    """Change facts of a table."""
    table = pq.read_table(path)
    changed = {**read_facts(path), **facts}
    write_table(table.replace_schema_metadata({KEY: json.dumps(changed).encode()}), path)


@pytest.mark.parametrize("classes", ["dog\ncat\nbird\n", "cat\ndog\n", "cat\ndog\nbird\nowl\n"])
def test_classes_of_another_order_or_number(made, classes):
    embed_text(made, f"local-dir:{made / 'clip'}", classes)
    message = message_of(similarity, made)
    assert str(made / "manifest/images.parquet") in message
    assert str(made / "text.parquet") in message
    assert "not the same class table" in message


@pytest.mark.parametrize("step", [label, quality])
@pytest.mark.parametrize("classes", [["dog", "cat", "bird"], ["cat", "dog"]])
def test_a_manifest_of_other_classes_than_the_similarities(made, step, classes):
    with_facts(made / "manifest/images.parquet", classes=classes)
    message = message_of(step, made)
    assert str(made / "manifest/images.parquet") in message
    assert "not the same class table" in message


def test_a_missing_shard_is_not_taken_for_failed_images(made):
    shard_file(made / "e.zarr", 1).unlink()
    message = message_of(similarity, made)
    assert str(shard_file(made / "e.zarr", 1)) in message
    assert str(made / "1.parquet") in message and "missing" in message


def test_a_shard_of_another_run(made):
    # Intact and of the same shape: only the digest differs.
    shutil.copy(shard_file(made / "e.zarr", 0), shard_file(made / "e.zarr", 1))
    assert np.isfinite(open_store(made / "e.zarr")[:]).all()
    message = message_of(similarity, made)
    assert "from another run" in message and str(made / "1.parquet") in message


def scaled(scale: float):
    return lambda network: network.logit_scale.data.fill_(scale)


def test_a_text_encoder_of_another_scale(made, tmp_path):
    embed_text(made, tiny.make_clip(tmp_path / "other", scaled(1.0)))
    message = message_of(similarity, made)
    assert str(made / "0.parquet") in message and str(made / "text.parquet") in message
    assert "logit_scale 14.28" in message and "2.718" in message


@pytest.mark.parametrize("scale", [1.98, 2.8, 4.767])
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_rounds_the_scale(made, tmp_path, precision, scale):
    tower = {"timm_model_name": "test_byobnet", "timm_pool": "", "image_size": 32}
    clip = tiny.make_clip(tmp_path / "timm", scaled(scale), vision_cfg=tower)
    embed_images(made, clip, precision)
    embed_text(made, clip)
    assert read_facts(made / "0.parquet")["logit_scale"] != pytest.approx(np.exp(scale), 1e-4)
    similarity(made)
    embed_text(made, tiny.make_clip(tmp_path / "other", scaled(scale + 0.1), vision_cfg=tower))
    assert "not the same weights" in message_of(similarity, made)


@pytest.mark.parametrize("scale", [np.nan, np.inf, 1000.0])
def test_a_scale_that_is_no_number(made, tmp_path, scale):
    clip = tiny.make_clip(tmp_path / "other", scaled(scale))
    message = message_of(embed_text, made, clip)
    assert "logit_scale" in message and clip in message


def biased(bias: float):
    return lambda network: network.logit_bias.data.fill_(bias)


def test_the_bias_of_the_logits(made, tmp_path):
    siglip = tiny.make_siglip(tmp_path / "siglip")
    embed_text(made, siglip)
    inputs = {"images": made / "manifest/images.parquet", "text": made / "text.parquet"}
    write_store(**inputs, split="train", store=made / "e.zarr")
    for precision in ("fp32", "bf16"):
        embed_images(made, siglip, precision)
        assert read_facts(made / "0.parquet")["logit_bias"] == -10
        similarity(made)
    assert open_store(made / "s.zarr").attrs["logit_bias"] == -10
    embed_text(made, tiny.make_siglip(tmp_path / "other", biased(-11.0)))
    message = message_of(similarity, made)
    assert str(made / "0.parquet") in message and str(made / "text.parquet") in message
    assert "logit_bias -10 and" in message and "with -11.0: not the same weights" in message
    with_facts(made / "text.parquet", logit_bias=None)
    assert "from one with None" in message_of(similarity, made)
    # Shards of an older release do not record it.
    embed_text(made, siglip)
    for shard in "01":
        with_facts(made / f"{shard}.parquet", logit_bias=None)
    similarity(made)


def test_a_model_without_bias_leaves_no_trace_of_one(made):
    similarity(made)
    facts = [read_facts(made / f"{name}.parquet") for name in ("0", "text")]
    assert not any("logit_bias" in of for of in (*facts, open_store(made / "s.zarr").attrs))


@pytest.mark.parametrize("bias", [np.nan, np.inf])
def test_a_bias_that_is_no_number(made, tmp_path, bias):
    clip = tiny.make_siglip(tmp_path / "other", biased(bias))
    message = message_of(embed_text, made, clip)
    assert f"logit_bias ({bias})" in message and clip in message


@pytest.mark.parametrize("facts", [{"logit_scale": None}, {"logit_scale": -1.0}])
def test_a_foreign_class_table_without_scale(made, facts):
    with_facts(made / "text.parquet", **facts)
    assert f"{made / 'text.parquet'}: its logit_scale" in message_of(similarity, made)


@pytest.mark.parametrize("name", ["logit_scale", "model", "templates"])
def test_a_foreign_class_table_that_does_not_say_what_it_is(made, name):
    path = made / "text.parquet"
    facts = read_facts(path)
    del facts[name]
    table = pq.read_table(path).replace_schema_metadata({KEY: json.dumps(facts).encode()})
    write_table(table, path)
    assert message_of(similarity, made).startswith(f"{path}: its metadata has no {name!r}")


@pytest.mark.parametrize("vector", [[0.0] * 32, [float("nan")] * 32, [1.0] * 31, []])
def test_a_class_embedding_that_is_no_direction(made, vector):
    path = made / "text.parquet"
    table, facts = pq.read_table(path), read_facts(path)
    vectors = [table["embedding"][0].as_py(), vector, table["embedding"][2].as_py()]
    table = table.set_column(2, "embedding", pa.array(vectors, pa.list_(pa.float32())))
    write_table(describe(table, **facts), path)
    message = message_of(similarity, made)
    assert f"{path}: the embedding of class 'dog'" in message


@pytest.mark.parametrize("step", [similarity, label, quality])
def test_a_store_of_another_number_of_rows(made, step):
    with_facts(made / "manifest/images.parquet", rows={"train": 9})
    message = message_of(step, made)
    store = made / ("e.zarr" if step is similarity else "s.zarr")
    assert f"{store} has 8 rows" in message and "images.parquet" in message


def test_a_store_of_another_width(made):
    write_metadata(made / "e.zarr", (8, 5, 16), SHARD, "float16", {"kind": "embeddings"})
    assert "different encoders" in message_of(similarity, made)


def test_a_shards_manifest_of_another_place(made):
    path = made / "manifest/train/0.parquet"
    for facts in ({"shard": 1}, {"shard_size": 4}, {"shard_size": "a"}, {"shard": None}):
        with_facts(path, **{"shard": 0, "shard_size": SHARD, **facts})
        assert f"{path}: its rows are not complete images" in message_of(read_shard, path)
    with_facts(path, shard=0, shard_size=SHARD)
    table = pq.read_table(path)
    write_table(table.slice(0, 7), path)
    assert "not complete images" in message_of(read_shard, path)


def test_an_embedding_of_norm_zero_is_its_images_status(made, tmp_path):
    def dark(network: torch.nn.Module) -> None:
        network.visual.proj.data.zero_()

    clip = tiny.make_clip(tmp_path / "dark", dark)
    embed_images(made, clip, shards=[0])
    assert set(pq.read_table(made / "0.parquet")["status"].to_pylist()) == {"not_finite"}
    assert np.isnan(open_store(made / "e.zarr")[:SHARD]).all()


def test_one_class_has_no_softmax(tmp_path):
    attributes = {"classes": ["dog"], "logit_scale": 100.0}
    write_metadata(tmp_path, (4, 5, 1), 4, "float32", attributes)
    assert "one class, 'dog', whose softmax is 1" in message_of(open_similarity, tmp_path, None)


OTHER = SCHEMA_VERSION + 1


def test_a_store_of_another_version(made):
    path = made / "e.zarr/zarr.json"
    metadata = json.loads(path.read_text())
    assert metadata["attributes"]["schema_version"] == SCHEMA_VERSION
    metadata["attributes"]["schema_version"] = OTHER
    path.write_text(json.dumps(metadata))
    message = message_of(similarity, made)
    assert str(made / "e.zarr") in message and f"(schema {OTHER}, this one" in message


@pytest.mark.parametrize("name", ["quality.json", "small/metrics.json"])
def test_measures_of_another_version(made, name):
    folder = made / "results/data/clip/labels"
    (folder / "small").mkdir(parents=True)
    quality(made)
    found = json.loads((made / "quality.json").read_text())
    assert found["schema_version"] == SCHEMA_VERSION
    (folder / "quality.json").write_text(json.dumps(found))
    path = folder / name
    path.write_text(json.dumps({**found, "schema_version": OTHER}))
    message = message_of(lambda: summarise(made / "results", as_json=False))
    assert str(path) in message and f"(schema {OTHER}, this one" in message
    for text in ("", "[]", "{}", '{"splits": 1}'):
        path.write_text(text)
        assert "run 'cdul run'" in message_of(lambda: summarise(made / "results", as_json=False))


@pytest.fixture
def model(tmp_path) -> Path:
    torch.manual_seed(1)
    save_classifier(new_classifier(MODEL, CLASSES, {}, None)[0], card(), tmp_path / "model")
    return tmp_path / "model"


def edit_card(model: Path, **changes: object) -> None:
    values = json.loads((model / "model.json").read_text())
    assert values["schema_version"] == SCHEMA_VERSION
    (model / "model.json").write_text(json.dumps({**values, **changes}))


def test_a_model_of_another_version(model):
    edit_card(model, schema_version=OTHER)
    message = message_of(load_classifier, model, CPU)
    assert message.startswith(f"{model / 'model.json'}: written by another version")


def test_a_card_of_another_number_of_classes_says_both(model):
    edit_card(model, classes=CLASSES[:2])
    message = message_of(load_classifier, model, CPU)
    assert "size mismatch for head.fc.weight" in message
    assert "[3, " in message and "[2, " in message


@pytest.mark.parametrize(
    "changes",
    [
        {"mean": [0.5] * 2},
        {"std": [0.0] * 3},
        {"interpolation": "nearest"},
        {"classes": []},
        {"classes": [1, 2, 3]},
        {"image_size": "big"},
        {"threshold": 2},
        {"model_args": {"act_layer": "os.system"}},
    ],
)
def test_a_card_that_makes_no_sense(model, changes):
    edit_card(model, **changes)
    assert "the model cannot be loaded" in message_of(load_classifier, model, CPU)


@pytest.fixture(scope="module")
def train_data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("train") / "data")


@pytest.mark.parametrize("damage", ["optimizer", "history", "network"])
def test_a_checkpoint_with_missing_or_foreign_keys(train_data, tmp_path, monkeypatch, damage):
    class StopError(Exception):
        pass

    def stop(*_):
        raise StopError

    with monkeypatch.context() as patch:
        patch.setattr(train_step, "_write_results", stop)
        with pytest.raises(StopError):
            train(train_data, tmp_path, epochs=2)
    checkpoint = tmp_path / "checkpoint.pt"
    state = torch.load(checkpoint, weights_only=True)
    if damage == "network":
        state["network"]["extra"] = torch.zeros(1)
    else:
        del state[damage]
    torch.save(state, checkpoint)
    message = message_of(lambda: train(train_data, tmp_path, epochs=2))
    assert message.startswith(f"{checkpoint}: does not fit this training")
    assert "delete it" in message


@pytest.mark.parametrize("loss", ["kl", "kl_reverse", "kl_classes"])
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_class_that_all_images_or_none_show(train_data, tmp_path, loss, value):
    table, classes, scores = read_scores(train_data / "labels.parquet")
    scores = scores.copy()
    scores[:, 1] = value
    write_labels(tmp_path / "labels.parquet", table, classes, scores)
    labels = {"labels": tmp_path / "labels.parquet"}
    train(train_data, tmp_path, loss=loss, epochs=2, alignment={"warmup": 0}, **labels)
    assert np.isfinite(history(tmp_path)["loss"]).all()
    assert np.isfinite(refined(tmp_path)).all()
