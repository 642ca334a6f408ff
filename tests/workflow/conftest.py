"""Real runs of the workflow on copies of the project."""

import fcntl
import shutil
from pathlib import Path

import pytest
from copies import SMALL_TRAINING, Project, copy_project


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """A fresh copy of the project."""
    return copy_project(tmp_path / "project")


FOLDER = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark all tests here as slow: every Snakemake process takes seconds to start."""
    for item in items:
        if FOLDER in item.path.parents:
            item.add_marker(pytest.mark.slow)


CONFIG = {
    "datasets": {"demo": {"shard_size": 20, "scenes": {"train": 50, "test": 20}}},
    "run": {"labels": ["final"], "trainings": ["small"]},
    "trainings": {"small": SMALL_TRAINING},
}


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Project:
    """A complete run of a reduced demo; tests leave it as they found it.

    It runs once, and each of pytest's worker processes has a copy.
    """
    own = tmp_path_factory.getbasetemp()
    shared = own if worker_id == "master" else own.parent
    with (shared / "demo.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (shared / "demo").exists():
            project = copy_project(shared / "unfinished")
            project.config = CONFIG
            project.snakemake()
            project.folder.rename(shared / "demo")
    shutil.copytree(shared / "demo", own / "project", symlinks=True)
    return Project(own / "project", CONFIG)
