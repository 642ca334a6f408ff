"""Stage features, and a training on them: only the last layer learns."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import timm
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from messages import message_of
from PIL import Image
from safetensors.torch import save_file

from cdul_steps.config import read_network
from cdul_steps.data.stores import new_store, open_store
from cdul_steps.data.tables import read_facts
from cdul_steps.models.classifier import new_classifier
from cdul_steps.models.timm_encoder import pooled_features
from cdul_steps.training.features import FeatureLoader, Standardised, read_features

MODEL = "test_byobnet"
SIZE = 40


def features_by_hand(images: list[Path], weights: Path) -> np.ndarray:
    """Features of images one by one, with timm, Pillow and NumPy alone: float32 (N, D)."""
    network = timm.create_model(MODEL, num_classes=0, checkpoint_path="").eval()
    state = {k: v for k, v in torch.load(weights).items() if not k.startswith("head.fc")}
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
    found = Standardised(features)(features).numpy()
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
    expected, found = head(standardised(features)), onto(torch.from_numpy(features))
    spread = max(1, float((standardised.scale * torch.from_numpy(np.abs(features))).max()))
    assert torch.allclose(expected, found, atol=1e-4 * spread)


def test_images_without_features_take_no_part():
    features = np.array([[1, 2], [np.nan, np.nan], [3, 6]], np.float32)
    standardised = Standardised(features)
    assert standardised.mean.tolist() == [2, 4]
    loader = FeatureLoader(standardised(features))
    index, found = zip(*loader.epoch(0, [[2, 1], [1], [0]]), strict=True)
    assert [i.tolist() for i in index] == [[2], [], [0]]
    assert found[0].tolist() == [[1, 1]] and found[1].shape == (0, 2)


def test_without_any_features_nothing_is_learnt():
    assert "no image" in message_of(Standardised, np.full((2, 3), np.nan, np.float32))


@pytest.mark.parametrize("rows", [[], [0], [6, 0, 3, 3], [2, 1]])
def test_rows_are_read_in_the_order_asked_for(tmp_path, rows):
    values = np.random.default_rng(0).normal(size=(7, 1, 3)).astype(np.float32)
    with new_store(tmp_path / "a.zarr", values.shape, 2, "float32", {"kind": "features"}) as store:
        store[:] = values
    found = read_features(tmp_path / "a.zarr", np.array(rows, int))
    assert np.array_equal(found, values[rows, 0])
    assert "no row 7" in message_of(read_features, tmp_path / "a.zarr", np.array([7]))


def test_a_network_without_a_linear_last_layer_cannot_be_frozen():
    network, _ = new_classifier("test_vit", ["a"], {"num_classes": 0} if False else {}, None)
    network.reset_classifier(0)
    assert "cannot be frozen" in message_of(pooled_features, network)
