import json
import subprocess
import sys

import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from cdul_steps import cli
from cdul_steps.data.files import SCHEMA_VERSION
from cdul_steps.data.tables import read_facts
from cdul_steps.errors import UserError
from cdul_steps.tools.summary import summarise

STAGES = ["manifest", "encode", "similarity", "label", "sweep", "train", "evaluate", "predict"]

# The stages from images to metrics, except for the encoder, whose output is synthetic here.
PIPELINE = """
import json, sys
from pathlib import Path
import numpy as np
import pyarrow as pa
from PIL import Image
from cdul_steps.cli import app
from cdul_steps.data.stores import write_shard
from cdul_steps.data.tables import describe, write_table

def run(*words):
    app(list(words), standalone_mode=False)
    assert "torch" not in sys.modules, words[0]

Path("images").mkdir()
for name in "abc":
    Image.new("RGB", (9, 9)).save(f"images/{name}.png")
Path("images/table.csv").write_text("path,dog,cat\\na.png,1,0\\nb.png,0,1\\nc.png,1,1\\n")
Path("classes.txt").write_text("dog\\ncat\\n")
run("manifest", "--reader", "table", "--root", "images/table.csv", "--classes", "classes.txt",
    "--shard-size", "2", "--output", "results/data/manifest/images.parquet")
text = pa.table({"class": ["dog", "cat"], "embedding": [[1.0, 0.0], [0.0, 1.0]]})
facts = {"logit_scale": 10.0, "model": "none", "pretrained": None, "templates": ["{}"]}
write_table(describe(text, "text", **facts), Path("text.parquet"))
vectors = np.array([[1, 0], [0, 1], [0.7, 0.7]], np.float16)[:, None].repeat(10, axis=1)
images = ["--images", "results/data/manifest/images.parquet"]
run("store", *images, "--split", "train", "--text", "text.parquet", "--output", "e.zarr")
for shard in (0, 1):
    rows = list(range(3))[2 * shard : 2 * shard + 2]
    write_shard(Path("e.zarr"), shard, vectors[rows], 2)
    outcome = {"row": rows, "status": ["ok"] * len(rows), "error": [""] * len(rows)}
    write_table(pa.table(outcome), Path(f"{shard}.parquet"))
run("similarity", "--store", "e.zarr", "--text", "text.parquet", *images, "--split", "train",
    "--table", "0.parquet", "--table", "1.parquet", "--output", "sim.zarr")
labels = "results/data/clip/final"
run("label", "--similarity", "sim.zarr", *images, "--split", "train", "--output",
    f"{labels}/pseudo_labels.parquet", "--settings",
    '{"standardise": true, "positives": 0.5, "grid": [3, 3]}')
run("quality", "--similarity", "train=sim.zarr", *images, "--output", f"{labels}/quality.json",
    "--labels", f"{labels}/pseudo_labels.parquet")
run("sweep", "--similarity", "train=sim.zarr", *images, "--output", "sweep.parquet", "--figure",
    "sweep.svg", "--settings", '{"tau": [1], "zeta": [0.5], "lambda": [0]}')
run("evaluate", "--scores", f"{labels}/pseudo_labels.parquet", *images, "--output",
    f"{labels}/fixed/metrics.json")
run("show", f"{labels}/pseudo_labels.parquet", "--class", "dog")
run("show", "results/data/manifest/images.parquet")
run("status", "results")
run("verify", "results")
run("summary", "results")
run("summary", "results", "--json")
"""


def commands():
    """All commands, by their words on the command line."""
    group = typer.main.get_command(cli.app)
    for name, command in group.commands.items():
        yield (name,)
        for inner in getattr(command, "commands", ()):
            yield name, inner


def test_help_lists_every_stage(cdul):
    done = cdul("--help")
    assert done.returncode == 0
    for stage in [*STAGES, "summary", "show", "status", "verify", "gallery", "demo"]:
        assert f" {stage} " in done.stdout
    assert "config-schema" not in done.stdout
    assert "--install-completion" in done.stdout and "--version" in done.stdout


@pytest.mark.parametrize("words", list(commands()), ids=" ".join)
def test_every_command_has_help(words):
    result = CliRunner().invoke(cli.app, [*words, "--help"])
    assert result.exit_code == 0
    assert "Usage" in result.output


def test_stages_without_a_model_do_not_import_torch(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", PIPELINE], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "mAP 100.00 on 3 images" in done.stdout
    table, _, rest = done.stdout.partition("\n\nmAP, CF1 and OF1")
    for line in ("CLIP, final", "CLIP, local max", "CLIP, pseudo-labels", "classifier, fixed"):
        assert line in table
    rows = json.loads(rest[rest.index("[") :])
    assert len(rows) == 7
    assert rows[-1]["scores"] == "classifier, fixed"
    assert rows[-1]["mAP"] == 100
    assert {row["dataset"] for row in rows} == {"data"}


def test_without_truth_the_summary_speaks_of_no_measure(tmp_path):
    labels = tmp_path / "photos/clip/final"
    (labels / "small/model").mkdir(parents=True)
    (labels / "small/model/model.json").touch()
    for name, facts in {
        "quality.json": {"splits": {}},
        "small/metrics.json": {
            "scores": "predictions/train.parquet",
            "mAP": None,
            "at_threshold": {"CF1": None, "OF1": None},
            "images": 0,
        },
    }.items():
        (labels / name).write_text(json.dumps({"schema_version": SCHEMA_VERSION, **facts}))
    text = summarise(tmp_path, as_json=False)
    assert "nothing to measure" in text and "percent" not in text
    assert "photos/clip/final/small/: model/" in text


@pytest.mark.parametrize(
    "words",
    [
        ("summary", "/none"),
        ("report", "/none"),
        ("evaluate", "--scores", "/none.parquet", "--images", "/none.parquet", "--output", "/x"),
        ("predict", "--model", "m", "--output", "o.csv"),
        (
            *("label", "--similarity", "s", "--images", "i", "--split", "train", "--output", "o"),
            *("--settings", '{"harden": {"threshold": 0.5, "top_k": 1}}'),
        ),
        ("manifest", "--reader", "folder", "--root", "/x", "--classes", "/x", "--output", "o"),
    ],
    ids=lambda words: words[0],
)
def test_a_mistake_is_one_line_and_status_one(words, cdul):
    done = cdul(*words)
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("cdul: error: ")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UserError("wrong\nhere"), "cdul: error: wrong here"),
        (PermissionError(13, "Permission denied", "/x"), "cdul: error: Permission denied: /x"),
    ],
)
def test_errors_are_told_in_one_line(error, line, monkeypatch):
    def fail(**_):
        raise error

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == line


def test_a_bug_keeps_its_traceback(monkeypatch):
    def fail(**_):
        raise ZeroDivisionError

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(ZeroDivisionError):
        cli.main()


def test_grids_of_the_manifest(tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    (tmp_path / "classes.txt").write_text("dog\n")
    words = ["manifest", "--reader", "folder", "--root", tmp_path, "--split", "train=."]
    words += ["--classes", tmp_path / "classes.txt", "--output", tmp_path / "images.parquet"]

    def make(*options):
        return CliRunner().invoke(cli.app, [*map(str, words), *options])

    for options, grid, overlap in (
        ((), [[3, 3]], 0),
        (("--grid", "2", "4"), [[2, 4]], 0),
        (
            ("--grid", "1", "2", "--further-grid", "3x2", "--further-grid", "1x1"),
            [[1, 2], [3, 2], [1, 1]],
            0,
        ),
        (("--overlap", "0.25"), [[3, 3]], 0.25),
    ):
        assert make(*options).exit_code == 0
        layout = read_facts(tmp_path / "images.parquet")["layout"]
        assert (layout["grid"], layout["overlap"]) == (grid, overlap)
    for options in (
        ("--further-grid", "3"),
        ("--further-grid", "0x3"),
        ("--grid", "0", "3"),
        ("--overlap", "1"),
    ):
        result = make(*options)
        assert result.exit_code == 2
        assert options[0] in result.output


@pytest.mark.parametrize(
    ("option", "value"), [("--difficult", "maybe"), ("--ap", "coco"), ("--colour", "red")]
)
def test_an_option_that_does_not_exist(option, value):
    words = ["evaluate", "--scores", "s", "--images", "i", "--output", "o", option, value]
    result = CliRunner().invoke(cli.app, words)
    assert result.exit_code == 2
    assert option in result.output
