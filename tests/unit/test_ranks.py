"""Training in several processes gives the same as in one, and all end together."""

import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import training_runs
from safetensors.torch import load_file
from torch.nn.parallel import DistributedDataParallel
from training_runs import PLAIN

from cdul_steps.data.corrections import UNKNOWN
from cdul_steps.errors import UserError
from cdul_steps.models.device import several_devices
from cdul_steps.steps import train
from cdul_steps.training.ranks import Ranks, run_ranks

pytestmark = pytest.mark.slow

WEIGHTS = "model/model.safetensors"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """24 images; two in a batch of five cannot be read, so that one rank has no image."""
    folder = training_runs.make_data(tmp_path_factory.mktemp("data") / "data")
    order = np.random.default_rng((0, 0)).permutation(24)
    for i in order[[1, 3]]:
        (folder / f"images/{i}.png").unlink()
    return folder


def assert_close(a: Path, b: Path) -> None:
    """Same weights, refined labels and history, except for rounding."""
    first, second = load_file(a / WEIGHTS), load_file(b / WEIGHTS)
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(training_runs.refined(a), training_runs.refined(b), atol=1e-5)
    for name in set(training_runs.COLUMNS) - {"images_per_second"}:
        ours, theirs = (training_runs.history(f)[name] for f in (a, b))
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5, err_msg=name)


def variants(data: Path, folder: Path) -> dict[str, dict]:
    """Settings of trainings whose processes exchange something."""
    corrected = training_runs.corrected_labels(
        data, folder / "labels.parquet", lambda ids: {(ids[3], "blue"): UNKNOWN}
    )
    # With ROLE, the optimiser learns the labels, and the loss is one of the whole batch.
    role = {**training_runs.VARIANTS["role"], "role": {"learning_rate_scale": 100.0}}
    return {
        "aligned": {**PLAIN, "batch_size": 1},
        "role": {**PLAIN, "batch_size": 5, **role},
        "corrected": {
            **{**PLAIN, "batch_size": 5, "weight_decay": 0.1, "schedule": "cosine"},
            **corrected,
        },
    }


def train_all(ranks: Ranks, device: str, data: Path, folder: Path, settings: dict) -> None:
    """Several trainings in the same processes, because starting them is slow."""
    for name, changes in settings.items():
        values = training_runs.arguments(data, folder / name, workers=1, **changes)
        task = train._Task(**{**values, "machine": replace(values["machine"], gpus=1)})
        train._train(ranks, device, task)


def test_two_processes_do_what_one_does(data, tmp_path):
    settings = variants(data, tmp_path)
    run_ranks(train_all, ["cpu"] * 2, data=data, folder=tmp_path / "two", settings=settings)
    for name, changes in settings.items():
        one, two = training_runs.run(data, tmp_path / name, **changes), tmp_path / "two" / name
        assert (training_runs.history(one)["label_movement"][1:] > 1e-4).all()
        assert_close(one, two)
        assert sorted(p.name for p in two.iterdir()) == sorted(p.name for p in one.iterdir())


def test_another_number_of_devices_goes_on(data, tmp_path, monkeypatch, capfd):
    """The number of devices is not a setting of the training: two can use the checkpoint of one."""
    undisturbed = training_runs.run(data, tmp_path / "undisturbed", **PLAIN)
    training_runs.interrupt(monkeypatch, data, tmp_path / "resumed", **PLAIN)
    training_runs.run(data, tmp_path / "resumed", gpus=2, **PLAIN)
    assert capfd.readouterr().err.count("resuming after epoch 2 of 3") == 1
    assert_close(undisturbed, tmp_path / "resumed")


def start(data: Path, output: Path, settings: Path) -> tuple[subprocess.Popen, str]:
    """A training in two processes, as a user starts it, in its third epoch or later."""
    words = ["--labels", data / "labels.parquet", "--images", data / "images.parquet"]
    words += ["--settings", settings, "--output", output, "--device", "cpu", "--devices", "2"]
    words += ["--workers", "1", "--max-pixels", "10000", "--max-failed-share", "0.5"]
    process = subprocess.Popen(
        [sys.executable, "-m", "cdul_steps.cli", "train", *map(str, words)],
        stderr=subprocess.PIPE,
        text=True,
    )
    log = ""
    while "epoch 2:" not in log:
        line = process.stderr.readline()
        assert line, log
        log += line
    return process, log


LONG = {**PLAIN, "epochs": 20}


@pytest.fixture(scope="module")
def long(data, tmp_path_factory) -> Path:
    """An undisturbed training that is long enough to be stopped."""
    return training_runs.run(data, tmp_path_factory.mktemp("long"), **LONG)


@pytest.mark.parametrize("end", ["SIGTERM", "SIGKILL of a rank"])
def test_stopped_and_started_again(data, long, tmp_path, end):
    settings = {**training_runs.SETTINGS, **LONG}
    file = tmp_path / "settings.yaml"
    file.write_text(str(settings).replace("'", '"').replace("True", "true"))
    process, log = start(data, tmp_path / "stopped", file)
    children = psutil.Process(process.pid).children(recursive=True)
    if end == "SIGTERM":
        process.terminate()
    else:
        # Not one of the decoding processes, which are the ranks' children.
        ours = psutil.Process(process.pid).children()
        ranks = [p for p in ours if "spawn_main" in " ".join(p.cmdline())]
        ranks[-1].kill()
    log += process.communicate(timeout=300)[1]
    if end == "SIGTERM":
        assert process.returncode == 128 + signal.SIGTERM
    else:
        assert process.returncode == 1
        assert "cdul: error: train: one of 2 processes was killed" in log
    # The decoding processes of a killed rank may print messages too; ours is one line.
    assert "cdul_steps" not in log.partition("Traceback")[2]
    assert psutil.wait_procs(children, timeout=120)[1] == []
    assert (tmp_path / "stopped/checkpoint.pt").is_file()
    training_runs.run(data, tmp_path / "stopped", **LONG)
    assert_close(long, tmp_path / "stopped")


def test_batch_norm_of_several_processes_is_refused_on_a_cpu(data, tmp_path):
    message = training_runs.fails(data, tmp_path, gpus=2, model="test_resnet")
    assert "batch norm over several processes needs GPUs" in message
    assert not (tmp_path / "model").exists()


def check(ranks: Ranks, device: str, folder: Path) -> None:
    """What each rank receives from the others; run by `run_ranks`."""
    assert ranks.count == 3
    parts = ranks.part([[5, 6, 7, 8], [9]])
    (folder / str(ranks.rank)).write_text(repr(parts))
    assert int(ranks.sum(torch.tensor(ranks.rank))) == 3
    # The first has two images, the second none, the third one.
    index, mine = ranks.whole(torch.tensor([[7, 5], [], [9]][ranks.rank], dtype=torch.int64))
    assert index.tolist() == [7, 5, 9]
    assert mine == [slice(0, 2), slice(2, 2), slice(2, 3)][ranks.rank]
    table = torch.tensor([[0.1, -1e30], [3.0, 4.0], [1 / 3, torch.inf]])
    assert torch.equal(ranks.gather(table[mine], mine, 3), table)
    torch.manual_seed(0)
    network, inputs = torch.nn.Linear(2, 1), torch.randn(3, 2)
    assert ranks.prepare(network) is network
    wrapped = ranks.wrap(network)
    assert isinstance(wrapped, DistributedDataParallel)
    outputs = wrapped(inputs[mine] if ranks.rank != 1 else inputs[:1])[: mine.stop - mine.start]
    ranks.gather(outputs, mine, 3).square().mean().sqrt().backward()
    found = network.weight.grad.clone()
    network.zero_grad()
    network(inputs).square().mean().sqrt().backward()
    torch.testing.assert_close(found, network.weight.grad)


def fail(ranks: Ranks, device: str) -> None:
    if ranks.rank == 1:
        raise OSError(28, "No space left on device", "/here")
    ranks.sum(torch.zeros(1))


def test_what_ranks_exchange(tmp_path):
    run_ranks(check, ["cpu"] * 3, folder=tmp_path)
    found = [(tmp_path / str(rank)).read_text() for rank in range(3)]
    assert found == ["[[5, 8], [9]]", "[[6], []]", "[[7], []]"]


def test_the_first_error_is_the_one_that_is_told():
    with pytest.raises(UserError, match="No space left on device: /here"):
        run_ranks(fail, ["cpu"] * 2)


def test_one_process_is_as_it_was():
    network = torch.nn.BatchNorm1d(2)
    ranks = Ranks()
    assert ranks.prepare(network) is network and ranks.wrap(network) is network
    table = torch.full((2, 2), torch.nan)
    assert ranks.sum(table) is table and ranks.gather(table, slice(0, 2), 2) is table
    assert ranks.whole(table) == (table, slice(0, 2))
    assert ranks.part([[3, 1, 2]]) == [[3, 1, 2]]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_devices_without_a_gpu():
    assert several_devices("cpu", 3) == ["cpu"] * 3
    assert several_devices("auto", 3) == ["cpu"]
    with pytest.raises(UserError, match="3 GPUs are requested, but there are 0"):
        several_devices("cuda", 3)
    with pytest.raises(UserError, match="device 'cuda:0' is a single device"):
        several_devices("cuda:0", 2)
