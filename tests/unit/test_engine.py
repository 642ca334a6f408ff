"""Engines of the image tower: equal vectors, and the choice of the faster one."""

import numpy as np
import pytest
import tiny
import torch

from cdul_steps.errors import UserError
from cdul_steps.method.similarity import unit
from cdul_steps.models import engine
from cdul_steps.models.encoder import ImageEncoder, load_clip
from cdul_steps.models.engine import OnnxEncoder, choose_engine

CONVOLUTIONS = {
    "vision_cfg": {
        "timm_model_name": "resnet10t",
        "timm_model_pretrained": False,
        "timm_pool": "",
        "timm_proj": "linear",
        "image_size": 64,
    }
}


@pytest.fixture(scope="module", params=["transformer", "convolutions"])
def encoder(request, tmp_path_factory) -> ImageEncoder:
    folder = tmp_path_factory.mktemp("clip")
    model = tiny.make_clip(folder, **(CONVOLUTIONS if request.param == "convolutions" else {}))
    return ImageEncoder(load_clip(model), "fp32", torch.device("cpu"))


def views(encoder: ImageEncoder, count: int) -> torch.Tensor:
    shape = (count, 3, *encoder.preprocess.size)
    return torch.from_numpy(np.random.default_rng(1).integers(0, 256, shape, np.uint8))


@pytest.mark.parametrize("batch", [1, 3, 7])
def test_onnx_gives_the_vectors_of_torch(encoder, batch):
    some = views(encoder, batch)
    cosine = (unit(encoder(some)) * unit(OnnxEncoder(encoder)(some))).sum(axis=1)
    assert cosine.min() > 0.99999


def test_short_work_is_not_measured(encoder):
    choice = choose_engine(encoder, "auto", 0, views=10, work=1)
    assert (choice.engine, choice.encoder, choice.batch_size) == ("torch", encoder, 5)


def test_long_work_takes_what_is_faster(encoder, monkeypatch):
    speed = {"torch": 1.0, "onnx": 0.5}
    larger = 0.1

    def seconds(tower, views):
        return speed["torch" if tower is encoder else "onnx"] / len(views) ** larger

    def choose(name: str, batch_size: int = 0):
        choice = choose_engine(encoder, name, batch_size, views=10, work=1e9)
        return choice.engine, choice.batch_size

    monkeypatch.setattr(engine, "_seconds", seconds)
    assert choose("auto") == ("onnx", 10)
    assert choose("torch") == ("torch", 10)
    larger = -0.1
    assert choose("auto") == ("onnx", 1)
    assert choose("auto", 3) == ("onnx", 3)
    larger = 0.02  # within the margin, as this speed is
    speed["onnx"] = 0.97
    assert choose("auto") == ("torch", 1)


def test_threads_are_left_as_they_were(encoder):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        choose_engine(encoder, "auto", 0, views=4, work=1)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_an_engine_with_other_vectors_is_refused(encoder, monkeypatch, capsys):
    monkeypatch.setattr(OnnxEncoder, "__call__", lambda self, views: -encoder(views))
    with pytest.raises(UserError, match="differ"):
        choose_engine(encoder, "onnx", 0, views=4, work=1)
    assert choose_engine(encoder, "auto", 0, views=4, work=1e9).engine == "torch"
    assert "differ" in capsys.readouterr().err


def test_half_precision_stays_with_torch(tmp_path):
    network = load_clip(tiny.make_clip(tmp_path), precision="bf16")
    encoder = ImageEncoder(network, "bf16", torch.device("cpu"))
    assert choose_engine(encoder, "auto", 0, views=4, work=1e9).engine == "torch"
