"""A folder of images and a list of names, as a user with photographs has them."""

import json
import os
import shutil

import pyarrow.parquet as pq
import pytest
import zarr
from copies import SMALL_TRAINING

from cdul_steps.demo.scenes import CLASSES, write_scenes


@pytest.fixture
def photos(project, tmp_path):
    """A folder of 12 images in the project's copy, and a config that reads it."""
    write_scenes(tmp_path / "scenes", seed=5, train=12, test=1)
    folder = project.folder / "my photos"
    folder.mkdir()
    for image in sorted((tmp_path / "scenes/train").iterdir()):
        shutil.copy(image, folder)
    (project.folder / "names.txt").write_text("\n".join(CLASSES))
    project.config = {
        "run": {"datasets": ["photos"], "labels": ["final"], "trainings": ["small"]},
        "datasets": {
            "photos": {
                "reader": "folder",
                "root": "my photos",
                "splits": {"train": "."},
                "classes": "names.txt",
                "shard_size": 5,
                "max_failed_share": 0.5,
            }
        },
        "trainings": {"small": SMALL_TRAINING},
    }
    return project, folder


def test_dirty_folder_runs_whole(photos):
    project, folder = photos
    first = sorted(folder.iterdir())[0]
    (folder / "torn.jpg").write_bytes(b"\xff\xd8\xff\xe0" + b"x" * 20)
    (folder / "cut.jpg").write_bytes(_jpeg(first)[:900])
    (folder / "text.jpg").write_text("not an image")
    (folder / "empty.png").touch()
    (folder / "folder.jpg").mkdir()
    project.snakemake()
    results = project.results / "photos/tiny-clip"
    status = {
        row["image_id"]: row["status"]
        for table in (results / "encode/train").glob("*.parquet")
        for row in pq.read_table(table).to_pylist()
    }
    bad = {name: s for name, s in status.items() if s != "ok"}
    assert bad == {
        "torn.jpg": bad["torn.jpg"],
        "cut.jpg": "truncated",
        "text.jpg": "not_an_image",
        "empty.png": "truncated",
    }
    labels = pq.read_table(results / "final/pseudo_labels.parquet")
    assert len(labels) == 12 and not set(bad) & set(labels["image_id"].to_pylist())
    predictions = pq.read_table(results / "final/small/predictions/train.parquet").to_pandas()
    assert (predictions.set_index("image_id").status != "ok").sum() == len(bad)
    metrics = json.loads((results / "final/small/metrics.json").read_text())
    assert metrics["mAP"] is None and metrics["images"] == 0
    assert project.plan() == {}
    project.snakemake("report")
    page = (project.results / "report/report.html").read_text(encoding="utf-8")
    assert "No ground truth is known" in page and "average precision" not in page
    assert all(f"<td>{name}</td>" in page for name in bad)


def test_what_is_excluded_has_no_row_and_is_noted(photos):
    project, folder = photos
    (folder / "our $HOME's").mkdir()
    for image in sorted(folder.glob("*.*"))[:2]:
        shutil.move(image, folder / "our $HOME's")
    project.config["datasets"]["photos"]["exclude"] = ["our $HOME's", "no such name"]
    images = project.results / "photos/manifest/images.parquet"
    project.snakemake(f"{project.results.name}/photos/manifest/images.parquet")
    assert len(pq.read_table(images)) == 10
    log = (project.results / "logs/manifest/photos.log").read_text()
    assert "left out 1 folder by 'exclude': our $HOME's (1)" in log
    project.config["datasets"]["photos"]["exclude"] = []
    project.snakemake(f"{project.results.name}/photos/manifest/images.parquet")
    assert len(pq.read_table(images)) == 12


def _jpeg(source) -> bytes:
    from io import BytesIO

    from PIL import Image

    buffer = BytesIO()
    Image.open(source).convert("RGB").save(buffer, "JPEG")
    return buffer.getvalue()


def test_changes_of_the_folder_encode_only_their_shards(photos):
    project, folder = photos
    target = "results/photos/tiny-clip/similarity/train.zarr"
    project.snakemake(target)
    before = project.shard_times("photos", "tiny-clip")
    assert len(before) == 3

    # Touched: at most its shard.
    names = sorted(p.name for p in folder.iterdir())
    os.utime(folder / names[0])
    project.snakemake(target)
    touched = project.shard_times("photos", "tiny-clip")
    assert {s for s in before if touched[s] != before[s]} == {"train.zarr/c/0/0/0"}

    # Added with the first name: only the last shard and a new one.
    for i in range(4):
        shutil.copy(folder / names[i], folder / f"0-new-{i}{(folder / names[i]).suffix}")
    project.snakemake(target)
    grown = project.shard_times("photos", "tiny-clip")
    assert set(grown) - set(before) == {"train.zarr/c/3/0/0"}
    assert {s for s in before if grown[s] != touched[s]} == {"train.zarr/c/2/0/0"}

    # Removed: none.
    (folder / names[5]).unlink()
    project.snakemake(target)
    assert project.shard_times("photos", "tiny-clip") == grown
    images = pq.read_table(project.results / "photos/manifest/images.parquet")
    assert len(images) == 15 and names[5] not in images["image_id"].to_pylist()


def test_one_name_beside_context(photos):
    project, _ = photos
    (project.folder / "names.txt").write_text("car\n")
    (project.folder / "context.txt").write_text("boat\ncat\nCars\nhouse\ntree\n")
    project.config["datasets"]["photos"]["context"] = "context.txt"
    gallery = "results/photos/tiny-clip/final/small/gallery/train"
    project.snakemake("report", gallery)
    results = project.results / "photos/tiny-clip"
    similarity = zarr.open_array(results / "similarity/train.zarr", mode="r")
    stays = similarity.attrs["context"]
    assert similarity.attrs["classes"] == ["car"]
    assert set(stays) <= {"boat", "cat", "house", "tree"} and len(stays) > 1
    labels = pq.read_table(results / "final/pseudo_labels.parquet")
    assert labels.column_names == ["image_id", "path", "car"]
    assert len(set(labels["car"].to_pylist())) == len(labels) == 12
    predictions = pq.read_table(results / "final/small/predictions/train.parquet")
    assert "car" in predictions.column_names and "tree" not in predictions.column_names
    text = (project.results / "report/report.html").read_text(encoding="utf-8")
    assert "Cars" in text and all(f"<td>{name}</td>" in text for name in stays)
    assert project.plan() == {}

    # Another list remakes the text and what follows; the manifest and all shards stay.
    (project.folder / "context.txt").write_text("boat\ncat\n")
    jobs = project.plan()
    assert jobs["encode_text"] == jobs["similarity"] == jobs["label"] == jobs["train"] == 1
    assert "encode" not in jobs and "manifest" not in jobs
    (project.folder / "context.txt").write_text("boat\ncat\nCars\nhouse\ntree\n")
    assert project.plan() == {}
    assert "encode_text" in project.set("datasets.photos.context_keep", ["tree"]).plan()
    assert "encode_text" in project.set("datasets.photos.context_nearness", 0.7).plan()
    again = project.set("labels.final.context_weight", 2).plan()
    assert again["label"] == 1 and "similarity" not in again
    # If the name means the only class, nothing is left to compare it with.
    (project.folder / "context.txt").write_text("Cars\n")
    line = _fails(project)
    assert "context.txt: has one class, 'car'" in line


def _fails(project, *arguments):
    """The one-line error of a run that must fail without a traceback."""
    done = project.snakemake(*arguments, check=False)
    assert done.returncode == 1
    assert "Traceback" not in done.stdout, done.stdout
    (line,) = [x for x in done.stdout.splitlines() if "cdul: error:" in x]
    return line


def test_too_many_failures_name_the_first(photos):
    project, folder = photos
    (folder / "text.jpg").write_text("not an image")
    line = _fails(project.set("datasets.photos.max_failed_share", 0.01))
    assert "text.jpg: not_an_image" in line and "max_failed_share" in line


@pytest.mark.parametrize(
    ("path", "value", "parts"),
    [
        ("datasets.photos.root", "nowhere", ["nowhere", "no such folder"]),
        ("datasets.photos.splits", {"train": "empty"}, ["train", "empty"]),
        ("datasets.photos.shard_sise", 3, ["shard_sise", "'shard_size'"]),
        ("datasets.photos.classes", "twice.txt", ["twice.txt", "listed twice"]),
        ("datasets.photos.classes", "one.txt", ["one.txt", "one class, 'dog'", "'context'"]),
        ("datasets.photos.context", "none.txt", ["context list none.txt", "No such file"]),
        ("datasets.photos.context", "empty.txt", ["context list empty.txt", "no names"]),
        ("datasets.photos.context", "twice.txt", ["twice.txt", "'Dog' is listed twice"]),
        ("datasets.photos.context_keep", ["dog"], ["photos", "no effect without 'context'"]),
        ("run.labels", ["fnal"], ["fnal", "'final'"]),
        ("encoders.tiny-clip.model", "local-dir:nowhere", ["encoders.tiny-clip", "nowhere"]),
        ("trainings.small.weights", "nowhere.pt", ["trainings.small.weights", "nowhere.pt"]),
    ],
)
def test_mistakes_are_one_line(photos, path, value, parts):
    project, folder = photos
    (folder / "empty").mkdir()
    (project.folder / "twice.txt").write_text("dog\ncat\nDog\n")
    (project.folder / "one.txt").write_text("dog\n")
    (project.folder / "empty.txt").write_text("# nothing\n")
    line = _fails(project.set(path, value))
    assert all(part in line for part in parts), line


def test_two_images_with_one_id(photos):
    project, folder = photos
    names = sorted(p.name for p in folder.iterdir())
    table = project.folder / "table.csv"
    table.write_text(f"path,image_id\nmy photos/{names[0]},a\nmy photos/{names[1]},a\n")
    project.config["datasets"]["photos"] |= {"reader": "table", "root": "table.csv"}
    line = _fails(project)
    assert names[0] in line and names[1] in line
