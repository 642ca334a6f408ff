"""A trained classifier applied to tar files that were not used for training."""

import json
import shutil
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
import torch
from copies import ROOT, SMALL_TRAINING, Project, copy_project
from jobs import find_job, kill_and_resume, leftovers

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
                "reader": "webdataset",
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
    for folder in ("files", "album"):
        (project.folder / folder).mkdir()
    scenes = sorted((project.results / "demo/scenes").rglob("*.jpg"))
    scenes = [*{scene.name: scene for scene in scenes}.values()]
    files = [Path(shutil.copy(scene, project.folder / "files")) for scene in scenes[:20]]
    files[3].write_bytes(files[3].read_bytes()[:-900])
    pack(project.folder / "album/0.tar", files[:12])
    pack(project.folder / "album/1.tar", files[12:])
    project.snakemake("apply")
    return project


def pack(path: Path, files: list[Path]) -> None:
    """Write a tar of files."""
    with tarfile.open(path, "w") as tar:
        for file in files:
            tar.add(file, file.name)


def parts(project: Project) -> pyarrow.dataset.Dataset:
    return pyarrow.dataset.dataset(project.folder / PARTS)


def test_the_parts_are_one_table(project, cdul):
    """The same scores as from `cdul predict` on the files, in one process."""
    table = parts(project).to_table()
    assert len(list((project.folder / PARTS).iterdir())) == 3 and len(table) == 20
    assert sorted(pc.unique(table["status"]).to_pylist()) == ["ok", "truncated"]
    output = project.folder / "predictions.parquet"
    cdul(
        "predict", project.folder / "files", "--model", project.folder / "model", "--output", output
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


def test_a_killed_encode_job_goes_on_where_it_was(project):
    store = "results/album/tiny-clip/embeddings/train.zarr"
    files = [f"{store}/c/{shard}/0/0" for shard in range(2)]
    run = project.start(*files)
    find_job(run, "encode").kill()
    assert run.communicate() and run.returncode == 1
    finished = {
        file: path.stat().st_mtime_ns for file in files if (path := project.folder / file).exists()
    }
    project.snakemake(*files)
    assert all((project.folder / f).stat().st_mtime_ns == t for f, t in finished.items())
    statuses = [
        pq.read_table(project.results / f"album/tiny-clip/encode/train/{shard}.parquet")["status"]
        for shard in range(2)
    ]
    assert [pc.sum(pc.equal(status, "ok")).as_py() for status in statuses] == [7, 8]
    assert not leftovers(project)


@pytest.mark.parametrize(
    ("stage", "file"),
    [
        ("manifest", "manifest/images.parquet"),
        ("label", "tiny-clip/final/pseudo_labels.parquet"),
        ("train", "tiny-clip/final/small/refined_labels.parquet"),
    ],
)
def test_a_killed_job_leaves_nothing_and_is_repeated(project, stage, file):
    target = f"results/album/{file}"
    project.snakemake(target)
    path = project.folder / target
    before = path.read_bytes()
    path.unlink()
    run = project.start(target)
    find_job(run, stage, decoding=stage == "train").kill()
    assert run.communicate() and run.returncode == 1
    assert not path.exists()
    project.snakemake(target)
    assert path.read_bytes() == before
    assert not leftovers(project)


def test_a_model_of_the_run_is_made_first(project):
    jobs = project.set("apply.small.model", MADE).plan("apply")
    assert jobs["train"] == 1 and jobs["apply_shard"] == 3
    absolute = str(project.folder / MADE)
    assert project.set("apply.small.model", absolute).plan("apply") == jobs


def test_a_new_image_scores_its_shard_alone(project):
    pack(project.folder / "album/2.tar", [next((project.folder / "files").iterdir())])
    try:
        assert project.plan("apply") == {"manifest": 1, "apply": 1}
        project.snakemake("apply")
        assert len(parts(project).to_table()) == 21
    finally:
        (project.folder / "album/2.tar").unlink()


def test_removed_images_leave_the_table(project):
    """Although their rows stay in the manifest of their shard, which keeps its embeddings."""
    part = project.folder / PARTS / "1.parquet"
    before = part.stat().st_mtime_ns
    first = pq.read_table(project.folder / PARTS / "0.parquet")["image_id"][0].as_py()
    without = project.set("datasets.album.exclude", [first])
    without.snakemake("apply")
    assert first not in parts(project).to_table()["image_id"].to_pylist()
    assert part.stat().st_mtime_ns == before


def test_the_table_has_no_part_of_earlier_shards(project):
    larger = project.set("datasets.album.shard_size", 16)
    larger.snakemake("apply")
    table = parts(project).to_table()
    assert len(list((project.folder / PARTS).iterdir())) == 2
    assert len(set(table["image_id"].to_pylist())) == len(table) == 20
    counts = json.loads((project.folder / f"{PARTS}.json").read_text())
    statuses = table["status"].to_pylist()
    assert counts["images"] == 20 and counts["shards"] == 2
    assert counts["failed"] == {"truncated": statuses.count("truncated")}
    named = [name for names in table["labels"].to_pylist() for name in names]
    assert {name: n for name, n in counts["labels"].items() if n} == Counter(named)
    project.snakemake("apply")


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
