"""A whole round: questions, answers, estimate, thresholds, corrections, the next training."""

import json
import shutil
import subprocess
from pathlib import Path

import launcher
import pyarrow.parquet as pq
import pytest
from browsers import press, start_browser
from check_page import close_and_open_again, download, find, open_page, question
from copies import Project

from cdul_steps.data.corrections import read_corrections
from cdul_steps.data.files import read_json
from cdul_steps.data.tables import read_facts

pytestmark = pytest.mark.browser
TRAINING = "results/demo/tiny-clip/final/small"


def cdul(project: Project, *words: str) -> str:
    command = [launcher.commands() / "cdul", *words]
    done = subprocess.run(command, cwd=project.folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def answer_in_browser(check: Path, truth: dict[str, set[str]], number: int, folder: Path) -> Path:
    """Answer a number of questions by keyboard, closing the tab halfway; the downloaded file."""
    text = (check / "data/index.js").read_text(encoding="ascii")
    questions = json.loads(text.removeprefix("part(").removesuffix(");\n"))["questions"]
    folder.mkdir()
    driver = start_browser(prefs={"download.default_directory": str(folder)})
    try:
        open_page(driver, check)
        for until in (number // 2, number):
            while find(driver, "progress").get_property("value") < until:
                name = question(driver).removeprefix("Look again: ").removesuffix("?")
                place = int(find(driver, "photograph").get_dom_attribute("alt").split()[1]) - 1
                press(driver, "y" if name in truth[questions[place][0]] else "n")
            close_and_open_again(driver, check)
            assert find(driver, "status").text.startswith(f"{until} of ")
        return download(driver, folder)
    finally:
        driver.quit()


def test_from_questions_to_the_next_training(demo, tmp_path):
    shutil.copytree(demo.folder, tmp_path / "project", symlinks=True)
    project = Project(tmp_path / "project", demo.config)
    table = pq.read_table(project.results / "demo/manifest/images.parquet")
    classes = read_facts(project.results / "demo/manifest/images.parquet")["classes"]
    truth = {
        row["image_id"]: {classes[c] for c in row["positive"]}
        for row in table.select(["image_id", "positive"]).to_pylist()
    }
    predictions = f"{TRAINING}/predictions/train.parquet"
    cdul(project, "check", "draw", "--scores", predictions, "--output", "check", "--number", "60")
    check = project.folder / "check"
    downloaded = answer_in_browser(check, truth, 50, tmp_path / "downloads")
    shutil.copy(downloaded, project.folder / "answers.csv")
    given = read_corrections(downloaded)
    assert len(given) == 50
    assert all(value == (name in truth[image]) for (image, name), value in given.items())

    estimate = json.loads(
        cdul(project, "check", "estimate", "answers.csv", "--check", "check", "--json")
    )
    assert estimate["answers"] == 50 and estimate["all"]["recall"]
    model = f"{TRAINING}/model"
    cdul(project, "check", "thresholds", "answers.csv", "--check", "check", "--model", model)
    card = read_json(project.folder / model / "model.json")
    assert card["checked"]["answers"] == 50 and set(card["thresholds"]) == set(classes)
    again = project.plan()
    assert again["predict"] == 2 and not {"label", "train"} & set(again)

    corrected = project.set("labels.final.corrections", "answers.csv")
    corrected.snakemake()
    facts = read_facts(project.results / "demo/tiny-clip/final/pseudo_labels.parquet")
    assert facts["corrections"] == 50
    card = read_json(project.folder / model / "model.json")
    assert not card["checked"] and not card["thresholds"]
    # The next check asks about nothing that has been answered.
    cdul(project, "check", "draw", "--scores", predictions, "--output", "second", "--number", "600")
    sample = pq.read_table(project.folder / "second/sample.parquet")
    entries = zip(sample["image_id"].to_pylist(), sample["class"].to_pylist(), strict=True)
    assert not set(entries) & set(given)
    # The old estimate stays valid for the old scores.
    text = cdul(project, "check", "estimate", "answers.csv", "--check", "check", "--json")
    assert json.loads(text) == estimate
