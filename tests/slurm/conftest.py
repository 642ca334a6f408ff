"""A SLURM for the tests, if one can be started."""

from collections.abc import Iterator

import cluster as slurm
import pytest


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A one-node SLURM with one GPU on this machine."""
    if reason := slurm.why_not():
        pytest.skip(reason)
    with slurm.running(tmp_path_factory.mktemp("slurm")):
        yield
