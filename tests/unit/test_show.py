"""What `cdul show` prints for each kind of table."""

import json

import made
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from messages import message_of

from cdul_steps.data.tables import describe, read_scores, score_table, write_table
from cdul_steps.tools.show import show_table

CLASSES = ["boat", "car", "cat"]
STEERING = "\x1b[31m\u009b2J\u202e.jpg"


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    names = [f"{i:02}.jpg" for i in range(30)]
    files = {"train": names, "test": names[:12]}
    return made.make_results(tmp_path_factory.mktemp("made") / "results", files, CLASSES)


def show(file, of_class=None, top=5):
    return json.loads(show_table(file, of_class=of_class, top=top, as_json=True))


def text(file, of_class=None, top=5):
    return show_table(file, of_class=of_class, top=top, as_json=False)


@pytest.mark.parametrize(
    "file", ["../pseudo_labels.parquet", "refined_labels.parquet", "predictions/test.parquet"]
)
def test_scores(file, training):
    ids, _, scores = read_scores(training / file)
    ids = ids["image_id"].to_pylist()
    found = show(training / file, top=4)
    assert found["images"] == len(scores)
    for name, column in zip(CLASSES, scores.T, strict=True):
        facts = found["classes"][name]
        assert facts["count"] == sum(value >= 0.5 for value in column)
        assert facts["mean"] == pytest.approx(column.mean(), rel=1e-5)
        for quantile, share in (("min", 0), ("5%", 0.05), ("median", 0.5), ("max", 1)):
            assert facts[quantile] == pytest.approx(np.quantile(column, share), rel=1e-5)
    best = scores.max(axis=1)
    assert [i["score"] for i in found["best"]] == sorted(best.tolist(), reverse=True)[:4]
    assert [i["score"] for i in found["worst"]] == sorted(best.tolist())[:4]
    for image in (*found["best"], *found["worst"]):
        row = scores[ids.index(image["image_id"])]
        assert image["score"] == row.max() == row[CLASSES.index(image["class"])]


def test_one_class(training):
    file = training / "refined_labels.parquet"
    ids, _, scores = read_scores(file)
    found = show(file, "car", top=3)
    assert list(found["classes"]) == ["car"]
    order = np.argsort(scores[:, 1], kind="stable")
    names = [ids["image_id"][int(row)].as_py() for row in order]
    assert [image["image_id"] for image in found["worst"]] == names[:3]
    assert [image["image_id"] for image in found["best"]] == names[:-4:-1]


def test_the_text_says_the_same(training):
    file = training / "predictions/train.parquet"
    found, lines = show(file), text(file).splitlines()
    assert lines[0] == f"{file}: scores, 29 images"
    header = lines.index("best:") - len(CLASSES) - 2
    assert lines[header].split() == [">=", "0.5", "mean", *list(found["classes"]["boat"])[2:]]
    for line, (name, facts) in zip(lines[header + 1 :], found["classes"].items(), strict=False):
        count, *values = facts.values()
        assert line.split() == [name, str(count), *(f"{value:.3f}" for value in values)]
    best = found["best"][0]
    assert lines[lines.index("best:") + 1].split() == [
        f"{best['score']:.4f}",
        best["class"],
        best["image_id"],
    ]


def test_predictions_say_what_failed_and_use_their_threshold(tmp_path):
    scores = np.array([[0.2, 0.9], [np.nan, np.nan], [0.4, 0.35]])
    table = score_table(pa.array(["a", "b", "c"]), pa.array(["a", "b", "c"]), ["x", "y"], scores)
    table = table.append_column("status", pa.array(["ok", "missing", "ok"]))
    write_table(
        describe(table, "scores", classes=["x", "y"], threshold=0.3), tmp_path / "p.parquet"
    )
    found = show(tmp_path / "p.parquet")
    assert found["images"] == 2
    assert found["statuses"] == {"ok": 2, "missing": 1}
    assert found["failed"] == [{"image_id": "b", "status": "missing"}]
    assert [facts["count"] for facts in found["classes"].values()] == [1, 2]
    assert "status: 2 ok, 1 missing\n  missing: b" in text(tmp_path / "p.parquet")


def test_images(training):
    file = training.parents[2] / "manifest/images.parquet"
    found = show(file)
    table = pq.read_table(file).to_pylist()
    assert found["images"] == 42
    assert {split: facts["images"] for split, facts in found["splits"].items()} == {
        "train": 30,
        "test": 12,
    }
    assert found["splits"]["train"]["known"] == 20
    assert found["splits"]["train"]["megapixels"]["max"] == pytest.approx(48 * 36 / 1e6)
    for c, name in enumerate(CLASSES):
        for split, count in found["positives"][name].items():
            rows = [r for r in table if r["split"] == split and r["known"]]
            assert count == sum(c in r["positive"] for r in rows)
    assert "Images that show each class:" in text(file)


def test_images_without_truth_or_header(training, tmp_path):
    file = training.parents[2] / "manifest/images.parquet"
    table = pq.read_table(file).drop_columns(["known", "positive"])
    width = table["width"].to_numpy().copy()
    width[3] = 0
    table = table.set_column(table.column_names.index("width"), "width", pa.array(width))
    write_table(table, tmp_path / "images.parquet")
    found = show(tmp_path / "images.parquet")
    assert found["splits"]["train"]["known"] == 0
    assert found["splits"]["train"]["unreadable"] == 1
    assert found["unreadable"] == ["train/03.jpg"]
    assert "Images that show" not in text(tmp_path / "images.parquet")


def test_encode_tables(training):
    file = training.parents[1] / "encode/train/0.parquet"
    found = show(file)
    assert found["statuses"] == {"ok": 29, "truncated": 1}
    assert found["failed"] == [
        {"image_id": "train/00.jpg", "status": "truncated", "error": "cut short"}
    ]
    assert found["seconds"]["median"] == pytest.approx(0.01)
    assert "  truncated: train/00.jpg cut short" in text(file)


def test_names_cannot_steer_the_terminal(tmp_path):
    names = pa.array([STEERING])
    write_table(score_table(names, names, [STEERING], np.ones((1, 1))), tmp_path / "p.parquet")
    shown = text(tmp_path / "p.parquet")
    assert r"\x1b[31m\x9b2J\u202e.jpg" in shown
    assert all(c.isprintable() or c == "\n" for c in shown)
    assert show(tmp_path / "p.parquet")["best"][0]["image_id"] == STEERING


def test_mistakes(training, tmp_path):
    def fails(file, of_class=None):
        return message_of(lambda: text(file, of_class))

    labels = training / "refined_labels.parquet"
    assert "no class 'boot'; did you mean 'boat'?" in fails(labels, "boot")
    assert "no class 'zzz'; it has boat, car, cat" in fails(labels, "zzz")
    assert "kind 'text'; show reads scores, images, encode" in fails(
        training.parents[1] / "text.parquet"
    )
    images = training.parents[2] / "manifest/images.parquet"
    assert "--class needs a table of scores" in fails(images, "boat")
    assert "no such file" in fails(tmp_path / "none.parquet")
    empty = pq.read_table(labels).slice(0, 0)
    write_table(empty, tmp_path / "empty.parquet")
    assert "no image has scores" in fails(tmp_path / "empty.parquet")


def test_the_command(training, cdul):
    done = cdul("show", training / "refined_labels.parquet", "--class", "boat", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == show(training / "refined_labels.parquet", "boat")
