"""Export: the file alone gives the same scores as PyTorch."""

import json
import re
import subprocess
import sys
from ast import literal_eval
from pathlib import Path

import numpy as np
import onnxruntime
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from messages import message_of
from PIL import Image
from safetensors.torch import load_file, save_file

from cdul_steps.models.classifier import Card, load_classifier, new_classifier, save_classifier
from cdul_steps.steps.predict import predict_images
from cdul_steps.tools import export
from cdul_steps.tools.export import EXAMPLES, FORMATS, export_classifier

pytestmark = pytest.mark.slow
CLASSES = ["cat", "dog", "élan | *"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A classifier whose scores differ between images."""
    return make_model(tmp_path_factory.mktemp("model"))


def make_model(folder: Path, **changes) -> Path:
    torch.manual_seed(0)
    network, _ = new_classifier("test_byobnet", CLASSES, {}, None)
    network.get_classifier().weight.data.normal_()
    card = Card(
        model="test_byobnet",
        classes=CLASSES,
        image_size=64,
        mean=[0.5, 0.4, 0.3],
        std=[0.2, 0.25, 0.3],
        interpolation="bicubic",
        threshold=0.4,
        **changes,
    )
    save_classifier(network, card, folder)
    (folder / "README.md").write_text("# The card\n")
    return folder


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory) -> dict[str, Path]:
    """One folder per format."""
    folder = tmp_path_factory.mktemp("exported")
    for name in FORMATS:
        export_classifier(model=model, format_=name, output=folder / name)
    return {name: folder / name for name in FORMATS}


@pytest.fixture(scope="module")
def photo(tmp_path_factory) -> Path:
    """A photograph that lies on its side, without transparency."""
    path = tmp_path_factory.mktemp("photo") / "side.jpg"
    image = Image.open(tiny.noise(path.with_suffix(".png"), 3))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(path, exif=exif)
    return path


@pytest.mark.filterwarnings("ignore:`torch.jit.load` is deprecated")
@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("name", FORMATS)
def test_any_batch_gives_what_pytorch_gives(exported, model, name, batch):
    network, card = load_classifier(model, torch.device("cpu"))
    images = np.random.default_rng(batch).integers(0, 256, (batch, 64, 64, 3), dtype=np.uint8)
    with torch.inference_mode():
        pixels = (torch.from_numpy(images).float() / 255 - torch.tensor(card.mean)) / torch.tensor(
            card.std
        )
        expected = network(pixels.permute(0, 3, 1, 2)).sigmoid().numpy()
        found = FORMATS[name][2](exported[name] / FORMATS[name][0])(images)
    assert expected.std() > 0.1
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.filterwarnings("ignore:`torch.jit.load` is deprecated")
def test_the_activation_is_the_models_own(tmp_path):
    model = make_model(tmp_path / "model", activation="softmax")
    export_classifier(model=model, format_="torchscript", output=tmp_path / "out")
    images = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    found = FORMATS["torchscript"][2](tmp_path / "out/model.pt")(images)
    np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-5)


def test_the_onnx_file_says_what_it_is(exported):
    session = onnxruntime.InferenceSession(exported["onnx"] / "model.onnx")
    (images,), (scores,) = session.get_inputs(), session.get_outputs()
    assert (images.name, images.type, images.shape[1:]) == ("images", "tensor(uint8)", [64, 64, 3])
    assert isinstance(images.shape[0], str) and images.shape[0] == scores.shape[0]
    assert (scores.name, scores.type, scores.shape[1:]) == ("probabilities", "tensor(float)", [3])
    inside = json.loads(session.get_modelmeta().custom_metadata_map["cdul"])
    beside = json.loads((exported["onnx"] / "model.json").read_text())
    assert inside == beside
    assert inside["classes"] == CLASSES and inside["threshold"] == 0.4
    assert inside["resize"]["size"] == [64, 64] and inside["resize"]["filter"] == "BICUBIC"


def program_of(readme: Path, name: str) -> str:
    """The program in a README; it must be short."""
    text = readme.read_text()
    assert text.endswith("# The card\n")
    (program,) = re.findall(r"```python\n(.*?)```", text, re.S)
    assert program == EXAMPLES[name] and len([line for line in program.splitlines() if line]) <= 10
    return program


@pytest.fixture(scope="module")
def scores(model, photo, tmp_path_factory) -> dict[str, float]:
    """This project's scores for the photograph."""
    output = tmp_path_factory.mktemp("scores") / "scores.parquet"
    predict_images(
        model=model,
        inputs=[photo],
        output=output,
        threshold=None,
        max_pixels=tiny.MAX_PIXELS,
        machine=tiny.MACHINE,
    )
    return pq.read_table(output).select(CLASSES).to_pylist()[0]


def test_the_readme_runs_without_this_project_and_torch(exported, photo, scores):
    program = program_of(exported["onnx"] / "README.md", "onnx")
    loaded = "print([m for m in ('cdul_steps', 'torch', 'timm') if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-I", "-c", program + loaded, photo],
        cwd=exported["onnx"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found, modules = done.stdout.splitlines()
    assert modules == "[]"
    assert literal_eval(found) == pytest.approx(scores, abs=1e-3)


@pytest.mark.filterwarnings("ignore:`torch.jit.load` is deprecated")
@pytest.mark.parametrize("name", ["pt2", "torchscript"])
def test_the_other_readmes_run(exported, photo, scores, name, monkeypatch, capsys):
    program = program_of(exported[name] / "README.md", name)
    monkeypatch.chdir(exported[name])
    monkeypatch.setattr(sys, "argv", ["-c", str(photo)])
    exec(program, {})
    assert literal_eval(capsys.readouterr().out) == pytest.approx(scores, abs=1e-3)


def test_the_documented_example_is_the_folders(repository):
    assert f"```python\n{EXAMPLES['onnx']}```" in (repository / "docs/export.md").read_text()


def test_a_file_that_differs_is_not_put_in_place(model, tmp_path, monkeypatch):
    name, write, run = FORMATS["torchscript"]

    def wrong(path):
        right = run(path)
        return lambda images: right(images) + 0.01

    monkeypatch.setitem(export.FORMATS, "torchscript", (name, write, wrong))
    text = message_of(
        lambda: export_classifier(model=model, format_="torchscript", output=tmp_path / "out")
    )
    assert "differs from PyTorch by 0.01" in text
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_a_saturated_network_is_compared_too(name, activation, tmp_path, monkeypatch):
    """All its probabilities are 0 or 1, whatever the file computes."""
    model = make_model(tmp_path / "model", activation=activation)
    weights = load_file(model / "model.safetensors")
    weights["head.fc.bias"] = torch.tensor([300.0, -300.0, -300.0])
    save_file(weights, model / "model.safetensors")
    export_classifier(model=model, format_=name, output=tmp_path / "right")

    file, write, run = FORMATS[name]

    def wrong(exported, *rest):
        exported.mean += 40
        write(exported, *rest)

    monkeypatch.setitem(export.FORMATS, name, (file, wrong, run))
    text = message_of(lambda: export_classifier(model=model, format_=name, output=tmp_path / "out"))
    assert "differs from PyTorch by" in text
    assert not list((tmp_path / "out").iterdir())


def test_the_model_folder_is_left_alone(model, tmp_path):
    before = (model / "model.json").read_text()
    text = message_of(
        lambda: export_classifier(model=model, format_="onnx", output=model / "../" / model.name)
    )
    assert "export to another folder" in text
    assert (model / "model.json").read_text() == before


def test_no_model_folder(tmp_path):
    text = message_of(
        lambda: export_classifier(model=tmp_path, format_="onnx", output=tmp_path / "out")
    )
    assert "not a model folder" in text
