"""Stage features, and training on features: only the last layer learns."""

import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from messages import message_of
from PIL import Image
from safetensors.torch import load_file, save_file
from training_runs import make_data as made_data

from cdul_steps.config import read_network, read_training
from cdul_steps.data.stores import new_store, open_store
from cdul_steps.data.tables import describe, read_facts, read_scores, score_table, write_table
from cdul_steps.data.truth import measure_table
from cdul_steps.errors import UserError
from cdul_steps.method.calibration import match_labels
from cdul_steps.method.gradient_alignment import halfway, to_label, to_latent
from cdul_steps.models.classifier import load_classifier, new_classifier
from cdul_steps.models.device import Machine
from cdul_steps.models.timm_encoder import pooled_features
from cdul_steps.steps import train as steps_train
from cdul_steps.steps.features import make_features, write_feature_store
from cdul_steps.steps.predict import SplitImages, predict_images
from cdul_steps.steps.train import Inputs, train_classifier
from cdul_steps.training.features import FeatureLoader, Standardised, read_features

MODEL = "test_byobnet"
SIZE = 40
SCRATCH = Path(tempfile.gettempdir())


def features_by_hand(images: list[Path], weights: Path) -> np.ndarray:
    """Features of single images with only timm, Pillow and NumPy: float32 (N, D)."""
    network = timm.create_model(MODEL, num_classes=0).eval()
    state = {k: v for k, v in load_file(weights).items() if not k.startswith("head.fc")}
    network.load_state_dict(state)
    data = timm.data.resolve_model_data_config(network)
    found = []
    for path in images:
        with Image.open(path) as image:
            pixels = image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        pixels = (np.asarray(pixels) / 255 - data["mean"]) / data["std"]
        inputs = torch.from_numpy(pixels.transpose(2, 0, 1)).float()[None]
        with torch.inference_mode():
            found.append(network(inputs)[0].numpy())
    return np.stack(found)


numbers = st.floats(-100, 100, width=32)


@given(arrays(np.float32, st.tuples(st.integers(2, 9), st.integers(1, 5)), elements=numbers))
@settings(deadline=None)
def test_standardised_features_have_mean_0_and_deviation_1(features):
    found = Standardised(features)(features, SCRATCH).numpy()
    assert np.allclose(found.mean(axis=0), 0, atol=1e-2)
    varied = features.std(axis=0, dtype=np.float64) > 1e-2
    assert np.allclose(found.std(axis=0)[varied], 1, atol=1e-2)
    assert np.allclose(found[:, features.std(axis=0) == 0], 0)


@given(
    arrays(np.float32, (6, 4), elements=numbers),
    arrays(np.float32, (3, 4), elements=st.floats(-2, 2, width=32)),
)
@settings(deadline=None)
def test_a_folded_head_gives_what_the_head_gives(features, weight):
    standardised = Standardised(features)
    head, onto = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)
    head.weight.data[:] = torch.from_numpy(weight)
    standardised.fold(head, onto)
    expected, found = head(standardised(features, SCRATCH)), onto(torch.from_numpy(features))
    spread = max(1, float((standardised.scale * torch.from_numpy(np.abs(features))).max()))
    assert torch.allclose(expected, found, atol=1e-4 * spread)


def test_images_without_features_take_no_part():
    features = np.array([[1, 2], [np.nan, np.nan], [3, 6]], np.float32)
    standardised = Standardised(features)
    assert standardised.mean.tolist() == [2, 4]
    loader = FeatureLoader(standardised(features, SCRATCH))
    index, found = zip(*loader.epoch(0, [[2, 1], [1], [0]]), strict=True)
    assert [i.tolist() for i in index] == [[2], [], [0]]
    assert found[0].tolist() == [[1, 1]] and found[1].shape == (0, 2)


def test_features_in_blocks_are_standardised_as_in_one_piece():
    features = np.random.default_rng(0).normal(3, 2, (5000, 160)).astype(np.float32)
    features[[0, 4000]] = np.nan
    usable = np.delete(features, [0, 4000], axis=0)
    mean, deviation = (f(axis=0, dtype=np.float64) for f in (usable.mean, usable.std))
    standardised = Standardised(features, poolings=2)
    assert np.array_equal(standardised.mean, mean.astype(np.float32))
    assert np.array_equal(standardised.scale, (1 / deviation).astype(np.float32))
    expected = (torch.from_numpy(features) - standardised.mean) * standardised.scale
    expected = expected.reshape(5000, 2, 80).mean(dim=1)
    np.testing.assert_array_equal(standardised(features, SCRATCH), expected)


def test_without_any_features_nothing_is_learnt():
    assert "no training image" in message_of(Standardised, np.full((2, 3), np.nan, np.float32))


@pytest.mark.parametrize("rows", [[], [0], [6, 0, 3, 3], [2, 1]])
def test_rows_are_read_in_the_order_asked_for(tmp_path, rows):
    values = np.random.default_rng(0).normal(size=(7, 1, 3)).astype(np.float32)
    with new_store(tmp_path / "a.zarr", values.shape, 2, "float32", {"kind": "features"}) as store:
        store[:] = values
    found = read_features(tmp_path / "a.zarr", np.array(rows, int), tmp_path)
    assert np.array_equal(found, values[rows, 0])
    assert "no row 7" in message_of(read_features, tmp_path / "a.zarr", np.array([7]), tmp_path)


def test_a_network_without_a_linear_last_layer_cannot_be_frozen():
    network, _ = new_classifier("test_vit", ["a"], {}, None)
    network.reset_classifier(0)
    assert "cannot be frozen" in message_of(pooled_features, network)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Images with bright squares in the classes' colours, their labels, and their features."""
    folder = made_data(tmp_path_factory.mktemp("frozen") / "data")
    with torch.random.fork_rng():
        torch.manual_seed(3)
        save_file(
            timm.create_model(MODEL, num_classes=5).state_dict(), folder / "trunk.safetensors"
        )
    for split in ("train", "test"):
        compute(folder, folder, split)
    return folder


def network_settings(data: Path, **changes) -> str:
    values = {"model": MODEL, "weights": str(data / "trunk.safetensors"), "image_size": SIZE}
    return json.dumps({**values, **changes})


def compute(data: Path, output: Path, split: str, engine: str = "torch", **changes) -> Path:
    """Compute the features of a split; returns the store."""
    settings, store = read_network(network_settings(data, **changes)), output / f"{split}.zarr"
    write_feature_store(images=data / "images.parquet", split=split, settings=settings, store=store)
    make_features(
        manifest=data / f"{split}/0.parquet",
        store=store,
        table=output / f"{split}.features.parquet",
        settings=settings,
        max_pixels=10_000,
        machine=Machine("cpu", workers=0, threads=1, engine=engine),
    )
    return store


def train(data: Path, output: Path, **changes) -> Path:
    values = {"trunk": "frozen", "epochs": 6, "batch_size": 5, "learning_rate": 1e-2, "loss": "kl"}
    values |= {"weight_decay": 3, "alignment": {"enabled": True, "step_size": 0.2, "warmup": 2}}
    settings = {**json.loads(network_settings(data)), **values, **changes}
    train_classifier(
        inputs=Inputs(
            data / "labels.parquet",
            data / "images.parquet",
            {split: data / f"{split}.zarr" for split in ("train", "test")},
        ),
        settings=read_training(json.dumps(settings)),
        difficult="ignore",
        max_pixels=10_000,
        max_failed_share=0.05,
        machine=Machine("cpu", workers=0, threads=1),
        output=output,
    )
    return output


def predict(data: Path, model: Path, split: str, output: Path) -> None:
    predict_images(
        model=model,
        inputs=SplitImages(data / "images.parquet", split),
        output=output,
        threshold=None,
        max_pixels=10_000,
        machine=Machine("cpu", workers=0, threads=1),
    )


@pytest.mark.parametrize("engine", ["torch", "onnx"])
def test_features_are_what_the_last_layer_takes(data, tmp_path, engine):
    found = open_store(compute(data, tmp_path, "test", engine))[:, 0][:8]
    paths = pq.read_table(data / "test/0.parquet")["path"].to_pylist()
    expected = features_by_hand(list(dict.fromkeys(map(Path, paths))), data / "trunk.safetensors")
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() < 1e-3 * np.abs(expected).max()
    facts = read_facts(tmp_path / "test.features.parquet")
    assert facts["kind"] == "features" and facts["engine"] == engine


def test_an_image_that_cannot_be_read_is_a_row_with_a_status(data, tmp_path):
    copy = shutil.copytree(data, tmp_path / "data")
    table = pq.read_table(copy / "test/0.parquet")
    paths = [str(copy / "images" / Path(p).name) for p in table["path"].to_pylist()]
    column = table.column_names.index("path")
    write_table(table.set_column(column, "path", pa.array(paths)), copy / "test/0.parquet")
    Path(paths[0]).write_bytes(b"no image")
    rows = open_store(compute(copy, tmp_path, "test"))[:, 0]
    assert np.isnan(rows[0]).all() and np.isfinite(rows[1:8]).all()
    status = pq.read_table(tmp_path / "test.features.parquet")["status"].to_pylist()
    assert status[0] == "not_an_image" and set(status[1:]) == {"ok"}


def test_only_the_last_layer_learns_and_the_model_is_an_ordinary_one(data, tmp_path):
    output = train(data, tmp_path / "out")
    network, _ = load_classifier(output / "model", torch.device("cpu"))
    start = load_file(data / "trunk.safetensors")
    for name, weight in network.state_dict().items():
        if not name.startswith("head.fc"):
            assert torch.equal(weight, start[name]), name
    assert network.get_classifier().weight.abs().sum() > 0
    # The whole network gives the same scores for the images as the head for their features.
    history = pq.read_table(output / "history.parquet").to_pandas()
    assert history.epoch.tolist() == list(range(1, 13))
    predict(data, output / "model", "test", tmp_path / "test.parquet")
    measured = measure_table(tmp_path / "test.parquet", data / "images.parquet", "ignore", "all")
    assert measured["mAP"] == pytest.approx(history.test_mAP.iloc[-1])
    predict(data, output / "model", "train", tmp_path / "train.parquet")
    probabilities = read_scores(tmp_path / "train.parquet")[2]
    assert (probabilities >= 0.5).sum() == (halfway_labels(data, output) >= 0.5).sum()


def halfway_labels(data: Path, output: Path) -> np.ndarray:
    tables = (data / "labels.parquet", output / "refined_labels.parquet")
    latents = [to_latent(torch.from_numpy(read_scores(table)[2])) for table in tables]
    return to_label(halfway(*latents)).numpy()


def test_the_head_learns_from_labels_halfway_to_the_refined_ones(data, tmp_path):
    output = train(data, tmp_path / "aligned")
    halfway = halfway_labels(data, output)
    copy = shutil.copytree(data, tmp_path / "data")
    ids, classes, first = read_scores(data / "labels.parquet")
    np.testing.assert_allclose(halfway.mean(axis=0), first.mean(axis=0), atol=1e-5)
    assert np.abs(halfway - first).max() > 0.05
    table = score_table(ids["image_id"], ids["path"], classes, halfway)
    write_table(describe(table, "scores", classes=classes), copy / "labels.parquet")
    fixed = train(copy, tmp_path / "fixed", alignment={"enabled": False})
    ours, its = (load_file(o / "model/model.safetensors") for o in (output, fixed))
    for name, weight in ours.items():
        torch.testing.assert_close(weight, its[name], rtol=1e-3, atol=1e-4, msg=name)


def test_labels_move_in_the_first_round_alone(data, tmp_path):
    history = pq.read_table(train(data, tmp_path) / "history.parquet").to_pandas()
    moved = history.label_movement > 1e-6
    assert moved.tolist() == [False] * 2 + [True] * 4 + [False] * 6
    fixed = train(data, tmp_path / "fixed", alignment={"enabled": False})
    assert len(pq.read_table(fixed / "history.parquet")) == 6


@pytest.mark.parametrize("epoch", [3, 6, 9])
def test_a_training_that_was_cut_short_goes_on_to_the_same_result(
    data, tmp_path, monkeypatch, epoch
):
    expected = train(data, tmp_path / "whole")
    save, saved = steps_train._save_checkpoint, []

    def save_and_stop(*arguments):
        save(*arguments)
        saved.append(arguments)
        if len(saved) == epoch:
            raise KeyboardInterrupt

    monkeypatch.setattr(steps_train, "_save_checkpoint", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        train(data, tmp_path / "cut")
    monkeypatch.undo()
    train(data, tmp_path / "cut")
    for name in ("model/model.safetensors",):
        assert (tmp_path / "cut" / name).read_bytes() == (expected / name).read_bytes()
    found = read_scores(tmp_path / "cut/refined_labels.parquet")[2]
    assert np.array_equal(found, read_scores(expected / "refined_labels.parquet")[2])


def test_a_frozen_trunk_needs_features_and_weights(data, tmp_path):
    text = network_settings(data, trunk="frozen", weights=None)
    assert "needs 'weights'" in message_of(read_training, text)
    settings = read_training(network_settings(data, trunk="frozen"))
    with pytest.raises(UserError, match="--features"):
        train_classifier(
            inputs=Inputs(data / "labels.parquet", data / "images.parquet"),
            settings=settings,
            difficult="ignore",
            max_pixels=10_000,
            max_failed_share=0.05,
            machine=Machine("cpu"),
            output=tmp_path,
        )


@given(arrays(np.float32, (7, 3), elements=st.floats(0, 1, width=32)), st.integers(0, 2**32 - 1))
def test_probabilities_name_as_much_as_the_labels(labels, seed):
    logits = np.random.default_rng(seed).normal(3, 5, labels.shape)
    slope, bias = match_labels(logits, labels)
    found = 1 / (1 + np.exp(-(slope * logits + bias)))
    assert slope > 0 and (found >= 0.5).sum() == (labels >= 0.5).sum()


def test_a_label_like_probabilities_are_given_back():
    """Logits that equal the labels' own need no other slope or bias."""
    random = np.random.default_rng(0)
    logits = random.normal(-2, 2, (5000, 4))
    slope, bias = match_labels(logits, 1 / (1 + np.exp(-logits)))
    assert slope == pytest.approx(1, abs=0.02) and bias == pytest.approx(0, abs=0.02)
