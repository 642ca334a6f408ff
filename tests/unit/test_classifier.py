"""The classifier: the sources of its weights, and its folder."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import tiny
import torch
from networks import CLASSES, CPU, MODEL, backbone, card
from PIL import Image
from safetensors.torch import load_file, save_file

from cdul_steps.errors import UserError
from cdul_steps.models.classifier import (
    fitting_args,
    load_classifier,
    new_classifier,
    save_classifier,
    start_head,
)


@pytest.fixture
def saved(tmp_path) -> Path:
    torch.manual_seed(1)
    save_classifier(new_classifier(MODEL, CLASSES, {}, None)[0], card(), tmp_path / "model")
    return tmp_path / "model"


def fails(function, *arguments) -> str:
    with pytest.raises(UserError) as error:
        function(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_random_start_depends_on_the_seed():
    def start(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return torch.cat(
            [p.flatten() for p in new_classifier(MODEL, CLASSES, {}, None)[0].parameters()]
        )

    assert torch.equal(start(0), start(0))
    assert not torch.equal(start(0), start(1))


@pytest.mark.parametrize("model", [MODEL, "resnet10t", "test_vit"])
def test_a_new_head_gives_the_mean_labels(model):
    network, data = new_classifier(model, CLASSES, {}, None)
    labels = torch.tensor([[0.9, 0.2, 0.0], [0.5, 0.1, 0.0]])
    start_head(network, labels)
    size = data["input_size"][1]
    logits = network.eval()(torch.rand(2, 3, size, size))
    expected = torch.tensor([[0.7, 0.15, 0.01]]).expand(2, 3)  # no label at all: 0.01
    torch.testing.assert_close(torch.sigmoid(logits), expected)


def test_data_config():
    network, data = new_classifier(MODEL, CLASSES, {"drop_rate": 0.25}, None)
    assert network(torch.zeros(2, 3, 64, 64)).shape == (2, 3)
    assert data["mean"] == timm.create_model(MODEL).pretrained_cfg["mean"]
    assert data["interpolation"] in ("bicubic", "bilinear")
    assert network.drop_rate == 0.25


@pytest.mark.parametrize("classes", [7, 1000])
def test_start_from_a_file_with_another_head(tmp_path, classes):
    file = backbone(tmp_path / "backbone.safetensors", classes)
    network, _ = new_classifier(MODEL, CLASSES, {}, str(file))
    weights = load_file(file)
    for name, value in network.state_dict().items():
        assert name.startswith("head") or torch.equal(value, weights[name]), name
    assert network.get_classifier().out_features == len(CLASSES)


def test_start_from_a_pytorch_file(tmp_path):
    weights = load_file(backbone(tmp_path / "backbone.safetensors"))
    torch.save(weights, tmp_path / "backbone.pth")
    network, _ = new_classifier(MODEL, CLASSES, {}, str(tmp_path / "backbone.pth"))
    assert torch.equal(network.stem.conv.weight, weights["stem.conv.weight"])


def test_file_of_another_model(tmp_path):
    file = backbone(tmp_path / "other.safetensors", model="test_efficientnet")
    message = fails(new_classifier, MODEL, CLASSES, {}, str(file))
    assert "other.safetensors cannot be made: " in message


def test_file_of_half_the_model(tmp_path):
    weights = load_file(backbone(tmp_path / "whole.safetensors"))
    half = {k: v for k, v in weights.items() if not k.startswith("stages.3")}
    save_file(half, tmp_path / "half.safetensors")
    message = fails(new_classifier, MODEL, CLASSES, {}, str(tmp_path / "half.safetensors"))
    assert "do not contain stages.3" in message


def test_torn_file(tmp_path):
    file = backbone(tmp_path / "torn.safetensors")
    file.write_bytes(file.read_bytes()[:1000])
    assert str(file) in fails(new_classifier, MODEL, CLASSES, {}, str(file))


def test_missing_file():
    message = fails(new_classifier, MODEL, CLASSES, {}, "nowhere.safetensors")
    assert message.startswith("training: weights nowhere.safetensors: no such file")


def test_unknown_model():
    assert "'resnet9999'" in fails(new_classifier, "resnet9999", CLASSES, {}, None)


def test_unknown_argument():
    assert "colour" in fails(new_classifier, MODEL, CLASSES, {"colour": 1}, None)
    assert "num_classes" in fails(new_classifier, MODEL, CLASSES, {"num_classes": 1}, None)


def test_timm_weights_without_network(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert f"'{MODEL}' with timm's weights" in fails(new_classifier, MODEL, CLASSES, {}, "timm")


@pytest.mark.parametrize("model", [MODEL, "test_resnet", "test_vit"])
def test_round_trip(tmp_path, model):
    # With the same number of threads and memory layout, the results are the same.
    size = 160 if model == "test_vit" else 40
    network, _ = new_classifier(model, CLASSES, {"drop_rate": 0.1}, None)
    written = card(model=model, model_args={"drop_rate": 0.1}, image_size=size, provenance={"a": 1})
    save_classifier(network, written, tmp_path / "model")
    loaded, read = load_classifier(tmp_path / "model", CPU)
    images = written.normalize(torch.randint(0, 256, (3, 3, size, size), dtype=torch.uint8))
    assert read == written
    assert not loaded.training
    with torch.inference_mode():
        assert torch.equal(loaded(images), network.eval()(images))
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == [
        "model.json",
        "model.safetensors",
    ]


# The smallest network of each kind with a fixed image size.
OWN_SIZE = {
    "vit_tiny_patch16_224": {"depth": 1},
    "deit_tiny_patch16_224": {"depth": 1},
    "deit3_small_patch16_224": {"depth": 1},
    "beit_base_patch16_224": {"depth": 1, "embed_dim": 48, "num_heads": 2},
    "eva02_tiny_patch14_224": {"depth": 1},
    "swin_tiny_patch4_window7_224": {"depths": (1, 1), "num_heads": (1, 2), "embed_dim": 24},
    "swinv2_tiny_window8_256": {"depths": (1, 1), "num_heads": (1, 2), "embed_dim": 24},
    "mixer_s32_224": {},
    "levit_128s": {},
    "maxvit_pico_rw_256": {"depths": (1, 1, 1, 1)},
}


@pytest.mark.parametrize("model", OWN_SIZE)
def test_networks_of_their_own_size_take_another(tmp_path, model):
    size = 128
    state = torch.get_rng_state()
    fitting = fitting_args(model, CLASSES, OWN_SIZE[model], size)
    assert torch.equal(state, torch.get_rng_state())
    network, _ = new_classifier(model, CLASSES, fitting, None)
    written = card(model=model, model_args=fitting, image_size=size)
    save_classifier(network, written, tmp_path)
    loaded, read = load_classifier(tmp_path, CPU)
    images = read.normalize(torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8))
    with torch.inference_mode():
        assert torch.equal(loaded(images), network.eval()(images))


@pytest.mark.parametrize("size", [64, 128])
def test_other_networks_and_their_own_size_need_nothing(size):
    arguments = {"drop_rate": 0.1}
    assert fitting_args("test_resnet", CLASSES, arguments, size) is arguments
    assert fitting_args("levit_128s", CLASSES, arguments, 224) is arguments


def test_pretrained_weights_at_another_size(tmp_path):
    model = "vit_tiny_patch16_224"
    file = backbone(tmp_path / "vit.safetensors", model=model)
    fitting = fitting_args(model, CLASSES, {}, 96)
    network, _ = new_classifier(model, CLASSES, fitting, str(file))
    assert network(torch.zeros(1, 3, 96, 96)).shape == (1, 3)
    weights = load_file(file)
    assert torch.equal(network.blocks[0].attn.qkv.weight, weights["blocks.0.attn.qkv.weight"])


def test_a_network_that_takes_no_other_size():
    sized = {"img_size": 96, "depth": 1}
    message = fails(fitting_args, "vit_tiny_patch16_224", CLASSES, sized, 64)
    assert "takes no images of 64 x 64 pixels; its own are 96 x 96" in message
    message = fails(fitting_args, "halonet26t", CLASSES, {}, 96)
    assert "its own are 256 x 256: set image_size to 256" in message


@pytest.mark.parametrize(
    "arguments",
    [
        {"in_chans": 1},
        {"features_only": True},
        {"global_pool": ""},
        {"block_sizes": 3},
        {"num_classes": 5},
        {"act_layer": "no such"},
    ],
)
def test_arguments_that_make_no_classifier(arguments):
    message = fails(fitting_args, MODEL, CLASSES, arguments, 64)
    assert f"{MODEL!r} with {arguments} is not a classifier of RGB images of 64 x 64" in message


def test_normalize():
    image = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    expected = [-0.1 / 0.4, 0.0, 0.7 / 0.6]
    np.testing.assert_allclose(card().normalize(image).flatten(), expected, atol=1e-6)


def test_resize_squashes(tmp_path):
    image = Image.open(tiny.noise(tmp_path / "a.png", 0, (90, 50))).convert("RGB")
    pixels = card().resize(image)
    assert pixels.shape == (3, 40, 40)
    expected = np.asarray(image.resize((40, 40), Image.Resampling.BICUBIC))
    assert np.array_equal(pixels, expected.transpose(2, 0, 1))
    part = card().resize(image, (10, 10, 50, 50))
    assert np.array_equal(part, np.asarray(image.crop((10, 10, 50, 50))).transpose(2, 0, 1))


@pytest.mark.parametrize("name", ["model.json", "model.safetensors"])
def test_folder_without(saved, name):
    (saved / name).unlink()
    assert fails(load_classifier, saved, CPU) == f"{saved}: not a model folder, {name} is missing"


def test_no_folder(tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "nowhere", tmp_path / "file"):
        assert "not a model folder" in fails(load_classifier, folder, CPU)


def test_torn_weights(saved):
    whole = (saved / "model.safetensors").read_bytes()
    (saved / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    assert "the model cannot be loaded" in fails(load_classifier, saved, CPU)


def test_weights_of_another_model(saved):
    torch.manual_seed(0)
    other = saved.parent / "other"
    save_classifier(new_classifier("test_resnet", CLASSES, {}, None)[0], card(), other)
    shutil.copy(other / "model.safetensors", saved)
    assert "the model cannot be loaded" in fails(load_classifier, saved, CPU)


@pytest.mark.parametrize(
    "change",
    [
        {"classes": CLASSES[:2]},
        {"model": "resnet9999"},
        {"unknown": 1},
        {"model_args": {"x": 1}},
        {"activation": "relu"},
    ],
)
def test_card_that_does_not_fit(saved, change):
    values = json.loads((saved / "model.json").read_text())
    (saved / "model.json").write_text(json.dumps({**values, **change}))
    assert "the model cannot be loaded" in fails(load_classifier, saved, CPU)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "null"])
def test_card_that_is_none(saved, text):
    (saved / "model.json").write_text(text)
    assert "the model cannot be loaded" in fails(load_classifier, saved, CPU)
