"""Benchmarks that depend on the workflow's files or on functions of the package must work."""

import json
import subprocess
import sys
from typing import Any

from copies import ROOT
from PIL import Image


def run(name: str, *words: object) -> dict[str, Any]:
    command = [sys.executable, ROOT / "benchmarks" / name, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


def test_planning_with_all_results_there():
    """It fails by itself if something is left to do."""
    plans = run("plan.py", "--shards", "3")["shards"]["3"]
    assert plans.keys() == {"plan_all_to_do", "plan_none_to_do", "run_none_to_do"}


def test_commands_are_timed_from_the_loaded_model_on(tmp_path):
    """The benchmarks watch functions of the package by their names."""
    for number in range(8):
        Image.new("RGB", (40, 30), (number, 0, 0)).save(tmp_path / f"{number}.jpg")
    photos = ["--photos", tmp_path, "--images", 8, "--turns", 1]
    (turn,) = run("encode.py", *photos, "--parts", "encode")["encode"]
    assert turn["views_per_second"] > 0
    short = ["--engines", "eager", "--batches", 1, "--seconds", 0.01, "--threads", 1]
    small = ["--model", "test_resnet", "--image-size", 32]
    found = run("classifier.py", *photos, *small, *short)
    assert all(found[stage]["turns"][0]["ratio"] > 0 for stage in ("predict", "features"))
