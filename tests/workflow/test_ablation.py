"""A small ablation with two variants and two seeds: its outputs, and what re-runs."""

import os
from contextlib import contextmanager

import numpy as np
import pyarrow.parquet as pq
import pytest
from copies import SMALL_TRAINING, copy_project

TABLE = """\
variant,against,loss,positives,alignment.enabled
fixed,,,,false
role,fixed,role,top1,false
"""
SUMMARY = {"ablation": 1, "ablation_table": 1}
A_TRAINING = {"train": 1, "predict": 1, "evaluate": 1, **SUMMARY}
TWO_TRAININGS = {"train": 2, "predict": 2, "evaluate": 2, **SUMMARY}


@pytest.fixture(scope="module")
def ablated(tmp_path_factory):
    """A complete ablation; tests leave it as they found it."""
    project = copy_project(tmp_path_factory.mktemp("ablation") / "project")
    (project.folder / "variants.csv").write_text(TABLE)
    project.config = {
        "datasets": {"demo": {"scenes": {"train": 20, "test": 10}}},
        "run": {"labels": ["final"], "trainings": ["small"]},
        "trainings": {"small": {**SMALL_TRAINING, "epochs": 1}},
        "ablation": {"training": "small", "table": "variants.csv", "seeds": [3, 5]},
    }
    project.snakemake("ablation")
    return project


def test_tables(ablated):
    folder = ablated.results / "demo/tiny-clip/ablation"
    rows = pq.read_table(folder / "ablation.parquet").to_pandas()
    assert rows["variant"].tolist() == ["fixed", "fixed", "role", "role"]
    assert rows["seed"].tolist() == [3, 5, 3, 5]
    assert rows["loss"].tolist() == ["kl", "kl", "role", "role"]
    assert rows["alignment.enabled"].tolist() == [False] * 4
    assert rows["classifier_mAP"].between(0, 100).all()
    fixed, role = rows[:2], rows[2:]
    # Labels below 1e-6 become ties.
    np.testing.assert_allclose(fixed["label_mAP_after"], fixed["label_mAP_before"], atol=0.5)
    assert (role["label_mAP_before"].to_numpy() == fixed["label_mAP_before"].to_numpy()).all()
    assert (role["label_mAP_after"] != role["label_mAP_before"]).all()
    text = (folder / "ablation.md").read_text()
    assert "| role | final | 2 |" in text and "over fixed" in text
    assert ablated.plan("ablation") == {}


@contextmanager
def table(project, text):
    """Use another table temporarily."""
    path = project.folder / "variants.csv"
    stat = path.stat()
    try:
        path.write_text(text)
        yield
    finally:
        path.write_text(TABLE)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def edited(project, text):
    """The plan with another table."""
    with table(project, text):
        return project.plan("ablation")


def test_a_new_row_runs_that_row_only(ablated):
    jobs = edited(ablated, TABLE + "asl,,asl,,false\n")
    assert jobs == TWO_TRAININGS


def test_a_changed_row_runs_that_row_only(ablated):
    jobs = edited(ablated, TABLE.replace("fixed,,,", "fixed,,bce,"))
    assert jobs == TWO_TRAININGS


def test_a_new_column_runs_no_training(ablated):
    lines = [line + ("," if i else ",alignment.sigma") for i, line in enumerate(TABLE.split())]
    assert edited(ablated, "\n".join(lines)) == SUMMARY


def test_another_seed_runs_that_seed_only(ablated):
    jobs = ablated.set("ablation.seeds", [3, 5, 8]).plan("ablation")
    assert jobs == TWO_TRAININGS


def test_a_killed_ablation_goes_on(ablated):
    """Killed during its last training, so its outputs and the tables are missing."""
    encoder = ablated.results / "demo/tiny-clip"
    lost = [encoder / "final/ablation/variant~role/seed~5", encoder / "ablation"]
    for folder in lost:
        folder.rename(folder.with_name("aside"))
    try:
        assert ablated.plan("ablation") == A_TRAINING
    finally:
        for folder in lost:
            folder.with_name("aside").rename(folder)


def test_a_mistake_is_one_line_and_hinders_no_other_target(ablated):
    with table(ablated, f"{TABLE}x,,role,,false\n"):
        done = ablated.snakemake("ablation", "-n", check=False)
        assert done.returncode == 1 and "Traceback" not in done.stdout
        (line,) = [x for x in done.stdout.splitlines() if "cdul: error:" in x]
        assert "variants.csv: trainings.x: loss 'role'" in line
        assert "train" in ablated.plan()
