"""The report: its figures and its page."""

import base64
import errno
import json
import re
import shutil
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import made
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
import zarr
from faults import small_disk
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from messages import message_of
from PIL import Image

from cdul_steps.config import Dataset, Encoder, Labels, read_training
from cdul_steps.data.files import SCHEMA_VERSION
from cdul_steps.data.labels import LabelFacts
from cdul_steps.data.tables import KEY, read_facts, read_scores
from cdul_steps.report import figures
from cdul_steps.report.captions import CAPTIONS, TITLES
from cdul_steps.report.page import PageSection, Table, render
from cdul_steps.report.runs import find_runs
from cdul_steps.report.sections import score_panels
from cdul_steps.report.words import labels_in_words
from cdul_steps.steps.encode import encode_shard, encode_text
from cdul_steps.steps.evaluate import evaluate_labels, evaluate_scores
from cdul_steps.steps.label import make_labels
from cdul_steps.steps.manifest import make_manifest
from cdul_steps.steps.predict import SplitImages, predict_images
from cdul_steps.steps.report import make_report
from cdul_steps.steps.similarity import make_similarity, write_store
from cdul_steps.steps.train import Inputs, train_classifier

CLASSES = ["cat", "<script>alert(1)</script>", "狗 & $x_1$"]
FIGURES = set(CAPTIONS) - {"estimate"}
"""Figures of a training with known truth."""
TINY = {"max_pixels": tiny.MAX_PIXELS, "machine": tiny.MACHINE}

# What the figures show


@st.composite
def ranked(draw):
    """Truth with at least one True, and scores with ties."""
    count = draw(st.integers(1, 30))
    truth = draw(arrays(bool, count))
    truth[draw(st.integers(0, count - 1))] = True
    return truth, draw(arrays(np.float32, count, elements=st.sampled_from([0, 0.25, 0.5, 0.75, 1])))


@given(ranked())
def test_precision_recall_has_the_best_precision_of_each_recall(case):
    truth, scores = case
    best: dict[float, float] = {}
    for threshold in np.unique(scores):
        predicted = scores >= threshold
        recall = (truth & predicted).sum() / truth.sum()
        precision = (truth & predicted).sum() / predicted.sum()
        if recall > 0:
            best[recall] = max(best.get(recall, 0), precision)
    recall, precision = figures.precision_recall(truth, scores)
    np.testing.assert_allclose(recall, sorted(best))
    np.testing.assert_allclose(precision, [best[r] for r in sorted(best)])


def test_long_curves_are_thinned_and_keep_their_ends():
    random = np.random.default_rng(0)
    truth, scores = random.random(5000) < 0.5, random.random(5000)
    recall, precision = figures.precision_recall(truth, scores, points=50)
    assert len(recall) == len(precision) == 50
    assert recall[0] < 0.001 and recall[-1] == 1
    assert precision[-1] == pytest.approx(truth.mean(), abs=0.01)


def test_precision_and_recall_at_a_threshold():
    truth, scores = np.array([True, True, False, False]), np.array([0.9, 0.2, 0.5, 0.1])
    assert figures.at_threshold(truth, scores, 0.5) == (0.5, 0.5)
    assert figures.at_threshold(truth, scores, 0.95) is None


@given(arrays(bool, st.tuples(st.integers(0, 12), st.integers(1, 5))))
def test_cooccurrence_counts_images(labels):
    found = figures.cooccurrence(labels)
    for a, b in np.ndindex(found.shape):
        assert found[a, b] == sum(row[a] and row[b] for row in labels)


@given(st.integers(0, 2**32 - 1))
def test_counts_of_scores_are_those_of_the_chosen_pairs(seed):
    random = np.random.default_rng(seed)
    scores = random.random((6, 4, 3)).astype(np.float32)
    scores[random.random(scores.shape) < 0.1] = np.nan
    chosen = random.random((6, 3)) < 0.5
    picked = [scores[i, v, c] for i, v, c in np.ndindex(scores.shape) if chosen[i, c]]
    picked = [value for value in picked if not np.isnan(value)]
    found = figures.count_scores(scores, chosen)
    assert found.sum() == len(picked)
    places = np.minimum((np.array(picked, dtype=float) * 40).astype(int), 39)
    np.testing.assert_array_equal(found, np.bincount(places, minlength=40))
    np.testing.assert_array_equal(
        figures.count_scores(scores[:, 0], chosen), figures.count_scores(scores[:, :1], chosen)
    )


def test_what_does_not_speak_for_a_label_fades_to_white():
    pixels = np.random.default_rng(0).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    np.testing.assert_array_equal(figures.fade(pixels, np.ones((4, 5))), pixels)
    pale = figures.fade(pixels, np.zeros((4, 5)))
    assert pale.min() >= 215 and (pale >= pixels).all()


def texts(figure, path) -> list[str]:
    """The texts of a figure's SVG."""
    with figures.style():
        figures.save(figure, path)
    found = ElementTree.parse(path).iter("{http://www.w3.org/2000/svg}text")
    return ["".join(text.itertext()) for text in found]


def test_bars_leave_out_classes_without_positives_and_sort_by_the_classifier(tmp_path):
    values = {"labels": [50.0, None, 70.0], "classifier": [80.0, None, 20.0]}
    figure = figures.draw_average_precision(["cat", "dog", "owl"], [3, 0, 5], values)
    found = texts(figure, tmp_path / "a.svg")
    assert "dog (0)" not in found
    # From bottom to top.
    assert found.index("owl (5)") < found.index("cat (3)")


def test_beyond_the_limit_only_the_most_frequent_classes_are_drawn(tmp_path):
    count = figures.MAX_CLASSES + 20
    names = [f"c{i}" for i in range(count)]
    figure = figures.draw_average_precision(names, list(range(1, count + 1)), {"a": [50.0] * count})
    assert figure.axes[0].get_ylim()[1] < figures.MAX_CLASSES
    found = texts(figure, tmp_path / "a.svg")
    assert "c20 (21)" in found and "c19 (20)" not in found
    counts = np.diag(np.arange(1, count + 1))
    found = texts(figures.draw_cooccurrence({"all": counts}, names), tmp_path / "b.svg")
    assert "c20" in found and "c19" not in found


@pytest.mark.parametrize("known", [True, False])
def test_learning_curves_show_what_is_known(known, tmp_path):
    history = {"epoch": [1, 2], "loss": [2.0, 1.0], "label_movement": [0.0, 0.1]}
    history |= {"label_mAP": [50.0, 60.0] if known else [None, None], "test_mAP": [None, None]}
    figure = figures.draw_learning(history, "nats")
    assert len(figure.axes) == (3 if known else 2)
    assert ("mAP (%)" in texts(figure, tmp_path / "a.svg")) == known


def test_every_axis_has_a_label():
    """Each axis has its unit, in words or in brackets."""
    random = np.random.default_rng(0)
    truth, scores = random.random((40, 3)) < 0.5, random.random((40, 3))
    drawn = [
        figures.draw_scores({"all": {"global": random.integers(1, 9, 40)}}, 0.3),
        figures.draw_average_precision(CLASSES, [1, 2, 3], {"labels": [1.0, 2.0, 3.0]}),
        figures.draw_precision_recall(
            {"labels": scores}, truth, np.ones_like(truth), CLASSES, [1.0, 2.0, 3.0], 0.5
        ),
        figures.draw_learning({"epoch": [1], "loss": [1.0], "label_movement": [0.0]}, "nats"),
        figures.draw_cooccurrence({"all": figures.cooccurrence(truth)}, CLASSES),
    ]
    for figure in drawn:
        assert any(axis.get_xlabel() for axis in figure.axes)
        assert all(axis.get_ylabel() for axis in figure.axes if not axis.get_shared_y_axes())
        assert figure.axes[0].get_ylabel()


# The page


def parse(page: str) -> ElementTree.Element:
    """The page as XML: all elements are closed, all text is escaped."""
    assert page.startswith("<!DOCTYPE html>")
    return ElementTree.fromstring(page.removeprefix("<!DOCTYPE html>"))


def elements(root: ElementTree.Element, name: str) -> list[ElementTree.Element]:
    return list(root.iter(f"{{http://www.w3.org/1999/xhtml}}{name}"))


def is_self_contained(root: ElementTree.Element) -> bool:
    """Nothing is loaded from elsewhere, and no script runs."""
    loaded = [e.get(key) for e in root.iter() for key in ("src", "href", "data") if e.get(key)]
    styles = "".join(e.text for e in elements(root, "style"))
    return (
        all(value.startswith(("data:", "#")) for value in loaded)
        and not re.search(r"url\(|@import", styles)
        and not elements(root, "script")
        and not any(key.startswith("on") for e in root.iter() for key in e.attrib)
    )


def test_the_page_escapes_all_text():
    bad = '<script>alert("1")</script>&\''
    section = PageSection(bad, facts=[(bad, bad)], notes=[bad], parts=[Table(bad, [bad], [[bad]])])
    page = render([section], title=bad, written=bad, version=bad, git=bad)
    root = parse(page)
    assert is_self_contained(root)
    assert page.count("<script") == 0
    for name in ("h2", "dt", "dd", "th", "td"):
        assert [e.text for e in elements(root, name)] == [bad]


def test_tables_show_dashes_and_two_decimals():
    table = Table("", ["a", "b", "c"], [["x", 1, 2.345], ["y", None, None]])
    root = parse(
        render([PageSection("s", parts=[table])], title="", written="", version="", git=None)
    )
    assert [e.text for e in elements(root, "td")] == ["x", "1", "2.35", "y", "-", "-"]
    assert table.numbers == {1, 2}


def test_every_figure_has_a_title_and_a_caption():
    assert set(CAPTIONS) == set(TITLES)
    assert all(len(text) > 100 for text in CAPTIONS.values())


# Whole reports


def run_stages(root: Path, known: bool) -> Path:
    """All stages on a few noise images and one broken file; returns the training's folder."""
    for split, count in (("train", 9), ("test", 5)):
        for i in range(count):
            tiny.noise(root / "images" / split / f"{i}.png", i if split == "train" else i + 50)
    (root / "images/train/<b>&.jpg").write_text("not an image")
    (root / "classes.yaml").write_text(json.dumps(CLASSES))
    results = root / "results/data<1>"
    images, encoder = results / "manifest/images.parquet", results / "clip"
    rows = {
        "path": [str(p.relative_to(root)) for p in sorted(root.glob("images/*/*"))],
        "split": [p.parent.name for p in sorted(root.glob("images/*/*"))],
    }
    for c, name in enumerate(CLASSES):
        rows[name] = [int(i % 3 == c or i % 4 == c) for i in range(len(rows["path"]))]
    pq.write_table(pa.table(rows), root / "table.parquet")
    dataset = Dataset(
        reader="table" if known else "folder",
        root=root / ("table.parquet" if known else "images/train"),
        classes=root / "classes.yaml",
        splits={"train": "train", "test": "test"} if known else {"train": "."},
        grid=(2, 2),
        shard_size=8,
        max_pixels=tiny.MAX_PIXELS,
        max_failed_share=1,
    )
    make_manifest(dataset=dataset, output=images)
    clip = Encoder(model=tiny.make_clip(root / "clip"), templates=["a {}"])
    encode_text(classes=root / "classes.yaml", encoder=clip, output=encoder / "text.parquet")
    splits = ("train", "test") if known else ("train",)
    for split in splits:
        store = encoder / f"embeddings/{split}.zarr"
        write_store(images=images, split=split, text=encoder / "text.parquet", store=store)
        for manifest in sorted((images.parent / split).glob("*.parquet")):
            encode_shard(
                manifest=manifest,
                store=store,
                table=encoder / "encode" / split / manifest.name,
                encoder=clip,
                **TINY,
            )
        make_similarity(
            store=store,
            text=encoder / "text.parquet",
            images=images,
            split=split,
            tables=sorted((encoder / "encode" / split).glob("*.parquet")),
            max_failed_share=0.5,
            output=encoder / f"similarity/{split}.zarr",
        )
    labels, measuring = encoder / "final", {"difficult": "ignore", "ap": "all"}
    similarity = {split: encoder / f"similarity/{split}.zarr" for split in splits}
    made = {"labels": labels / "pseudo_labels.parquet", "images": images}
    make_labels(
        similarity=similarity["train"],
        images=images,
        split="train",
        settings=Labels(),
        output=made["labels"],
    )
    evaluate_labels(similarity=similarity, output=labels / "quality.json", **made, **measuring)
    training = labels / "small"
    text = '{"model": "test_resnet", "image_size": 64, "epochs": 2, "alignment": {"warmup": 0}}'
    train_classifier(
        inputs=Inputs(labels / "pseudo_labels.parquet", images),
        settings=read_training(text),
        difficult="ignore",
        max_failed_share=0.5,
        output=training,
        **TINY,
    )
    for split in splits:
        predictions = training / f"predictions/{split}.parquet"
        predict_images(
            model=training / "model",
            inputs=SplitImages(images, split),
            output=predictions,
            threshold=None,
            **TINY,
        )
    evaluate_scores(
        scores=predictions, images=images, output=training / "metrics.json", **measuring
    )
    return training


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> Path:
    """A training with truth and a test split."""
    return run_stages(tmp_path_factory.mktemp("measured"), known=True)


@pytest.fixture(scope="module")
def unmeasured(tmp_path_factory) -> Path:
    """A training on a folder of images: no truth, no test split."""
    return run_stages(tmp_path_factory.mktemp("unmeasured"), known=False)


@pytest.fixture
def copied(measured, tmp_path) -> Path:
    """The labels folder of a copy for a test to change."""
    results = measured.parents[3]
    return shutil.copytree(results, tmp_path / "results") / measured.parent.relative_to(results)


def report(folder: Path, output: Path) -> tuple[ElementTree.Element, str, set[str]]:
    """The parsed page, its text, and the names of its figures."""
    make_report(folders=[folder], output=output)
    page = (output / "report.html").read_text(encoding="utf-8")
    root = parse(page)
    assert is_self_contained(root)
    files = {p.stem: p for p in output.rglob("*.*") if p.suffix in (".svg", ".jpg")}
    sources = [image.get("src") for image in elements(root, "img")]
    assert len(sources) == len(files)
    for source in sources:
        content = base64.b64decode(source.partition("base64,")[2])
        assert content in {file.read_bytes() for file in files.values()}
    return root, " ".join(" ".join(root.itertext()).split()), set(files)


@pytest.fixture(scope="module")
def whole(measured, tmp_path_factory):
    """The report of all results of a measured training: its folder, and as `report` returns it."""
    folder = tmp_path_factory.mktemp("report") / "report"
    return folder, *report(measured.parents[3], folder)


def test_a_report_has_all_its_parts(measured, whole):
    _, root, text, found = whole
    assert found == FIGURES
    assert all(CAPTIONS[name] in text for name in found)
    headings = [e.text for e in elements(root, "h2")]
    assert headings == [
        "Overview",
        "Data: data<1>",
        "Encoder: data<1> / clip",
        "Pseudo-labels: data<1> / clip / final",
        "Classifier: data<1> / clip / final / small",
        "Images that could not be used",
        "Time, speed and memory",
        "Software",
    ]
    cells = [e.text for e in elements(root, "td")]
    for name in CLASSES:
        assert name in cells
    metrics = json.loads((measured / "metrics.json").read_text())
    assert f"{metrics['mAP']:.2f}" in cells
    quality = json.loads((measured.parent / "quality.json").read_text())
    assert f"{quality['splits']['train']['local_max']['mAP']:.2f}" in cells
    for value in ("images/train/<b>&.jpg", "not_an_image"):
        assert value in cells
    assert {"torch", "timm", "open_clip_torch", "zarr"} <= set(cells)


def test_names_are_text_in_the_figures(whole):
    folder = whole[0] / "data<1>/clip/final/small"
    for name in ("average_precision", "precision_recall", "cooccurrence"):
        svg = (folder / f"{name}.svg").read_text(encoding="utf-8")
        assert "<script" not in svg
        if name != "precision_recall":  # it names at most three classes
            assert "狗 &amp; $x_1$" in svg and "&lt;script&gt;alert(1)" in svg
    with Image.open(folder / "class_maps.jpg") as image:
        assert image.width > 800


def test_a_folder_of_images_has_no_measures(unmeasured, tmp_path):
    root, text, found = report(unmeasured, tmp_path / "report")
    assert found == {"scores", "learning", "cooccurrence", "class_maps"}
    assert "No ground truth is known" in text
    assert "mAP" not in [e.text for e in elements(root, "th")]
    assert "<b>&.jpg" in [e.text for e in elements(root, "td")]


def test_what_has_not_been_made_is_absent(copied, tmp_path):
    encoder, training = copied.parent, copied / "small"
    tables = ["encode", "text.parquet", "similarity"]
    for gone, expected in [
        ([encoder / "similarity/test.zarr"], FIGURES),
        ([training / "metrics.json", training / "model"], {"scores", "learning", "cooccurrence"}),
        ([training / "predictions", copied / "quality.json"], {"scores", "learning"}),
        ([encoder / name for name in tables], {"learning"}),
        ([training], set()),
    ]:
        for place in gone:
            shutil.rmtree(place) if place.is_dir() else place.unlink()
        _, _, found = report(copied, tmp_path / "report")
        assert found == expected, gone


def test_labels_of_other_software(copied, tmp_path):
    """They do not record how they were made, so CLIP's scores use the model's own temperature."""
    path = copied / "pseudo_labels.parquet"
    facts = read_facts(path)
    kept = {key: facts[key] for key in ("kind", "schema_version", "classes")}
    table = pq.read_table(path).replace_schema_metadata({"cdul": json.dumps(kept)})
    pq.write_table(table, path)
    _, text, found = report(copied, tmp_path / "report")
    assert found == FIGURES
    assert "CLIP, global" in text


def test_calibrated_labels_are_measured_and_drawn_as_they_are(copied, tmp_path):
    encoder, images = copied.parent, copied.parents[1] / "manifest/images.parquet"
    make_labels(
        similarity=encoder / "similarity/train.zarr",
        images=images,
        split="train",
        settings=Labels(standardise=True, harden={"top_k": 1}),
        output=copied / "pseudo_labels.parquet",
    )
    stores = {split: encoder / f"similarity/{split}.zarr" for split in ("train", "test")}
    quality = evaluate_labels(
        similarity=stores,
        images=images,
        labels=copied / "pseudo_labels.parquet",
        difficult="ignore",
        ap="all",
        output=copied / "quality.json",
    )
    root, text, found = report(copied, tmp_path / "report")
    assert found == FIGURES
    cells = [e.text for e in elements(root, "td")]
    assert "CLIP, final" in cells and "CLIP, pseudo-labels" in cells
    assert f"{quality['splits']['test']['pseudo_labels']['mAP']:.2f}" in cells
    assert "classes standardised" in text and "hard 1 for the 1 largest labels of an image" in text
    # Hard labels: nothing but zeros and ones.
    (run,) = find_runs([copied])
    for counts in score_panels(run).values():
        assert counts["pseudo-labels"].sum() == counts["pseudo-labels"][[0, -1]].sum() > 0


def test_where_images_went_that_show_none_of_the_classes(tmp_path):
    context = [f"context {i}" for i in range(60)]
    files = {"train": [f"{i}.jpg" for i in range(40)], "test": ["a.jpg", "b.jpg", "c.jpg"]}
    labels = made.make_results(tmp_path / "results", files, context=context).parent
    root, text, found = report(labels, tmp_path / "report")
    assert "context names left out because they mean a class Boats (boat)" in text
    assert "context 60 names, which count as 50" in text
    _, _, values = read_scores(labels / "pseudo_labels.parquet")
    empty = int((values < 0.5).all(axis=1).sum())
    assert 0 < empty < 39
    assert f"Nothing found: {empty} of 39 images" in text
    cosines = zarr.open_array(labels.parent / "similarity/train.zarr", mode="r")[1:, 0]
    powers = np.exp(cosines.astype(float) / made.SETTINGS.tau) * np.array([1] * 3 + [50 / 60] * 60)
    scores = powers / powers.sum(axis=1, keepdims=True)
    best = np.bincount(scores.argmax(axis=1), minlength=63)[3:]
    assert f"{100 * scores[:, 3:].sum(axis=1).mean():.0f}% of CLIP's scores went to context" in text
    assert f"{best.sum()} of 39 images match one of them best" in text
    rows = [[cell.text for cell in row] for row in elements(root, "tr")]
    rows = [row for row in rows if row[0].startswith("context ") and row[0] != "context name"]
    assert len(rows) == 20 and "the first 20 of 60 names" in text
    assert [int(row[1]) for row in rows] == sorted(best.tolist(), reverse=True)[:20]
    for name, images, share in rows:
        place = context.index(name)
        assert int(images) == best[place]
        assert float(share) == pytest.approx(100 * scores[:, 3 + place].mean(), abs=0.006)
    # The figure counts only scores of classes.
    (run,) = find_runs([labels])
    counts = sum(c["whole images"].sum() for c in score_panels(run).values())
    assert counts == 3 * sum(known for known in read_known(run.images))
    assert found == {"scores"}


def read_known(images: Path) -> list[bool]:
    table = pq.read_table(images).to_pylist()
    return [row["known"] for row in table if row["split"] == "train" and row["row"] > 0]


def test_what_was_done_to_the_labels_is_said_in_words():
    plain = LabelFacts(
        construction="final", tau=0.05, zeta=0.3, lambda_=0.0, similarity={"logit_scale": 20.0}
    )
    assert labels_in_words(plain) == {
        "construction": "final",
        "tau": "0.05 (the model's own)",
        "zeta": "0.3",
        "lambda": "0",
    }
    by_sigmoid = labels_in_words(replace(plain, logit_bias=-16.5))
    assert by_sigmoid["scores"] == "a sigmoid of each class, with bias -16.5"
    done = {"tau": 0.15, "grid": (2, 2), "threshold": 0.5, "corrections": 7}
    done |= {"statistics": {"mean": []}, "positives": 3.0, "slope": 3.0, "bias": -0.25}
    words = labels_in_words(replace(plain, **done))
    assert words["tau"] == "0.15 (3 times the model's own)"
    assert words["positives"].startswith("3: calibrated") and "-0.25" in words["positives"]
    assert words["hard"] == "1 if at least 0.5, else 0"
    assert {"snippets", "classes", "corrections"} < set(words)
    # A table from other software records nothing.
    assert labels_in_words(LabelFacts()) == {}


def test_tables_of_shards_that_are_no_more_do_not_count(copied, whole, tmp_path):
    folder = copied.parent / "encode/train"
    shutil.copy(folder / "1.parquet", folder / "7.parquet")
    root, _, _ = report(copied, tmp_path / "report")
    costs = [[e.text for e in row] for row in elements(root, "tr")]
    assert [row for row in costs if row[0] == "encode"] == [
        row for row in ([e.text for e in r] for r in elements(whole[1], "tr")) if row[0] == "encode"
    ]
    assert [row[0] for row in costs].count("data<1>") == 2  # once over all, once for the failure


def test_images_that_are_gone_have_no_maps(copied, tmp_path):
    images = copied.parents[1] / "manifest/images.parquet"
    predictions = copied / "small/predictions/test.parquet"
    table = pq.read_table(predictions)
    gone = pa.array([f"/nowhere/{i}.png" for i in range(len(table))])
    pq.write_table(table.set_column(table.column_names.index("path"), "path", gone), predictions)
    assert images.is_file()
    _, text, found = report(copied, tmp_path / "report")
    assert found == FIGURES - {"class_maps"}
    assert "No class activation maps: none of the images can be read any longer." in text


def test_time_and_memory_come_from_the_benchmarks(copied, tmp_path):
    table = copied.parents[2] / "benchmarks/predict/data<1>/clip/final/small/{}.tsv"
    table.parent.mkdir(parents=True)
    for split, seconds, memory in (("train", "3.0", "900.5"), ("test", "2.0", "NA")):
        Path(str(table).format(split)).write_text(f"s\tmax_pss\n{seconds}\t{memory}\n")
    root, _, _ = report(copied, tmp_path / "report")
    rows = [[e.text for e in row] for row in elements(root, "tr")]
    (predict,) = [row for row in rows if row[0] == "predict"]
    # 15 images in 5 seconds.
    assert predict == ["predict", "data<1> / clip / final / small", "2", "5.00", "3.00", "900"]
    (encode,) = [row for row in rows if row[0] == "encode"]
    assert encode[2] == encode[5] == "-" and float(encode[3]) > 0 and float(encode[4]) > 0


def test_the_same_results_give_the_same_figures(measured, whole, tmp_path):
    report(measured, tmp_path)
    for file in whole[0].rglob("*.*"):
        other = tmp_path / file.relative_to(whole[0])
        assert file.name == "report.html" or file.read_bytes() == other.read_bytes()


def make(folder: Path, output: Path) -> None:
    make_report(folders=[folder], output=output)


def test_mistakes(measured, tmp_path):
    message = message_of(make, tmp_path, tmp_path / "report")
    assert "not a folder of results" in message and str(tmp_path) in message
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/photo.jpg").touch()
    assert "contains 'photo.jpg'" in message_of(make, measured, tmp_path / "mine")
    assert (tmp_path / "mine/photo.jpg").exists()


@pytest.mark.root
def test_full_disk(unmeasured, tmp_path):
    with small_disk(tmp_path / "disk", "64k") as disk:
        place = disk / "report"
        place.mkdir()
        (place / "report.html").write_text("earlier")
        with pytest.raises(OSError, match=re.escape(str(disk))) as caught:
            make(unmeasured, place)
        assert caught.value.errno == errno.ENOSPC
        assert [p for p in disk.rglob("*") if p.is_file()] == [place / "report.html"]
        assert (place / "report.html").read_text() == "earlier"


@pytest.mark.parametrize(
    ("file", "part"),
    [
        ("quality.json", "quality"),
        ("small/metrics.json", "metrics"),
        ("small/model/model.json", "provenance"),
        ("small/history.parquet", "history"),
    ],
)
def test_files_that_are_torn_or_of_another_version(copied, file, part):
    path = copied / file

    def told() -> str:
        (run,) = find_runs([copied])
        return message_of(getattr, run, part)

    other = {"schema_version": SCHEMA_VERSION + 1}
    if path.suffix == ".json":
        path.write_text(json.dumps({**json.loads(path.read_text()), **other}))
    else:
        table = pq.read_table(path)
        pq.write_table(table.replace_schema_metadata({KEY: json.dumps(other)}), path)
    assert told().startswith(f"{path}: written by another version")
    path.write_bytes(path.read_bytes()[:-9])
    assert told().startswith(f"{path}: no")
