"""Benchmarks that depend on the workflow's files must work with the current ones."""

import json
import subprocess
import sys

from copies import ROOT


def test_planning_with_all_results_there():
    """It fails by itself if something is left to do."""
    command = [sys.executable, ROOT / "benchmarks/plan.py", "--shards", "3"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    plans = json.loads(done.stdout)["shards"]["3"]
    assert plans.keys() == {"plan_all_to_do", "plan_none_to_do", "run_none_to_do"}
