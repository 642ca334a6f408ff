"""Names and images that mean harm, through real runs: each ends as a row, and none as a command."""

import shutil
import struct
import zlib
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from copies import SMALL_TRAINING
from PIL import Image

CLASSES = ["<script>alert(1)</script>", "a; touch pwned", "$(touch pwned)", "{}", "it's", "犬"]
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


@pytest.fixture
def hostile(project):
    """A folder of images that a person with bad intentions has named."""
    evil = "a; touch pwned"
    root = project.folder / evil
    for seed, name in enumerate(NAMES):
        picture(root / name, seed)
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
                "shard_size": 8,
                "max_failed_share": 0.5,
            }
        },
        "encoders": {"evil": {"model": f"local-dir:{evil} clip"}},
        "trainings": {"small": SMALL_TRAINING | {"epochs": 1}},
    }
    return project, root


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
        "bomb.png": "too_large",
        "thread.png": "bad_shape",
        "gone.png": "missing",
        "loop.png": "unreadable",
    }


def test_hostile_names_and_images_run_whole(hostile):
    project, root = hostile
    expected = add_bad_images(root)
    picture(root / "dot.png", 0, (1, 1))
    project.snakemake()
    assert not [p for p in project.folder.rglob("*") if p.name == "pwned"]
    encoder = project.folder / project.config["results"] / "evil/evil"
    rows = [
        row
        for table in sorted((encoder / "encode/train").glob("*.parquet"))
        for row in pq.read_table(table).to_pylist()
    ]
    expected |= dict.fromkeys([*NAMES, "dot.png"], "ok")
    assert Counter(row["image_id"] for row in rows) == Counter(expected.keys())
    assert {row["image_id"]: row["status"] for row in rows} == expected
    assert all(bool(row["error"]) == (row["status"] != "ok") for row in rows)
    labels = pq.read_table(encoder / "final/pseudo_labels.parquet")
    assert labels.column_names == ["image_id", "path", *CLASSES]
    usable = sorted(name for name, status in expected.items() if status == "ok")
    assert labels["image_id"].to_pylist() == usable
    scored = pq.read_table(encoder / "final/small/predictions/train.parquet").to_pylist()
    # What is too thin for CLIP's views is no trouble to the classifier.
    assert {row["image_id"] for row in scored if row["status"] == "ok"} == {*usable, "thread.png"}
    assert project.plan() == {}
