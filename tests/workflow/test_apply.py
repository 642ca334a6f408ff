"""A trained classifier applied to a collection that was not used for training."""

import shutil

import numpy as np
import pyarrow.compute as pc
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
import torch
from copies import ROOT, SMALL_TRAINING, Project, copy_project
from jobs import kill_and_resume

from cdul_steps.config import Network
from cdul_steps.data.classes import load_classes
from cdul_steps.models.classifier import network_and_card, save_classifier

MADE = "results/demo/tiny-clip/final/small/model"
PARTS = "results/album/applied/small/train"


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Project:
    """An album of some scenes, one of them damaged, and an untrained classifier for them."""
    project = copy_project(tmp_path_factory.mktemp("apply") / "project")
    project.config = {
        "datasets": {
            "demo": {"shard_size": 40, "scenes": {"train": 20, "test": 1}},
            "album": {
                "reader": "folder",
                "root": "album",
                "classes": "config/classes/demo.yaml",
                "splits": {"train": "."},
                "shard_size": 8,
                "max_failed_share": 0.5,
            },
        },
        "run": {"labels": ["final"], "trainings": ["small"]},
        "trainings": {"small": SMALL_TRAINING},
        "apply": {"small": {"model": "model", "dataset": "album"}},
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network, card = network_and_card(
            Network(model="test_resnet", image_size=64),
            list(load_classes(ROOT / "config/classes/demo.yaml").names),
        )
    save_classifier(network, card, project.folder / "model")
    project.snakemake("results/demo/scenes/scenes.csv")
    (project.folder / "album").mkdir()
    scenes = sorted((project.results / "demo/scenes").rglob("*.jpg"))
    scenes = [*{scene.name: scene for scene in scenes}.values()]
    for scene in scenes[:20]:
        shutil.copy(scene, project.folder / "album" / scene.name)
    damaged = project.folder / "album" / scenes[3].name
    damaged.write_bytes(damaged.read_bytes()[:-900])
    project.snakemake("apply")
    return project


def parts(project: Project) -> pyarrow.dataset.Dataset:
    return pyarrow.dataset.dataset(project.folder / PARTS)


def test_the_parts_are_one_table(project, cdul):
    """The same scores as from `cdul predict` on the folder, in one process."""
    table = parts(project).to_table()
    assert len(list((project.folder / PARTS).iterdir())) == 3 and len(table) == 20
    assert sorted(pc.unique(table["status"]).to_pylist()) == ["ok", "truncated"]
    output = project.folder / "predictions.parquet"
    cdul(
        "predict", project.folder / "album", "--model", project.folder / "model", "--output", output
    )
    expected = pq.read_table(output)
    names = [name for name in expected.column_names if name not in ("image_id", "path")]
    assert table.drop_columns(["image_id", "path"]).column_names == names
    for name in names:
        ours, its = table[name].to_pylist(), expected[name].to_pylist()
        if isinstance(its[0], float):
            np.testing.assert_allclose(ours, its, atol=1e-6)
        else:
            assert ours == its
    assert project.plan("apply") == {}


def test_a_killed_run_goes_on_where_it_was(project):
    files = [f"{PARTS}/{shard}.parquet" for shard in range(3)]
    kill_and_resume(project, "predict", files, "apply")


def test_a_model_of_the_run_is_made_first(project):
    jobs = project.set("apply.small.model", MADE).plan("apply")
    assert jobs["train"] == 1 and jobs["apply_shard"] == 3


def test_a_new_image_scores_its_shard_alone(project):
    shutil.copy(next((project.folder / "album").iterdir()), project.folder / "album/new.jpg")
    try:
        assert project.plan("apply") == {"manifest": 1, "apply": 1}
        project.snakemake("apply")
        assert len(parts(project).to_table()) == 21
    finally:
        (project.folder / "album/new.jpg").unlink()


def test_status_knows_the_parts(project, cdul):
    assert "apply" in cdul("status", project.results).stdout


@pytest.mark.parametrize(
    "path, value, message",
    [
        ("apply", {}, "nothing to apply: name a classifier and a data set under 'apply'"),
        ("apply.small.dataset", "albun", "did you mean 'album'?"),
        ("apply.small.model", "nowhere/model", "apply.small.model: nowhere/model: no such folder"),
    ],
)
def test_what_cannot_be_applied_is_told(project, path, value, message):
    done = project.set(path, value).snakemake("-n", "apply", check=False)
    assert done.returncode == 1 and message in done.stdout
