"""Real runs of the workflow on copies of the project."""

from pathlib import Path

import pytest
from copies import SMALL_TRAINING, Project, copy_project


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """A fresh copy of the project."""
    return copy_project(tmp_path / "project")


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A small cut of the demo, run whole; tests leave it as they found it."""
    project = copy_project(tmp_path_factory.mktemp("demo") / "project")
    project.config = {
        "datasets": {"demo": {"shard_size": 20, "scenes": {"train": 50, "test": 20}}},
        "run": {"trainings": ["small"]},
        "trainings": {"small": SMALL_TRAINING},
    }
    project.snakemake()
    return project
