"""Checks: the sample, the estimates from answers, and the errors."""

import csv
import json
from pathlib import Path

import made
import numpy as np
import pyarrow.parquet as pq
import pytest
from messages import message_of
from PIL import Image
from typer.testing import CliRunner

from cdul_steps.cli import app
from cdul_steps.data.corrections import read_corrections
from cdul_steps.data.files import digest, read_json, write_json
from cdul_steps.data.tables import describe, read_facts, read_scores, score_table, write_table
from cdul_steps.errors import UserError
from cdul_steps.steps.report import make_report
from cdul_steps.tools.check import (
    choose_thresholds,
    describe_estimate,
    describe_thresholds,
    draw_sample,
    estimate_scores,
    read_answers,
)

CLASSES = ["boat", "car", "cat"]
NAMES = [f"{i:03}.jpg" for i in range(120)]


@pytest.fixture(scope="module")
def training(tmp_path_factory) -> Path:
    results = tmp_path_factory.mktemp("made") / "results"
    return made.make_results(results, {"train": NAMES}, CLASSES)


@pytest.fixture(scope="module")
def scores(training) -> Path:
    return training / "predictions/train.parquet"


@pytest.fixture(scope="module")
def drawn(scores, tmp_path_factory) -> Path:
    return draw(scores, tmp_path_factory.mktemp("drawn") / "check")


def draw(scores: Path, output: Path, number: int = 150, **further) -> Path:
    arguments = {"seed": 0, "threshold": None, "only": [], "corrections": None, **further}
    draw_sample(scores=scores, output=output, number=number, **arguments)
    return output


def asked(check: Path) -> list[tuple[str, str]]:
    table = pq.read_table(check / "sample.parquet")
    table = table.filter(table["asked"])
    return list(zip(table["image_id"].to_pylist(), table["class"].to_pylist(), strict=True))


def truth_of(check: Path) -> dict[tuple[str, str], bool]:
    """An invented truth for every entry, mostly as the scores predict."""
    table, classes, scores = read_scores(check / "scores.parquet")
    shown = np.random.default_rng(5).random(scores.shape) < 0.05 + 0.9 * scores
    return {
        (image_id, name): bool(shown[row, column])
        for row, image_id in enumerate(table["image_id"].to_pylist())
        for column, name in enumerate(classes)
    }


def answer(check: Path, path: Path, number: int | None = None) -> Path:
    """Write the answers to the first questions of a check."""
    truth = truth_of(check)
    return write_answers(path, {entry: int(truth[entry]) for entry in asked(check)[:number]})


def write_answers(path: Path, given: dict[tuple[str, str], int]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["image_id", "class", "value"])
        writer.writerows([*entry, value] for entry, value in given.items())
    return path


@pytest.fixture(scope="module")
def answers(drawn, tmp_path_factory) -> Path:
    return answer(drawn, tmp_path_factory.mktemp("answers") / "answers.csv")


def index_of(check: Path) -> dict:
    text = (check / "data/index.js").read_text(encoding="ascii")
    return json.loads(text.removeprefix("part(").removesuffix(");\n"))


def test_page_asks_what_the_sample_has(drawn, scores):
    index = index_of(drawn)
    assert index["classes"] == CLASSES
    table, _, values = read_scores(scores)
    row = {image_id: i for i, image_id in enumerate(table["image_id"].to_pylist())}
    questions = [(image_id, CLASSES[c]) for image_id, c, _, _ in index["questions"]]
    assert questions == asked(drawn) and len(set(questions)) == 150
    for image_id, c, place, named in index["questions"]:
        assert named == (values[row[image_id], c] >= 0.5)
        with Image.open(drawn / f"images/{place}.webp") as image:
            assert max(image.size) == 48
    assert 0 < pq.read_table(drawn / "sample.parquet")["probability"].to_numpy().min() <= 1


def test_more_questions_later_keep_the_first_and_the_answers(scores, tmp_path):
    check = draw(scores, tmp_path / "check", 40)
    first, index = asked(check), index_of(check)
    answer(check, check / "answers.csv")
    draw(scores, check, 100)
    assert asked(check)[:40] == first and len(asked(check)) == 100
    assert index_of(check)["id"] == index["id"]
    assert len(read_answers(check / "answers.csv", check).yes) == 40


def test_estimate_is_that_of_the_answers(drawn, answers):
    found = estimate_scores(answers, drawn)
    truth = truth_of(drawn)
    table, classes, scores = read_scores(drawn / "scores.parquet")
    ids = table["image_id"].to_pylist()
    shown = np.array([[truth[image_id, name] for name in classes] for image_id in ids])
    named = scores >= 0.5
    true = {
        "precision": (shown & named).sum() / named.sum(),
        "recall": (shown & named).sum() / shown.sum(),
    }
    for name, value in true.items():
        low, middle, high = found["all"][name]
        assert low < middle < high
        assert abs(middle - value) < 0.12 and abs(found["by_design"][name] - value) < 0.12
    assert found["answers"] == 150 and found["all"]["named"] == named.sum()
    for point in found["all"]["curve"]:
        named = scores >= point["threshold"]
        low, _, high = point["recall"]
        assert low - 0.08 <= (shown & named).sum() / shown.sum() <= high + 0.08
    at = next(point for point in found["all"]["curve"] if point["threshold"] == 0.5)
    assert at["precision"] == found["all"]["precision"] and at["recall"] == found["all"]["recall"]
    text = describe_estimate(found)
    assert "From 150 answers to 150 questions." in text
    assert text == describe_estimate(estimate_scores(answers, drawn))


def test_few_answers_estimate_nothing(drawn, tmp_path):
    found = estimate_scores(answer(drawn, tmp_path / "few.csv", 8), drawn)
    assert found["all"]["recall"] is None and found["classes"]["cat"]["precision"] is None
    assert "too few answers" in describe_estimate(found)
    found = estimate_scores(answer(drawn, tmp_path / "more.csv", 140), drawn)["all"]
    assert found["recall"] and found["mAP"] is None


def test_curves_have_gaps_where_answers_are_few(drawn, answers):
    found = estimate_scores(answers, drawn)
    table, classes, scores = read_scores(drawn / "scores.parquet")
    rows = {i: row for row, i in enumerate(table["image_id"].to_pylist())}
    for name, row in found["classes"].items():
        own = [scores[rows[i], classes.index(c)] for i, c in asked(drawn) if c == name]
        for point in row["curve"]:
            enough = sum(score >= point["threshold"] for score in own) >= 12
            assert (point["precision"] is not None) == enough
            assert (point["recall"] is None) == (row["recall"] is None)
    assert any(point["precision"] is None for point in found["classes"]["cat"]["curve"])


def test_a_report_shows_estimates(training, drawn, answers, tmp_path):
    found = {"some": estimate_scores(answers, drawn)}
    found["few"] = estimate_scores(answer(drawn, tmp_path / "few.csv", 8), drawn)
    for name, value in found.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(value))
    output = tmp_path / "report"
    arguments = ["report", str(training.parent), "--output", str(output)]
    arguments += [f"--estimate={tmp_path / name}.json" for name in found]
    assert CliRunner().invoke(app, arguments, catch_exceptions=False).exit_code == 0
    page = (output / "report.html").read_text(encoding="utf-8")
    assert "From 150 answers to 150 questions." in page and "From 8 answers" in page
    low, _, high = found["some"]["all"]["precision"]
    assert f"<td>{100 * low:.0f} to {100 * high:.0f}</td>" in page
    drawing = (output / "estimates/1/estimate.svg").read_text()
    titles = ["all classes (150 answers)"]
    titles += [f"{c} ({row['answers']} answers)" for c, row in found["some"]["classes"].items()]
    assert all(title in drawing for title in titles)
    # Eight answers give no curve.
    assert not (output / "estimates/2").exists()


def test_a_file_that_is_no_estimate_is_named(training, answers, tmp_path):
    (tmp_path / "other.json").write_text("{}")

    def told(path: Path) -> str:
        arguments = {"folders": [training.parent], "output": tmp_path / "report"}
        return message_of(lambda: make_report(**arguments, estimates=[path]))

    for path in (answers, tmp_path / "other.json"):
        assert told(path).startswith(f"{path}: not an estimate")
    assert told(tmp_path / "no.json").endswith("no such file")


def test_answers_are_corrections_and_corrected_entries_are_not_asked(
    scores, drawn, answers, tmp_path
):
    given = read_corrections(answers)
    assert len(given) == 150
    again = draw(scores, tmp_path / "again", corrections=answers)
    assert not set(asked(again)) & set(given)


def test_corrections_may_spell_images_otherwise_and_be_of_others(scores, drawn, tmp_path, capsys):
    """As the labels' own corrections may; those of other images are counted."""
    (image_id, name), *_ = asked(drawn)
    rows = [("image_id", "class", "value"), ("./" + image_id, name, "1"), ("other.jpg", name, "0")]
    file = tmp_path / "corrections.csv"
    file.write_text("".join(",".join(row) + "\n" for row in rows))
    again = draw(scores, tmp_path / "again", corrections=file)
    assert (image_id, name) not in asked(again)
    assert f"corrections of images that are not in {scores}: 1" in capsys.readouterr().err


def test_entries_that_predictions_were_learnt_from_are_not_asked(tmp_path):
    training = made.make_results(tmp_path / "results", {"train": NAMES[:20]}, CLASSES)
    refined = training / "refined_labels.parquet"
    table = pq.read_table(refined)
    corrected = [["cat"] if i % 2 else [] for i in range(len(table))]
    table = table.append_column("corrected", [corrected])
    write_table(describe(table, "scores", classes=CLASSES), refined)
    ids = [i for i, names in zip(table["image_id"].to_pylist(), corrected, strict=True) if names]
    for file in (refined, training / "predictions/train.parquet"):
        check = draw(file, tmp_path / file.stem)
        assert len(asked(check)) == 3 * 19 - len(ids)
        assert not set(asked(check)) & {(image_id, "cat") for image_id in ids}


def test_classes_asked_for_alone(scores, tmp_path):
    check = draw(scores, tmp_path / "check", 30, only=["Cat"])
    assert {name for _, name in asked(check)} == {"cat"}
    assert set(estimate_scores(answer(check, tmp_path / "a.csv"), check)["classes"]) == {"cat"}
    assert "no class 'dog'; the classes are boat, car, cat" in message_of(
        lambda: draw(scores, tmp_path / "other", only=["dog"])
    )


def only_class(scores: Path, path: Path, values: np.ndarray | None = None) -> Path:
    """Scores of the class cat alone, as a project with one class has them, or other `values`."""
    table, classes, found = read_scores(scores)
    column = found[:, [classes.index("cat")]] if values is None else values
    one = score_table(table["image_id"], table["path"], ["cat"], column)
    write_table(describe(one, "scores", classes=["cat"]), path)
    return path


def test_a_single_class(scores, tmp_path):
    check = draw(only_class(scores, tmp_path / "one.parquet"), tmp_path / "check", 90)
    assert index_of(check)["classes"] == ["cat"] and len(asked(check)) == 90
    file = answer(check, tmp_path / "answers.csv")
    found = estimate_scores(file, check)
    over_all, cat = found["all"], found["classes"]["cat"]
    assert over_all["precision"] and over_all["mAP"] == cat["AP"]
    assert all(over_all[name] == cat[name] for name in ("precision", "recall", "f1", "curve"))
    chosen = choose_thresholds(file, check, precision=0.8, model=None)
    assert chosen["classes"]["cat"]["own"]
    few = answer(check, tmp_path / "few.csv", 30)
    assert estimate_scores(few, check)["classes"]["cat"]["recall"] is None
    message = message_of(lambda: choose_thresholds(few, check, precision=None, model=None))
    assert "too few answers for thresholds: 30, of which" in message


@pytest.mark.parametrize(("value", "given"), [(1.0, 1), (0.0, 0), (0.3, 1), (0.01, 1)])
def test_a_single_class_with_the_same_score_everywhere(value, given, scores, tmp_path):
    values = np.full((119, 1), value, np.float32)
    check = draw(only_class(scores, tmp_path / "one.parquet", values), tmp_path / "check", 50)
    file = write_answers(tmp_path / "answers.csv", dict.fromkeys(asked(check), given))
    cat = estimate_scores(file, check)["classes"]["cat"]
    if value == 1:
        assert cat["precision"][1] > 0.9 and cat["recall"] == [1, 1, 1]
    else:
        assert cat["precision"] is None and cat["f1"] is None
        assert cat["recall"] == ([0, 0, 0] if given else None)
    if value == 0.01:
        message = message_of(lambda: choose_thresholds(file, check, precision=None, model=None))
        assert "no score reaches 0.02, the lowest threshold" in message
    elif given:
        choose_thresholds(file, check, precision=None, model=None)


def test_a_class_that_no_image_shows(drawn, tmp_path):
    truth = truth_of(drawn)
    given = {entry: int(truth[entry] and entry[1] != "cat") for entry in asked(drawn)}
    file = write_answers(tmp_path / "answers.csv", given)
    found = estimate_scores(file, drawn)
    cat = found["classes"]["cat"]
    assert cat["yes"] == 0 and cat["recall"] is cat["f1"] is cat["AP"] is None
    assert cat["precision"][0] == 0 and cat["precision"][2] < 0.2
    assert found["all"]["recall"] and found["all"]["mAP"]
    chosen = choose_thresholds(file, drawn, precision=None, model=None)
    assert not chosen["classes"]["cat"]["own"] and chosen["classes"]["boat"]["own"]


def test_only_no(drawn, tmp_path):
    file = write_answers(tmp_path / "answers.csv", dict.fromkeys(asked(drawn), 0))
    found = estimate_scores(file, drawn)
    assert found["all"]["precision"][2] < 0.1 and found["all"]["recall"] is None
    for precision in (None, 0.8):
        message = message_of(
            lambda p=precision: choose_thresholds(file, drawn, precision=p, model=None)
        )
        assert "too few answers for thresholds: 150, of which 0 yes" in message


def edited(answers: Path, path: Path, change) -> Path:
    path.write_text(change(answers.read_text(encoding="utf-8")), encoding="utf-8")
    return path


def test_a_spreadsheet_may_have_edited_the_answers(drawn, answers, tmp_path):
    plain = read_corrections(answers)
    changes = {
        "semicolons": lambda text: "\ufeff" + text.replace(",", ";"),
        "tabs": lambda text: text.replace(",", "\t"),
        "words": lambda text: text.replace(",1\n", ",TRUE\n"),
        "columns": lambda text: text.replace("value\n", "value,note\n").replace("1\n", "1,x\n"),
    }
    for name, change in changes.items():
        assert read_corrections(edited(answers, tmp_path / f"{name}.csv", change)) == plain, name
    (tmp_path / "wide.csv").write_text(answers.read_text(encoding="utf-8"), encoding="utf-16")
    assert read_corrections(tmp_path / "wide.csv") == plain


def test_a_half_written_file_invents_no_answer(answers, tmp_path):
    plain, text = read_corrections(answers), answers.read_text(encoding="utf-8")
    text = text.replace(",1\n", ",unknown\n")
    file, refused = tmp_path / "half.csv", 0
    for end in range(len(text) - 100, len(text)):
        file.write_text(text[:end], encoding="utf-8")
        try:
            found = read_corrections(file)
        except UserError as error:
            assert "give 1, 0 or unknown" in str(error)
            refused += 1
        else:
            assert set(found) <= set(plain)
    assert refused


def test_bad_answers_are_one_clear_line(drawn, answers, tmp_path):
    image, name = asked(drawn)[0]
    other = next(e for e in truth_of(drawn) if e not in set(asked(drawn)))
    lines = {
        "asks nothing": ("image_id,class,value\n", "contains no yes or no to the questions"),
        "another run": (f"image_id,class,value\nx/y.jpg,{name},1\n", "not one of the 119 labelled"),
        "not asked": (f"image_id,class,value\n{other[0]},{other[1]},1\n", "were not asked"),
        "renamed": (f"image_id,class,value\n{image},ship,1\n", "'ship'"),
        "twice": (
            f"image_id,class,value\n{image},{name},1\n{image},{name},0\n",
            "has another value further up",
        ),
        "half": (f"image_id,class,value\n{image},{name},unkn", "give 1, 0 or unknown"),
        "no columns": ("a,b\n1,2\n", "no column 'image_id'"),
    }
    for what, (text, expected) in lines.items():
        file = tmp_path / f"{what}.csv"
        file.write_text(text, encoding="utf-8")
        assert expected in message_of(estimate_scores, file, drawn), what
    assert "no such file" in message_of(estimate_scores, answers, tmp_path).casefold()


def test_a_check_of_other_scores_is_not_replaced(scores, training, drawn):
    before = digest(drawn)
    for arguments in (
        {"scores": training / "refined_labels.parquet"},
        {"scores": scores, "seed": 1},
        {"scores": scores, "threshold": 0.4},
    ):
        assert "give a new folder" in message_of(lambda a=arguments: draw(output=drawn, **a))
    assert digest(drawn) == before


def test_images_that_are_gone_are_not_asked(tmp_path, capsys):
    training = made.make_results(tmp_path / "results", {"train": NAMES[:20]}, CLASSES)
    scores = training / "predictions/train.parquet"
    gone = read_scores(scores)[0]["path"].to_pylist()[0]
    Path(gone).unlink()
    check = draw(scores, tmp_path / "check")
    assert len(asked(check)) == 3 * 18
    assert "images skipped because they cannot be read: 1" in capsys.readouterr().err


def test_answers_about_images_that_are_gone_still_count(tmp_path):
    training = made.make_results(tmp_path / "results", {"train": NAMES[:20]}, CLASSES)
    scores = training / "predictions/train.parquet"
    check = draw(scores, tmp_path / "check", 20)
    file = answer(check, tmp_path / "answers.csv")
    image = asked(check)[0][0]
    table = read_scores(scores)[0]
    Path(table["path"][table["image_id"].to_pylist().index(image)].as_py()).unlink()
    draw(scores, check, 30)
    questions = index_of(check)["questions"]
    assert len(questions) < 30 and image not in {question[0] for question in questions}
    found = estimate_scores(file, check)
    assert found["answers"] == 20 and found["asked"] == len(questions)


def test_scores_that_cannot_be_checked(tmp_path, scores):
    table, classes, values = read_scores(scores)
    without = score_table(table["image_id"], table["path"], classes, values - 1)
    write_table(describe(without, "scores", classes=classes), tmp_path / "negative.parquet")
    write_table(without.drop_columns("path"), tmp_path / "pathless.parquet")
    for name, expected in {"negative": "outside 0..1", "pathless": "no column 'path'"}.items():
        message = message_of(lambda n=name: draw(tmp_path / f"{n}.parquet", tmp_path / "check"))
        assert expected in message
    assert not (tmp_path / "check").exists()


@pytest.fixture
def model(scores, tmp_path) -> tuple[Path, Path]:
    """A model folder, and predictions that claim to come from its weights."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    write_json(folder / "model.json", {"classes": CLASSES, "threshold": 0.5})
    table = pq.read_table(scores)
    facts = {"classes": CLASSES, "weights": digest(folder / "model.safetensors")}
    write_table(describe(table, "scores", **facts), tmp_path / "predictions.parquet")
    return folder, tmp_path / "predictions.parquet"


def test_thresholds_are_stored_with_the_model(model, tmp_path):
    folder, predictions = model
    check = draw(predictions, tmp_path / "check", 300)
    file = answer(check, tmp_path / "answers.csv")
    found = choose_thresholds(file, check, precision=0.8, model=folder)
    card = read_json(folder / "model.json")
    assert card["thresholds"] == {name: row["threshold"] for name, row in found["classes"].items()}
    assert card["checked"]["answers"] == 300
    assert card["checked"]["precision"] == found["all"]["precision"]
    table, classes, scores = read_scores(predictions)
    truth = truth_of(check)
    shown = np.array([[truth[i, c] for c in classes] for i in table["image_id"].to_pylist()])
    named = scores >= np.array([*card["thresholds"].values()])
    low, _, high = card["checked"]["precision"]
    assert low - 0.05 <= (shown & named).sum() / named.sum() <= high + 0.05
    text = describe_thresholds(found)
    assert "from 300 answers" in text and "cat" in text


def test_thresholds_of_few_answers_are_common_ones(drawn, tmp_path):
    file = answer(drawn, tmp_path / "answers.csv", 40)
    found = choose_thresholds(file, drawn, precision=None, model=None)
    assert not any(row["own"] for row in found["classes"].values())
    assert {row["threshold"] for row in found["classes"].values()} == {found["threshold"]}
    message = message_of(lambda: choose_thresholds(file, drawn, precision=1.0, model=None))
    assert "no threshold reaches a precision of 1" in message


def test_thresholds_of_another_model_are_refused(model, drawn, answers, tmp_path):
    for folder, expected in (
        (model[0], "not of this model's predictions"),
        (tmp_path, "not a model folder"),
    ):
        message = message_of(
            lambda f=folder: choose_thresholds(answers, drawn, precision=None, model=f)
        )
        assert expected in message
    assert "thresholds" not in read_json(model[0] / "model.json")


def test_commands(scores, tmp_path):
    run = CliRunner()
    check = tmp_path / "check"
    arguments = ["check", "draw", "--scores", str(scores), "--output", str(check), "--number", "60"]
    assert run.invoke(app, arguments, catch_exceptions=False).exit_code == 0
    file = str(answer(check, tmp_path / "answers.csv"))
    for command in ("estimate", "thresholds"):
        plain = run.invoke(app, ["check", command, file, "--check", str(check)])
        assert "60 answers" in plain.output
        printed = run.invoke(app, ["check", command, file, "--check", str(check), "--json"])
        assert json.loads(printed.output)["answers"] == 60
    assert read_facts(check / "sample.parquet")["number"] == 60
