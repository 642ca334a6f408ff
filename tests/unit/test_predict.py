"""Stage predict: which images are scored, how, and in which format."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import tiny
import torch
from PIL import Image
from predict_runs import CLASSES, run
from safetensors.torch import load_file, save_file

from cdul_steps.data.images import decode
from cdul_steps.data.tables import read_facts, write_scores
from cdul_steps.errors import UserError
from cdul_steps.models.classifier import Card, load_classifier, new_classifier, save_classifier


@pytest.fixture(scope="module")
def model(images, tmp_path_factory) -> Path:
    """A classifier whose head distinguishes the images."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    network, _ = new_classifier("test_byobnet", CLASSES, {}, None)
    card = Card(
        model="test_byobnet",
        classes=CLASSES,
        image_size=64,
        mean=[0.5] * 3,
        std=[0.2] * 3,
        interpolation="bicubic",
        threshold=0.5,
    )
    pixels = np.stack([card.resize(decode(path)) for path in sorted(images.rglob("*.png"))])
    wanted = torch.tensor(
        [[1, -1, -1], [1, 1, -1], [-2, 2, 1], [0.5, 1, 2], [-1, -1, -1], [3, -2, 1]]
    )
    with torch.no_grad():
        features = network.eval().forward_features(card.normalize(torch.from_numpy(pixels)))
        features = network.forward_head(features, pre_logits=True)
        network.get_classifier().bias.zero_()
        network.get_classifier().weight.copy_((torch.linalg.pinv(features) @ wanted).T)
    save_classifier(network, card, folder)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for i in range(6):
        tiny.noise(folder / ("deep/er" if i % 2 else ".") / f"{i}.png", i)
    (folder / "notes.txt").write_text("not one of them")
    return folder


def fails(*positional: Path, **changes) -> str:
    with pytest.raises(UserError) as error:
        run(*positional, **changes)
    assert "\n" not in str(error.value)
    return str(error.value)


def named(scores: pd.DataFrame, threshold: float) -> list[list[str]]:
    return [[c for c in CLASSES if row[c] >= threshold] for _, row in scores.iterrows()]


def test_folder_and_scores(model, images, tmp_path):
    scores = run(model, tmp_path / "a.parquet", images)
    assert list(scores.columns) == ["image_id", "path", *CLASSES, "labels", "status"]
    names = ["0.png", "2.png", "4.png", "deep/er/1.png", "deep/er/3.png", "deep/er/5.png"]
    assert scores["path"].tolist() == [(images / name).as_posix() for name in names]
    assert (scores["status"] == "ok").all()
    assert scores["cat"].dtype == np.float32
    network, card = load_classifier(model, torch.device("cpu"))
    for _, row in scores.iterrows():
        image = decode(row["path"]).resize((64, 64), Image.Resampling.BICUBIC)
        pixels = (np.asarray(image, dtype=np.float32) / 255 - 0.5) / 0.2
        with torch.no_grad():
            expected = network(torch.from_numpy(pixels.transpose(2, 0, 1)[None])).sigmoid()[0]
        np.testing.assert_allclose(row[CLASSES].astype(float), expected, atol=1e-6)
    facts = read_facts(tmp_path / "a.parquet")
    assert (facts["classes"], facts["threshold"]) == (card.classes, 0.5)


def test_classes_have_thresholds_of_their_own(model, images, tmp_path):
    shutil.copytree(model, tmp_path / "model")
    card = json.loads((model / "model.json").read_text())
    plain = run(model, tmp_path / "plain.parquet", images)
    limit = float(plain["cat"].median())
    changed = {**card, "threshold": 0.4, "thresholds": {"cat": limit}}
    (tmp_path / "model/model.json").write_text(json.dumps(changed))
    scores = run(tmp_path / "model", tmp_path / "own.parquet", images)
    limits = {name: limit if name == "cat" else 0.4 for name in CLASSES}
    expected = [[c for c in CLASSES if row[c] >= limits[c]] for _, row in scores.iterrows()]
    assert [list(names) for names in scores["labels"]] == expected
    assert 0 < sum("cat" in names for names in expected) < len(expected)
    facts = read_facts(tmp_path / "own.parquet")
    assert (facts["threshold"], facts["thresholds"]) == (0.4, {"cat": limit})
    # A threshold on the command line applies to every class.
    scores = run(tmp_path / "model", tmp_path / "given.parquet", images, threshold=0.45)
    assert [list(names) for names in scores["labels"]] == named(scores, 0.45)
    assert "thresholds" not in read_facts(tmp_path / "given.parquet")


@pytest.mark.parametrize("activation", ["softmax", None])
def test_the_activation_is_that_of_the_card(model, images, tmp_path, activation):
    """A card of an older version does not name the head; then it is a sigmoid."""
    shutil.copytree(model, tmp_path / "model")
    card = json.loads((model / "model.json").read_text())
    assert card.pop("activation") == "sigmoid"
    changed = {**card, "activation": activation} if activation else card
    (tmp_path / "model/model.json").write_text(json.dumps(changed))
    found = run(tmp_path / "model", tmp_path / "b.parquet", images)[CLASSES].to_numpy()
    sigmoid = run(model, tmp_path / "a.parquet", images)[CLASSES].to_numpy().astype(float)
    odds = sigmoid / (1 - sigmoid)
    expected = odds / odds.sum(axis=1, keepdims=True) if activation else sigmoid
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_labels_are_those_above_the_threshold(model, images, tmp_path):
    scores = run(model, tmp_path / "a.parquet", images)
    assert scores[CLASSES].to_numpy().std() > 0.1
    assert [list(row) for row in scores["labels"]] == named(scores, 0.5)
    for threshold in (0.2, 0.8, float(scores["cat"].iloc[0])):
        other = run(model, tmp_path / "b.parquet", images, threshold=threshold)
        assert [list(row) for row in other["labels"]] == named(scores, threshold)
    assert len({len(row) for row in scores["labels"]}) > 1


def test_files_and_folders_in_the_order_given(model, images, tmp_path):
    scores = run(model, tmp_path / "a.parquet", images / "4.png", images / "deep")
    names = ["4.png", "deep/er/1.png", "deep/er/3.png", "deep/er/5.png"]
    assert scores["path"].tolist() == [(images / name).as_posix() for name in names]


def test_split_of_a_manifest(model, images, tmp_path):
    tiny.folder_manifest(images, tmp_path / "manifest")
    manifest = tmp_path / "manifest/images.parquet"
    scores = run(model, tmp_path / "a.parquet", images=manifest, split="train")
    assert scores["image_id"].tolist()[3] == "deep/er/1.png"
    by_folder = run(model, tmp_path / "b.parquet", images)
    assert np.array_equal(scores[CLASSES], by_folder[CLASSES])
    message = fails(model, tmp_path / "c.parquet", images=manifest, split="test")
    assert "no image of split 'test'; it has train" in message


def test_csv(model, images, tmp_path):
    expected = run(model, tmp_path / "a.parquet", images)
    run(model, tmp_path / "a.csv", images)
    found = pd.read_csv(tmp_path / "a.csv", keep_default_na=False)
    assert list(found.columns) == list(expected.columns)
    np.testing.assert_allclose(found[CLASSES].astype(float), expected[CLASSES], rtol=1e-6)
    assert found["labels"].tolist() == ["; ".join(row) for row in expected["labels"]]


def test_csv_quotes_names_that_hold_what_joins_them(model, images, tmp_path):
    shutil.copytree(model, tmp_path / "model")
    card = json.loads((model / "model.json").read_text())
    card["classes"] = ["cat; dog", 'the "owl"', "potted plant, big"]
    (tmp_path / "model/model.json").write_text(json.dumps(card))
    expected = run(tmp_path / "model", tmp_path / "a.parquet", images, threshold=0.0)["labels"]
    run(tmp_path / "model", tmp_path / "a.csv", images, threshold=0.0)
    cells = pd.read_csv(tmp_path / "a.csv", keep_default_na=False)["labels"]
    reader = csv.reader(cells, delimiter=";", skipinitialspace=True)
    assert list(reader) == [list(row) for row in expected] and len(expected[0]) == 3


def test_what_a_folder_holds_besides_is_told(model, images, tmp_path, capsys):
    shutil.copytree(images, tmp_path / "images/@eaDir")
    shutil.copy(images / "0.png", tmp_path / "images/0.png")
    scores = run(model, tmp_path / "a.parquet", tmp_path / "images")
    assert scores["path"].tolist() == [(tmp_path / "images/0.png").as_posix()]
    assert "predict: " in (told := capsys.readouterr().err)
    assert "left out 1 folder of the system: @eaDir (1)" in told


def test_json(model, images, tmp_path):
    expected = run(model, tmp_path / "a.parquet", images)
    run(model, tmp_path / "a.json", images)
    found = json.loads((tmp_path / "a.json").read_text())
    assert [row["path"] for row in found] == expected["path"].tolist()
    assert [row["labels"] for row in found] == [list(row) for row in expected["labels"]]
    assert found[0]["potted plant"] == pytest.approx(expected["potted plant"][0], abs=1e-6)


@pytest.mark.parametrize("suffix", ["parquet", "csv", "json"])
def test_bad_image_keeps_its_row(model, images, tmp_path, suffix):
    (tmp_path / "bad.jpg").write_text("Not found")
    (tmp_path / "empty.jpg").touch()
    output = tmp_path / f"a.{suffix}"
    inputs = [tmp_path / "bad.jpg", images / "0.png", tmp_path / "empty.jpg"]
    run(model, output, *inputs)
    read = {"parquet": pd.read_parquet, "csv": pd.read_csv, "json": pd.read_json}[suffix]
    found = read(output)
    assert found["status"].tolist() == ["not_an_image", "ok", "truncated"]
    assert found[CLASSES].isna().all(axis=1).tolist() == [True, False, True]
    assert suffix == "csv" or [len(row) for row in found["labels"]][::2] == [0, 0]


def test_only_bad_images(model, tmp_path):
    (tmp_path / "bad.jpg").write_text("Not found")
    said = fails(model, tmp_path / "a.parquet", tmp_path / "bad.jpg")
    assert said == "predict: none of the 1 images can be used (not_an_image (1))"
    assert not (tmp_path / "a.parquet").exists()
    assert of_shard(model, tmp_path / "bad.jpg", tmp_path)["status"].tolist() == ["not_an_image"]


def of_shard(model: Path, image: Path, folder: Path) -> pd.DataFrame:
    """The predictions of a shard with one image; none that can be used is no error there."""
    (folder / "shard").mkdir()
    shutil.copy(image, folder / "shard")
    tiny.folder_manifest(folder / "shard", folder / "manifest")
    made = folder / "manifest"
    files = {"images": made / "images.parquet", "manifest": made / "train/0.parquet"}
    return run(model, folder / "shard.parquet", **files)


@pytest.mark.parametrize("kind", ["csv", "json"])
def test_an_earlier_file_is_kept(model, images, tmp_path, kind):
    """A person may have edited it; a Parquet file only if it is not one of predictions."""
    file = tmp_path / f"a.{kind}"
    run(model, file, images / "0.png")
    before = file.read_bytes()
    assert "exists already" in fails(model, file, images / "0.png")
    assert file.read_bytes() == before
    own = tmp_path / "own.parquet"
    pd.DataFrame({"x": [1]}).to_parquet(own)
    labels = tmp_path / "pseudo_labels.parquet"
    write_scores(pa.table({"image_id": ["a"], "path": ["a"]}), ["x"], np.ones((1, 1), "f4"), labels)
    for file in (own, labels):
        assert "not a table of predictions" in fails(model, file, images / "0.png")


def test_scores_that_are_not_finite(model, images, tmp_path):
    shutil.copytree(model, tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    weights["head.fc.weight"][1] = torch.inf
    save_file(weights, tmp_path / "model/model.safetensors")
    scores = of_shard(tmp_path / "model", images / "0.png", tmp_path)
    if np.isfinite(scores[CLASSES]).all(axis=None):
        pytest.skip("the infinite weight met no other sign")
    assert scores["status"].tolist() == ["not_finite"]
    assert scores[CLASSES].isna().all(axis=None)
    assert scores["labels"].map(len).tolist() == [0]
    said = fails(tmp_path / "model", tmp_path / "a.parquet", images / "0.png")
    assert said == "predict: none of the 1 images can be used (not_finite (1))"


def test_input_errors(model, images, tmp_path):
    for name in ("a.txt", "a", "a.parquet.gz"):
        assert "must end in .parquet, .csv or .json" in fails(model, tmp_path / name, images)
    missing = tmp_path / "nowhere.jpg"
    message = fails(model, tmp_path / "a.csv", images, missing)
    assert message == f"{missing}: no such file or folder"
    (tmp_path / "empty").mkdir()
    assert "no image in this folder" in fails(model, tmp_path / "a.csv", tmp_path / "empty")
    assert "not a model folder" in fails(images, tmp_path / "a.csv", images)
    assert not (tmp_path / "a.csv").exists()


@pytest.mark.parametrize("changes", [{"batch_size": 1}, {"batch_size": 4}, {"workers": 2}])
def test_batches_and_workers_do_not_matter(model, images, tmp_path, changes):
    expected = run(model, tmp_path / "a.parquet", images)
    found = run(model, tmp_path / "b.parquet", images, **changes)
    np.testing.assert_allclose(found[CLASSES], expected[CLASSES], rtol=0, atol=1e-6)
    assert found["path"].equals(expected["path"])


def test_model_folder_works_elsewhere(model, images, tmp_path):
    expected = run(model, tmp_path / "a.parquet", images)
    shutil.copytree(model, tmp_path / "first")
    moved = shutil.move(tmp_path / "first", tmp_path / "elsewhere")
    found = run(Path(moved), tmp_path / "b.parquet", images)
    assert np.array_equal(found[CLASSES], expected[CLASSES])
