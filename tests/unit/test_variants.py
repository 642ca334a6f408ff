"""The table of an ablation, and the comparison of its variants."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from messages import message_of
from sklearn.metrics import average_precision_score

from cdul_steps.config import Ablation, Training
from cdul_steps.data.tables import describe, score_table, write_table
from cdul_steps.steps.ablation import compare_variants
from cdul_steps.tools.doctor import read_config
from cdul_steps.variants import read_rows, read_variants

ROOT = Path(__file__).parents[2]
BASE = {"base": Training(epochs=7), "other": Training()}


def variants(folder, text, suffix="csv", **settings):
    path = folder / f"table.{suffix}"
    path.write_text(text)
    ablation = Ablation(**{"training": "base", "table": str(path), "seeds": [1, 2], **settings})
    return read_variants(ablation, BASE, ["final", "local"], default="final")


def test_every_row_with_every_seed(tmp_path):
    text = "# A comment.\nvariant,loss,alignment.sigma,alignment.enabled\na,bce,0.1,\nb,,,false\n"
    found = variants(tmp_path, text)
    assert [(v.name, v.settings.seed) for v in found] == [("a", 1), ("a", 2), ("b", 1), ("b", 2)]
    expected = Training(epochs=7, seed=1, loss="bce", alignment={"sigma": 0.1})
    assert found[0].settings == expected
    assert found[3].settings == Training(epochs=7, seed=2, alignment={"enabled": False})
    assert {v.labels for v in found} == {"final"}


def variants_of(overlays: str, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("CDUL_TEST_DATA", "/nowhere")
    config = read_config([Path(overlay) for overlay in overlays.split()])
    default = config.ablated.labels[0]
    return config, read_variants(config.ablation, config.trainings, config.labels, default=default)


PAPER = [f"config/{name}.yaml" for name in ("voc2007", "voc2012", "coco2014", "nuswide")]


PHOTOS = "experiments/voc2007.yaml"


@pytest.mark.parametrize(
    "overlays",
    ["", "experiments/constructions.yaml", PHOTOS, f"{PHOTOS} experiments/grids.yaml", *PAPER],
)
def test_no_two_rows_of_a_table_here_are_the_same_training(overlays, monkeypatch):
    config, found = variants_of(overlays, monkeypatch)
    made = {
        (config.labels[v.labels].model_dump_json(), v.settings.model_dump_json()) for v in found
    }
    assert len(made) == len(found)


@pytest.mark.parametrize("overlay", PAPER)
def test_rows_say_the_same_of_the_paper_s_training_and_of_the_demo_s(overlay, monkeypatch):
    _, demo = variants_of("", monkeypatch)
    config, paper = variants_of(overlay, monkeypatch)
    assert config.ablation.training == Path(overlay).stem
    for ours, theirs in zip(demo, paper, strict=True):
        assert (ours.settings.loss, ours.settings.positives) == (
            theirs.settings.loss,
            theirs.settings.positives,
        )
        if ours.settings.alignment.enabled:
            assert ours.settings.alignment == theirs.settings.alignment


def test_labels_and_seed_of_a_row(tmp_path):
    found = variants(tmp_path, "variant\tlabels\tseed\na\tlocal\t9\nb\n", "tsv")
    assert [(v.name, v.labels, v.settings.seed) for v in found] == [
        ("a", "local", 9),
        ("b", "final", 1),
        ("b", "final", 2),
    ]


def test_arguments_of_the_model_have_types(tmp_path):
    text = "variant,model_args.zero_init_last,model_args.drop_rate,model_args.act_layer\n"
    found = variants(tmp_path, text + "a,false,0.3,silu\nb,,,\n")
    expected = {"zero_init_last": False, "drop_rate": 0.3, "act_layer": "silu"}
    assert [v.settings.model_args for v in found] == [expected] * 2 + [{}] * 2


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("loss\nkl\n", "needs a column 'variant'"),
        ("variant,loss\n", "needs a column 'variant' and one row"),
        ("", "not a readable table"),
        ("variant,loss\na,kl\nb,kl,1\n", "not a readable table"),
        ("variant,loss\na,kl,1\n", "more cells than its first line"),
        ("variant\na\na\n", "'a' occurs twice"),
        ("variant\na/b\n", "'a/b' is not a usable variant name"),
        ("variant,loss\n,kl\n", "'' is not a usable variant name"),
        ("variant,against\nfixed,\na,fxed\n", "'against' names 'fxed'; did you mean 'fixed'?"),
        ("variant,labels\na,fnal\n", "a: 'labels' names 'fnal'; did you mean 'final'?"),
        ("variant,alignment.sgma\na,1\n", "unknown key 'trainings.a.alignment.sgma'"),
        ("variant,loss\na,mse\n", "'trainings.a.loss' is 'mse'"),
        ("variant,loss.x\na,1\n", "'trainings.a.loss' is"),
        ("variant,seed\na,one\n", "'trainings.a.seed' is 'one'"),
        ("variant,seed\na,5000000000\n", "'trainings.a.seed' is"),
        ("variant,model_args.x\na,{\n", "a: model_args.x: "),
        ("variant,loss\na,role\n", "trainings.a: loss 'role' learns from fixed hard positives"),
    ],
)
def test_mistakes_name_the_table(tmp_path, text, part):
    message = message_of(variants, tmp_path, text)
    assert str(tmp_path / "table.csv") in message
    assert part in message


def test_no_table_and_no_training(tmp_path):
    message = message_of(read_rows, tmp_path / "none.csv")
    assert message == f"ablation.table: {tmp_path}/none.csv: no such file"
    ablation = Ablation(training="bse")
    message = message_of(read_variants, ablation, BASE, ["final"], "final")
    assert message.endswith("not under 'trainings'; did you mean 'base'?")


TRUTH = [[0], [1], [0, 1], [1]]


@pytest.fixture
def trained(tmp_path):
    """The trainings of two variants with two seeds each, but one is missing."""
    ids, paths = pa.array(list("abcd")), pa.array(["x.png"] * 4)
    images = pa.table({"image_id": ids, "positive": pa.array(TRUTH, pa.list_(pa.int32()))})
    write_table(images, tmp_path / "images.parquet")
    (tmp_path / "table.csv").write_text("variant,against,loss\nfixed,,\nother,fixed,bce\n")
    random = np.random.default_rng(0)

    def scores(path, **facts):
        path.parent.mkdir(parents=True, exist_ok=True)
        values = random.random((4, 2)).astype(np.float32)
        table = score_table(ids, paths, ["dog", "cat"], values)
        write_table(describe(table, "scores", classes=["dog", "cat"], **facts), path)
        return values

    before = scores(tmp_path / "final/pseudo_labels.parquet")
    trainings, after = [], []
    for i, (name, seed) in enumerate((n, s) for n in ("fixed", "other") for s in (4, 5)):
        folder = tmp_path / f"final/ablation/{name}/{seed}"
        settings = Training(seed=seed, loss="bce" if name == "other" else "kl").model_dump()
        after.append(scores(folder / "refined_labels.parquet", training=settings))
        metrics = {"mAP": [50.0, 60.0, 51.0, 63.0][i], "scores": "predictions/test.parquet"}
        (folder / "metrics.json").write_text(json.dumps(metrics))
        trainings.append((name, folder))
    return tmp_path, trainings, before, after


def compare(folder, trainings):
    compare_variants(
        table=folder / "table.csv",
        trainings=trainings,
        images=folder / "images.parquet",
        difficult="ignore",
        ap="all",
        output=folder / "ablation",
    )
    rows = pq.read_table(folder / "ablation/ablation.parquet").to_pandas()
    return rows, (folder / "ablation/ablation.md").read_text()


def mean_ap(scores):
    truth = np.array([[c in row for c in (0, 1)] for row in TRUTH])
    return 100 * np.mean([average_precision_score(truth[:, c], scores[:, c]) for c in (0, 1)])


def test_comparison(trained):
    folder, trainings, before, after = trained
    rows, text = compare(folder, trainings)
    assert rows["variant"].tolist() == ["fixed", "fixed", "other", "other"]
    assert rows["seed"].tolist() == [4, 5, 4, 5]
    assert rows["loss"].tolist() == ["kl", "kl", "bce", "bce"]
    assert set(rows["labels"]) == {"final"} and set(rows["split"]) == {"test"}
    np.testing.assert_allclose(rows["label_mAP_before"], mean_ap(before))
    np.testing.assert_allclose(rows["label_mAP_after"], [mean_ap(values) for values in after])
    np.testing.assert_allclose(rows["gain"], [np.nan, np.nan, 1, 3])
    last = text.splitlines()[-1].strip("| ").split(" | ")
    both = [mean_ap(values) for values in after[2:]]
    assert last == [
        "other",
        "final",
        "2",
        f"57.00 ± {np.std([51, 63], ddof=1):.2f} (test)",
        f"+2.00 ± {np.std([1, 3], ddof=1):.2f} over fixed",
        f"{mean_ap(before):.2f} ± 0.00",
        f"{np.mean(both):.2f} ± {np.std(both, ddof=1):.2f}",
    ]


def test_comparison_of_one_seed_and_without_truth(trained):
    folder, trainings, _, _ = trained
    for _, path in trainings:
        metrics = json.loads((path / "metrics.json").read_text())
        (path / "metrics.json").write_text(json.dumps({**metrics, "mAP": None}))
    images = pq.read_table(folder / "images.parquet").drop_columns("positive")
    write_table(images, folder / "images.parquet")
    rows, text = compare(folder, trainings[1:3])
    assert rows["classifier_mAP"].isna().all() and rows["gain"].isna().all()
    assert text.splitlines()[-1] == "| other | final | 1 | - (test) | - over fixed | - | - |"
    assert pd.api.types.is_float_dtype(rows["classifier_mAP"])


def test_trainings_that_do_not_fit(trained):
    folder, trainings, _, _ = trained
    assert "no variant 'x'" in message_of(compare, folder, [("x", trainings[0][1])])
    (folder / "final/pseudo_labels.parquet").unlink()
    assert "no pseudo_labels.parquet" in message_of(compare, folder, trainings)
