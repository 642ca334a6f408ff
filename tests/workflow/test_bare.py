"""Snakemake's lint with only Snakemake installed, as the workflow catalogue runs it."""

import subprocess
import sys

from copies import ROOT

# Without the packages that this project needs and Snakemake does not.
PROGRAM = """
import sys
from snakemake.cli import main
for name in ("msgspec", "numpy", "onnx", "pandas", "pyarrow", "PIL", "torch", "typer", "zarr"):
    sys.modules[name] = None
main(["--lint"])
"""


def test_lint_needs_snakemake_alone():
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "your workflow is in a good condition" in done.stderr
