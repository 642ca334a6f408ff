"""Encoding and training on a GPU give the same as on the CPU, also in half precision."""

import os
import subprocess
import sys
from pathlib import Path

import encode_runs
import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny
import torch
import training_runs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

# By its number: `cuda` would reserve a GPU until the tests end.
GPU = "cuda:0"
JOB = """
import sys
from cdul_steps.models.device import choose_device
print(choose_device("auto"), flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> str:
    return tiny.make_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for i in range(5):
        tiny.noise(folder / f"images/{i}.png", i)
    return tiny.folder_manifest(folder / "images", folder / "manifest") / "0.parquet"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return training_runs.make_data(tmp_path_factory.mktemp("train") / "data")


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_vectors_are_those_of_the_cpu(manifest, clip, tmp_path, precision):
    expected, _ = encode_runs.run(manifest, tmp_path / "cpu", clip)
    rows, outcome = encode_runs.run(
        manifest, tmp_path / "gpu", clip, device=GPU, precision=precision, workers=2
    )
    assert set(encode_runs.statuses(outcome).values()) == {"ok"}
    assert encode_runs.cosines(rows, expected).min() >= 0.999


def test_encode_in_batches(manifest, clip, tmp_path):
    expected, _ = encode_runs.run(manifest, tmp_path / "a", clip, device=GPU)
    rows, _ = encode_runs.run(manifest, tmp_path / "b", clip, device=GPU, batch_size=3)
    assert encode_runs.cosines(rows, expected).min() >= 0.99999


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_train_lowers_the_loss(data, tmp_path, precision):
    training_runs.run(data, tmp_path, device=GPU, precision=precision, workers=2, epochs=8)
    table = training_runs.history(tmp_path)
    assert table["loss"].iloc[-1] < 0.9 * table["loss"].iloc[0]
    assert (table["label_movement"][1:] > 0).all()
    assert pq.read_table(tmp_path / "refined_labels.parquet").num_rows == 24


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")
def test_two_gpus_do_what_one_does(data, tmp_path):
    """With batch norm over the whole batch."""
    settings = {**training_runs.PLAIN, "model": "test_resnet", "batch_size": 5}
    one = training_runs.run(data, tmp_path / "one", device=GPU, **settings)
    two = training_runs.run(data, tmp_path / "two", device="cuda", gpus=2, **settings)
    np.testing.assert_allclose(training_runs.refined(one), training_runs.refined(two), atol=1e-2)


def test_resume(data, tmp_path, monkeypatch, capsys):
    settings = {"device": GPU, "precision": "fp16"}
    training_runs.interrupt(monkeypatch, data, tmp_path, **settings)
    training_runs.run(data, tmp_path, **settings)
    assert "resuming after epoch 2 of 4" in capsys.readouterr().err
    assert np.isfinite(training_runs.history(tmp_path)["loss"]).all()


def test_a_job_waits_for_the_gpu_of_another(tmp_path):
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path), "CUDA_VISIBLE_DEVICES": "0"}

    def start() -> subprocess.Popen:
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        return subprocess.Popen([sys.executable, "-c", JOB], env=environment, text=True, **pipes)

    with start() as first:
        assert first.stdout.readline() == "cuda:0\n"
        with start() as second:
            assert "waiting" in second.stderr.readline()
            first.kill()
            assert second.stdout.readline() == "cuda:0\n"
            second.kill()
