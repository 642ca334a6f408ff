"""Fixtures shared by all tests."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import launcher
import pytest
from hypothesis import settings

# Time limits on single examples would make the tests depend on the machine.
settings.register_profile("cdul", deadline=None, max_examples=30)
settings.load_profile("cdul")


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the repository."""
    return Path(__file__).parents[1]


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder with real test data, which is not part of the project."""
    folder = os.environ.get("CDUL_TEST_DATA")
    if not folder:
        pytest.skip("CDUL_TEST_DATA is not set: no folder of test data")
    return Path(folder)


@pytest.fixture(scope="session")
def cdul() -> Callable[..., subprocess.CompletedProcess]:
    """Run the command line in a separate process, through the launcher."""

    def run(*words: object) -> subprocess.CompletedProcess:
        command = [str(launcher.commands() / "cdul"), *map(str, words)]
        return subprocess.run(command, capture_output=True, text=True, timeout=120)

    return run
