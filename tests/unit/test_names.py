"""File names with difficult characters, in every format, in both directions."""

import csv
import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
from messages import message_of
from predict_runs import run

from cdul_steps.data.corrections import read_corrections, write_corrections
from cdul_steps.data.readers import read_dataset
from cdul_steps.data.tables import describe, score_table, write_csv, write_table
from cdul_steps.models.classifier import Card, new_classifier, save_classifier
from cdul_steps.tools.review import export_review, import_review

CONTROL = [chr(c) for c in (*range(1, 32), *range(127, 160), 0x2028, 0x2029, 0xFEFF)]
NAMES = sorted(
    [f"{c}a{c}b{c}.png" for c in CONTROL]
    + [f"{c}{d}.png" for c in '\r\n\t",;' for d in '\r\n\t",;']
    + [" .png", "'.png", "=1+1.png", "#.png", "%0d.png", "a\r.png", "\ra.png", "<b>&.png"]
)
CLASSES = ["cat", "dog"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for number, name in enumerate(NAMES):
        tiny.noise(folder / name, number, (8, 8))
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    network, _ = new_classifier("test_byobnet", CLASSES, {}, None)
    card = Card(
        model="test_byobnet",
        classes=CLASSES,
        image_size=32,
        mean=[0.5] * 3,
        std=[0.2] * 3,
        interpolation="bicubic",
        threshold=0.5,
    )
    save_classifier(network, card, folder)
    return folder


READ = {
    "parquet": lambda path: pq.read_table(path)["path"].to_pylist(),
    "csv": lambda path: pd.read_csv(path, keep_default_na=False)["path"].tolist(),
    "json": lambda path: [row["path"] for row in json.loads(path.read_text("utf-8"))],
}


@pytest.mark.parametrize("suffix", READ)
def test_predict(photos, model, tmp_path, suffix):
    output = tmp_path / f"scores.{suffix}"
    run(model, output, photos)
    expected = [f"{photos.as_posix()}/{name}" for name in NAMES]
    assert READ[suffix](output) == expected
    if suffix == "csv":
        with output.open(encoding="utf-8", newline="") as file:
            assert [row["path"] for row in csv.DictReader(file, strict=True)] == expected


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_the_reader_table(photos, tmp_path, suffix):
    frame = pd.DataFrame({"path": [f"{photos}/{name}" for name in NAMES], "image_id": NAMES})
    table = tmp_path / f"table.{suffix}"
    if suffix == "csv":
        write_csv(frame, table)
    else:
        pq.write_table(pa.Table.from_pandas(frame), table)
    records = read_dataset("table", table, {"train": "."}, CLASSES)
    assert [Path(record.path).name for record in records] == NAMES
    assert all(Path(record.path).is_file() for record in records)


def answered(review: Path, format_: str) -> Path:
    """A tool's file after a review without changes."""
    files = {"csv": "review.csv", "label-studio": "tasks.json", "coco": "annotations.json"}
    file = review / files.get(format_, "labels.json")
    if format_ == "csv":
        with file.open(encoding="utf-8", newline="") as stream:
            rows = list(csv.DictReader(stream, strict=True))
        with file.open("w", encoding="utf-8", newline="") as stream:
            writer = csv.DictWriter(stream, rows[0])
            writer.writeheader()
            writer.writerows({**row, "value": row["proposed"]} for row in rows)
    elif format_ == "label-studio":
        tasks = json.loads(file.read_text("utf-8"))
        for task in tasks:
            task["annotations"] = [{"result": task["predictions"][0]["result"]}]
        file.write_text(json.dumps(tasks), "utf-8")
    return file


@pytest.mark.parametrize("format_", ["csv", "label-studio", "coco", "fiftyone"])
def test_a_review_there_and_back(photos, tmp_path, format_):
    tiny.folder_manifest(photos, tmp_path / "manifest")
    images = tmp_path / "manifest/images.parquet"
    table = pq.read_table(images, columns=["image_id", "path"])
    assert table["image_id"].to_pylist() == NAMES
    scores = np.tile(np.float32([0.9, 0.1]), (len(NAMES), 1))
    labels = score_table(table["image_id"], table["path"], CLASSES, scores)
    write_table(describe(labels, "scores", classes=CLASSES), tmp_path / "labels.parquet")
    review, output = tmp_path / "review", tmp_path / "corrections.csv"
    export_review(
        labels=tmp_path / "labels.parquet",
        format_=format_,
        output=review,
        threshold=0.5,
        limit=None,
        images=images,
        root=None,
    )
    import_review(review=review, file=answered(review, format_), confirm=True, output=output)
    expected = {(name, c): float(c == "cat") for name in NAMES for c in CLASSES}
    assert read_corrections(output) == expected


def test_corrections(tmp_path):
    corrections = {(name, c): float(c == "cat") for name in NAMES for c in CLASSES}
    write_corrections(tmp_path / "c.csv", corrections)
    assert read_corrections(tmp_path / "c.csv") == corrections


def test_a_csv_is_quoted_only_where_it_must_be(tmp_path):
    frame = pd.DataFrame({"path": ["a.png", "b,c.png"], "score": [0.5, None]})
    write_csv(frame, tmp_path / "a.csv")
    assert (tmp_path / "a.csv").read_text() == 'path,score\na.png,0.5\n"b,c.png",\n'


@pytest.mark.parametrize(("count", "words"), [(1, "the file name b'"), (300, "300 file names")])
def test_names_that_are_not_utf8_are_told_together(tmp_path, count, words):
    for number in range(count):
        Path(os.fsdecode(b"%s/photo\xff%03d.jpg" % (os.fsencode(tmp_path), number))).touch()
    message = message_of(read_dataset, "folder", tmp_path, {"train": "."}, ())
    assert message.startswith(f"{tmp_path}: {words}")
    assert rb"photo\xff000.jpg".decode() in message and "photo\\xff005" not in message
