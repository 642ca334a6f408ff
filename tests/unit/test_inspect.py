"""docs/inspect.md: every block runs, and the results of the less obvious ones are correct."""

import contextlib
import io
import re
import shlex
from pathlib import Path

import duckdb
import made
import numpy as np
import pyarrow.parquet as pq
import pytest
import zarr
from typer.testing import CliRunner

from cdul_steps.cli import app
from cdul_steps.data.tables import read_scores

TEXT = (Path(__file__).parents[2] / "docs/inspect.md").read_text(encoding="utf-8")
BLOCKS = [
    pytest.param(
        language, block, id=f"{language} at line {TEXT[: match.start()].count(chr(10)) + 1}"
    )
    for match in re.finditer(r"^```(\w+)\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)
    for language, block in [match.groups()]
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A working directory with a demo's results."""
    folder = tmp_path_factory.mktemp("inspect")
    files = {"train": [f"{i:02}.jpg" for i in range(40)], "test": ["a.jpg", "b.jpg"]}
    made.make_results(folder / "results", files)
    return folder


@pytest.fixture(autouse=True)
def inside(folder, monkeypatch):
    monkeypatch.chdir(folder)


def block_after(sentence: str, language: str) -> str:
    assert TEXT.count(sentence) == 1
    return TEXT.partition(sentence)[2].partition(f"```{language}\n")[2].partition("```")[0]


def sql(after: str) -> list[tuple]:
    """The rows that the SQL block after a sentence returns."""
    return duckdb.sql(block_after(after, "sql")).fetchall()


def python(after: str) -> dict:
    """The variables that the Python block after a sentence defines."""
    names: dict = {}
    exec(block_after(after, "python"), names)
    return names


def scores(name: str) -> np.ndarray:
    return read_scores(Path("results/demo/tiny-clip/calibrated") / name)[2].astype(float)


def run_command(line: str) -> str:
    program, *words = shlex.split(line)
    if words[0] == "run":
        return "not here: a workflow, which has its own tests"
    assert program == "cdul"
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize(("language", "block"), BLOCKS)
def test_every_block_runs(language, block):
    if language == "sh":
        assert all(run_command(line) for line in block.splitlines())
    elif language == "sql":
        assert duckdb.sql(block).fetchall()
    else:
        assert language == "python"
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(block, {})
        assert printed.getvalue()


def test_images_of_a_class():
    boat = scores("pseudo_labels.parquet")[:, 0]
    rows = sql("Images of a class")
    assert [row[1] for row in rows] == pytest.approx(sorted(boat[boat > 0.8], reverse=True))


def test_every_class_and_the_histogram():
    labels = scores("pseudo_labels.parquet")
    counts = {name: (count, mean) for name, count, mean in sql("All classes at once")}
    for c, name in enumerate(("boat", "car", "cat")):
        assert counts[name][0] == (labels[:, c] >= 0.5).sum()
        assert counts[name][1] == pytest.approx(labels[:, c].mean(), rel=1e-5)
    expected, _ = np.histogram(labels, np.linspace(0, 1, 11))
    found = dict(sql("Histogram"))
    assert sum(found.values()) == labels.size
    assert [found.get(i / 10, 0) for i in range(10)] == expected.tolist()


def test_changes_and_disagreements():
    clip, refined = scores("pseudo_labels.parquet"), scores("aligned/refined_labels.parquet")
    largest = np.sort(abs(refined - clip).ravel())[::-1][:20]
    changes = [
        abs(after - before) for _, _, before, after in sql("Labels that the refinement changed")
    ]
    assert changes == pytest.approx(largest.tolist(), rel=1e-4)
    classifier = scores("aligned/predictions/train.parquet")
    largest = np.sort(abs(classifier - clip)[:, 0])[::-1][:20]
    found = [abs(a - b) for _, a, b in sql("Where CLIP and the classifier disagree")]
    assert found == pytest.approx(largest.tolist(), rel=1e-4)


def test_failed_images():
    found = {row[:2]: row[2:] for row in sql("Number of images by encoding status")}
    assert {split: count for (split, status), (count, _) in found.items() if status == "ok"} == {
        "train": 39,
        "test": 1,
    }
    assert found["train", "truncated"] == (1, ["train/00.jpg"])
    assert found["test", "truncated"] == (1, ["test/a.jpg"])


def test_precision_and_recall():
    names = python("Precision and recall of the labels at 0.5")
    images = pq.read_table("results/demo/manifest/images.parquet").to_pylist()
    known = {i["image_id"]: i["positive"] for i in images if i["known"]}
    labels = pq.read_table("results/demo/tiny-clip/calibrated/pseudo_labels.parquet").to_pylist()
    rows = [row for row in labels if row["image_id"] in known]
    for c, name in enumerate(("boat", "car", "cat")):
        both = sum(row[name] >= 0.5 and c in known[row["image_id"]] for row in rows)
        assert names["hits"][name] == both
        assert names["found"].sum()[name] == sum(row[name] >= 0.5 for row in rows)
        assert names["truth"].sum()[name] == sum(c in known[row["image_id"]] for row in rows)


def test_where_the_whole_and_a_snippet_disagree():
    names = python("Images for which the whole image and the best snippet differ most")
    cosines = zarr.open_array("results/demo/tiny-clip/similarity/train.zarr", mode="r")[:]
    logits = np.exp(cosines.astype(float) * made.LOGIT_SCALE)
    every = logits / logits.sum(axis=2, keepdims=True)
    gaps = np.nanmax(every[1:, 1:].max(axis=1) - every[1:, 0], axis=1)
    assert names["gap"].max(axis=1)[1:] == pytest.approx(gaps, abs=1e-5)
    assert (names["table"]["snippet"] - names["table"]["whole"])[1:].to_list() == pytest.approx(
        gaps.tolist(), abs=1e-5
    )


def test_images_like_an_image():
    cosine = python("Images most similar to a given image")["cosine"]
    assert cosine.idxmax() == "train/01.jpg"
    assert cosine.max() == pytest.approx(1, abs=1e-3)
