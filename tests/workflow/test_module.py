"""Another workflow takes this one as a module, under a prefix and with a config of its own."""

import json
import os
import subprocess
from pathlib import Path

import launcher
import pyarrow.parquet as pq
import pytest
import yaml
from copies import ROOT, SMALL_TRAINING

SNAKEFILE = f"""
configfile: "outer.yaml"


module cdul:
    snakefile:
        {json.dumps(str(ROOT / "Snakefile"))}
    config:
        config["labelling"]
    prefix:
        "taken"


use rule * from cdul as cdul_*


rule count:
    default_target: True
    input:
        "taken/found/photos/tiny-clip/final/pseudo_labels.parquet",
    output:
        "count.txt",
    shell:
        "wc -c < {{input}} > {{output}}"
"""


@pytest.fixture
def outer(tmp_path: Path) -> Path:
    """The other workflow's folder, with generated scenes to label."""
    config = {
        "results": "found",
        "run": {"datasets": ["photos"], "trainings": ["small"]},
        "datasets": {
            "photos": {
                "reader": "demo",
                "classes": str(ROOT / "config/classes/demo.yaml"),
                "shard_size": 6,
                "scenes": {"train": 9, "test": 1, "size": 64},
            }
        },
        "encoders": {"tiny-clip": {"model": f"local-dir:{ROOT}/cdul_steps/demo/tiny-clip"}},
        "labels": {"final": {}},
        "trainings": {"small": SMALL_TRAINING},
    }
    (tmp_path / "outer.yaml").write_text(yaml.safe_dump({"labelling": config}))
    (tmp_path / "Snakefile").write_text(SNAKEFILE)
    return tmp_path


def snakemake(folder: Path, *words: str) -> str:
    done = subprocess.run(
        [launcher.commands() / "snakemake", "--cores", "2", *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_as_a_module(outer):
    snakemake(outer)
    labels = outer / "taken/found/photos/tiny-clip/final/pseudo_labels.parquet"
    assert len(pq.read_table(labels)) == 9
    assert int((outer / "count.txt").read_text()) == labels.stat().st_size
    assert not (outer / "found").exists() and not (outer / "results").exists()
    assert "Nothing to be done" in snakemake(outer)
    plan = snakemake(outer, "-n", "cdul_all")
    for rule in ("cdul_quality", "cdul_train", "cdul_predict", "cdul_evaluate", "cdul_model_card"):
        assert rule in plan
    assert "cdul_encode " not in plan and "cdul_manifest " not in plan


def test_the_catalogues_front_door(project):
    """`workflow/Snakefile` plans what `Snakefile` does."""
    plan = project.plan()
    assert plan["model_card"] == 1
    assert project.plan("--snakefile", "workflow/Snakefile") == {**plan, "default": 1}
