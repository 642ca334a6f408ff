"""The workflow from the wheel, in folders without a clone."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import launcher
import pytest
import yaml
from copies import ROOT

SMALL = {
    "datasets": {"demo": {"scenes": {"train": 4, "test": 2, "size": 64}}},
    "run": {"labels": ["final"]},
}


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A function that runs a command in a folder, with the wheel as its package."""
    place = tmp_path_factory.mktemp("installed")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(place)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = place.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(place / "site")

    def run(folder, command, *words):
        return subprocess.run(
            [launcher.commands() / command, *words],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(place / "site")},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    run.site = place / "site"
    return run


def test_the_wheel_has_all_that_a_clone_has_beside_the_package(installed):
    project = installed.site / "cdul_steps/project"
    for folder in ("config", "docs", "profiles", "workflow"):
        for file in (ROOT / folder).rglob("*.*"):
            assert (project / file.relative_to(ROOT)).is_file() or "__pycache__" in file.parts
    assert (installed.site / "cdul_steps/py.typed").is_file()


def test_a_folder_of_ones_own(installed, tmp_path):
    done = installed(tmp_path, "cdul", "init", "mine", "--config", "demo")
    assert done.returncode == 0, done.stdout
    mine = tmp_path / "mine"
    (mine / "small.yaml").write_text(yaml.safe_dump(SMALL))
    words = ["--configfile", "small.yaml"]
    # Planning reads the folder's class file and the package's model.
    scenes = "results/demo/scenes/scenes.csv"
    done = installed(mine, "cdul", "run", scenes, *words)
    assert done.returncode == 0, done.stdout
    assert (mine / scenes).is_file()
    done = installed(mine, "cdul", "run", "--dry-run", "--quiet", "rules", *words)
    assert done.returncode == 0, done.stdout
    assert "encode_text" in done.stdout and "scenes" not in done.stdout
    snakefile = installed(mine, "cdul", "snakefile").stdout.strip()
    assert snakefile.startswith(str(installed.site))
    docs = installed(mine, "cdul", "docs").stdout.strip()
    assert docs.startswith(str(installed.site)) and Path(docs, "datasets.md").is_file()


def test_an_empty_folder_has_the_demo(installed, tmp_path):
    """With `--directory`, another folder than the shell's."""
    snakefile = str(installed.site / "cdul_steps/project/Snakefile")
    (tmp_path / "there").mkdir()
    words = ["-s", snakefile, "--directory", "there", "-n", "--cores", "1"]
    done = installed(tmp_path, "snakemake", *words)
    assert done.returncode == 0, done.stdout
    assert "encode_text" in done.stdout and "train" in done.stdout


def test_a_mistake_is_snakemakes(installed, tmp_path):
    done = installed(tmp_path, "cdul", "run", "--nonsense")
    assert done.returncode == 2 and "--nonsense" in done.stdout
    assert "Traceback" not in done.stdout
