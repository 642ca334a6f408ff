"""The stages label and evaluate, through their functions and the command line."""

import json
import math
import os
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zarr
from messages import message_of
from pydantic import ValidationError
from sklearn.metrics import average_precision_score

from cdul_steps.config import Labels
from cdul_steps.data.labels import LabelFacts, labels_like
from cdul_steps.data.stores import open_store
from cdul_steps.data.tables import describe, read_facts, read_scores, write_table
from cdul_steps.data.truth import measure_table
from cdul_steps.errors import UserError
from cdul_steps.method.aggregation import CONSTRUCTIONS as BUILT
from cdul_steps.steps.evaluate import conclusion, evaluate_labels, evaluate_scores
from cdul_steps.steps.label import make_labels

# Published vectors

CONSTRUCTIONS = {
    "global": ("global", 0.0),
    "local mean": ("local_mean", 0.0),
    "local max": ("local_max", 0.0),
    "local min": ("aggregate", 2.0),  # no score reaches zeta
}
CONVENTIONS = ("negative", "ignore", "positive")


def published_folder() -> Path:
    """Only for the names of the test cases; the fixture skips them if the folder is missing."""
    return Path(os.environ.get("CDUL_TEST_DATA", "")) / "voc2012-rn50x64"


def published_rows():
    """Rows of expected.md: tau, construction, zeta, and mAP by convention."""
    path = published_folder() / "expected.md"
    if not path.is_file():
        return [pytest.param(None, id="expected.md")]
    cases = []
    for line in path.read_text().splitlines()[2:]:
        tau, zeta, label, *values = [cell.strip() for cell in line.strip("|").split("|")]
        construction, default = CONSTRUCTIONS.get(label, (label, None))
        case = {
            "tau": float(tau),
            "construction": construction,
            "zeta": float(zeta) if zeta else default,
            "mAP": dict(zip(CONVENTIONS, map(float, values), strict=True)),
        }
        cases.append(pytest.param(case, id=" ".join(filter(None, (label, f"tau={tau}", zeta)))))
    return cases


def save_store(path, cosines, **attributes):
    """A similarity store as any program would write it with Zarr."""
    array = zarr.create_array(path, data=np.asarray(cosines, np.float32), overwrite=True)
    array.attrs.update(attributes)
    return path


@pytest.fixture(scope="module")
def published(test_data, tmp_path_factory):
    """The published vectors as a similarity store and a table of images."""
    table = pq.read_table(test_data / "voc2012-rn50x64" / "vectors.parquet")
    prefix = "global:"
    classes = [n.removeprefix(prefix) for n in table.column_names if n.startswith(prefix)]
    columns = {
        kind: np.stack([table[f"{kind}:{name}"].to_numpy() for name in classes], axis=1)
        for kind in ("global", "max", "min", "label")
    }
    cosines = [4.6052 * np.log(columns[view]) for view in ("global", "max", "min")]
    folder = tmp_path_factory.mktemp("published")
    save_store(folder / "sim.zarr", np.stack(cosines, axis=1), classes=classes, logit_scale=100.0)
    ids = table["image_id"].to_pylist()
    images = pa.table(
        {
            "image_id": pa.array(map(str, ids)),
            "split": pa.array(["train"] * len(ids)),
            "row": pa.array(range(len(ids))),
            "path": pa.array([f"{name}.jpg" for name in ids]),
            "positive": pa.array([np.flatnonzero(row == 1) for row in columns["label"]]),
            "difficult": pa.array([np.flatnonzero(row == 0) for row in columns["label"]]),
        }
    )
    write_table(images, folder / "images.parquet")
    return folder


@pytest.mark.parametrize("case", published_rows())
def test_published_vectors_give_the_expected_map(case, published, tmp_path):
    make_labels(
        similarity=published / "sim.zarr",
        images=published / "images.parquet",
        split="train",
        # A zeta beyond the bound of the settings, so that no score reaches it.
        settings=Labels().model_copy(
            update={key: case[key] for key in ("construction", "tau", "zeta")}
        ),
        output=tmp_path / "labels.parquet",
    )
    for convention, expected in case["mAP"].items():
        result = measure_table(
            tmp_path / "labels.parquet", published / "images.parquet", convention, "all"
        )
        assert result["images"] == 2859
        assert result["mAP"] == pytest.approx(expected, abs=0.01), convention


def test_every_published_row_is_a_case(published):
    text = (published_folder() / "expected.md").read_text()
    rows = [line for line in text.splitlines() if re.match(r"\| *\d", line)]
    assert len(published_rows()) == len(rows) == 56


@pytest.mark.parametrize(
    ("settings", "difficult", "expected"),
    [
        ({"tau": 0.01, "zeta": 0.3, "lambda": 0}, "ignore", 88.620),
        ({"zeta": 0.5}, "negative", 87.788),  # tau from logit_scale
        ({"tau": 0.05, "construction": "global"}, "positive", 86.164),
    ],
)
def test_published_vectors_through_the_command_line(
    settings, difficult, expected, published, cdul, tmp_path
):
    labels, metrics = tmp_path / "labels.parquet", tmp_path / "metrics.json"
    images = ["--images", published / "images.parquet"]
    similarity = ["--similarity", published / "sim.zarr", "--split", "train"]
    options = ["--settings", json.dumps(settings)]
    done = cdul("label", *similarity, *images, *options, "--output", labels)
    assert done.returncode == 0, done.stderr
    done = cdul(
        "evaluate", "--scores", labels, *images, "--difficult", difficult, "--output", metrics
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(metrics.read_text())
    assert result["mAP"] == pytest.approx(expected, abs=0.01)
    assert f"mAP {result['mAP']:.2f} on 2859 images" in done.stdout


# Small stores

CLASSES = ["dog", "cat", "owl"]


@pytest.fixture
def small(tmp_path):
    """Six images with rows out of order, one in another split; none shows an owl."""
    cosines = np.random.default_rng(0).uniform(0.1, 0.3, (6, 4, 3))
    save_store(tmp_path / "sim.zarr", cosines, classes=CLASSES, logit_scale=20.0)
    images = pa.table(
        {
            "image_id": ["f", "e", "d", "c", "b", "a"],
            "split": ["train"] * 5 + ["test"],
            "row": [5, 4, 3, 2, 1, 0],
            "path": [f"/{name}.jpg" for name in "fedcba"],
            "positive": pa.array([[0], [0, 1], [1], [], None, [0]], pa.list_(pa.int32())),
            "difficult": pa.array([[], [], [0], [2], None, []], pa.list_(pa.int32())),
        }
    )
    write_table(images, tmp_path / "images.parquet")
    return tmp_path


def label(folder, similarity="sim.zarr", **settings):
    make_labels(
        similarity=folder / similarity,
        images=folder / "images.parquet",
        split="train",
        settings=Labels(**settings),
        output=folder / "labels.parquet",
    )
    return pq.read_table(folder / "labels.parquet")


def evaluate(folder, **changes):
    arguments = {
        "scores": folder / "labels.parquet",
        "images": folder / "images.parquet",
        "difficult": "ignore",
        "ap": "all",
        "output": folder / "metrics.json",
    }
    return evaluate_scores(**{**arguments, **changes})


def values(table):
    return np.stack([table[name].to_numpy() for name in CLASSES], axis=1)


def final_label(p, tau, zeta):
    """The pseudo-label of one image from its cosines (1+S, C)."""
    s = np.exp(p / tau) / np.exp(p / tau).sum(axis=1, keepdims=True)
    alpha, beta = s[1:].max(axis=0), s[1:].min(axis=0)
    return (s[0] + np.where(alpha >= zeta, alpha, beta)) / 2


def test_labels_follow_the_rows_of_the_images(small):
    table = label(small, tau=0.02)
    assert table.column_names == ["image_id", "path", *CLASSES]
    assert table["image_id"].to_pylist() == ["f", "e", "d", "c", "b"]
    assert table["path"].to_pylist() == ["/f.jpg", "/e.jpg", "/d.jpg", "/c.jpg", "/b.jpg"]
    cosines = zarr.open_array(small / "sim.zarr", mode="r")[:].astype(float)
    expected = [final_label(cosines[row], 0.02, 0.3) for row in (5, 4, 3, 2, 1)]
    np.testing.assert_allclose(values(table), expected, rtol=1e-4)
    assert table.schema.field("dog").type == pa.float32()


def test_tau_is_one_over_the_logit_scale(small):
    default = label(small)
    assert read_facts(small / "labels.parquet")["tau"] == pytest.approx(1 / 20)
    np.testing.assert_array_equal(values(default), values(label(small, tau=1 / 20)))
    assert not np.allclose(values(default), values(label(small, tau=math.log(20))))


def test_settings_are_in_the_metadata(small):
    label(small, zeta=0.4, lambda_=-1.0)
    facts = read_facts(small / "labels.parquet")
    assert facts["classes"] == CLASSES
    assert (facts["zeta"], facts["lambda"], facts["split"]) == (0.4, -1.0, "train")
    assert facts["similarity"] == {"logit_scale": 20.0}
    assert {"cdul", "numpy"} <= set(facts["software"])


def test_corrections_are_in_the_labels(small):
    before = values(label(small))
    assert "corrected" not in label(small).column_names
    path = small / "corrections.csv"
    path.write_text("image_id,class,value\nd,dog,0\nb,cat,1\nb,owl,unknown\n")
    table = label(small, corrections=path)
    assert table.column_names == ["image_id", "path", *CLASSES, "corrected"]
    assert table["corrected"].to_pylist() == [[], [], ["dog"], [], ["cat", "owl"]]
    expected = before.copy()
    expected[2, 0], expected[4, 1:] = 0, [1, 0.5]
    np.testing.assert_array_equal(values(table), expected)
    assert read_facts(small / "labels.parquet")["corrections"] == 3
    _, classes, scores = read_scores(small / "labels.parquet")
    assert classes == CLASSES and np.array_equal(scores, expected)


def test_a_correction_of_another_image(small):
    path = small / "corrections.csv"
    path.write_text("image_id,class,value\na,dog,1\n")
    with pytest.raises(UserError, match="corrects 'a', which is not one of the 5 labelled images"):
        label(small, corrections=path)
    assert not (small / "labels.parquet").exists()


def test_images_without_embedding_have_no_row(small):
    array = zarr.open_array(small / "sim.zarr", mode="r+")
    array[4] = np.nan
    array[2, 1, 0] = np.nan
    assert label(small)["image_id"].to_pylist() == ["f", "d", "b"]
    array[:] = np.nan
    with pytest.raises(UserError, match="no image of split 'train' has a similarity"):
        label(small)


@pytest.mark.parametrize("tau", [0.0, -0.01, math.nan])
def test_tau_must_be_positive(small, tau):
    with pytest.raises(ValidationError, match="tau"):
        label(small, tau=tau)
    label(small)
    with_facts(small / "labels.parquet", tau=tau)
    with pytest.raises(UserError, match="tau"):
        quality(small)


def test_metrics_say_what_they_mean(small):
    label(small)
    evaluate(small)
    result = json.loads((small / "metrics.json").read_text())
    assert result["definition"]["difficult"] == "ignore"
    assert "left out" in result["definition"]["meaning"]["ignore"]
    assert "negative" not in result["definition"]["meaning"]
    assert result["settings"]["construction"] == "final"
    assert result["images"] == 4  # the truth of b is unknown, and a is in another split


def test_a_class_without_positives_is_null_listed_and_left_out(small):
    scores = values(label(small))
    result = evaluate(small)
    assert result["per_class"]["owl"] == {"AP": None, "positives": 0, "images": 3}
    assert result["classes_without_positives"] == ["owl"]
    dog = 100 * average_precision_score([1, 1, 0], scores[[0, 1, 3], 0])  # d is difficult
    cat = 100 * average_precision_score([0, 1, 1, 0], scores[:4, 1])
    assert result["per_class"]["dog"]["AP"] == pytest.approx(dog)
    assert result["mAP"] == pytest.approx((dog + cat) / 2)


def test_the_convention_and_the_kind_of_ap_are_heeded(small):
    label(small)
    positives = {}
    for difficult in CONVENTIONS:
        per_class = evaluate(small, difficult=difficult)["per_class"]
        positives[difficult] = [
            (per_class[name]["positives"], per_class[name]["images"]) for name in CLASSES
        ]
    assert positives == {
        "negative": [(2, 4), (2, 4), (0, 4)],
        "ignore": [(2, 3), (2, 4), (0, 3)],
        "positive": [(3, 4), (2, 4), (1, 4)],
    }
    assert evaluate(small, ap="voc07")["definition"]["ap"] == "voc07"


def rewrite_images(folder, change):
    path = folder / "images.parquet"
    table = change(pq.read_table(path))
    write_table(table, path)


@pytest.mark.parametrize("missing", [["positive", "difficult"], ["positive"]])
def test_without_truth_the_map_is_null(small, missing):
    label(small)
    rewrite_images(small, lambda table: table.drop_columns(missing))
    evaluate(small)
    result = json.loads((small / "metrics.json").read_text())
    assert result["mAP"] is None
    assert result["images"] == 0
    assert result["classes_without_positives"] == CLASSES


def test_without_difficult_all_entries_count(small):
    label(small)
    rewrite_images(small, lambda table: table.drop_columns("difficult"))
    result = evaluate(small)
    assert [result["per_class"][name]["images"] for name in CLASSES] == [4, 4, 4]


def test_images_marked_as_unknown_are_left_out(small):
    scores = np.array([[0.9, 0.1, 0], [0.2, 0.2, 0], [0.5, 0.3, 0], [0.1, 0.9, 0], [0.3, 0.4, 0]])
    table = label(small)
    for c, name in enumerate(CLASSES):
        table = table.set_column(2 + c, name, pa.array(scores[:, c], pa.float32()))
    write_table(table, small / "labels.parquet")
    known = pa.array([False, True, True, True, True, None])
    rewrite_images(small, lambda table: table.append_column("known", known))
    result = evaluate(small)
    assert result["images"] == 3
    assert result["per_class"]["dog"]["AP"] == pytest.approx(100)
    cat = 100 * average_precision_score([1, 1, 0], scores[1:4, 1])
    assert result["per_class"]["cat"]["AP"] == pytest.approx(cat)


def test_images_are_matched_by_id_not_by_place(small):
    label(small)
    expected = evaluate(small)["per_class"]
    rewrite_images(small, lambda table: table.take([3, 0, 5, 2, 4, 1]))
    assert evaluate(small)["per_class"] == expected


def test_another_class_order_names_both_files_and_orders(small):
    label(small)
    rewrite_images(small, lambda t: describe(t, "images", classes=["cat", "dog", "owl"]))
    with pytest.raises(UserError) as caught:
        evaluate(small)
    message = str(caught.value)
    assert str(small / "images.parquet") in message
    assert "cat, dog, owl" in message and "dog, cat, owl" in message


def test_an_image_twice_in_the_scores(small):
    table = label(small)
    write_table(pa.concat_tables([table, table.slice(0, 1)]), small / "labels.parquet")
    with pytest.raises(UserError, match="more than one row"):
        evaluate(small)


# Why there is no mAP


def rewrite_scores(folder, change):
    table = pq.read_table(folder / "labels.parquet")
    write_table(change(table), folder / "labels.parquet")


def all_nan(table):
    for c, name in enumerate(CLASSES):
        table = table.set_column(2 + c, name, pa.array([math.nan] * len(table), pa.float32()))
    return table


def known_as(positive):
    def change(table):
        lists = pa.array([positive] * len(table), pa.list_(pa.int32()))
        table = table.drop_columns(["positive", "difficult"])
        return table.append_column("positive", lists)

    return change


@pytest.mark.parametrize(
    ("scores", "images", "line", "left_out"),
    [
        (
            all_nan,
            None,
            "no mAP: no row has scores, all are NaN (5 without scores)",
            (5, 0, 0),
        ),
        (
            None,
            known_as(None),
            "no mAP: no image with known truth (5 with unknown truth)",
            (0, 0, 5),
        ),
        (
            None,
            known_as([]),
            "no mAP: the 5 images with known truth show no class",
            (0, 0, 0),
        ),
        (
            lambda table: table.slice(0, 0),
            None,
            "no mAP: no row has scores, there are none",
            (0, 0, 0),
        ),
    ],
    ids=["scores are NaN", "truth unknown", "no positives", "no rows"],
)
def test_why_there_is_no_map(small, cdul, scores, images, line, left_out):
    label(small)
    rewrite_scores(small, scores or (lambda table: table))
    rewrite_images(small, images or (lambda table: table))
    files = {"--scores": "labels.parquet", "--images": "images.parquet", "--output": "m.json"}
    words = [word for option, name in files.items() for word in (option, small / name)]
    done = cdul("evaluate", *words)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{line}, written to {small / 'm.json'}"
    found = json.loads((small / "m.json").read_text())
    assert found["mAP"] is None
    assert tuple(found["left_out"].values()) == left_out


def test_no_image_of_the_data_set(small):
    label(small)
    ids = pa.array([f"/photos/{i}.jpg" for i in range(5)])
    rewrite_scores(small, lambda table: table.set_column(0, "image_id", ids))
    with pytest.raises(UserError) as caught:
        evaluate(small)
    message = str(caught.value)
    assert "none of its 5 images is in" in message
    assert "'/photos/0.jpg'" in message and "'f'" in message and "\n" not in message


def test_what_was_left_out_is_told(small, cdul):
    table = label(small)
    ids = pa.array(["else", *table["image_id"].to_pylist()[1:]])
    cat = pa.array([*table["cat"].to_pylist()[:4], math.nan], pa.float32())
    table = table.set_column(0, "image_id", ids).set_column(
        table.column_names.index("cat"), "cat", cat
    )
    write_table(table, small / "labels.parquet")
    result = evaluate(small)
    measured = 5 - sum(result["left_out"].values())
    assert result["left_out"]["without_scores"] == result["left_out"]["not_in_images"] == 1
    assert result["images"] == measured and result["mAP"] is not None
    line = conclusion(result)
    assert line.startswith(
        f"mAP {result['mAP']:.2f} on {measured} images (1 without scores, 1 not in the data set"
    )


def test_ids_are_compared_in_one_form(small):
    label(small)
    expected = evaluate(small)["per_class"]
    rewrite_images(
        small,
        lambda table: table.set_column(
            0, "image_id", pa.array([f"caf\u00e9/{i}" for i in table["image_id"].to_pylist()])
        ),
    )
    rewrite_scores(
        small,
        lambda table: table.set_column(
            0, "image_id", pa.array([f".\\cafe\u0301\\{i}" for i in table["image_id"].to_pylist()])
        ),
    )
    assert evaluate(small)["per_class"] == expected


@pytest.mark.parametrize("column", [pa.array(["a"] * 5), pa.array([[1]] * 5), pa.array([1] * 5)])
def test_an_extra_column_is_named(small, column):
    table = label(small).replace_schema_metadata(None)
    rewrite_images(small, lambda t: describe(t, "images", classes=CLASSES))
    write_table(table.append_column("colour", column), small / "labels.parquet")
    with pytest.raises(UserError, match="'colour'"):
        evaluate(small)
    # Columns that cannot be classes, as in predictions saved by pandas, do no harm.
    plain = table.append_column("status", pa.array(["ok"] * 5)).append_column("labels", column)
    write_table(plain, small / "labels.parquet")
    assert list(evaluate(small)["per_class"]) == CLASSES


@pytest.mark.parametrize("index", [3, -1])
def test_truth_beyond_the_classes(small, index):
    label(small)
    positive = pa.array([[index]] * 6, pa.list_(pa.int32()))
    rewrite_images(
        small,
        lambda t: t.set_column(t.column_names.index("positive"), "positive", positive),
    )
    with pytest.raises(UserError, match="beyond the 3 scored"):
        evaluate(small)


def test_quality_measures_each_construction_as_evaluate_does(small):
    label(small)
    result = quality(small, similarity={"train": small / "sim.zarr"})
    assert json.loads((small / "quality.json").read_text()) == result
    assert result["tau"] == pytest.approx(0.05)
    for construction, measures in result["splits"]["train"].items():
        label(small, construction=construction)
        alone = evaluate(small)
        assert measures == {name: alone[name] for name in measures}


# Calibrated labels, hard labels, labels from some views


def quality(folder, **changes):
    arguments = {
        "similarity": dict.fromkeys(("train", "test"), folder / "sim.zarr"),
        "images": folder / "images.parquet",
        "labels": folder / "labels.parquet",
        "difficult": "ignore",
        "ap": "all",
        "output": folder / "quality.json",
    }
    return evaluate_labels(**{**arguments, **changes})


def test_positives_raise_the_labels_of_the_split_and_keep_their_order(small):
    plain = values(label(small))
    raised = values(label(small, positives=2.0))
    facts = read_facts(small / "labels.parquet")
    assert facts["positives"] == 2.0 and facts["bias"] > 0
    assert raised.sum(axis=1).mean() == pytest.approx(2.0, rel=1e-5)
    np.testing.assert_array_equal(np.argsort(raised, axis=0), np.argsort(plain, axis=0))
    odds = plain / (1 - plain) * math.exp(facts["bias"])
    np.testing.assert_allclose(raised, odds / (1 + odds), rtol=1e-4)


def test_raised_labels_of_a_warm_softmax_have_the_sharpness_of_the_model(small):
    plain = values(label(small, tau=3 / 20))
    raised = values(label(small, tau=3 / 20, positives=2.0))
    facts = read_facts(small / "labels.parquet")
    assert facts["slope"] == pytest.approx(3)
    odds = (plain / (1 - plain)) ** 3 * math.exp(facts["bias"])
    np.testing.assert_allclose(raised, odds / (1 + odds), rtol=1e-3)
    assert raised.sum(axis=1).mean() == pytest.approx(2.0, rel=1e-5)
    write_sim(small, classes=CLASSES)
    with pytest.raises(UserError, match="'logit_scale', which positives needs"):
        label(small, tau=3 / 20, positives=2.0)


def test_statistics_are_those_of_the_split(small):
    array = zarr.open_array(small / "sim.zarr", mode="r+")
    array[0] = 0.9  # image a is in the test split
    array[4, 0, 0] = np.nan  # and e has no similarity
    result = values(label(small, standardise=True, tau=0.02))
    cosines = np.delete(array[:].astype(float), 4, axis=0)
    expected = np.empty_like(cosines)
    for kind, part in enumerate((slice(0, 1), slice(1, None))):
        train = cosines[1:, part]
        mean, deviation = train.mean(axis=(0, 1)), train.std(axis=(0, 1))
        expected[:, part] = (cosines[:, part] - mean) / deviation * deviation.mean()
        facts = read_facts(small / "labels.parquet")["statistics"]
        np.testing.assert_allclose(facts["mean"][kind], mean)
        np.testing.assert_allclose(facts["deviation"][kind], deviation)
    np.testing.assert_allclose(
        result, [final_label(expected[row], 0.02, 0.3) for row in (4, 3, 2, 1)], rtol=1e-3
    )


def test_hard_labels(small):
    plain = values(label(small))
    np.testing.assert_array_equal(
        values(label(small, harden={"threshold": 0.4})), plain >= np.float32(0.4)
    )
    hard = values(label(small, harden={"top_k": 2}))
    assert (hard.sum(axis=1) == 2).all()
    assert (np.where(hard, plain, 1).min(axis=1) >= np.where(hard, 0, plain).max(axis=1)).all()
    both = values(label(small, positives=2.0, harden={"threshold": 0.5}))
    np.testing.assert_array_equal(both, values(label(small, positives=2.0)) >= 0.5)


def test_labels_of_one_of_several_grids(small):
    with pytest.raises(UserError, match="leave out the labels' grid"):
        label(small, grid=(1, 2))
    rewrite_images(small, lambda t: describe(t, "images", layout={"grid": [[1, 2], [1, 1]]}))
    cosines = zarr.open_array(small / "sim.zarr", mode="r")[:].astype(float)
    for grid, views in (((1, 2), [0, 1, 2]), ((1, 1), [0, 3]), (None, [0, 1, 2, 3])):
        result = values(label(small, grid=grid, tau=0.02))
        expected = [final_label(cosines[row][views], 0.02, 0.3) for row in (5, 4, 3, 2, 1)]
        np.testing.assert_allclose(result, expected, rtol=1e-4)
        measures = quality(small)["splits"]["train"]["final"]
        assert measures["mAP"] == evaluate(small)["mAP"]
    with pytest.raises(UserError, match="no grid of 2 x 2 snippets, only 1 x 2, 1 x 1"):
        label(small, grid=(2, 2))


def test_a_sum_that_labels_cannot_have(small):
    with pytest.raises(UserError, match="sum to 3"):
        label(small, positives=3.0)


@pytest.mark.parametrize(
    "settings",
    [
        {"positives": 2.0},
        {"standardise": True},
        {"harden": {"top_k": 1}},
        {"harden": {"threshold": 0.4}},
    ],
)
def test_quality_measures_calibrated_labels_too(settings, small):
    settings = {"construction": "local_mean", "lambda_": 1.0, **settings}
    label(small, **settings)
    splits = quality(small)["splits"]
    alone = evaluate(small)
    assert splits["train"]["pseudo_labels"] == {
        name: alone[name] for name in splits["train"]["pseudo_labels"]
    }
    assert list(splits["train"])[:5] == list(splits["test"])[:5] == list(BUILT)
    label(small, construction="local_mean")
    assert "pseudo_labels" not in quality(small)["splits"]["train"]


def test_quality_takes_statistics_bias_and_slope_of_the_train_split_to_the_test_split(tmp_path):
    random, size = np.random.default_rng(0), 60
    columns = {"image_id": [], "split": [], "row": [], "path": [], "positive": []}
    for split in ("train", "test"):
        cosines = random.uniform(0.1, 0.3, (size, 4, 3))
        cosines += np.array([0.1, 0, 0.02 if split == "test" else 0])
        save_store(tmp_path / f"{split}.zarr", cosines, classes=CLASSES, logit_scale=20.0)
        columns["image_id"] += [f"{split}{i}" for i in range(size)]
        columns["split"] += [split] * size
        columns["row"] += list(range(size))
        columns["path"] += ["x.jpg"] * size
        columns["positive"] += [np.flatnonzero(row) for row in random.random((size, 3)) < 0.4]
    write_table(pa.table(columns), tmp_path / "images.parquet")
    settings = {"standardise": True, "positives": 1.3, "tau": 0.1}
    table = label(tmp_path, "train.zarr", **settings)
    facts = read_facts(tmp_path / "labels.parquet")
    splits = quality(tmp_path, similarity={s: tmp_path / f"{s}.zarr" for s in ("train", "test")})[
        "splits"
    ]

    mean, deviation = (np.array(v)[[0, 1, 1, 1]] for v in facts["statistics"].values())
    unit = deviation.mean(axis=1, keepdims=True)
    cosines = zarr.open_array(tmp_path / "test.zarr", mode="r")[:].astype(float)
    y = np.array([final_label((p - mean) / deviation * unit, 0.1, 0.3) for p in cosines])
    odds = (y / (1 - y)) ** 2 * math.exp(facts["bias"])
    table = table.set_column(0, "image_id", pa.array([f"test{i}" for i in range(size)]))
    for c, name in enumerate(CLASSES):
        scores = pa.array(odds[:, c] / (1 + odds[:, c]), pa.float32())
        table = table.set_column(2 + c, name, scores)
    write_table(table, tmp_path / "labels.parquet")
    expected = evaluate(tmp_path)
    found = splits["test"]["pseudo_labels"]
    assert found["images"] == expected["images"] == size
    assert found["mAP"] == pytest.approx(expected["mAP"])
    assert found["at_threshold"] == expected["at_threshold"]
    assert found["mAP"] != splits["test"]["final"]["mAP"]


def add_context(folder: Path, names: int = 8) -> np.ndarray:
    """Add context to the small store; returns its cosines (N, 1+S, C+M)."""
    array = zarr.open_array(folder / "sim.zarr", mode="r")
    further = np.random.default_rng(1).uniform(0.1, 0.3, (*array.shape[:2], names))
    cosines = np.concatenate([array[:], further], axis=2).astype(np.float32)
    attributes = {**array.attrs, "context": [f"context {i}" for i in range(names)]}
    save_store(folder / "sim.zarr", cosines, **attributes)
    return cosines.astype(float)


def test_context_takes_part_and_gets_no_label(small):
    alone = label(small, tau=0.02)
    assert "context_weight" not in read_facts(small / "labels.parquet")
    cosines = add_context(small)
    for weight, counted in ((50, 8), (2, 2)):
        table = label(small, tau=0.02, context_weight=weight)
        assert table.column_names == alone.column_names
        # A name that counts only in part equals one with a smaller score.
        cosines[..., 3:] += 0.02 * math.log(counted / 8)
        expected = [final_label(cosines[row], 0.02, 0.3)[:3] for row in (5, 4, 3, 2, 1)]
        np.testing.assert_allclose(values(table), expected, rtol=1e-4, atol=1e-6)
        facts = read_facts(small / "labels.parquet")
        assert facts["context_weight"] == weight
        assert facts["similarity"]["context"] == [f"context {i}" for i in range(8)]
        found = quality(small)["splits"]["train"]["final"]
        assert found["mAP"] == pytest.approx(evaluate(small)["mAP"])
        assert found["at_threshold"] == evaluate(small)["at_threshold"]
    assert (values(table) < values(alone)).all()


def test_positives_count_classes_only(small):
    add_context(small)
    assert values(label(small, positives=0.1)).sum(axis=1).mean() == pytest.approx(0.1, rel=1e-4)


def test_labels_of_other_context_are_not_made_again(small):
    add_context(small)
    label(small, positives=0.1)
    quality(small)
    save_store(small / "sim.zarr", np.zeros((6, 4, 4)), classes=CLASSES, context=["tree"])
    assert "its context names are not those of the labels" in message_of(quality, small)


def test_one_class_beside_context(small):
    add_context(small)
    array = zarr.open_array(small / "sim.zarr", mode="r")
    attributes = {**array.attrs, "classes": CLASSES[:1]}
    save_store(small / "sim.zarr", np.delete(array[:], [1, 2], axis=2), **attributes)
    rewrite_images(small, lambda table: table.drop_columns(["positive", "difficult"]))
    table = label(small, standardise=True)
    assert table.column_names == ["image_id", "path", "dog"]
    assert len(set(table["dog"].to_pylist())) > 1


def test_without_truth_quality_reads_no_cosines(small):
    rewrite_images(small, lambda table: table.drop_columns(["positive", "difficult"]))
    label(small, positives=2.0)
    (chunk,) = (path for path in (small / "sim.zarr/c").rglob("*") if path.is_file())
    chunk.write_bytes(b"torn")
    splits = quality(small)["splits"]
    assert all(m["mAP"] is None and m["images"] == 0 for m in splits["train"].values())


# What a table records about how it was made


def with_facts(path, **facts):
    write_table(describe(pq.read_table(path), **{**read_facts(path), **facts}), path)


def test_facts_are_read_as_they_were_written(small):
    label(small, standardise=True, positives=2.0, harden={"top_k": 1})
    facts = LabelFacts.read(small / "labels.parquet")
    assert facts.whole and facts.changed and facts.class_statistics.mean.shape == (2, 3)
    images, _, labels = read_scores(small / "labels.parquet")
    facts.write(images, labels, small / "again.parquet")
    again, first = ((small / f"{name}.parquet").read_bytes() for name in ("again", "labels"))
    assert again == first
    written = [read_facts(small / f"{name}.parquet") for name in ("labels", "again")]
    assert written[0] == written[1]
    assert LabelFacts.read(small / "again.parquet") == facts
    assert set(written[0]) == {
        *("kind", "schema_version", "classes", "split", "construction", "tau", "zeta", "lambda"),
        *("grid", "statistics", "positives", "bias", "slope", "threshold", "top_k"),
        *("similarity", "software"),
    }


def test_facts_of_a_table_from_elsewhere(small):
    write_table(label(small).replace_schema_metadata(None), small / "labels.parquet")
    facts = LabelFacts.read(small / "labels.parquet")
    assert facts == LabelFacts(whole=False)
    with pytest.raises(UserError, match=r"labels.parquet: does not record how its labels were"):
        quality(small)


@pytest.mark.parametrize(
    ("key", "value"),
    [("tau", "warm"), ("grid", [3]), ("statistics", [1]), ("similarity", 3), ("lambda", [])],
)
def test_facts_that_are_none(small, key, value):
    label(small)
    with_facts(small / "labels.parquet", **{key: value})
    with pytest.raises(UserError, match=f"labels.parquet: its value of '{key}.* is not valid"):
        LabelFacts.read(small / "labels.parquet")


def test_quality_takes_the_settings_of_the_labels(small):
    label(small, tau=0.02, zeta=0.5, lambda_=1.0)
    found = quality(small)
    assert (found["tau"], found["zeta"], found["lambda"]) == (0.02, 0.5, 1.0)
    assert found["splits"]["train"]["final"]["mAP"] == evaluate(small)["mAP"]


# Sigmoid

BIAS = -4.0


def add_bias(folder: Path, bias: float = BIAS) -> np.ndarray:
    """Give the small store a model with a bias; returns its cosines."""
    array = zarr.open_array(folder / "sim.zarr", mode="r")
    save_store(folder / "sim.zarr", array[:], **array.attrs, logit_bias=bias)
    return array[:].astype(float)


def sigmoid_label(p, tau, zeta=0.3):
    """The pseudo-label of one image from its cosines (1+S, C), each class separately."""
    s = 1 / (1 + np.exp(-(p / tau + BIAS)))
    alpha, beta = s[1:].max(axis=0), s[1:].min(axis=0)
    return (s[0] + np.where(alpha >= zeta, alpha, beta)) / 2


def test_a_model_with_a_bias_scores_by_a_sigmoid(small, capsys):
    by_softmax = label(small)
    assert "(final, softmax, tau 0.05)" in capsys.readouterr().err
    cosines = add_bias(small)
    table = label(small)
    assert "(final, sigmoid, tau 0.05)" in capsys.readouterr().err
    expected = [sigmoid_label(cosines[row], 1 / 20) for row in (5, 4, 3, 2, 1)]
    np.testing.assert_allclose(values(table), expected, rtol=1e-4)
    assert table.equals(label(small, scores="sigmoid"))
    warm = [sigmoid_label(cosines[row], 0.1) for row in (5, 4, 3, 2, 1)]
    np.testing.assert_allclose(values(label(small, tau=0.1)), warm, rtol=1e-4)
    assert read_facts(small / "labels.parquet")["logit_bias"] == BIAS

    np.testing.assert_array_equal(values(label(small, scores="softmax")), values(by_softmax))
    assert "logit_bias" not in read_facts(small / "labels.parquet")
    label(small, scores="softmax", standardise=True)


@pytest.mark.parametrize("settings", [{}, {"positives": 1.3, "tau": 0.1}, {"scores": "softmax"}])
def test_quality_scores_as_the_labels_were(small, settings):
    add_bias(small)
    label(small, **settings)
    found = quality(small)
    own = found["splits"]["train"]["pseudo_labels" if "positives" in settings else "final"]
    assert own["mAP"] == pytest.approx(evaluate(small)["mAP"])
    assert own["at_threshold"] == evaluate(small)["at_threshold"]
    assert found.get("logit_bias") == (None if "scores" in settings else BIAS)


def test_labels_by_a_sigmoid_are_made_again_on_another_split(small):
    cosines = add_bias(small)
    label(small, positives=1.3, tau=0.1)
    facts, array = LabelFacts.read(small / "labels.parquet"), open_store(small / "sim.zarr")
    found = labels_like(facts, small / "sim.zarr", array, small / "images.parquet", np.array([0]))
    y = sigmoid_label(cosines[0], 0.1)
    odds = (y / (1 - y)) ** facts.slope * math.exp(facts.bias)
    np.testing.assert_allclose(found[0], odds / (1 + odds), rtol=1e-4)
    assert facts.slope == 2


def test_labels_of_an_older_release_are_by_a_softmax(small):
    label(small, positives=1.3)
    facts = read_facts(small / "labels.parquet")
    add_bias(small)
    assert "logit_bias" not in facts
    own = quality(small)["splits"]["train"]["pseudo_labels"]
    assert own["at_threshold"] == evaluate(small)["at_threshold"]


def test_context_takes_no_part_in_a_sigmoid(small, capsys):
    add_bias(small)
    alone = label(small, positives=1.3)
    add_context(small)
    told = "label: each class has its own sigmoid, so the context names are not used"
    assert told not in capsys.readouterr().err
    assert label(small, positives=1.3).equals(alone)
    assert told in capsys.readouterr().err
    assert "context_weight" not in read_facts(small / "labels.parquet")
    own = quality(small)["splits"]["train"]["pseudo_labels"]
    assert own["at_threshold"] == evaluate(small)["at_threshold"]


def test_a_sigmoid_needs_a_bias_and_the_class_means(small):
    message = message_of(lambda: label(small, scores="sigmoid"))
    assert "sim.zarr: the model has no logit_bias, which 'scores: sigmoid'" in message
    add_bias(small)
    message = message_of(lambda: label(small, standardise=True))
    assert "sim.zarr: 'standardise' removes each class's mean" in message
    assert "'scores: softmax'" in message


@pytest.mark.parametrize("bias", ["-10", [-10.0], "NaN"])
def test_a_bias_that_is_no_number(small, bias):
    add_bias(small, bias)
    assert f"sim.zarr: its logit_bias is {bias!r}" in message_of(label, small)


# One line per error


def write_sim(small, **attributes):
    save_store(small / "sim.zarr", np.zeros((6, 4, 3)), **attributes)


MISTAKES = {
    "split": (
        lambda small: None,
        ["--split", "val"],
        "no image of split 'val'; it has train, test",
    ),
    "classes": (lambda small: write_sim(small, logit_scale=9), [], "attribute 'classes'"),
    "scale": (lambda small: write_sim(small, classes=CLASSES), [], "'logit_scale'; set 'tau'"),
    "row": (
        lambda small: rewrite_images(
            small, lambda t: t.set_column(2, "row", [[0, 1, 2, 3, 99, 4]])
        ),
        [],
        "row 99 of split 'train' is beyond the 6 rows",
    ),
    "negative row": (
        lambda small: rewrite_images(
            small, lambda t: t.set_column(2, "row", [[0, 1, 2, 3, -7, 4]])
        ),
        [],
        "row -7 of split 'train'",
    ),
    "no store": (
        lambda small: None,
        ["--similarity", "/none.zarr"],
        "/none.zarr: not a Zarr array",
    ),
    "no images": (lambda small: None, ["--images", "/none.parquet"], "/none.parquet: no such file"),
    "no column": (
        lambda small: rewrite_images(small, lambda table: table.drop_columns("row")),
        [],
        "no column 'row'",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_line(mistake, small, cdul):
    prepare, options, part = MISTAKES[mistake]
    prepare(small)
    required = {
        "--similarity": small / "sim.zarr",
        "--images": small / "images.parquet",
        "--split": "train",
        "--output": small / "labels.parquet",
    }
    required.update(zip(options[::2], options[1::2], strict=True))
    done = cdul("label", *(word for pair in required.items() for word in pair))
    assert done.returncode == 1
    line = done.stderr.splitlines()[-1]
    assert line.startswith("cdul: error: ")
    assert part in line
    assert "Traceback" not in done.stderr
    assert not (small / "labels.parquet").exists()
