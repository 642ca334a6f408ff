"""One job per GPU: choosing one that no other process has taken."""

import multiprocessing
import os

import pytest
import torch

from cdul_steps.errors import UserError
from cdul_steps.models.device import Machine, choose_device, claim, stop_without

GPUS = ["GPU-a", "GPU-b", "GPU-c"]
FORK = multiprocessing.get_context("fork")


def take(pipe, gpus, folder, count):
    """Wait for a message, so that all start together; keep the GPU until the next message."""
    pipe.recv()
    pipe.send(claim(gpus, folder, count))
    pipe.recv()


@pytest.fixture
def job(tmp_path):
    """Start a process that claims one of the named GPUs; returns it and the pipe to it."""
    started = []

    def start(*gpus, count=1):
        ours, theirs = FORK.Pipe()
        process = FORK.Process(target=take, args=(theirs, gpus, tmp_path, count))
        process.start()
        started.append(process)
        return process, ours

    yield start
    for process in started:
        process.kill()
        process.join()


def go(*jobs):
    """The GPUs that the jobs take if all ask at the same time."""
    for _, pipe in jobs:
        pipe.send("go")
    return [pipe.recv() for _, pipe in jobs]


def test_no_two_processes_take_one_gpu(job):
    found = go(*(job(*GPUS) for _ in range(5)))
    assert sorted(found) == [[], [], [0], [1], [2]]


def test_a_gpu_is_free_again_however_its_job_ended(job):
    done, killed = job(*GPUS), job(*GPUS)
    assert go(done) + go(killed) == [[0], [1]]
    done[1].send("end")
    killed[0].kill()
    for process, _ in (done, killed):
        process.join()
    assert sorted(go(job(*GPUS), job(*GPUS))) == [[0], [1]]


def test_several_gpus_are_taken_together_or_not_at_all(job):
    assert go(job(*GPUS, count=2)) == [[0, 1]]
    # The third remains for jobs that need only one.
    assert go(job(*GPUS, count=2)) + go(job(*GPUS)) == [[], [2]]


def test_the_name_counts_not_the_number(job):
    # As with SLURM, each job sees its own GPU as number 0.
    assert go(job("GPU-a")) + go(job("GPU-b")) == [[0], [0]]
    assert go(job("GPU-b", "GPU-a", "GPU-c")) == [[2]]


def test_a_process_keeps_its_gpu(tmp_path):
    assert claim(GPUS, tmp_path) == [0]
    assert claim(GPUS, tmp_path) == [0]


def test_children_do_not_share_the_gpu(job, tmp_path):
    assert claim(GPUS[:1], tmp_path) == [0]
    assert go(job(*GPUS[:1])) == [[]]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu():
    assert choose_device("auto") == choose_device("cpu") == torch.device("cpu")
    for name in ("cuda", "cuda:0", "gpu"):
        with pytest.raises(UserError, match=f"device '{name}' cannot be used here"):
            choose_device(name)


@pytest.mark.parametrize(
    ("threads", "workers", "expected"),
    [(4, -1, (3, 1)), (1, -1, (1, 1)), (4, 2, (4, 2)), (4, 0, (4, 0))],
)
def test_a_decoding_process_takes_its_thread_from_torch(threads, workers, expected):
    before = torch.get_num_threads()
    try:
        _, found = Machine("cpu", threads=threads, workers=workers).set_up(cpu_workers=1)
        assert (torch.get_num_threads(), found) == expected
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("parent", ["alive", "gone"])
def test_a_worker_without_its_parent_ends(parent):
    process = FORK.Process(
        target=stop_without, args=(os.getpid() if parent == "alive" else 1 << 22, 0)
    )
    process.start()
    process.join()
    assert process.exitcode == (parent == "gone")
