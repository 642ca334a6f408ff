"""Weights from a file are used like those of their tag: preprocessing and activation."""

import json
import re
from copy import deepcopy
from pathlib import Path

import numpy as np
import open_clip
import pytest
import tiny
import torch
from messages import message_of
from PIL import Image

from cdul_steps.method.similarity import unit
from cdul_steps.models.encoder import ImageEncoder, load_clip
from cdul_steps.models.recipe import assumed

TAGS = [pair for pair in open_clip.list_pretrained() if not pair[0].endswith("-quickgelu")]
SAME = 0.99999
FILE = re.compile(r"the file as 'pretrained'(?: \(of the model ([^)]+)\))? or")


SMALL = deepcopy(tiny.CLIP)
SMALL["text_cfg"]["vocab_size"] = 100


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """Random weights of a tiny architecture, in open_clip's format."""
    folder = tmp_path_factory.mktemp("clip")
    tiny.make_clip(folder, text_cfg=SMALL["text_cfg"])
    return folder / tiny.WEIGHTS


@pytest.fixture
def small(monkeypatch):
    """Every model of open_clip with a tiny architecture, but its own activation and tags."""
    for name in open_clip.list_models():
        quick = {k: v for k, v in open_clip.get_model_config(name).items() if k == "quick_gelu"}
        monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, name, {**deepcopy(SMALL), **quick})


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def put(cache: Path, tag: dict, weights: Path) -> None:
    """Put weights into the hub's cache as those of a tag."""
    repository, _, name = tag["hf_hub"].rpartition("/")
    place = cache / f"models--{repository.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs/main").write_text("0" * 40)
    name = Path(name or tiny.WEIGHTS).with_suffix(".safetensors")
    (place / "snapshots" / ("0" * 40)).mkdir(parents=True)
    (place / "snapshots" / ("0" * 40) / name).symlink_to(weights)


def embed(network) -> np.ndarray:
    """Unit vectors of a photograph's non-square snippets."""
    encoder = ImageEncoder(network, "fp32", torch.device("cpu"))
    pixels = np.random.default_rng(0).integers(0, 256, (9, 13, 3), np.uint8)
    image = Image.fromarray(pixels).resize((130, 90), Image.Resampling.BICUBIC)
    views = encoder.preprocess.views(image, np.array([[0, 0, 130, 90], [10, 0, 50, 80]]))
    return unit(encoder(torch.from_numpy(views)))


@pytest.mark.parametrize(("model", "tag"), TAGS, ids=lambda value: value)
def test_a_file_given_as_the_message_says_has_its_tags_vectors(model, tag, weights, small, cache):
    message = message_of(load_clip, model, tag)
    put(cache, open_clip.get_pretrained_cfg(model, tag), weights)
    own = embed(load_clip(model, tag))
    if named := FILE.search(message):
        by_file = embed(load_clip(named[1] or model, str(weights)))
        assert (own * by_file).sum(axis=1).min() > SAME
    else:
        # No name in open_clip gives these vectors from a file; the folder's config does.
        for name in {model, f"{model}-quickgelu"} & set(open_clip.list_models()):
            assert (own * embed(load_clip(name, str(weights)))).sum(axis=1).min() < SAME
        assert "its folder as 'model: local-dir:FOLDER'" in message


def test_what_was_assumed_is_said(weights, small, tmp_path):
    file = str(weights)
    assert assumed("ViT-B-32", "openai") is None
    assert "mean 0.5 0.5 0.5" in assumed("ViT-B-16-SigLIP", file)
    assert "like all of open_clip's weights" in assumed("RN50", file)
    assert "QuickGELU" in assumed("RN50", file)
    words = assumed("ViT-B-32", file)
    assert ", GELU; weights of openai," in words and "the model ViT-B-32-quickgelu" in words
    assert "laion2b_s32b_b82k need their folder" in assumed("ViT-L-14", file)
    assert "no weights of this model" in assumed("ViT-S-32", file)


def test_a_folder_whose_config_is_silent(tmp_path):
    model = tiny.make_clip(tmp_path)
    assert assumed(model, None) is None
    file = tmp_path / "open_clip_config.json"
    file.write_text(json.dumps({"model_cfg": tiny.CLIP}))
    assert "has no mean and std" in assumed(model, None)
