"""Second views and dense views as stages: which changes remake them, and what a kill leaves."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from copies import SMALL_TRAINING, Project, copy_project
from jobs import find_job, kill_and_resume, leftovers

from cdul_steps.data.tables import read_scores

BOXED = "results/demo~tiny-clip~seen"
SECOND = "results/demo/tiny-clip/second/pseudo_labels.parquet"
QUALITY = "results/demo/tiny-clip/second/quality.json"
AFTER = {"similarity": 1, "label": 1, "join_labels": 1}


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Project:
    """A reduced demo up to labels with second views; tests leave it as they found it."""
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
    project.snakemake(SECOND, QUALITY)
    return project


def test_what_a_run_leaves_behind(project):
    tables = sorted((project.folder / BOXED / "manifest/train").glob("*.parquet"))
    assert [len(pq.read_table(table)) for table in tables] == [60, 60, 30]
    assert len(pq.read_table(project.folder / SECOND)) == 50
    assert list(json.loads((project.folder / QUALITY).read_text())["splits"]) == ["train"]
    assert project.plan(SECOND, QUALITY) == {}


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


def test_the_slurm_profile_can_plan_them(project):
    """Its groups form no cycle: the quality of joined labels waits for labels of its own group."""
    slurm = ["--profile", "profiles/slurm", "--workflow-profile", "profiles/slurm"]
    assert project.plan(SECOND, QUALITY, *slurm) == {}
    labels = "results/demo/tiny-clip/final/pseudo_labels.parquet"
    assert "quality" in project.plan(QUALITY, "--forcerun", labels, *slurm)
    assert "quality" in project.plan(QUALITY, "--forceall", *slurm)


def test_a_killed_stage_goes_on_where_it_was(project):
    shards = [f"{BOXED}/manifest/train/{shard}.parquet" for shard in range(3)]
    kill_and_resume(project, "boxes", shards, *shards)
    assert project.plan(SECOND, QUALITY) == {}


def test_dense_views_survive_a_kill(project, cdul):
    encoder = {"model": "local-dir:cdul_steps/demo/tiny-clip", "views": "dense"}
    dense = project.set("encoders.dense", encoder)
    tables = [f"results/demo/dense/encode/train/{shard}.parquet" for shard in range(3)]
    assert dense.plan(*tables) == {"encode": 3}
    run = dense.start(*tables)
    find_job(run, "encode").kill()
    assert run.communicate() and run.returncode == 1
    assert not all((project.folder / table).exists() for table in tables)
    dense.snakemake(*tables)
    assert dense.plan(*tables) == {} and not leftovers(project)
    done = cdul("verify", project.results)
    assert done.returncode == 0, done.stdout


def test_refined_labels_can_be_learnt_from_again(project):
    twice = project.set("labels.twice", {"join": [{"labels": "final", "training": "small"}]})
    target = "results/demo/tiny-clip/twice/pseudo_labels.parquet"
    assert twice.plan(target) == {"join_labels": 1}
    twice.snakemake(target)
    refined = read_scores(project.results / "demo/tiny-clip/final/small/refined_labels.parquet")
    found = read_scores(project.folder / target)
    assert np.array_equal(found[2], refined[2]) and found[0].equals(refined[0])


def test_report_and_gallery_show_second_views(project, cdul, tmp_path):
    folder = project.results / "demo/tiny-clip/second"
    assert cdul("report", folder, "--output", tmp_path / "report").returncode == 0
    page = (tmp_path / "report/report.html").read_text()
    assert "the mean of" in page and "local max of second views" in page
    views = project.folder / BOXED / "tiny-clip/best"
    done = cdul("gallery", views, "--output", tmp_path / "gallery")
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "gallery/data/page-0.js").read_text()
    (first, *_), _ = json.JSONDecoder().raw_decode(page.partition(",")[2])
    assert len(first["boxes"]) == 2


def test_status_and_verify_know_second_views(project, cdul):
    assert "demo~tiny-clip~seen" in cdul("status", project.results).stdout
    done = cdul("verify", project.results)
    assert done.returncode == 0, done.stdout


def test_a_manifest_made_again_without_a_change(project):
    project.snakemake(SECOND, "--forcerun", "manifest")
    assert project.plan(SECOND, QUALITY) == {}
