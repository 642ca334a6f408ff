"""Results in a Snakemake storage: only files that rules declare come back from it."""

import shutil

import launcher
import pytest
import yaml
from copies import SMALL_TRAINING, copy_project
from PIL import Image

pytest.importorskip("snakemake_storage_plugin_fs")


@pytest.mark.skipif(shutil.which("rsync") is None, reason="the fs plugin needs rsync")
def test_results_in_a_storage(tmp_path):
    """A run with its report; planning it again finds nothing to do."""
    project = copy_project(tmp_path / "project")
    for split in ("train",):
        (project.folder / "photos" / split).mkdir(parents=True)
        for name in "abc":
            Image.new("RGB", (64, 64)).save(project.folder / "photos" / split / f"{name}.png")
    config = {
        "datasets": {
            "photos": {
                "reader": "folder",
                "root": str(project.folder / "photos"),
                "classes": "config/classes/demo.yaml",
                "splits": {"train": "train"},
                "shard_size": 2,
            }
        },
        "run": {"datasets": ["photos"], "labels": ["final"], "trainings": ["small"]},
        "trainings": {"small": {**SMALL_TRAINING, "epochs": 1}},
    }
    (project.folder / "overlay.yaml").write_text(yaml.safe_dump(config))
    stored = tmp_path / "stored"

    def snakemake(*words: str) -> str:
        options = ["--default-storage-provider", "fs", "--default-storage-prefix", str(stored)]
        options += ["--configfile", "overlay.yaml"]
        done = launcher.run_snakemake(
            project.folder, project.environment, "--cores", "2", *words, *options
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    snakemake("report")
    results = stored / "results/photos"
    shards = {path.name for path in (results / "manifest/train").glob("*.parquet")}
    assert shards == {"0.parquet", "1.parquet"}
    assert "small" in (stored / "results/report/report.html").read_text()
    # The files outside of the storage are only copies.
    shutil.rmtree(project.folder / ".snakemake/storage", ignore_errors=True)
    assert "Nothing to be done" in snakemake("-n", "report")
    assert "Nothing to be done" in snakemake("-n")
