"""A training on a frozen trunk: which changes recompute its features."""

import shutil

import pyarrow.parquet as pq
import pytest
import timm
import zarr
from copies import Project, copy_project
from jobs import find_job, leftovers, same
from safetensors.torch import save_file

SHARDS = 3 + 1
AFTER_TRAIN = {"predict": 2, "evaluate": 1, "model_card": 1}
MODEL = "test_byobnet"


@pytest.fixture(scope="module")
def frozen(tmp_path_factory) -> Project:
    """A complete run of a reduced demo with a frozen trunk; tests leave it as they found it."""
    project = copy_project(tmp_path_factory.mktemp("frozen") / "project")
    save_file(timm.create_model(MODEL).state_dict(), project.folder / "trunk.safetensors")
    training = {
        **{"model": MODEL, "weights": "trunk.safetensors", "image_size": 64, "trunk": "frozen"},
        **{"epochs": 2, "batch_size": 16, "learning_rate": "1e-3", "weight_decay": 3},
        **{"loss": "kl", "alignment": {"step_size": 0.2, "warmup": 0}},
    }
    project.config = {
        "datasets": {"demo": {"shard_size": 20, "scenes": {"train": 50, "test": 20}}},
        "run": {"labels": ["final"], "trainings": ["head"]},
        "trainings": {"head": training},
    }
    project.snakemake()
    return project


def features(project: Project, jobs: dict[str, int]) -> dict[str, int]:
    """The jobs for features."""
    return {rule: count for rule, count in jobs.items() if rule.startswith("feature")}


def test_what_a_run_leaves_behind(frozen):
    (folder,) = (frozen.results / "demo/features").iterdir()
    assert folder.name.startswith(f"{MODEL}-64-")
    store = zarr.open_array(folder / "train.zarr", mode="r")
    assert store.shape[:2] == (50, 1) and store.dtype == "float32"
    tables = sorted((folder / "train").glob("*.parquet"))
    assert [len(pq.read_table(table)) for table in tables] == [20, 20, 10]
    history = pq.read_table(frozen.results / "demo/tiny-clip/final/head/history.parquet")
    assert history["epoch"].to_pylist() == [1, 2, 3, 4]
    assert frozen.plan() == {}


@pytest.mark.parametrize(
    "path, value",
    [
        ("trainings.head.loss", "bce"),
        ("trainings.head.seed", 7),
        ("trainings.head.epochs", 3),
        ("trainings.head.weight_decay", 1),
        ("trainings.head.alignment.sigma", 0.2),
        ("labels.final.zeta", 0.1),
        ("evaluate.difficult", "negative"),
        ("runtime.workers", 1),
    ],
)
def test_what_makes_no_features_again(frozen, path, value):
    jobs = frozen.set(path, value).plan()
    assert features(frozen, jobs) == {}
    assert path.startswith("runtime") or jobs


def test_another_training_on_the_same_trunk_shares_its_features(frozen):
    other = frozen.set("trainings.other", frozen.config["trainings"]["head"] | {"seed": 3})
    assert other.set("run.trainings", ["other"]).plan() == {"train": 1, **AFTER_TRAIN}


def test_fine_tuning_starts_from_the_head(frozen):
    head = frozen.config["trainings"]["head"]
    tuned = {**head, "trunk": "trained", "start_from": "head", "epochs": 1}
    project = frozen.set("trainings.tuned", tuned).set("run.trainings", ["tuned"])
    assert project.plan() == {"train": 1, **AFTER_TRAIN}
    assert project.set("trainings.head.seed", 1).plan() == {"train": 2, **AFTER_TRAIN}
    project.snakemake()
    history = pq.read_table(frozen.results / "demo/tiny-clip/final/tuned/history.parquet")
    assert history["epoch"].to_pylist() == [1]
    assert project.plan() == {} and frozen.plan() == {}


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"start_from": "haed"},
            " names 'haed', which is not under 'trainings'; did you mean 'head'?",
        ),
        ({"trunk": "frozen"}, ": a frozen trunk gets its own head"),
        ({"model": "test_resnet"}, ": 'head' trains test_byobnet with {}, not test_resnet with {}"),
    ],
)
def test_what_cannot_be_started_from_is_told_before_anything_runs(frozen, changes, message):
    head = frozen.config["trainings"]["head"]
    tuned = {**head, "trunk": "trained", "start_from": "head", **changes}
    done = frozen.set("trainings.tuned", tuned).snakemake("-n", check=False)
    assert done.returncode == 1
    assert f"config: trainings.tuned.start_from{message}" in done.stdout


@pytest.mark.parametrize("path, value", [("image_size", 96), ("model_args", {"drop_rate": 0.1})])
def test_another_network_has_features_of_its_own(frozen, path, value):
    jobs = frozen.set(f"trainings.head.{path}", value).plan()
    assert features(frozen, jobs) == {"features": SHARDS, "feature_store": 2}


def test_other_weights_make_features_again(frozen):
    file = frozen.folder / "trunk.safetensors"
    kept = shutil.copy2(file, file.with_suffix(".kept"))
    try:
        save_file(timm.create_model(MODEL).state_dict(), file)
        jobs = frozen.plan()
    finally:
        shutil.copy2(kept, file)
    assert features(frozen, jobs) == {"features": SHARDS, "feature_store": 2}
    assert jobs["train"] == 1


def test_a_lost_shard_is_made_again_alone(frozen):
    (folder,) = (frozen.results / "demo/features").iterdir()
    shard = folder / "train.zarr/c/1/0/0"
    kept = shutil.copy2(shard, folder / "kept")
    shard.unlink()
    try:
        target = str(shard.relative_to(frozen.folder))
        assert frozen.plan(target) == {"features": 1}
    finally:
        shutil.copy2(kept, shard)
        kept = folder / "kept"
        kept.unlink()


def test_a_killed_stage_goes_on_where_it_was(frozen, tmp_path):
    shutil.copytree(frozen.folder, tmp_path / "project", symlinks=True)
    project = Project(tmp_path / "project", frozen.config)
    (folder,) = (project.results / "demo/features").iterdir()
    shards = [folder / f"train.zarr/c/{shard}/0/0" for shard in range(3)]
    for shard in shards[1:]:
        shard.unlink()
        (folder / f"train/{shard.parts[-3]}.parquet").unlink()
    targets = [str(shard.relative_to(project.folder)) for shard in shards[1:]]
    kept = shards[0].stat().st_mtime_ns
    run = project.start(*targets)
    find_job(run, "features").kill()
    assert run.communicate() and run.returncode == 1
    project.snakemake(*targets)
    assert shards[0].stat().st_mtime_ns == kept
    assert same(project, frozen, "results/demo/features/*/*.zarr/**/*") and not leftovers(project)
    assert project.plan(*targets) == {}


def test_status_and_verify_know_features(frozen, cdul):
    text = cdul("status", frozen.results).stdout
    assert "features" in text and "3/3 shards" in text
    assert cdul("verify", frozen.results).returncode == 0
    (folder,) = (frozen.results / "demo/features").iterdir()
    shard = folder / "test.zarr/c/0/0/0"
    content = shard.read_bytes()
    try:
        shard.write_bytes(content[:-9] + b"corrupted")
        done = cdul("verify", frozen.results)
    finally:
        shard.write_bytes(content)
    assert done.returncode == 1 and "is not the file that its job wrote" in done.stdout
