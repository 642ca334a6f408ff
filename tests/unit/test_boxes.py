"""Second views: boxes around what a classifier sees, and joined labels."""

import json
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import timm
import torch
import training_runs
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from messages import message_of
from networks import card
from PIL import Image
from training_runs import write_labels

from cdul_steps.config import BoxShape, Labels, load
from cdul_steps.data.manifest import read_shard
from cdul_steps.data.outcomes import outcome_table
from cdul_steps.data.tables import describe, read_facts, read_scores, write_table
from cdul_steps.errors import UserError
from cdul_steps.method.boxes import map_boxes, to_pixels
from cdul_steps.models.classifier import save_classifier
from cdul_steps.models.device import Machine
from cdul_steps.models.embedding import ImageViews
from cdul_steps.models.timm_encoder import TimmEncoder
from cdul_steps.steps.boxes import make_boxes, write_box_images
from cdul_steps.steps.evaluate import evaluate_labels
from cdul_steps.steps.label import join_labels
from cdul_steps.tools.retry import retry_failed

SIZE = 64
maps = arrays(
    np.float32,
    st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 6)),
    elements=st.floats(-4, 4, width=16),
)


@given(maps, st.sampled_from([0.25, 0.5, 0.75]), st.sampled_from([0.0, 0.125, 1.0]))
def test_a_box_is_around_the_strong_cells(values, threshold, margin):
    found = map_boxes(torch.from_numpy(values), threshold, margin).numpy()
    for map_, box in zip(values, found, strict=True):
        rows, columns = np.nonzero(map_ >= map_.min() + threshold * (map_.max() - map_.min()))
        (y0, x0), (y1, x1) = (min(rows), min(columns)), (max(rows) + 1, max(columns) + 1)
        ends = np.array([x0, y0, x1, y1]) / np.tile(map_.shape[::-1], 2)
        grown = margin * (ends[2:] - ends[:2])
        expected = np.clip(ends + np.concatenate([-grown, grown]), 0, 1)
        np.testing.assert_allclose(box, expected, atol=1e-6)


shares = st.floats(0, 1, width=32)


@given(shares, shares, shares, shares, st.integers(1, 3000), st.integers(1, 3000))
def test_a_box_in_pixels_lies_in_the_image_and_holds_what_it_held(a, b, c, d, width, height):
    box = np.array([min(a, c), min(b, d), max(a, c), max(b, d)])
    x0, y0, x1, y1 = to_pixels(box, width, height)
    assert 0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height
    size = np.tile([width, height], 2)
    assert (np.abs(np.array([x0, y0, x1, y1]) - box * size) <= 1.001).all()


def test_whole_cells_are_whole_pixels():
    assert to_pixels(np.array([1 / 7, 2 / 7, 3 / 7, 1]), 700, 70).tolist() == [100, 20, 300, 70]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return training_runs.make_data(tmp_path_factory.mktemp("data") / "data")


def classifier(folder: Path, model: str = "test_resnet") -> tuple[torch.nn.Module, Path]:
    classes = training_runs.CLASSES
    with torch.random.fork_rng():
        torch.manual_seed(1)
        network = timm.create_model(model, num_classes=len(classes)).eval()
    save_classifier(network, card(model=model, classes=classes, image_size=SIZE), folder)
    return network, folder


def boxes(data: Path, model: Path, output: Path, classes: int = 2) -> Path:
    make_boxes(
        manifest=data / "train/0.parquet",
        model=model,
        settings=BoxShape(classes=classes, threshold=0.6, margin=0.0),
        max_pixels=10_000,
        machine=Machine("cpu", workers=0, threads=1),
        output=output,
    )
    return output


def test_boxes_are_those_of_the_class_activation_maps(data, tmp_path):
    """Zhou et al., 2016: the features weighted by the head, for a head that follows their mean."""
    network, model = classifier(tmp_path / "model")
    output = boxes(data, model, tmp_path / "0.parquet")
    facts, images, found = read_shard(output)
    named = pq.read_table(output)["class"].to_pylist()
    assert found.shape[1] == 3 and facts["views"] == 3 and facts["boxes"]["threshold"] == 0.6
    first = read_shard(data / "train/0.parquet")
    assert images.equals(first[1]) and np.array_equal(found[:, 0], first[2][:, 0])
    of = card(model="test_resnet", classes=training_runs.CLASSES, image_size=SIZE)
    kinds = set()
    for i, path in enumerate(images["path"].to_pylist()):
        pixels = torch.from_numpy(of.resize(Image.open(path)))[None]
        with torch.no_grad():
            features = network.forward_features(of.normalize(pixels))
            best = network.forward_head(features)[0].topk(2).indices
        maps = torch.einsum("cd,dhw->chw", network.get_classifier().weight[best], features[0])
        expected = to_pixels(map_boxes(maps.detach(), 0.6, 0.0).numpy(), 32, 32)
        assert np.array_equal(found[i, 1:], expected)
        assert named[3 * i : 3 * i + 3] == [None, *(training_runs.CLASSES[c] for c in best)]
        kinds.add(tuple(expected.ravel()))
    assert len(kinds) > 3


def test_an_image_that_cannot_be_read_has_empty_views(data, tmp_path):
    """Never those of the whole image: they would pass for second views once it can be read."""
    _, model = classifier(tmp_path / "model")
    table = pq.read_table(data / "train/0.parquet")
    paths = pc.if_else(pc.equal(table["row"], 5), "/nowhere.png", table["path"])
    column = table.column_names.index("path")
    (tmp_path / "train").mkdir()
    write_table(table.set_column(column, "path", paths), tmp_path / "train/0.parquet")
    _, _, found = read_shard(boxes(tmp_path, model, tmp_path / "0.parquet"))
    empty = (found == 0).all(axis=(1, 2))
    assert empty[5] and empty.sum() == 1


def test_boxes_of_an_image_that_can_be_read_again_are_made_again(tmp_path):
    """By retry-failed; until then, the image counts as failed, whatever it is now."""
    network, model = classifier(tmp_path / "model")
    data = training_runs.make_data(tmp_path / "data")
    lost = Path(read_shard(data / "train/0.parquet")[1]["path"][5].as_py())
    held = lost.read_bytes()
    manifest = tmp_path / "results/d~e~seen/manifest"
    manifest.mkdir(parents=True)
    write_box_images(
        images=data / "images.parquet", class_count=2, output=manifest / "images.parquet"
    )
    lost.unlink()
    boxes(data, model, manifest / "train/0.parquet")
    lost.write_bytes(held)
    _, images, found = read_shard(manifest / "train/0.parquet")
    of = card(model="test_resnet", classes=training_runs.CLASSES, image_size=SIZE)
    cut = TimmEncoder(network, of, torch.device("cpu")).preprocess
    views = ImageViews(images["path"].combine_chunks(), found, cut, 10_000, None)
    status = [views[i].status for i in range(len(images))]
    assert status == ["changed" if i == 5 else "ok" for i in range(len(images))]
    table = manifest.parent / "e/encode/train/0.parquet"
    outcome = outcome_table(images, [(one, "", 0.0) for one in status])
    write_table(describe(outcome, "encode", shard=0), table)
    assert retry_failed(tmp_path / "results") == 1
    assert table.exists() and not (manifest / "train/0.parquet").exists()
    assert retry_failed(tmp_path / "results") == 0


def test_the_images_are_those_of_the_train_split(data, tmp_path):
    write_box_images(
        images=data / "images.parquet", class_count=2, output=tmp_path / "images.parquet"
    )
    found, first = (pq.read_table(f / "images.parquet") for f in (tmp_path, data))
    assert found.equals(first.slice(0, len(found))) and len(found) == 24
    facts = read_facts(tmp_path / "images.parquet")
    assert facts["rows"] == {"train": 24} and facts["layout"]["views"] == 3
    assert facts["layout"]["splits"] == {"train": "a"}


def test_a_classifier_that_has_no_boxes_says_so(data, tmp_path):
    _, model = classifier(tmp_path / "vit", "test_vit")
    assert "no feature map" in message_of(boxes, data, model, tmp_path / "0.parquet")
    assert not (tmp_path / "0.parquet").exists()


def test_fewer_classes_than_boxes_have_a_box_each(data, tmp_path):
    _, model = classifier(tmp_path / "model")
    output = boxes(data, model, tmp_path / "0.parquet", 4)
    facts, _, found = read_shard(output)
    assert found.shape[1] == facts["views"] == 4
    named = pq.read_table(output)["class"].to_pylist()[1:4]
    assert sorted(named) == sorted(training_runs.CLASSES)
    write_box_images(
        images=data / "images.parquet", class_count=4, output=tmp_path / "images.parquet"
    )
    assert read_facts(tmp_path / "images.parquet")["layout"]["views"] == 4


def tables(data: Path, folder: Path, *order: list[int]) -> list[Path]:
    images = pq.read_table(data / "images.parquet")
    found = []
    for k, rows in enumerate(order):
        scores = np.random.default_rng(k).random((len(rows), 3)).astype(np.float32)
        found.append(folder / f"{k}.parquet")
        write_labels(found[-1], images.take(rows), training_runs.CLASSES, scores)
    return found


def join(output: Path, *labels: Path, **settings) -> Path:
    join_labels(tables=labels, settings=Labels(**settings), output=output)
    return output


def test_joined_labels_are_the_mean_of_the_images_that_all_have(data, tmp_path, capsys):
    orders = [[3, 1, 0, 7], [0, 1, 2, 3], [1, 3, 0, 9]]
    parts = tables(data, tmp_path, *orders)
    images, classes, found = read_scores(join(tmp_path / "out.parquet", *parts))
    ids = pq.read_table(data / "images.parquet")["image_id"].to_pylist()
    assert images["image_id"].to_pylist() == [ids[i] for i in (3, 1, 0)]
    values = [read_scores(part)[2] for part in parts]
    for row, i in enumerate((3, 1, 0)):
        expected = np.mean([v[o.index(i)] for v, o in zip(values, orders, strict=True)], axis=0)
        np.testing.assert_allclose(found[row], expected, atol=1e-6)
    assert classes == training_runs.CLASSES
    assert "3 that are not in all of them are left out" in capsys.readouterr().err
    assert len(read_facts(tmp_path / "out.parquet")["joined"]) == 3


def test_joined_labels_are_calibrated_hardened_and_corrected(data, tmp_path):
    parts = tables(data, tmp_path, [0, 1, 2, 3], [0, 1, 2, 3])
    found = read_scores(join(tmp_path / "a.parquet", *parts, positives=1.2))[2]
    assert found.sum(axis=1).mean() == pytest.approx(1.2, abs=1e-4)
    found = read_scores(join(tmp_path / "b.parquet", *parts, harden={"top_k": 1}))[2]
    assert (found.sum(axis=1) == 1).all()
    name = pq.read_table(data / "images.parquet")["image_id"][2].as_py()
    (tmp_path / "c.csv").write_text(f"image_id,class,value\n{name},green,1\n")
    corrected = join(tmp_path / "c.parquet", *parts, corrections=str(tmp_path / "c.csv"))
    table, _, found = read_scores(corrected)
    assert found[2, 1] == 1 and table["corrected"].to_pylist() == [[], [], ["green"], []]
    message = message_of(join, tmp_path / "d.parquet", corrected, parts[0])
    assert "has corrections" in message


def test_labels_that_do_not_fit_together_are_not_joined(data, tmp_path):
    first, second = tables(data, tmp_path, [0, 1], [2, 3])
    assert "none of its images" in message_of(join, tmp_path / "out.parquet", first, second)
    images = pq.read_table(data / "images.parquet").take([0, 1])
    other = tmp_path / "other.parquet"
    write_labels(other, images, ["red", "blue", "green"], np.ones((2, 3), np.float32))
    assert "do not have the same classes" in message_of(
        join, tmp_path / "out.parquet", first, other
    )


def test_joined_labels_are_measured(data, tmp_path):
    parts = tables(data, tmp_path, [0, 1, 2, 3], [0, 1, 2, 3])
    for part in parts:
        facts = {**read_facts(part), "split": "train"}
        write_table(
            describe(
                pq.read_table(part),
                facts.pop("kind"),
                **{k: v for k, v in facts.items() if k != "schema_version"},
            ),
            part,
        )
    found = evaluate_labels(
        similarity={},
        images=data / "images.parquet",
        labels=join(tmp_path / "out.parquet", *parts),
        difficult="ignore",
        ap="all",
        output=tmp_path / "quality.json",
    )
    assert list(found["splits"]) == ["train"]
    assert found["splits"]["train"]["pseudo_labels"]["images"] == 4
    assert json.loads((tmp_path / "quality.json").read_text())["splits"] == found["splits"]


CONFIG = {
    "run": {"labels": ["second"]},
    "datasets": {
        "demo": {
            "reader": "demo",
            "classes": "config/classes/demo.yaml",
            "splits": {"train": "train"},
        }
    },
    "encoders": {"tiny-clip": {"model": "local-dir:x"}},
    "labels": {
        "first": {},
        "best": {"construction": "local_max"},
        "second": {"join": [{"labels": "first"}, {"labels": "best", "boxes": "seen"}]},
    },
    "boxes": {"seen": {"labels": "first", "training": "aligned"}},
    "trainings": {"aligned": {}},
}


def changed(path: str, value: object) -> dict:
    config = json.loads(json.dumps(CONFIG))
    *parents, last = path.split(".")
    section = config
    for key in parents:
        section = section[int(key)] if key.isdigit() else section[key]
    section[last] = value
    return config


def test_second_views_have_a_folder_of_their_own():
    config = load(CONFIG)
    assert list(config.all_boxed) == ["demo~tiny-clip~seen"]
    assert config.boxed("demo", "other", "seen").folder == "demo~other~seen"


@pytest.mark.parametrize(
    "path, value, message",
    [
        ("labels.second.join.0.training", "small", "'small', which is not under 'trainings'"),
        ("labels.second.join.1.training", "aligned", "boxes and a training in one entry"),
        ("labels.second.join.0.labels", "frist", "did you mean 'first'?"),
        ("labels.second.join.1.boxes", "sene", "names 'sene', which is not under 'boxes'"),
        ("labels.second.join.0.encoder", "clip", "names 'clip', which is not under 'encoders'"),
        ("labels.second.join.0.labels", "second", "need themselves: second need second"),
        ("labels.second.join.1.labels", "second", "which are themselves joined"),
        ("labels.second.zeta", 0.1, "labels.second: 'zeta' has no effect with 'join'"),
        ("labels.best.grid", [3, 3], "labels.best.grid: the boxes that labels.second.join names"),
        (
            "labels.best.corrections",
            "a.csv",
            "'corrections'; give them to labels.second",
        ),
        (
            "boxes.seen.labels",
            "second",
            "labels.second need themselves: second need second",
        ),
        (
            "boxes.seen.training",
            "other",
            "'other', which is not under 'trainings'",
        ),
        ("encoders.tiny-clip.views", "dense", "encoders.tiny-clip has dense views"),
    ],
)
def test_what_cannot_be_joined_is_told(path, value, message):
    with pytest.raises(UserError, match=r"^config: ") as caught:
        load(changed(path, value))
    assert message in str(caught.value)
