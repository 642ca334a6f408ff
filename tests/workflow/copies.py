"""Copies of the project for running the workflow."""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import launcher
import yaml

ROOT = Path(__file__).parents[2]
PARTS = ("Snakefile", "workflow", "config", "profiles", "cdul_steps")


@dataclass
class Project:
    """A copy of the project, and the config merged over its default."""

    folder: Path
    config: dict = field(default_factory=dict)

    @property
    def results(self) -> Path:
        return self.folder / self.config.get("results", "results")

    @property
    def environment(self) -> dict[str, str]:
        """The environment in which the copy finds its own package."""
        return {**os.environ, "PYTHONPATH": str(self.folder)}

    def overlay(self) -> str:
        """Write the config to a file; returns its path."""
        path = self.folder / "overlay.yaml"
        path.write_text(yaml.safe_dump(self.config))
        return str(path)

    def words(self, *arguments: str) -> list[str]:
        """The arguments of snakemake with the copy's config."""
        return ["--cores", "2", *arguments, "--configfile", self.overlay()]

    def start(self, *arguments: str, **options: Any) -> subprocess.Popen:
        """Start snakemake in the copy, with options of Popen; stdout includes stderr."""
        return subprocess.Popen(
            [sys.executable, "-m", "snakemake", *self.words(*arguments)],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            **options,
        )

    def snakemake(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess:
        """Run snakemake in the copy through the launcher; stdout includes stderr."""
        words = self.words(*arguments)
        done = launcher.run_snakemake(self.folder, self.environment, *words)
        if check:
            assert done.returncode == 0, done.stdout
        return done

    def plan(self, *arguments: str) -> dict[str, int]:
        """The jobs that snakemake would run, by rule."""
        text = self.snakemake("-n", *arguments).stdout
        stats = text.partition("Job stats:")[2].partition("total")[0]
        jobs = {m[1]: int(m[2]) for m in re.finditer(r"^(\w+)\s+(\d+)\s*$", stats, re.M)}
        jobs.pop("all", None)
        return jobs

    def set(self, path: str, value: object) -> "Project":
        """The same copy with one config value changed; `path` as in "labels.final.zeta"."""
        config = yaml.safe_load(yaml.safe_dump(self.config))
        *parents, last = path.split(".")
        section = config
        for key in parents:
            section = section.setdefault(key, {})
        section[last] = value
        return Project(self.folder, config)

    def shard_times(self, dataset: str, encoder: str) -> dict[str, int]:
        """When each shard of embeddings was written."""
        store = self.results / dataset / encoder / "embeddings"
        return {
            p.relative_to(store).as_posix(): p.stat().st_mtime_ns
            for p in store.glob("*.zarr/c/*/0/0")
        }


def copy_project(folder: Path) -> Project:
    """Copy the files that a run needs."""
    folder.mkdir()
    for part in PARTS:
        source = ROOT / part
        if source.is_dir():
            shutil.copytree(source, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / part)
    return Project(folder)


SMALL_TRAINING = {
    "model": "test_resnet",
    "image_size": 64,
    "epochs": 2,
    "batch_size": 16,
    "learning_rate": "1e-3",
    "alignment": {"warmup": 0},
}
