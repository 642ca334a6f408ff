"""Fine-tuning from a classifier: where it starts, and what it refuses to start from."""

from pathlib import Path

import pytest
import torch
import training_runs
from safetensors.torch import load_file, save_file
from training_runs import fails, interrupt, run, same

WEIGHTS = "model/model.safetensors"
STILL = {"learning_rate": 1e-12, "epochs": 1, "alignment": training_runs.OFF, "flip": False}
HEAD = ("fc.weight", "fc.bias")
"""The names of the last layer's weights, which `match_labels` changes too."""


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return training_runs.make_data(tmp_path_factory.mktemp("data") / "data")


@pytest.fixture(scope="module")
def first(data, tmp_path_factory) -> Path:
    return run(data, tmp_path_factory.mktemp("first"))


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / WEIGHTS)


def test_it_starts_where_the_first_has_ended(data, first, tmp_path):
    run(data, tmp_path, start=first / "model", **STILL)
    before, after = weights(first), weights(tmp_path)
    statistics = {name for name in before if "running" in name or "tracked" in name}
    for name in before.keys() - set(HEAD) - statistics:
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=1e-6, msg=name)
    slopes = after["fc.weight"] / before["fc.weight"]
    torch.testing.assert_close(slopes, slopes.mean().expand_as(slopes), rtol=1e-3, atol=0)


def test_another_start_is_another_training(data, first, tmp_path, monkeypatch, capsys):
    interrupt(monkeypatch, data, tmp_path / "a", start=first / "model")
    run(data, tmp_path / "a", start=first / "model")
    assert "resuming after epoch 2" in capsys.readouterr().err
    assert same(tmp_path / "a", run(data, tmp_path / "b", start=first / "model"))
    interrupt(monkeypatch, data, tmp_path / "c", start=first / "model")
    changed = weights(first)
    changed["fc.bias"] += 1
    (tmp_path / "other").mkdir()
    (tmp_path / "other/model.json").write_text((first / "model/model.json").read_text())
    save_file(changed, tmp_path / "other/model.safetensors")
    run(data, tmp_path / "c", start=tmp_path / "other")
    assert "from other settings" in capsys.readouterr().err


def test_what_cannot_be_started_from_is_one_line(data, first, tmp_path):
    start = first / "model"
    message = fails(data, tmp_path, start=start, model="test_byobnet", model_args={})
    assert "classifier's model is test_resnet, and this training's test_byobnet" in message
    assert "model_args" in fails(data, tmp_path, start=start, model_args={"drop_rate": 0.3})
    assert "not a model folder" in fails(data, tmp_path, start=tmp_path)
    assert "start_from needs --start" in fails(data, tmp_path, start_from="first")
    assert not (tmp_path / "model").exists()
