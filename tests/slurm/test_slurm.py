"""The workflow through profiles/slurm, on a real SLURM."""

import re
import subprocess
import time

import pytest
import yaml
from copies import SMALL_TRAINING, copy_project

pytestmark = pytest.mark.slurm

# Poll often, because the jobs are short; there is no accounting database.
OPTIONS = ["--workflow-profile", "profiles/slurm", "--slurm-status-command", "squeue"]
OPTIONS += ["--slurm-init-seconds-before-status-checks", "1"]


@pytest.fixture
def project(tmp_path):
    """A reduced demo with three shards."""
    project = copy_project(tmp_path / "project")
    cut = {
        "reader": "demo",
        "classes": "config/classes/demo.yaml",
        "splits": {"train": "train"},
        "shard_size": 16,
        "scenes": {"train": 40, "test": 1},
    }
    project.config = {
        "datasets": {"cut": cut},
        "run": {"datasets": ["cut"], "labels": ["final"], "trainings": ["small"]},
        "trainings": {"small": {**SMALL_TRAINING, "epochs": 40}},
    }
    return project


def submissions() -> list[dict[str, str]]:
    """What SLURM reports about each submission so far, in order."""
    command = ["scontrol", "show", "jobs", "--oneliner"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    jobs = [dict(re.findall(r"(\w+)=(\S+)", line)) for line in text.splitlines() if "JobId" in line]
    return sorted(jobs, key=lambda job: int(job["JobId"]))


def gpus(jobs: list[dict[str, str]]) -> list[tuple[str, str | None]]:
    """`(rule or group, requested GPUs)` of each submission."""
    names = [re.match(r"rule_(encode_text|[a-z]+)", job["Comment"])[1] for job in jobs]
    return [(name, job.get("TresPerJob")) for name, job in zip(names, jobs, strict=True)]


def test_the_demo_on_slurm(cluster, project):
    log = project.results / "logs/train/cut/tiny-clip/final/small.log"
    limits = {"main": {"max_runtime": "1d"}, "gpus": {"max_runtime": "1d", "max_gpu": 1}}
    (project.folder / "partitions.yaml").write_text(yaml.safe_dump({"partitions": limits}))
    options = [*OPTIONS, "--slurm-partition-config", "partitions.yaml"]
    options += ["--group-components", "encode=2"]
    project.snakemake(*options, "--until", "manifest")
    # Snakemake's own groups of shards overlap now.
    run = project.start(*options, "--retries", "0")
    while not (log.exists() and "epoch 3:" in log.read_text()):
        assert run.poll() is None, run.stdout.read()
        time.sleep(0.1)
    jobs = submissions()
    subprocess.run(["scancel", jobs[-1]["JobId"]], check=True)
    output, _ = run.communicate()
    assert run.returncode == 1 and "CANCELLED" in output
    one = "gres:gpu:1"
    assert gpus(jobs[:2]) == [("scenes", None), ("manifest", None)]
    assert sorted(gpus(jobs[2:5])) == [*[("encode", one)] * 2, ("encode_text", None)]
    assert gpus(jobs[5:]) == [("label", None), ("train", one)]
    assert {job["Partition"] for job in jobs if "TresPerJob" in job} == {"gpus"}
    assert {job["Partition"] for job in jobs if "TresPerJob" not in job} == {"main"}
    assert "Traceback" not in log.read_text()

    # On a cluster without GPUs, this is enough.
    reserve = ["ReservationName=mine", "Users=root", "Nodes=ALL", "StartTime=now", "Duration=60"]
    subprocess.run(["scontrol", "create", "reservation", *reserve], check=True)
    words = ["--slurm-reservation", "mine", "--set-resources", "train:mem_mb=0", "train:nodes=1"]
    project.snakemake(*OPTIONS, "--resources", "gpu=0", *words)
    later = submissions()[len(jobs) :]
    assert gpus(later) == [("train", None), ("predict", None), ("evaluate", None)]
    assert [job["Reservation"] for job in later] == ["mine"] * 3
    assert [job["MinMemoryNode"] for job in later] == ["0", "8000M", "8000M"]
    assert "resuming after epoch" in log.read_text()
    assert project.plan() == {}
