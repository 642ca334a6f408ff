"""Second views as stages: what they are made again for, and what not."""

import pyarrow.parquet as pq
import pytest
from copies import SMALL_TRAINING, Project, copy_project
from jobs import find_job, leftovers

BOXED = "results/demo~tiny-clip~seen"
SECOND = "results/demo/tiny-clip/second/pseudo_labels.parquet"
AFTER = {"similarity": 1, "label": 1, "join_labels": 1}


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Project:
    """A small cut of the demo up to labels of second views; tests leave it as they found it."""
    project = copy_project(tmp_path_factory.mktemp("second") / "project")
    project.config = {
        "datasets": {"demo": {"shard_size": 20, "scenes": {"train": 50, "test": 20}}},
        "run": {"labels": ["second"], "trainings": ["small"]},
        "trainings": {"small": {**SMALL_TRAINING, "model_args": {}}},
        "labels": {
            "best": {"construction": "local_max"},
            "second": {"join": [{"labels": "final"}, {"labels": "best", "boxes": "seen"}]},
        },
        "boxes": {"seen": {"labels": "final", "training": "small", "classes": 2}},
    }
    project.snakemake()
    return project


def test_what_a_run_leaves_behind(project):
    tables = sorted((project.folder / BOXED / "manifest/train").glob("*.parquet"))
    assert [len(pq.read_table(table)) for table in tables] == [60, 60, 30]
    assert len(pq.read_table(project.folder / SECOND)) == 50
    metrics = project.results / "demo/tiny-clip/second/small/metrics.json"
    assert metrics.is_file() and project.plan() == {}


@pytest.mark.parametrize(
    "path, value, jobs",
    [
        ("boxes.seen.threshold", 0.7, {"boxes": 3, "encode": 3, **AFTER}),
        ("labels.best.tau", 0.2, {"label": 1, "join_labels": 1}),
        ("labels.second.positives", 2, {"join_labels": 1}),
        ("trainings.small.seed", 7, {"train": 1, "boxes": 3, "encode": 3, **AFTER}),
        ("runtime.workers", 1, {}),
    ],
)
def test_what_is_made_again(project, path, value, jobs):
    assert project.set(path, value).plan(SECOND) == jobs


def test_a_killed_stage_goes_on_where_it_was(project):
    shards = [f"{BOXED}/manifest/train/{shard}.parquet" for shard in range(3)]
    before = [(project.folder / shard).read_bytes() for shard in shards]
    kept = (project.folder / shards[0]).stat().st_mtime_ns
    for shard in shards[1:]:
        (project.folder / shard).unlink()
    run = project.start(*shards)
    find_job(run, "boxes").kill()
    assert run.communicate() and run.returncode == 1
    project.snakemake(*shards)
    assert [(project.folder / shard).read_bytes() for shard in shards] == before
    assert (project.folder / shards[0]).stat().st_mtime_ns == kept
    assert not leftovers(project) and project.plan() == {}


def test_status_and_verify_know_second_views(project, cdul):
    assert "demo~tiny-clip~seen" in cdul("status", project.results).stdout
    done = cdul("verify", project.results)
    assert done.returncode == 0, done.stdout
