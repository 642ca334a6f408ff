"""Interrupted runs: the next run finishes them with the same result."""

import shutil
import signal
import time

import psutil
import pytest
from copies import SMALL_TRAINING, Project, copy_project
from jobs import find_job, leftovers, same, workers

SHARDS = 3
SIMILARITY = "results/demo/tiny-clip/similarity/train.zarr"
TRAINING = "results/demo/tiny-clip/final/small"
REFINED = f"{TRAINING}/refined_labels.parquet"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Project:
    """A reduced demo up to its training, run without interruption."""
    project = copy_project(tmp_path_factory.mktemp("undisturbed") / "project")
    scenes = {"train": 40 * SHARDS, "test": 1}
    project.config = {
        "datasets": {"demo": {"shard_size": 40, "scenes": scenes}},
        "run": {"trainings": ["small"]},
        "trainings": {"small": {**SMALL_TRAINING, "epochs": 12}},
    }
    project.snakemake(REFINED)
    return project


@pytest.fixture
def project(undisturbed, tmp_path) -> Project:
    """A copy of the finished run."""
    shutil.copytree(undisturbed.folder, tmp_path / "project", symlinks=True)
    return Project(tmp_path / "project", undisturbed.config)


def forget_shards(project: Project) -> None:
    encoder = project.results / "demo/tiny-clip"
    shutil.rmtree(encoder / "embeddings/train.zarr/c")
    shutil.rmtree(encoder / "encode/train")
    shutil.rmtree(project.folder / SIMILARITY)


def is_whole(project: Project, undisturbed: Project) -> bool:
    """Whether all vectors and similarities exist and are correct."""
    assert len(project.shard_times("demo", "tiny-clip")) == SHARDS
    embeddings = "results/demo/tiny-clip/embeddings/train.zarr/**/*"
    return same(project, undisturbed, embeddings, f"{SIMILARITY}/**/*")


def test_killed_encode_jobs(project, undisturbed):
    forget_shards(project)
    run = project.start(SIMILARITY)
    # A worker process of one job, and another job with all its processes.
    first = find_job(run, "encode")
    workers(first)[0].kill()
    second = find_job(run, "encode", (first,))
    second.kill()
    assert run.communicate() and run.returncode == 1
    before = project.shard_times("demo", "tiny-clip")
    assert len(before) == SHARDS - 2
    project.snakemake(SIMILARITY)
    after = project.shard_times("demo", "tiny-clip")
    assert {shard: after[shard] for shard in before} == before
    assert is_whole(project, undisturbed)
    assert not leftovers(project)


def test_killed_snakemake(project, undisturbed):
    forget_shards(project)
    run = project.start(SIMILARITY)
    first = find_job(run, "encode")
    second = find_job(run, "encode", (first,))
    run.kill()
    run.wait()
    before = project.shard_times("demo", "tiny-clip")
    assert second.is_running()
    refused = project.snakemake(SIMILARITY, check=False)
    assert refused.returncode == 1 and "--unlock" in refused.stdout
    project.snakemake("--unlock")
    project.snakemake(SIMILARITY)
    after = project.shard_times("demo", "tiny-clip")
    assert len(before) == 1 and {shard: after[shard] for shard in before} == before
    assert is_whole(project, undisturbed)
    psutil.wait_procs([second])
    assert is_whole(project, undisturbed)
    # If the orphan wrote its shard last, its similarities are computed again.
    assert project.plan(SIMILARITY) in ({}, {"similarity": 1})
    project.snakemake(SIMILARITY)
    assert is_whole(project, undisturbed)
    assert project.plan(SIMILARITY) == {}


def test_training_that_is_told_to_stop(project, undisturbed):
    shutil.rmtree(project.folder / TRAINING)
    run = project.start(REFINED)
    job = find_job(run, "train")
    log = project.results / "logs/train/demo/tiny-clip/final/small.log"
    while "epoch 3:" not in log.read_text():
        time.sleep(0.01)
    at_work = workers(job)
    job.send_signal(signal.SIGTERM)
    assert run.communicate() and run.returncode == 1
    assert not any(worker.is_running() for worker in at_work)
    assert "Traceback" not in log.read_text()
    assert [p.name for p in (project.folder / TRAINING).iterdir()] == ["checkpoint.pt"]
    project.snakemake(REFINED)
    assert "resuming after epoch" in log.read_text()
    assert same(project, undisturbed, f"{TRAINING}/model/*", REFINED)
    assert not leftovers(project)
