"""Files that are not weights: each reader says what they are and what to do."""

import gzip
import io
import json
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import open_clip
import pytest
import tiny
import torch
from messages import message_of
from networks import CLASSES, CPU, MODEL, backbone, card
from safetensors.torch import load_file, save_file

from cdul_steps.models.classifier import load_classifier, new_classifier, save_classifier
from cdul_steps.models.encoder import load_clip

NAME = "tiny-clip-of-weights"
REPOSITORY = "example/weights"


@pytest.fixture(scope="module", autouse=True)
def registered(tmp_path_factory):
    configs = tmp_path_factory.mktemp("configs")
    (configs / f"{NAME}.json").write_text(json.dumps(tiny.CLIP))
    open_clip.add_model_config(configs)


@pytest.fixture
def tag(tmp_path, monkeypatch) -> Path:
    """A tag's path in the cache, without network."""
    tags = {"tag": {"hf_hub": f"{REPOSITORY}/"}}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, NAME, tags)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def cached(hub: Path, repository: str, file: Path, name: str) -> Path:
    """Put a file into the cache as the hub does: a blob, and a link of its name to it."""
    place = hub / f"models--{repository.replace('/', '--')}"
    for folder in ("refs", "blobs", "snapshots/" + "0" * 40):
        (place / folder).mkdir(parents=True, exist_ok=True)
    (place / "refs/main").write_text("0" * 40)
    blob = place / "blobs" / f"0123{name}"
    blob.write_bytes(file.read_bytes())
    (place / "snapshots" / ("0" * 40) / name).symlink_to(blob)
    return blob


def script(path: Path, weights: dict) -> None:
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(path))


def numpy_scalar(path: Path, weights: dict) -> None:
    torch.save({"state_dict": weights, "best": np.float64(1)}, path)


def half(path: Path, weights: dict) -> None:
    buffer = io.BytesIO()
    torch.save(weights, buffer)
    path.write_bytes(buffer.getvalue()[: buffer.tell() // 2])


def half_of_an_old_form(path: Path, weights: dict) -> None:
    buffer = io.BytesIO()
    torch.save(weights, buffer, _use_new_zipfile_serialization=False)
    path.write_bytes(buffer.getvalue()[: buffer.tell() // 2])


def half_safetensors(path: Path, weights: dict) -> None:
    save_file(weights, path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def packed(path: Path, weights: dict) -> None:
    path.write_bytes(gzip.compress(b"weights"))


def tar(path: Path, weights: dict) -> None:
    with tarfile.open(path, "w") as archive:
        archive.add(__file__, "weights.py")


def archive(path: Path, weights: dict) -> None:
    with zipfile.ZipFile(path, "w") as members:
        members.writestr("model/weights.bin", b"x")


def text(content: str) -> Callable[[Path, dict], None]:
    return lambda path, weights: path.write_text(content)


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n"
FILES: dict[str, tuple[str, Callable[[Path, dict], object], str]] = {
    "TorchScript": ("pt", script, "is a TorchScript program"),
    "NumPy scalar": ("pt", numpy_scalar, "contains Python objects besides tensors (numpy"),
    "truncated": ("pt", half, "is truncated or corrupt"),
    "truncated, of an old form": ("pt", half_of_an_old_form, "is truncated or corrupt"),
    "truncated safetensors": ("safetensors", half_safetensors, "is truncated or corrupt"),
    "web page": ("pt", text("\n<!DOCTYPE html><html>"), "is a web page"),
    "web page as safetensors": ("safetensors", text("<html><body>"), "is a web page"),
    "Git LFS": ("safetensors", text(LFS), "is a Git LFS pointer"),
    "git-annex": ("pt", text("/annex/objects/SHA256E-s1--00.pt"), "is a git-annex pointer"),
    "empty": ("pt", text(""), "is empty"),
    "empty safetensors": ("safetensors", text(""), "is empty"),
    "JSON": ("pt", text('{"error": "not found"}'), "is neither safetensors nor"),
    "gzip": ("pt", packed, "is compressed (gzip)"),
    "tar": ("pt", tar, "is a tar archive"),
    "ZIP": ("pt", archive, "is a ZIP archive"),
    "safetensors as pt": ("pt", lambda p, w: save_file(w, p), "is a safetensors file"),
    "pt as safetensors": ("safetensors", lambda p, w: torch.save(w, p), "is a PyTorch file"),
}


def told(message: str, expected: str) -> None:
    assert expected in message, message
    # The libraries' advice does not apply here, and should not be followed.
    for advice in ("weights_only", "allow_pickle", "pickle", "github.com", "arbitrary code"):
        assert advice not in message, message


@pytest.mark.parametrize("kind", FILES)
def test_a_file_for_the_encoder(tmp_path, kind):
    suffix, write, expected = FILES[kind]
    tiny.make_clip(tmp_path / "clip")
    write(tmp_path / f"w.{suffix}", load_file(tmp_path / "clip" / tiny.WEIGHTS))
    told(message_of(load_clip, NAME, str(tmp_path / f"w.{suffix}")), expected)


@pytest.mark.parametrize("kind", FILES)
def test_a_file_in_the_encoders_folder(tmp_path, kind):
    suffix, write, expected = FILES[kind]
    model = tiny.make_clip(tmp_path)
    weights = load_file(tmp_path / tiny.WEIGHTS)
    (tmp_path / tiny.WEIGHTS).unlink()
    suffix = suffix.replace("pt", "pth")
    write(tmp_path / f"open_clip_pytorch_model.{suffix}", weights)
    told(message_of(load_clip, model), expected)


@pytest.mark.parametrize("kind", FILES)
def test_a_file_for_the_classifier(tmp_path, kind):
    suffix, write, expected = FILES[kind]
    write(tmp_path / f"w.{suffix}", load_file(backbone(tmp_path / "b.safetensors")))
    told(message_of(new_classifier, MODEL, CLASSES, {}, str(tmp_path / f"w.{suffix}")), expected)


@pytest.mark.parametrize("kind", [k for k in FILES if FILES[k][0] == "safetensors"])
def test_a_file_of_a_trained_model(tmp_path, kind):
    _, write, expected = FILES[kind]
    save_classifier(new_classifier(MODEL, CLASSES, {}, None)[0], card(), tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    write(tmp_path / "model.safetensors", weights)
    message = message_of(load_classifier, tmp_path, CPU)
    told(message, expected)
    assert message.startswith(f"{tmp_path / 'model.safetensors'}: ")


def test_a_truncated_file_in_the_cache(tmp_path, tag):
    tiny.make_clip(tmp_path / "clip")
    half_safetensors(tmp_path / "half", load_file(tmp_path / "clip" / tiny.WEIGHTS))
    blob = cached(tag, REPOSITORY, tmp_path / "half", tiny.WEIGHTS)
    told(message_of(load_clip, NAME, "tag"), f"{blob} is truncated or corrupt; delete it")
    config = tmp_path / "clip/open_clip_config.json"
    cached(tag, "example/whole", config, "open_clip_config.json")
    blob = cached(tag, "example/whole", tmp_path / "half", tiny.WEIGHTS)
    told(message_of(load_clip, "hf-hub:example/whole"), f"{blob} is truncated or corrupt; delete")


def test_a_truncated_file_of_timms_in_the_cache(tmp_path, tag):
    half_safetensors(tmp_path / "half", load_file(backbone(tmp_path / "b.safetensors")))
    blob = cached(tag, "timm/test_byobnet.r160_in1k", tmp_path / "half", "model.safetensors")
    message = message_of(new_classifier, MODEL, CLASSES, {}, "timm")
    told(message, f"{blob} is truncated or corrupt; delete it")


def test_weights_of_siglip_for_another_model(tmp_path):
    tiny.make_clip(tmp_path)
    weights = load_file(tmp_path / tiny.WEIGHTS)
    save_file({**weights, "logit_bias": torch.zeros(1)}, tmp_path / "siglip.safetensors")
    told(message_of(load_clip, NAME, str(tmp_path / "siglip.safetensors")), "contains a logit_bias")


def test_weights_of_another_model_are_told_by_their_names(tmp_path):
    tiny.make_clip(tmp_path)
    weights = load_file(tmp_path / tiny.WEIGHTS)
    weights["more"] = weights.pop("visual.proj")
    weights["text_projection"] = torch.zeros(2, 3)
    save_file(weights, tmp_path / "w.safetensors")
    message = message_of(load_clip, NAME, str(tmp_path / "w.safetensors"))
    for part in (
        "lacks visual.proj;",
        "also contains more;",
        "text_projection ([2, 3], not [32, 32]",
    ):
        assert part in message
    torch.save([1, 2], tmp_path / "list.pt")
    told(message_of(load_clip, NAME, str(tmp_path / "list.pt")), "no state dict of this model")
