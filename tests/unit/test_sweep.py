from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zarr

from cdul_steps.config import Labels, Sweep
from cdul_steps.data.tables import describe, read_facts, write_table
from cdul_steps.data.truth import measure_table
from cdul_steps.errors import UserError
from cdul_steps.steps.evaluate import evaluate_labels
from cdul_steps.steps.label import make_labels
from cdul_steps.steps.sweep import draw, sweep_labels

CLASSES = ["dog", "cat", "owl"]
SIZES = {"train": 30, "test": 20}
SETTINGS = Sweep(tau=[0.5, 2], zeta=[0, 0.4, 1], lambda_=[-1, 0, 0.5])


@pytest.fixture
def folder(tmp_path):
    """Two splits with rows out of order, some difficult, some without truth or cosines."""
    random = np.random.default_rng(0)
    tables = []
    for split, size in SIZES.items():
        cosines = random.uniform(0.1, 0.3, (size, 5, 3)).astype(np.float32)
        cosines[3] = np.nan
        array = zarr.create_array(tmp_path / f"{split}.zarr", data=cosines)
        array.attrs.update(classes=CLASSES, logit_scale=20.0)
        positive = [np.flatnonzero(row) for row in random.random((size, 3)) < 0.4]
        positive[5] = None
        difficult = [[2] if truth is not None and 2 not in truth else [] for truth in positive]
        tables.append(
            pa.table(
                {
                    "image_id": [f"{split}{i}" for i in range(size)],
                    "split": [split] * size,
                    "row": random.permutation(size),
                    "path": ["x.jpg"] * size,
                    "positive": pa.array(positive, pa.list_(pa.int32())),
                    "difficult": pa.array(difficult, pa.list_(pa.int32())),
                }
            )
        )
    write_table(pa.concat_tables(tables), tmp_path / "images.parquet")
    return tmp_path


def sweep(folder, **changes):
    arguments = {
        "similarity": {split: folder / f"{split}.zarr" for split in SIZES},
        "images": folder / "images.parquet",
        "settings": SETTINGS,
        "difficult": "negative",
        "ap": "all",
        "threads": 2,
        "output": folder / "sweep.parquet",
        "figure": None,
    }
    sweep_labels(**{**arguments, **changes})
    return pq.read_table(folder / "sweep.parquet").to_pylist()


def test_a_row_a_split_and_setting(folder):
    rows = sweep(folder)
    assert len(rows) == len(SIZES) * 2 * 2 * (3 + 3 + 3 * 3)
    for row in rows:
        assert row["tau"] == pytest.approx(row["tau_multiple"] / 20)
        assert (row["zeta"] is None) == (row["construction"] not in ("aggregate", "final"))
        assert (row["lambda"] is None) == (row["construction"] != "final")
        assert row["images"] == SIZES[row["split"]] - 2
    keys = ("split", "construction", "standardise", "tau", "zeta", "lambda")
    assert len({tuple(row[key] for key in keys) for row in rows}) == len(rows)
    facts = read_facts(folder / "sweep.parquet")
    assert facts["difficult"] == "negative" and facts["settings"]["lambda"] == [-1, 0, 0.5]


def labels_of(row: dict, folder: Path) -> Path:
    """The labels of the train split with the settings of a row."""
    make_labels(
        similarity=folder / "train.zarr",
        images=folder / "images.parquet",
        split="train",
        settings=Labels(
            construction=row["construction"],
            standardise=row["standardise"],
            tau=row["tau"],
            zeta=row["zeta"] or 0.0,
            lambda_=row["lambda"] or 0.0,
        ),
        output=folder / "labels.parquet",
    )
    return folder / "labels.parquet"


@pytest.mark.parametrize("difficult", ["negative", "ignore"])
def test_rows_of_the_train_split_are_what_label_and_evaluate_give(difficult, folder):
    images = folder / "images.parquet"
    for row in sweep(folder, difficult=difficult):
        if row["split"] == "train":
            labels = labels_of(row, folder)
            result = measure_table(labels, images, difficult, "all")
            assert row["mAP"] == pytest.approx(result["mAP"], rel=1e-9)
            table = pq.read_table(labels)
            known = [i for i, name in enumerate(table["image_id"]) if name.as_py() != "train5"]
            total = sum(table[name].to_numpy()[known].sum() for name in CLASSES)
            assert row["positives"] == pytest.approx(total / len(known), rel=1e-5)


def test_rows_of_the_test_split_are_what_quality_gives(folder):
    images = folder / "images.parquet"
    for row in sweep(folder, settings=Sweep(tau=[2], zeta=[0.4], lambda_=[0.5])):
        if row["split"] == "test":
            labels = labels_of(row, folder)
            result = evaluate_labels(
                similarity={"test": folder / "test.zarr"},
                images=images,
                labels=labels,
                difficult="negative",
                ap="all",
                output=folder / "quality.json",
            )
            name = "pseudo_labels" if row["standardise"] else row["construction"]
            assert row["mAP"] == pytest.approx(result["splits"]["test"][name]["mAP"], rel=1e-9)


def test_context_is_in_the_sweep_as_in_the_labels(folder):
    for split in SIZES:
        array = zarr.open_array(folder / f"{split}.zarr", mode="a")
        cosines, attributes = array[:], dict(array.attrs)
        context = np.roll(cosines, 1, axis=2)[..., :2]
        array = zarr.create_array(
            folder / f"{split}.zarr",
            data=np.concatenate([cosines, context], axis=2),
            overwrite=True,
        )
        array.attrs.update(attributes | {"context": ["tree", "river"]})
    test_rows_of_the_train_split_are_what_label_and_evaluate_give("negative", folder)


def test_an_image_without_one_of_its_views_counts_for_nothing(folder):
    whole = {row["images"] for row in sweep(folder) if row["split"] == "train"}
    zarr.open(folder / "train.zarr")[7, 2] = np.nan
    rows = [row for row in sweep(folder) if row["split"] == "train"]
    assert {row["images"] + 1 for row in rows} == whole
    result = evaluate_labels(
        similarity={"train": folder / "train.zarr"},
        images=folder / "images.parquet",
        labels=labels_of(rows[0], folder),
        difficult="negative",
        ap="all",
        output=folder / "quality.json",
    )
    assert {found["images"] + 1 for found in result["splits"]["train"].values()} == whole


def test_a_store_of_another_data_set(folder):
    table = pq.read_table(folder / "images.parquet")
    rows = {"train": 31, "test": 20}
    write_table(describe(table, "images", rows=rows), folder / "images.parquet")
    with pytest.raises(UserError, match=r"30 rows and .* gives split 'train' 31"):
        sweep(folder)


def test_the_kind_of_ap_is_heeded(folder):
    points = [row["mAP"] for row in sweep(folder, ap="voc07")]
    assert points != [row["mAP"] for row in sweep(folder)]


def without_truth(folder, split):
    table = pq.read_table(folder / "images.parquet")
    known = pa.array([name != split for name in table["split"].to_pylist()])
    write_table(table.append_column("known", known), folder / "images.parquet")


def test_a_split_without_truth_is_left_out(folder, capsys):
    without_truth(folder, "test")
    assert {row["split"] for row in sweep(folder)} == {"train"}
    assert "test: no image has known truth" in capsys.readouterr().err


def test_without_any_truth_there_is_one_line(folder):
    with pytest.raises(UserError, match="no image has known truth, so there is nothing to sweep"):
        without_truth(folder, "train")
        sweep(folder, similarity={"train": folder / "train.zarr"})
    assert not (folder / "sweep.parquet").exists()


def test_scores_of_a_model_with_a_bias_are_sigmoids(folder, capsys):
    by_softmax = sweep(folder)
    for split in SIZES:
        zarr.open_array(folder / f"{split}.zarr").attrs["logit_bias"] = -4.0
    rows = sweep(folder)
    assert "cosines are not standardised" in capsys.readouterr().err
    assert {row["standardise"] for row in rows} == {False}
    assert [r["mAP"] for r in rows] != [r["mAP"] for r in by_softmax if not r["standardise"]]
    test_rows_of_the_train_split_are_what_label_and_evaluate_give("negative", folder)


def test_a_store_without_scale_is_told_what_the_sweep_needs(folder):
    for split in SIZES:
        del zarr.open_array(folder / f"{split}.zarr").attrs["logit_scale"]
    with pytest.raises(UserError, match="'logit_scale'; the sweep's taus are multiples of 1 /"):
        sweep(folder)


def test_standardising_needs_the_train_split(folder):
    test = {"test": folder / "test.zarr"}
    with pytest.raises(UserError, match="split 'train'"):
        sweep(folder, similarity=test)
    assert sweep(folder, similarity=test, settings=Sweep(standardise=[False]))


@pytest.mark.parametrize(
    "settings",
    [SETTINGS, Sweep(tau=[1], constructions=["global"]), Sweep(standardise=[True], zeta=[0.5])],
    ids=["all", "global", "standardised"],
)
def test_the_figure_has_every_line(settings, folder):
    rows = sweep(folder, settings=settings, figure=folder / "sweep.svg")
    assert (folder / "sweep.svg").read_text().lstrip().startswith("<?xml")
    panels = draw(rows).axes
    assert len(panels) == 2 * len(settings.standardise)
    finals = len(settings.zeta) if "final" in settings.constructions else 0
    single = {"global", "local_mean", "local_max"} & set(settings.constructions)
    for panel in panels:
        labels = [line.get_label() for line in panel.get_lines()]
        assert len([x for x in labels if not x.startswith("_")]) == finals + len(single)
