"""Real photographs: part of PASCAL VOC2007, with a stand-in for CLIP."""

import json
import os
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
CUT = {"trainval": 40, "test": 30}


@pytest.fixture
def voc(project, tmp_path):
    """The first photographs of each split, in the devkit's layout."""
    if "CDUL_TEST_DATA" not in os.environ:
        pytest.skip("CDUL_TEST_DATA does not name a folder of test data")
    source = Path(os.environ["CDUL_TEST_DATA"]) / "voc2007/VOCdevkit/VOC2007"
    cut = tmp_path / "VOC2007"
    (cut / "ImageSets/Main").mkdir(parents=True)
    (cut / "JPEGImages").symlink_to(source / "JPEGImages")
    for listing in (source / "ImageSets/Main").glob("*.txt"):
        lines = listing.read_text().splitlines(keepends=True)
        count = CUT[listing.stem.rpartition("_")[2]]
        (cut / "ImageSets/Main" / listing.name).write_text("".join(lines[:count]))
    project.config = yaml.safe_load((ROOT / "experiments/voc2007.yaml").read_text())
    project.config["datasets"]["voc2007"] |= {"root": str(cut), "shard_size": 25}
    project.config["run"]["trainings"] = ["finetuned"]
    project.config["trainings"]["finetuned"] |= {
        "epochs": 2,
        "image_size": 64,
        "alignment": {"warmup": 0},
    }
    return project


def test_photographs_run_whole(voc):
    voc.snakemake()
    results = voc.results / "voc2007/photo-mini/final"
    quality = json.loads((results / "quality.json").read_text())["splits"]["train"]
    assert quality["final"]["images"] == 40
    assert quality["final"]["mAP"] > quality["global"]["mAP"] > 50
    metrics = json.loads((results / "finetuned/metrics.json").read_text())
    assert metrics["images"] == 30 and metrics["mAP"] > 0
    assert voc.plan() == {}
