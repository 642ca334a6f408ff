"""The files of a gallery, compared with the tables that they show."""

import json
from pathlib import Path
from urllib.parse import unquote

import made
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zarr
from PIL import Image

from cdul_steps.data.tables import describe, read_facts, read_scores, write_table
from cdul_steps.data.thumbnails import write_thumbnails
from cdul_steps.errors import UserError
from cdul_steps.method.similarity import scores as scores_of
from cdul_steps.steps.gallery import THUMBNAIL, make_gallery
from cdul_steps.steps.label import make_labels

CLASSES = ["boat", "<script>alert(1)</script>", "cat & 'dog' \"x\""]
HOSTILE = 'a"><img src=x onerror=hit=1>.jpg'
NAMES = [f"{i:03}.jpg" for i in range(118)] + [HOSTILE, "50%41 #1?\n.jpg"]


def parts(folder: Path) -> dict[str, object]:
    """The data files of a gallery, by name."""
    found = {}
    for file in (folder / "data").iterdir():
        text = file.read_text(encoding="ascii")
        assert text.startswith("part(") and text.endswith(");\n")
        name, value = json.loads(f"[{text[len('part(') : -len(');') - 1]}]")
        assert file.name == f"{name}.js"
        found[name] = value
    return found


def images_of(data: dict) -> list[dict]:
    pages = -(-data["index"]["images"] // data["index"]["page_size"])
    images = [image for k in range(pages) for image in data[f"page-{k}"]]
    assert len(images) == data["index"]["images"]
    return images


@pytest.fixture(scope="module")
def training(tmp_path_factory) -> Path:
    results = tmp_path_factory.mktemp("made") / "results"
    return made.make_results(results, {"train": NAMES, "test": NAMES[:7]}, CLASSES)


@pytest.fixture(scope="module")
def page(training) -> Path:
    folder = training.parents[4] / "gallery"
    make_gallery(folder=training, split="train", output=folder)
    return folder


@pytest.fixture
def copy(tmp_path) -> Path:
    """Results of a few images, for tests that break them."""
    return made.make_results(tmp_path / "results", {"train": NAMES[:5], "test": NAMES[:5]})


def test_scores_are_those_of_the_tables(page, training):
    data = parts(page)
    images = images_of(data)
    assert data["index"]["kinds"] == ["CLIP", "refined", "classifier"]
    assert data["index"]["classes"] == CLASSES
    tables = [
        training.parent / "pseudo_labels.parquet",
        training / "refined_labels.parquet",
        training / "predictions/train.parquet",
    ]
    ids, _, _ = read_scores(tables[0])
    assert [image["id"] for image in images] == ids["image_id"].to_pylist()
    assert len(images) == len(NAMES) - 1  # one was not encoded
    scores = np.stack([read_scores(table)[2] for table in tables]).astype(float)
    shown = np.array([image["scores"] for image in images]) / 1000
    np.testing.assert_allclose(shown, scores.swapaxes(0, 1), atol=5.1e-4)

    uncertainty = 1 - np.abs(2 * scores - 1)
    disagreement, change = abs(scores[2] - scores[0]), abs(scores[1] - scores[0])
    for name, expected in {
        "any": (scores.max(2), uncertainty.mean(2), disagreement.max(1), change.max(1)),
        **{
            f"class-{c}": (scores[..., c], uncertainty[..., c], disagreement[:, c], change[:, c])
            for c in range(len(CLASSES))
        },
    }.items():
        columns = data["index"]["any"] if name == "any" else data[name]
        assert list(columns) == ["scores", "uncertainty", "disagreement", "change"]
        for column, values in zip(columns.values(), expected, strict=True):
            np.testing.assert_allclose(np.array(column) / 1000, values, atol=5.1e-4)


def test_snippets_are_those_of_the_store_and_the_manifest(page, training):
    images = {image["id"]: image for image in images_of(parts(page))}
    dataset = training.parents[2]
    cosines = zarr.open_array(dataset / "tiny-clip/similarity/train.zarr", mode="r")[:]
    scores = scores_of(cosines, made.SETTINGS.tau)
    table = pq.read_table(dataset / "manifest/images.parquet").to_pylist()
    for row in (r for r in table if r["split"] == "train" and r["image_id"] in images):
        image = images[row["image_id"]]
        assert image["top"] == scores[row["row"]].argmax(axis=1).tolist()
        np.testing.assert_allclose(
            np.array(image["top_scores"]) / 1000, scores[row["row"]].max(axis=1), atol=5.1e-4
        )
        assert image["size"] == [row["width"], row["height"]]
        left, top, width, height = np.array(image["boxes"]).T
        assert left.tolist() == [0, 333, 667] * 3
        assert top.tolist() == [0] * 3 + [333] * 3 + [667] * 3
        assert set(width) | set(height) == {333}


CONTEXT = ["tree", "river", "wall", "sky"]


def test_what_went_to_context_is_that_of_the_store(tmp_path):
    training = made.make_results(tmp_path / "results", {"train": NAMES[:30]}, context=CONTEXT)
    predictions = training / "predictions/train.parquet"
    facts = {"classes": ["boat", "car", "cat"], "threshold": 0.3, "thresholds": {"car": 0.7}}
    write_table(describe(pq.read_table(predictions), "scores", **facts), predictions)
    make_gallery(folder=training, split="train", output=tmp_path / "page")
    data = parts(tmp_path / "page")
    assert data["index"]["classes"] == ["boat", "car", "cat"]
    assert data["index"]["names"] == ["boat", "car", "cat", *CONTEXT]
    assert data["index"]["thresholds"] == [[500] * 3, [500] * 3, [300, 700, 300]]
    cosines = zarr.open_array(training.parents[1] / "similarity/train.zarr", mode="r")[:]
    powers = np.exp(cosines.astype(float) / made.SETTINGS.tau)
    scores = powers / powers.sum(axis=2, keepdims=True)
    rows = {
        r["image_id"]: r["row"]
        for r in pq.read_table(training.parents[2] / "manifest/images.parquet").to_pylist()
    }
    images = images_of(data)
    assert len(images) == 29
    for image in images:
        of = scores[rows[image["id"]]]
        assert image["top"] == of.argmax(axis=1).tolist()
        assert image["context"] / 1000 == pytest.approx(of[0, 3:].sum(), abs=1e-3)
        best = sorted(range(3, 7), key=lambda c: -of[0, c])[:3]
        assert image["context_top"] == best
        np.testing.assert_allclose(np.array(image["context_scores"]) / 1000, of[0, best], atol=1e-3)
    assert len({image["top"][0] for image in images} - {0, 1, 2}) > 1


def test_without_context_nothing_goes_to_it(page):
    data = parts(page)
    assert data["index"]["names"] == data["index"]["classes"]
    assert {image["context"] for image in images_of(data)} == {0}
    assert all(image["context_top"] == image["context_scores"] == [] for image in images_of(data))


def test_links_lead_to_the_images_whatever_their_names(page):
    images = images_of(parts(page))
    assert images[-2]["id"] == f"train/{HOSTILE}"
    for image in (images[0], *images[-2:]):
        assert not set(image["link"]) & set("\"<># ?'\n")
        path = page / unquote(image["link"])
        assert path.is_file() and path.name == Path(image["id"]).name


def test_thumbnails_are_small_and_in_order(page, tmp_path):
    images = images_of(parts(page))
    assert len(list((page / "thumbnails").iterdir())) == len(images)
    for i in (0, 57, len(images) - 1):
        with Image.open(page / f"thumbnails/{i}.webp") as thumbnail:
            original = Image.open(page / unquote(images[i]["link"])).convert("RGB")
            assert thumbnail.size == original.size  # never enlarged
            difference = np.asarray(thumbnail, int) - np.asarray(original, int)
            assert np.abs(difference).mean() < 6
    large = tmp_path / "large.png"
    Image.new("RGB", (2000, 500), "red").save(large)
    made_so = {"side": THUMBNAIL, "quality": 75, "max_pixels": 10**7, "what": "test"}
    assert write_thumbnails([str(large)], tmp_path / "t", **made_so) == [True]
    with Image.open(tmp_path / "t/0.webp") as thumbnail:
        assert thumbnail.size == (256, 64)


def test_truth_where_it_is_known(page, training):
    table = pq.read_table(training.parents[2] / "manifest/images.parquet").to_pylist()
    expected = {r["image_id"]: r["positive"] if r["known"] else None for r in table}
    images = images_of(parts(page))
    assert {image["positive"] is None for image in images} == {True, False}
    assert all(image["positive"] == expected[image["id"]] for image in images)


def test_clips_scores_of_the_test_split_are_its_labels(training, tmp_path):
    make_gallery(folder=training, split="test", output=tmp_path / "gallery")
    data = parts(tmp_path / "gallery")
    assert data["index"]["kinds"] == ["CLIP", "classifier"]
    assert "change" not in data["index"]["any"]
    dataset = training.parents[2]
    make_labels(
        similarity=dataset / "tiny-clip/similarity/test.zarr",
        images=dataset / "manifest/images.parquet",
        split="test",
        settings=made.SETTINGS.model_copy(update={"positives": None}),
        output=tmp_path / "labels.parquet",
    )
    plain = read_scores(tmp_path / "labels.parquet")[2].astype(float)
    # Calibrated like the labels of the train split, whatever the sum on the test split.
    facts = read_facts(training.parent / "pseudo_labels.parquet")
    odds = (plain / (1 - plain)) ** facts["slope"] * np.exp(facts["bias"])
    shown = np.array([image["scores"][0] for image in images_of(data)]) / 1000
    np.testing.assert_allclose(shown, odds / (1 + odds), atol=5.1e-4)


def test_settings_that_are_not_known_here_leave_clips_test_scores_out(copy, tmp_path, capsys):
    labels = copy.parent / "pseudo_labels.parquet"
    facts = json.loads(pq.read_schema(labels).metadata[b"cdul"])
    del facts["statistics"]
    write_table(describe(pq.read_table(labels), **facts), labels)
    make_gallery(folder=copy, split="test", output=tmp_path / "gallery")
    assert parts(tmp_path / "gallery")["index"]["kinds"] == ["classifier"]
    assert "left out" in capsys.readouterr().err


def test_before_any_training_clip_alone(copy, tmp_path):
    make_gallery(folder=copy.parent, split="train", output=tmp_path / "gallery")
    data = parts(tmp_path / "gallery")
    assert data["index"]["kinds"] == ["CLIP"]
    assert data["index"]["title"] == "demo / tiny-clip / calibrated"


def test_an_image_that_went_away_has_no_thumbnail(copy, tmp_path, capsys):
    (copy.parents[2] / "scenes/train/003.jpg").unlink()
    make_gallery(folder=copy, split="train", output=tmp_path / "gallery")
    images = images_of(parts(tmp_path / "gallery"))
    assert [image["thumbnail"] for image in images] == [True, True, False, True]
    assert "unreadable files, shown without thumbnail: 1" in capsys.readouterr().err


def test_an_image_with_scores_but_no_similarity_has_no_snippets(copy, tmp_path):
    file = copy / "predictions/train.parquet"
    table = pq.read_table(file)
    lost = table.slice(0, 1).set_column(0, "image_id", [["train/000.jpg"]])
    write_table(pa.concat_tables([table, lost.cast(table.schema)]), file)
    make_gallery(folder=copy, split="train", output=tmp_path / "gallery")
    first = images_of(parts(tmp_path / "gallery"))[0]
    assert first["id"] == "train/000.jpg"
    assert first["top"] == first["boxes"] == []
    assert first["scores"][0] == [-1, -1, -1]
    assert min(first["scores"][2]) >= 0


def test_a_gallery_is_replaced_and_nothing_else_is(copy, tmp_path):
    output = tmp_path / "gallery"
    output.mkdir()
    for _ in range(2):
        make_gallery(folder=copy, split="train", output=output)
        (output / "thumbnails/9.webp").touch()
    make_gallery(folder=copy, split="train", output=output)
    assert len(list((output / "thumbnails").iterdir())) == 4
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "mine.jpg").touch()
    for mine in (photos, photos / "mine.jpg"):
        with pytest.raises(UserError, match=r"give a new folder|is a file"):
            make_gallery(folder=copy, split="train", output=mine)
    assert list(photos.iterdir()) == [photos / "mine.jpg"]


def drop_scores(training):
    (training.parent / "pseudo_labels.parquet").unlink()


def other_classes(training):
    file = training / "refined_labels.parquet"
    table = pq.read_table(file)
    names = ["image_id", "path", "car", "boat", "cat"]
    write_table(describe(table.rename_columns(names), "scores"), file)


def other_store(training):
    array = zarr.open_array(training.parents[1] / "similarity/train.zarr", mode="a")
    array.attrs["classes"] = ["a", "b", "c"]


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (drop_scores, "give results/DATASET/ENCODER/LABELS/TRAINING"),
        (other_classes, "the scores of CLIP and refined have different class tables"),
        (other_store, "its classes differ from those of the scores"),
    ],
)
def test_mistakes(change, part, copy, tmp_path):
    change(copy)
    with pytest.raises(UserError, match=part) as caught:
        make_gallery(folder=copy, split="train", output=tmp_path / "gallery")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "gallery").exists()


def test_the_command(copy, tmp_path, cdul):
    done = cdul("gallery", copy, "--split", "test", "--output", tmp_path / "gallery")
    assert done.returncode == 0, done.stderr
    assert f"open {tmp_path / 'gallery/index.html'}" in done.stderr
    done = cdul("gallery", copy)
    assert done.returncode == 0, done.stderr
    assert (copy / "gallery/train/index.html").is_file()
    done = cdul("gallery", copy, "--split", "val", "--output", tmp_path / "other")
    assert done.returncode == 1
    assert done.stderr.startswith("cdul: error: ") and "no image of split 'val'" in done.stderr
