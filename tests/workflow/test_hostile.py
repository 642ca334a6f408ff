"""Hostile names and images, and faults, in real runs of one small project.

The tests build on each other's results and leave them up to date.
"""

import json
import os
import re
import shlex
import shutil
import signal
import struct
import subprocess
import time
import zlib
from collections import Counter
from pathlib import Path

import launcher
import pyarrow.parquet as pq
import pytest
from copies import SMALL_TRAINING, Project, copy_project
from kill import Run, digests, files, kill_stages, resume, stage_seconds
from PIL import Image

from cdul_steps.data.files import SCHEMA_VERSION
from cdul_steps.data.tables import KEY

CLASSES = ["<script>alert(1)</script>", "a; touch pwned", "$(touch pwned)", "x{}", "it's", "犬"]
NAMES = [
    "$(touch pwned).png",
    "`touch pwned`.png",
    "; touch pwned #.PNG",
    " blank  inside.png",
    "ünï—码.Png",
    "quo\"te's.png",
    "new\nline.png",
    "--help.png",
    "{wildcard}.png",
    "sub; touch pwned/deep/x.png",
]


def picture(path: Path, seed: int, size=(40, 30)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.effect_noise(size, 20 + seed).convert("RGB").save(path, "PNG")


def add_bad_images(root: Path) -> dict[str, str]:
    """Images that cannot be used; their statuses."""
    whole = (root / NAMES[0]).read_bytes()
    side = 20_000
    rows = zlib.compress(bytes((1 + side // 8) * side), 1)
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)), (b"IDAT", rows)]
    bomb = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in [*chunks, (b"IEND", b"")]
    )
    for name, data in {
        "cut.png": whole[: len(whole) // 2],
        "empty.png": b"",
        "text.jpg": b"no image",
        "bomb.png": bomb,
        "zeros.png": bytes(len(whole)),
    }.items():
        (root / name).write_bytes(data)
    picture(root / "thread.png", 0, (1, 5000))
    (root / "gone.png").symlink_to(root / "nowhere.png")
    (root / "loop.png").symlink_to(root / "loop.png")
    (root / "folder.jpg").mkdir()  # no image at all
    return {
        "cut.png": "truncated",
        "empty.png": "truncated",
        "text.jpg": "not_an_image",
        "zeros.png": "not_an_image",
        "bomb.png": "too_large",
        "thread.png": "bad_shape",
        "gone.png": "missing",
        "loop.png": "unreadable",
    }


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A complete run of a project with hostile names; returns the run and the statuses."""
    project = copy_project(tmp_path_factory.mktemp("hostile") / "project")
    evil = "a; touch pwned"
    root = project.folder / evil
    for seed, name in enumerate(NAMES):
        picture(root / name, seed)
    picture(root / "dot.png", 0, (1, 1))
    expected = dict.fromkeys([*NAMES, "dot.png"], "ok") | add_bad_images(root)
    classes = project.folder / f"{evil}.txt"
    classes.write_text("\n".join(CLASSES))
    shutil.copytree(project.folder / "cdul_steps/demo/tiny-clip", project.folder / f"{evil} clip")
    project.config = {
        "results": f"{evil} results",
        "run": {
            "datasets": ["evil"],
            "encoders": ["evil"],
            "labels": ["final"],
            "trainings": ["small"],
        },
        "datasets": {
            "evil": {
                "reader": "folder",
                "root": evil,
                "splits": {"train": "."},
                "classes": classes.name,
                "shard_size": 12,
                "max_failed_share": 0.5,
            }
        },
        "encoders": {"evil": {"model": f"local-dir:{evil} clip"}},
        "trainings": {"small": SMALL_TRAINING},
    }
    return project, resume(project), expected


def encode_rows(project: Project) -> list[dict]:
    tables = sorted((project.results / "evil/evil/encode/train").glob("*.parquet"))
    return [row for table in tables for row in pq.read_table(table).to_pylist()]


def test_hostile_names_and_images_run_whole(hostile):
    project, _, expected = hostile
    assert not [p for p in project.folder.rglob("*") if p.name == "pwned"]
    rows = encode_rows(project)
    assert Counter(row["image_id"] for row in rows) == Counter(expected.keys())
    assert {row["image_id"]: row["status"] for row in rows} == expected
    assert all(bool(row["error"]) == (row["status"] != "ok") for row in rows)
    labels = pq.read_table(project.results / "evil/evil/final/pseudo_labels.parquet")
    assert labels.column_names == ["image_id", "path", *CLASSES]
    usable = sorted(name for name, status in expected.items() if status == "ok")
    assert labels["image_id"].to_pylist() == usable
    scored = project.results / "evil/evil/final/small/predictions/train.parquet"
    scored = {row["image_id"]: row["status"] for row in pq.read_table(scored).to_pylist()}
    # An image too thin for CLIP's views is usable for the classifier.
    assert scored == expected | {"thread.png": "ok"}
    assert project.plan() == {}


def test_everything_left_behind_says_its_version(hostile):
    project, _, _ = hostile
    seen = Counter()
    for path in project.results.rglob("*"):
        if path.suffix == ".parquet":
            facts = json.loads(pq.read_schema(path).metadata[KEY])
        elif path.suffix == ".json":
            facts = json.loads(path.read_text())
            facts = facts["attributes"] if path.name == "zarr.json" else facts
        else:
            continue
        assert facts["schema_version"] == SCHEMA_VERSION, path
        seen[path.suffix] += 1
    assert seen[".parquet"] >= 8 and seen[".json"] >= 5


def test_a_second_run_beside_the_first_is_refused(hostile):
    project, _, _ = hostile
    target = "a; touch pwned results/evil/evil/final/pseudo_labels.parquet"
    before = digests(project.results)
    first = Run(project, target, "--forcerun", "label")
    while first.started("label") is None:
        assert first.process.poll() is None, first.text
        time.sleep(0.01)
    # So that it cannot end before the second begins.
    os.killpg(first.process.pid, signal.SIGSTOP)
    second = project.snakemake(target, check=False)
    os.killpg(first.process.pid, signal.SIGCONT)
    assert second.returncode == 1 and "locked" in second.stdout
    assert first.wait() == 0, first.text
    assert digests(project.results) == before


def test_results_dated_in_the_future_are_kept_and_told(hostile):
    project, _, _ = hostile
    target = "a; touch pwned results/evil/evil/final/pseudo_labels.parquet"
    before, ahead = digests(project.results), time.time() + 7200
    for path in project.results.rglob("*"):
        os.utime(path, (ahead, ahead), follow_symlinks=False)
    # Snakemake alone would reject the outputs only after the job.
    refused = project.snakemake(target, "--forcerun", "label", check=False)
    assert refused.returncode == 1 and "dated in the future" in refused.stdout
    assert (project.folder / target).stat().st_mtime >= int(ahead)
    command = re.search("'(find .*)', or else", refused.stdout)[1]
    subprocess.run(shlex.split(command), check=True, cwd=project.folder)
    assert project.plan(target) == {} and digests(project.results) == before


@pytest.mark.parametrize(("stage", "seed"), [("encode", 1), ("train", 5)])
def test_kills_lose_nothing(hostile, stage, seed):
    project, run, _ = hostile
    outputs = files("evil", "evil", 2, "train")
    table = kill_stages(project, outputs, Counter([stage]), stage_seconds(run, [stage]), seed)
    assert table[stage]["resumed"] == 1 and table[stage]["lost"] == 0


def test_failed_images_get_another_try(hostile):
    project, _, _ = hostile
    root = project.folder / "a; touch pwned"
    target = "a; touch pwned results/evil/evil/similarity/train.zarr"
    # Intact again with the same size and time, as after a disk comes back.
    image = root / "zeros.png"
    times = image.stat()
    image.write_bytes((root / NAMES[0]).read_bytes())
    os.utime(image, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert project.plan(target) == {}
    command = [launcher.commands() / "cdul", "retry-failed", str(project.results)]
    done = subprocess.run(
        command, cwd=project.folder, env=project.environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "1 of 7 failed images can be read now" in done.stderr
    assert "--forcerun manifest" in done.stdout
    shards = project.shard_times("evil", "evil")
    project.snakemake(target, "--forcerun", "manifest")
    assert {row["image_id"]: row["status"] for row in encode_rows(project)}["zeros.png"] == "ok"
    changed = [
        s for s, moment in project.shard_times("evil", "evil").items() if shards[s] != moment
    ]
    assert len(changed) == 1
