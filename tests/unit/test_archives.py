"""Images in archives give the same results as separate files, in every stage and tool."""

from pathlib import Path

import numpy as np
import pandas as pd
import predict_runs
import pyarrow.parquet as pq
import pytest
import tiny
from layouts import write
from messages import message_of
from packed import write_parquet, write_tar
from PIL import Image

from cdul_steps.cli import app
from cdul_steps.config import Dataset, Training
from cdul_steps.data.images import decode
from cdul_steps.data.stores import open_store
from cdul_steps.data.tables import describe, score_table, write_table
from cdul_steps.data.thumbnails import write_thumbnails
from cdul_steps.models.classifier import Card, new_classifier, save_classifier
from cdul_steps.steps.gallery import _link
from cdul_steps.steps.manifest import make_manifest
from cdul_steps.tools.doctor import _data
from cdul_steps.tools.review import export_review
from cdul_steps.training.loader import TrainImages

READERS = {"files": "folder", "tar": "webdataset", "parquet": "parquet"}
FORMS = ("tar", "parquet")


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    """Seven images, one of them damaged: as files, in two tars, and in two Parquet files."""
    folder = tmp_path_factory.mktemp("packed")
    for i in range(7):
        tiny.noise(folder / f"files/{i}.png", i, (48, 40) if i % 2 else (37, 61))
    damaged = folder / "files/5.png"
    damaged.write_bytes(damaged.read_bytes()[:-300])
    images = {p.name: p.read_bytes() for p in sorted((folder / "files").iterdir())}
    for number, part in enumerate((list(images.items())[:4], list(images.items())[4:])):
        write_tar(folder / f"tar/{number}.tar", part)
        write_parquet(folder / f"parquet/{number}.parquet", [data for _, data in part])
    write(folder / "classes.txt", "cat\ndog\nbird\n")
    return folder


def dataset(packed: Path, form: str, **changes) -> Dataset:
    values = {
        "reader": READERS[form],
        "root": str(packed / form),
        "classes": str(packed / "classes.txt"),
        "splits": {"train": "."},
        "shard_size": 4,
        "max_failed_share": 0.5,
    }
    return Dataset(**values | changes)


@pytest.fixture(scope="module")
def results(packed, repository, tmp_path_factory) -> dict[str, Path]:
    """The results of the commands from manifest to label, for each form."""
    model = ["--model", f"local-dir:{repository}/cdul_steps/demo/tiny-clip"]
    folders = {form: tmp_path_factory.mktemp(form) for form in READERS}
    for form, folder in folders.items():

        def run(command: str, *words: object) -> None:
            app([command, *map(str, words)], standalone_mode=False)

        manifest = ["--images", folder / "images.parquet", "--split", "train"]
        classes = ["--classes", packed / "classes.txt"]
        share = ["--max-failed-share", 0.5]
        run(
            *("manifest", "--reader", READERS[form], "--root", packed / form, *classes, *share),
            *("--split=train=.", "--shard-size", 4, "--output", folder / "images.parquet"),
        )
        text = ["--text", folder / "text.parquet"]
        run("encode-text", *classes, *model, "--output", text[1])
        store = ["--store", folder / "e.zarr"]
        run("store", *manifest, *text, "--output", store[1])
        for shard in range(2):
            run(
                *("encode", "--manifest", folder / f"train/{shard}.parquet", *store, *model),
                *("--table", folder / f"encode/{shard}.parquet"),
                *("--workers", 2 * shard, "--threads", 1, "--device", "cpu", "--engine", "torch"),
            )
        tables = [w for k in range(2) for w in ("--table", folder / f"encode/{k}.parquet")]
        similarity = folder / "s.zarr"
        run("similarity", *store, *text, *manifest, *tables, *share, "--output", similarity)
        run(
            *("label", "--similarity", similarity, *manifest),
            *("--output", folder / "labels.parquet"),
        )
    return folders


@pytest.mark.parametrize("form", FORMS)
def test_embeddings_and_labels_are_those_of_files_to_the_bit(results, form):
    files, packed = results["files"], results[form]
    for store in ("e.zarr", "s.zarr"):
        expected, found = (np.asarray(open_store(f / store)) for f in (files, packed))
        assert found.tobytes() == expected.tobytes()
        assert np.isfinite(found).all(axis=(1, 2)).tolist() == [*[True] * 5, False, True]
    outcomes = [
        pd.concat([pd.read_parquet(f / f"encode/{k}.parquet") for k in range(2)])
        for f in (files, packed)
    ]
    for column in ("row", "status", "error"):
        assert outcomes[0][column].tolist() == outcomes[1][column].tolist()
    tables = [pq.read_table(f / "labels.parquet") for f in (files, packed)]
    scores = [table.drop_columns(["image_id", "path"]) for table in tables]
    assert scores[0].equals(scores[1])
    assert len(scores[0]) == 6
    views = [pq.read_table(f / "train/0.parquet", columns=["x0", "y1"]) for f in (files, packed)]
    assert views[0].equals(views[1])


@pytest.mark.parametrize("form", FORMS)
def test_an_added_archive_moves_no_row_and_a_changed_one_is_seen(packed, tmp_path, form):
    for path in (packed / form).iterdir():
        (tmp_path / form).mkdir(exist_ok=True)
        (tmp_path / form / path.name).write_bytes(path.read_bytes())
    output = tmp_path / "manifest/images.parquet"
    write(tmp_path / "classes.txt", "cat\n")
    make_manifest(dataset=dataset(tmp_path, form), output=output)
    first = pd.read_parquet(output).set_index("image_id")
    shard = (tmp_path / "manifest/train/0.parquet").read_bytes()
    image = (packed / "files/0.png").read_bytes()
    if form == "tar":
        write_tar(tmp_path / "tar/-before.tar", {"x.png": image})
    else:
        write_parquet(tmp_path / "parquet/-before.parquet", [image])
    make_manifest(dataset=dataset(tmp_path, form), output=output)
    second = pd.read_parquet(output).set_index("image_id")
    assert len(second) == len(first) + 1
    assert second.loc[first.index, "row"].tolist() == first["row"].tolist()
    assert second["row"].max() == len(first)
    assert (tmp_path / "manifest/train/0.parquet").read_bytes() == shard
    path = next((tmp_path / form).glob("0.*"))
    path.write_bytes(path.read_bytes())  # at another time
    make_manifest(dataset=dataset(tmp_path, form), output=output)
    assert (tmp_path / "manifest/train/0.parquet").read_bytes() != shard


@pytest.mark.parametrize("form", FORMS)
def test_doctor(packed, form):
    text, values = _data(dataset(packed, form, max_pixels=2000, max_failed_share=0.6))
    assert values["images"] == {"train": 7}
    assert "4 of 7 images cannot be read" in text
    assert "too_large" in message_of(_data, dataset(packed, form, max_pixels=2000))
    gone = f"{packed}/{form}/{{0..2}}.{form}"
    assert f"2.{form}: no such file" in message_of(_data, dataset(packed, form, root=gone))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    network, _ = new_classifier("test_byobnet", predict_runs.CLASSES, {}, None)
    card = Card("test_byobnet", predict_runs.CLASSES, 64, [0.5] * 3, [0.2] * 3, "bicubic", 0.5)
    save_classifier(network, card, folder)
    return folder


@pytest.mark.parametrize("form", FORMS)
def test_predict(packed, model, tmp_path, form):
    expected = predict_runs.run(model, tmp_path / "f.parquet", packed / "files")
    archives = sorted((packed / form).iterdir())
    found = predict_runs.run(model, tmp_path / "a.parquet", *archives)
    columns = [*predict_runs.CLASSES, "status"]
    assert found[columns].equals(expected[columns])
    assert found["image_id"].is_unique
    assert found["image_id"][0] == f"{archives[0]}/0"


def test_predict_wants_no_labels(packed, model, tmp_path):
    image = (packed / "files/0.png").read_bytes()
    write_tar(tmp_path / "x.tar", {"a.png": image, "a.cls": b"7", "b.json": b"damaged"})
    write_parquet(tmp_path / "x.parquet", [image], label=[7])
    write_tar(tmp_path / "none.tar", {})
    inputs = [tmp_path / "x.tar", tmp_path / "x.parquet"]
    found = predict_runs.run(model, tmp_path / "out.parquet", *inputs)
    assert found["image_id"].tolist() == [f"{inputs[0]}/a", f"{inputs[1]}/0"]
    assert found["status"].tolist() == ["ok", "ok"]
    message = message_of(predict_runs.run, model, tmp_path / "out.parquet", tmp_path / "none.tar")
    assert message == f"{tmp_path / 'none.tar'}: no image in this file"


@pytest.mark.parametrize("form", FORMS)
def test_training_and_thumbnails_get_the_pixels_of_the_file(packed, results, tmp_path, form):
    images = pq.read_table(results[form] / "images.parquet")
    loaded = TrainImages(
        images["path"].combine_chunks(),
        lambda image, box=None: np.moveaxis(np.asarray(image), 2, 0),
        Training(),
        tiny.MAX_PIXELS,
    )
    for i in range(7):
        found = loaded[-1, i]
        if i == 5:
            assert found is None
            continue
        expected = np.asarray(decode(packed / f"files/{i}.png"))
        np.testing.assert_array_equal(np.moveaxis(found[1], 0, 2), expected)
    options = {"side": 16, "quality": 80, "max_pixels": tiny.MAX_PIXELS, "what": "test"}
    drawn = write_thumbnails(images["path"].to_pylist(), tmp_path / "small", **options)
    assert drawn == [True] * 5 + [False, True]
    assert max(Image.open(tmp_path / "small/0.webp").size) == 16


@pytest.mark.parametrize("form", FORMS)
def test_pages_and_tools_that_open_files_are_told_that_there_is_none(results, tmp_path, form):
    (path, *_) = paths = pq.read_table(results[form] / "images.parquet")["path"].to_pylist()
    assert _link(path, tmp_path) is None
    assert _link(str(tmp_path / "a b.jpg"), tmp_path) == "a%20b.jpg"
    table = score_table(paths, paths, ["cat"], np.ones((7, 1)))
    write_table(describe(table, "scores", classes=["cat"]), tmp_path / "scores.parquet")

    def export(format_: str) -> None:
        export_review(
            labels=tmp_path / "scores.parquet",
            format_=format_,
            output=tmp_path / format_,
            threshold=0.5,
            limit=None,
            images=None,
            root=None,
        )

    assert "in archives" in message_of(export, "fiftyone")
    export("csv")
    assert pd.read_csv(tmp_path / "csv/review.csv")["path"][0] == path
