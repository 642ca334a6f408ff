"""Another workflow uses this one as a module, with a prefix and its own config."""

import os
from pathlib import Path

import launcher
import pyarrow.parquet as pq
import pytest
import yaml
from copies import ROOT, SMALL_TRAINING

SNAKEFILE = """
from cdul_steps.shipped import SNAKEFILE


configfile: "outer.yaml"


module cdul:
    snakefile:
        str(SNAKEFILE)
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
        "wc -c < {input} > {output}"
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
                "classes": "config/classes/demo.yaml",
                "shard_size": 6,
                "scenes": {"train": 9, "test": 1, "size": 64},
            }
        },
        "encoders": {"tiny-clip": {"model": "local-dir:cdul_steps/demo/tiny-clip"}},
        "labels": {"final": {}},
        "trainings": {"small": {**SMALL_TRAINING, "epochs": 1}},
        "sweep": {"tau": [1], "zeta": [0.3], "lambda": [0], "standardise": [False]},
        "ablation": {"training": "small", "table": "variants.csv", "seeds": [0]},
    }
    (tmp_path / "variants.csv").write_text("variant\nas-it-is\n")
    (tmp_path / "outer.yaml").write_text(yaml.safe_dump({"labelling": config}))
    (tmp_path / "Snakefile").write_text(SNAKEFILE)
    return tmp_path


def snakemake(folder: Path, *words: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = launcher.run_snakemake(folder, environment, "--cores", "2", *words)
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_as_a_module(outer):
    snakemake(outer)
    labels = outer / "taken/found/photos/tiny-clip/final/pseudo_labels.parquet"
    assert len(pq.read_table(labels)) == 9
    assert int((outer / "count.txt").read_text()) == labels.stat().st_size
    assert not (outer / "found").exists() and not (outer / "results").exists()

    # Other files that are read and written also have the prefix.
    encoder = outer / "taken/found/photos/tiny-clip"
    gallery = encoder / "final/small/gallery/train"
    targets = ["cdul_report", "cdul_sweep", "cdul_ablation", str(gallery.relative_to(outer))]
    text = snakemake(outer, *targets)
    assert "rule cdul_encode:" not in text and "cdul_manifest:" not in text
    for made in (
        outer / "taken/found/report/report.html",
        encoder / "sweep/sweep.svg",
        encoder / "ablation/ablation.md",
        gallery / "index.html",
    ):
        assert made.is_file(), made
    assert "small" in (outer / "taken/found/report/report.html").read_text()
    assert not (outer / "found").exists() and not (outer / "results").exists()
    assert "Nothing to be done" in snakemake(outer, *targets)


def test_the_catalogues_front_door(project):
    """`workflow/Snakefile` plans the same as `Snakefile`."""
    plan = project.plan()
    assert plan["model_card"] == 1
    assert project.plan("--snakefile", "workflow/Snakefile") == {**plan, "default": 1}
