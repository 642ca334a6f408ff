"""The unit tests that Snakemake generates from a run."""

import shutil
import subprocess
import sys

import launcher
from copies import Project


def test_generated_unit_tests(demo, tmp_path):
    """Each runs one rule in a folder with the inputs of that rule only, and compares every byte."""
    project = Project(tmp_path / "project", demo.config)
    shutil.copytree(demo.folder, project.folder)
    # Not through the launcher, whose folder Snakemake would take for that of the run.
    output, _ = project.start("--generate-unit-tests", "generated").communicate()
    assert "test_label.py" in output
    tests = [f"generated/test_{rule}.py" for rule in ("label", "evaluate")]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--tb=short", *tests],
        cwd=project.folder,
        env={**project.environment, "PATH": f"{launcher.commands()}:{project.environment['PATH']}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "2 passed" in done.stdout, done.stdout
