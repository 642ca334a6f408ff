"""`cdul status` and `cdul verify` on complete, unfinished and broken results of a run."""

import json
import os
import shlex
import shutil
import subprocess
import time

import launcher
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from copies import Project

from cdul_steps.data.files import digest
from cdul_steps.data.stores import write_shard
from cdul_steps.data.tables import KEY
from cdul_steps.tools.status import status
from cdul_steps.tools.verify import verify

SHARD = "embeddings/train.zarr/c/1/0/0"
TABLE = "encode/train/1.parquet"


@pytest.fixture
def copy(demo, tmp_path, monkeypatch) -> Project:
    """A copy of the finished run, for tests that break it; its results are at `results`."""
    shutil.copytree(demo.folder, tmp_path / "project", symlinks=True)
    monkeypatch.chdir(tmp_path / "project")
    return Project(tmp_path / "project", demo.config)


@pytest.fixture
def encoder(copy):
    return copy.results / "demo/tiny-clip"


def cdul(project, *words) -> subprocess.CompletedProcess:
    command = [launcher.commands() / "cdul", *words]
    return subprocess.run(command, cwd=project.folder, capture_output=True, text=True)


def rows(results, stage: str) -> list[dict]:
    return [r for r in json.loads(status(results, as_json=True)) if r["stage"] == stage]


def test_status_of_a_finished_run(demo):
    found = json.loads(cdul(demo, "status", "--json").stdout)
    assert [(r["stage"], r["of"], r["done"], r["total"], r["unit"]) for r in found] == [
        ("manifest", "demo", 70, 70, "images"),
        ("encode", "demo/tiny-clip train", 3, 3, "shards"),
        ("encode", "demo/tiny-clip test", 1, 1, "shards"),
        ("similarity", "demo/tiny-clip train", 50, 50, "images"),
        ("similarity", "demo/tiny-clip test", 20, 20, "images"),
        ("label", "demo/tiny-clip/final", 50, 50, "images"),
        ("train", "demo/tiny-clip/final/small", 2, 2, "epochs"),
        ("predict", "demo/tiny-clip/final/small train", 50, 50, "images"),
        ("predict", "demo/tiny-clip/final/small test", 20, 20, "images"),
    ]
    assert all(r["error"] is None and r["seconds_left"] == 0 for r in found)
    assert all(r["images_per_second"] > 0 for r in found)
    assert {r["failed"] for r in found if r["stage"] in ("encode", "predict")} == {0}
    text = cdul(demo, "status").stdout
    assert "encode      demo/tiny-clip train" in text and "3/3 shards" in text


def edit_table(path, change, **facts):
    """Rewrite a table with changed rows and facts."""
    table = pq.read_table(path)
    metadata = table.schema.metadata
    old = json.loads(metadata[KEY])
    metadata = {**metadata, KEY: json.dumps({**old, **facts}).encode()}
    pq.write_table(change(table).replace_schema_metadata(metadata), path)


def test_status_of_an_unfinished_run(encoder):
    results = encoder.parents[1]
    failed = pa.array(["truncated"] + ["ok"] * 19)
    edit_table(encoder / "encode/train/0.parquet", lambda t: t.set_column(2, "status", failed))
    (encoder / TABLE).unlink()
    # Its images changed after it was encoded.
    os.utime(results / "demo/manifest/train/2.parquet")
    log = results / "logs/encode/demo/tiny-clip/train/1.log"
    log.write_text("encode: loaded\nencode: 5/20 images, 2.5 images/s, 6 s left\n")
    row = rows(results, "encode")[0]
    assert (row["done"], row["total"], row["failed"], row["error"]) == (1, 3, 1, None)
    # 15 of shard 1 and 10 of shard 2, at the speed of shard 0.
    assert row["seconds_left"] == pytest.approx(25 / row["images_per_second"], abs=0.06)
    log.write_text("encode: loaded\ncdul: error: no memory\n")
    assert rows(results, "encode")[0]["error"] == "shard 1: no memory"
    assert "shard 1: no memory" in status(results, as_json=False)


def test_status_before_the_first_shard_is_finished(encoder):
    results = encoder.parents[1]
    shutil.rmtree(encoder / "encode")
    for shard in range(3):
        log = results / f"logs/encode/demo/tiny-clip/train/{shard}.log"
        log.write_text("encode: 5/20 images, 2.5 images/s, 6 s left\n")
        age = time.time() - 100 * (shard == 2)
        os.utime(log, (age, age))
    row = rows(results, "encode")[0]
    # Two jobs are running, one is not.
    assert (row["done"], row["images_per_second"], row["seconds_left"]) == (0, 5.0, 8.0)


def test_status_of_a_training(encoder):
    results = encoder.parents[1]
    (encoder / "final/small/history.parquet").unlink()
    log = results / "logs/train/demo/tiny-clip/final/small.log"
    first = "train: m (0.5 M parameters) on cpu, 50 images, 12 classes, 8 epochs"
    log.write_text(f"{first}\ntrain: epoch 1: loss 1\ntrain epoch 2/8: 10/50 images, ")
    with log.open("a") as stream:
        stream.write("20.0 images/s, 2 s left\n")
    (row,) = rows(results, "train")
    assert (row["done"], row["total"], row["seconds_left"]) == (1, 8, (7 * 50 - 10) / 20)
    log.write_text("")
    (row,) = rows(results, "train")
    assert (row["done"], row["total"], row["seconds_left"]) == (0, None, None)


def test_status_of_nothing(tmp_path):
    done = subprocess.run(
        [launcher.commands() / "cdul", "status", tmp_path],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "nothing there yet" in done.stderr


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[:-20])


def empty_shard(encoder):
    """A shard without vectors, and a table that records exactly this."""
    array = np.full((20, 10, 128), np.nan, np.float16)
    shape = json.loads((encoder / "embeddings/train.zarr/zarr.json").read_text())["shape"]
    write_shard(encoder / "embeddings/train.zarr", 1, array[..., : shape[2]], 20)
    edit_table(encoder / TABLE, lambda t: t, digest=digest(encoder / SHARD))


def edit_json(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def edit_text(encoder):
    swapped = [1, 0, *range(2, 12)]
    edit_table(
        encoder / "text.parquet",
        lambda t: t.set_column(2, "embedding", t["embedding"].take(pa.array(swapped))),
    )


def edit_ids(path, name="image_id"):
    ids = pa.array([f"other-{i}" for i in range(pq.read_metadata(path).num_rows)])
    edit_table(path, lambda t: t.set_column(t.column_names.index(name), name, ids))


SIMILARITY = "similarity/train.zarr"
MODEL = "final/small/model"
BREAKS = {
    "shard, a bit": (SHARD, lambda e: flip(e / SHARD), "checksum"),
    "shard, cut": (SHARD, lambda e: cut(e / SHARD), "checksum"),
    "shard, gone": (SHARD, lambda e: (e / SHARD).unlink(), "missing"),
    "shard, without vectors": (SHARD, empty_shard, "its vectors do not match"),
    "table, cut": (TABLE, lambda e: cut(e / TABLE), "not a readable Parquet file"),
    "table, gone": (TABLE, lambda e: (e / TABLE).unlink(), "missing"),
    "table, rows": (TABLE, lambda e: edit_table(e / TABLE, lambda t: t[1:]), "rows"),
    "store, gone": (
        "embeddings/train.zarr/zarr.json",
        lambda e: (e / "embeddings/train.zarr/zarr.json").unlink(),
        "not a Zarr array",
    ),
    "store, shape": (
        "embeddings/train.zarr/zarr.json",
        lambda e: edit_json(e / "embeddings/train.zarr/zarr.json", shape=[60, 10, 64]),
        "images per shard",
    ),
    "similarity, a bit": (SIMILARITY, lambda e: flip(e / SIMILARITY / "c/0/0/0"), "corrupt"),
    "similarity, classes": (
        SIMILARITY,
        lambda e: edit_json(e / SIMILARITY / "zarr.json", attributes={"classes": ["a"]}),
        "classes",
    ),
    "similarity, of other classes": (SIMILARITY, edit_text, "is not the cosine"),
    "text": ("text.parquet", lambda e: cut(e / "text.parquet"), "not a readable Parquet file"),
    "labels": ("final/pseudo_labels.parquet", lambda e: cut(e / "final/pseudo_labels.parquet"), ""),
    "labels, of other images": (
        "final/pseudo_labels.parquet",
        lambda e: edit_ids(e / "final/pseudo_labels.parquet"),
        "images that are not in the manifest",
    ),
    "quality": ("final/quality.json", lambda e: cut(e / "final/quality.json"), ""),
    "weights": (f"{MODEL}/model.safetensors", lambda e: cut(e / MODEL / "model.safetensors"), ""),
    "card": (
        f"{MODEL}/model.json",
        lambda e: edit_json(e / MODEL / "model.json", classes=["a"]),
        "its classes",
    ),
    "history": (
        "final/small/history.parquet",
        lambda e: cut(e / "final/small/history.parquet"),
        "",
    ),
    "refined": (
        "final/small/refined_labels.parquet",
        lambda e: edit_ids(e / "final/small/refined_labels.parquet"),
        "images and classes",
    ),
    "predictions": (
        "final/small/predictions/test.parquet",
        lambda e: edit_ids(e / "final/small/predictions/test.parquet"),
        "its images",
    ),
    "predictions of other weights": (
        "final/small/predictions/test.parquet",
        lambda e: edit_table(
            e / "final/small/predictions/test.parquet", lambda t: t, weights="other"
        ),
        "weights other than",
    ),
    "metrics": ("final/small/metrics.json", lambda e: cut(e / "final/small/metrics.json"), ""),
    "images": (
        "../manifest/images.parquet",
        lambda e: cut(e / "../manifest/images.parquet"),
        "not a readable Parquet file",
    ),
    "manifest, gone": (
        "../manifest/train/1.parquet",
        lambda e: (e / "../manifest/train/1.parquet").unlink(),
        "no such file",
    ),
    "manifest of other images": (
        "../manifest/train/1.parquet",
        lambda e: edit_ids(e / "../manifest/train/1.parquet"),
        "does not contain the images",
    ),
}


# Files that no longer agree with the broken ones: the other split, or later results.
FURTHER = {"similarity, of other classes": 1, "labels, of other images": 1, "weights": 2}


@pytest.mark.parametrize("name", BREAKS)
def test_verify_names_what_is_broken(encoder, name):
    file, broken, problem = BREAKS[name]
    broken(encoder)
    found = [(path, text) for path, text, _ in verify(encoder.parents[1]).broken]
    (text,) = [text for path, text in found if path.resolve() == (encoder / file).resolve()]
    assert problem in text
    assert len(found) == 1 + FURTHER.get(name, 0), found


def test_a_missing_shard_is_unfinished_before_its_similarity(copy, encoder):
    shutil.rmtree(encoder / SIMILARITY)
    (encoder / TABLE).unlink()
    (encoder / "encode/train/2.parquet").unlink()
    done = cdul(copy, "verify")
    assert done.returncode == 0, done.stdout
    assert "0 broken; 2 shards do not exist yet" in done.stdout


def run_command(project, *options: str) -> None:
    """Run the command that `verify` prints, with more options."""
    done = cdul(project, "verify", "--json")
    assert done.returncode == 1
    command = json.loads(done.stdout)["command"]
    command = command.replace("cdul", str(launcher.commands() / "cdul"), 1)
    command = f"{command} {shlex.join(options)} --configfile {shlex.quote(project.overlay())}"
    subprocess.run(command, shell=True, check=True, cwd=project.folder, env=project.environment)


def test_the_command_that_verify_names_makes_it_right(copy, encoder):
    before = {p: digest(encoder / p) for p in (SHARD, "final/pseudo_labels.parquet", MODEL)}
    assert cdul(copy, "verify").returncode == 0
    for name in ("shard, a bit", "store, shape", "labels", "weights", "manifest, gone"):
        BREAKS[name][1](encoder)
    run_command(copy)
    assert cdul(copy, "verify").returncode == 0
    assert {p: digest(encoder / p) for p in before} == before
    assert copy.plan() == {}


def test_the_command_for_a_broken_manifest(copy, encoder):
    BREAKS["images"][1](encoder)
    run_command(copy, "--until", "manifest")
    assert cdul(copy, "verify").returncode == 0
