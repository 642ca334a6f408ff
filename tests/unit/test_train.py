"""Stage train: its files, and that they are the same after any interruption."""

import json
import multiprocessing
import os
import re
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from messages import message_of
from PIL import Image
from safetensors.torch import load_file
from training_runs import (
    CLASSES,
    COLUMNS,
    OFF,
    SETTINGS,
    VARIANTS,
    corrected_labels,
    fails,
    history,
    interrupt,
    make_data,
    manifest,
    refined,
    run,
    same,
    write_labels,
)

from cdul_steps.config import Training
from cdul_steps.data.corrections import UNKNOWN, corrected_entries
from cdul_steps.data.tables import read_facts, read_scores, write_table
from cdul_steps.method.loss_functions import EPSILON
from cdul_steps.models.classifier import Card, load_classifier, new_classifier
from cdul_steps.steps import train
from cdul_steps.training.labels import new_labels
from cdul_steps.training.loader import TrainImages, batches
from cdul_steps.training.trainer import _learning_rate


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("data") / "data")


@pytest.fixture(scope="module")
def done(data, tmp_path_factory) -> Path:
    """An undisturbed training."""
    return run(data, tmp_path_factory.mktemp("done"))


def test_outputs(data, done):
    assert sorted(p.name for p in done.iterdir()) == [
        "history.parquet",
        "model",
        "refined_labels.parquet",
    ]
    table = history(done)
    assert list(table.columns) == COLUMNS
    assert table["epoch"].tolist() == [1, 2, 3, 4]
    assert table["loss"].iloc[-1] < table["loss"].iloc[0]
    assert (table["images_per_second"] > 0).all()
    for name in ("train_mAP", "label_mAP", "test_mAP"):
        assert table[name].between(0, 100).all()
    images, classes, labels = read_scores(done / "refined_labels.parquet")
    source = pq.read_table(data / "labels.parquet")
    assert classes == CLASSES
    assert images["image_id"].to_pylist() == source["image_id"].to_pylist()
    assert ((labels >= EPSILON * 0.99) & (labels <= 1 - EPSILON * 0.99)).all()
    assert read_facts(done / "refined_labels.parquet")["training"]["model"] == "test_resnet"
    card = json.loads((done / "model/model.json").read_text())
    assert (card["classes"], card["image_size"]) == (CLASSES, 32)
    assert card["provenance"]["labels"]["digest"]


def test_labels_move_after_the_warm_up(done):
    movement = history(done)["label_movement"]
    assert movement[0] == 0
    assert (movement[1:] > 0).all()


def test_labels_move_every_so_often(data, tmp_path):
    run(data, tmp_path, epochs=5, alignment={"warmup": 1, "every": 2})
    assert (history(tmp_path)["label_movement"] > 0).tolist() == [False, True, False, True, False]


def test_a_warm_up_without_end_is_told(data, tmp_path, capsys):
    run(data, tmp_path / "never", epochs=1, alignment={"warmup": 1})
    assert "the labels will not change: alignment.warmup (1)" in capsys.readouterr().err
    run(data, tmp_path / "last", epochs=1, alignment={"warmup": 0})
    run(data, tmp_path / "fixed", epochs=1, alignment={"enabled": False, "warmup": 1})
    assert "will not change" not in capsys.readouterr().err


def test_labels_stay_without_alignment(data, done, tmp_path):
    run(data, tmp_path, alignment={"enabled": False})
    assert (history(tmp_path)["label_movement"] == 0).all()
    given = read_scores(data / "labels.parquet")[2]
    kept = np.clip(given, EPSILON, 1 - EPSILON)
    np.testing.assert_allclose(refined(tmp_path), kept, atol=1e-6)
    assert np.abs(refined(done) - kept).max() > 1e-3


def test_corrected_labels_stay_while_the_others_move(data, tmp_path):
    values = [1.0, 0.0, UNKNOWN]
    labels = corrected_labels(
        data,
        tmp_path / "labels.parquet",
        lambda ids: {(ids[i], CLASSES[i % 3]): values[i % 2 + (i > 5)] for i in range(9)},
    )
    run(data, tmp_path, **labels)
    _, _, given = read_scores(tmp_path / "labels.parquet")
    table, _, after = read_scores(tmp_path / "refined_labels.parquet")
    corrected = corrected_entries(table, CLASSES)
    assert corrected.sum() == 9 and set(given[corrected]) == set(values)
    np.testing.assert_allclose(after[corrected], given[corrected], atol=1.1 * EPSILON)
    assert (np.abs(after - np.clip(given, EPSILON, 1 - EPSILON))[~corrected] > 1e-6).all()


@pytest.mark.parametrize("variant", ["kl", *VARIANTS])
def test_a_classifier_names_as_much_as_soft_labels_do(data, tmp_path, variant, capsys):
    settings = VARIANTS.get(variant, {})
    run(data, tmp_path, **settings)
    log = capsys.readouterr().err
    if settings.get("positives") or variant == "kl_classes":
        assert "predicts as many classes" not in log
        return
    slope, bias = map(
        float,
        re.search(
            r"logits times (\S+), (\S+)\), so that it predicts as many classes", log
        ).groups(),
    )
    assert slope > 0 and abs(slope - 1) + abs(bias) > 1e-2
    network, card = load_classifier(tmp_path / "model", torch.device("cpu"))
    table, _, labels = read_scores(tmp_path / "refined_labels.parquet")
    images = [card.resize(Image.open(path)) for path in table["path"].to_pylist()]
    with torch.inference_mode():
        logits = network(card.normalize(torch.from_numpy(np.stack(images))))
    named = int((card.probabilities(logits) >= 0.5).sum())
    assert abs(named - int((labels >= 0.5).sum())) <= 1


@pytest.mark.parametrize("variant", ["kl", *VARIANTS])
def test_nothing_is_learnt_from_what_nobody_could_decide(data, tmp_path, variant):
    labels = corrected_labels(
        data, tmp_path / "labels.parquet", lambda ids: {(i, "blue"): UNKNOWN for i in ids}
    )
    run(data, tmp_path, **VARIANTS.get(variant, {}), model_args={}, **labels)
    learnt = load_file(tmp_path / "model/model.safetensors")
    # A head starts with weights 0 and the classes' mean labels, here 0.5 for the last.
    assert not learnt["fc.weight"][2].any() and learnt["fc.weight"][:2].any(dim=1).all()
    if VARIANTS.get(variant, {}).get("positives"):  # with soft labels, all classes have one offset
        assert learnt["fc.bias"][2] == 0
    assert (refined(tmp_path)[:, 2] == UNKNOWN).all()


@pytest.mark.parametrize("loss", ["bce", "role"])
def test_what_nobody_could_decide_is_not_the_one_positive(loss):
    labels, corrected = torch.tensor([[0.3, 0.5, 0.1]]), torch.tensor([[False, True, False]])
    settings = Training(loss=loss, positives="top1", alignment=OFF)
    found = new_labels(labels, corrected, settings).labels
    assert found[0, 0] > 0.9 and found[0, 1] == UNKNOWN


def test_same_seed_same_result(data, done, tmp_path):
    assert same(run(data, tmp_path / "a"), done)
    assert not same(run(data, tmp_path / "b", seed=1), done)


def test_number_of_workers_does_not_matter(data, done, tmp_path):
    assert same(run(data, tmp_path, workers=2), done)


def test_truth_never_touches_learning(done, tmp_path):
    other = make_data(tmp_path / "data")
    table = pd.read_csv(other / "data.csv")
    table[CLASSES] = 1 - table[CLASSES]
    labels = (other / "labels.parquet").read_bytes()
    table.to_csv(other / "data.csv", index=False)
    manifest(other)
    assert (other / "labels.parquet").read_bytes() == labels
    plain = make_data(tmp_path / "plain")
    first, second = run(other, tmp_path / "a"), run(plain, tmp_path / "b")
    assert same(first, second)
    assert history(first)["test_mAP"].tolist() != history(second)["test_mAP"].tolist()


def test_without_test_split_and_without_truth(data, done, tmp_path):
    shutil.copytree(data, tmp_path / "data")
    table = pd.read_csv(tmp_path / "data/data.csv").drop(columns=CLASSES)
    table[table["split"] == "a"].to_csv(tmp_path / "data/data.csv", index=False)
    (tmp_path / "data/images.parquet").unlink()
    manifest(tmp_path / "data", test=False)
    shutil.copy(data / "labels.parquet", tmp_path / "data")
    output = run(tmp_path / "data", tmp_path / "output")
    assert same(output, done)
    found = history(output)
    assert list(found.columns) == COLUMNS
    assert found[["train_mAP", "label_mAP", "test_mAP"]].isna().all(axis=None)


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_is_the_same(data, done, tmp_path, monkeypatch, capsys, workers):
    interrupt(monkeypatch, data, tmp_path, workers=workers)
    run(data, tmp_path, workers=workers)
    assert "resuming after epoch 2 of 4" in capsys.readouterr().err
    assert same(tmp_path, done)
    columns = [c for c in COLUMNS if c != "images_per_second"]
    assert history(tmp_path)[columns].equals(history(done)[columns])
    assert not (tmp_path / "checkpoint.pt").exists()


@pytest.mark.parametrize("variant", [*VARIANTS, "role sgd"])
def test_every_variant_learns_and_resumes(data, tmp_path, monkeypatch, variant):
    name, _, optimizer = variant.partition(" ")
    settings = {**VARIANTS[name], "optimizer": optimizer or "adamw"}
    undisturbed = run(data, tmp_path / "undisturbed", **settings)
    interrupt(monkeypatch, data, tmp_path / "resumed", **settings)
    run(data, tmp_path / "resumed", **settings)
    assert same(tmp_path / "resumed", undisturbed)
    table = history(undisturbed)
    assert table["loss"].iloc[-1] < table["loss"].iloc[0]
    moves = name == "role" or VARIANTS[name].get("alignment") != OFF
    assert (table["label_movement"].iloc[1:] > 0).tolist() == [moves] * 3


@pytest.mark.parametrize(("variant", "ends"), [("an", (0, 1)), ("ls", (0.1, 0.9))])
def test_refined_labels_of_hard_variants(data, tmp_path, variant, ends):
    run(data, tmp_path, **VARIANTS[variant], epochs=1)
    given = read_scores(data / "labels.parquet")[2]
    best = given == given.max(axis=1, keepdims=True)
    np.testing.assert_allclose(refined(tmp_path), np.where(best, *ends[::-1]), atol=2e-6)


def test_refined_labels_of_role_are_its_estimates(data, tmp_path):
    """They stay high for observed positives; the others are learnt from the network."""
    settings = {**VARIANTS["role"], "role": {"learning_rate_scale": 100.0}, "seed": 1}
    run(data, tmp_path, **settings, epochs=30, expected_positives=1.5)
    given = read_scores(data / "labels.parquet")[2]
    best = given == given.max(axis=1, keepdims=True)
    labels = refined(tmp_path)
    assert labels[best].min() > 0.8
    assert np.abs(labels[~best] - 0.5).max() > 0.15
    assert labels.sum(axis=1).mean() == pytest.approx(1.5, abs=0.4)


def test_softmax_of_the_loss_over_classes_is_in_the_card(data, done, tmp_path):
    run(data, tmp_path, loss="kl_classes", epochs=1)
    for output, activation in ((tmp_path, "softmax"), (done, "sigmoid")):
        card = json.loads((output / "model/model.json").read_text())
        assert card["activation"] == activation


def alone(*positional, **changes) -> None:
    os.setsid()
    run(*positional, **changes)


def test_killed_and_started_again(data, tmp_path, capfd):
    output, many = tmp_path / "killed", {"epochs": 12}
    process = multiprocessing.get_context("fork").Process(
        target=alone, args=(data, output), kwargs={**many, "workers": 1}
    )
    process.start()
    log = ""
    while "epoch 3:" not in log:
        assert process.is_alive()
        time.sleep(0.01)
        log += capfd.readouterr().err
    os.killpg(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert (output / "checkpoint.pt").is_file()
    assert not (output / "history.parquet").exists()
    run(data, output, **many)
    assert "resuming after epoch" in capfd.readouterr().err
    assert same(output, run(data, tmp_path / "undisturbed", **many))


def test_checkpoint_is_plain_data(data, tmp_path, monkeypatch):
    interrupt(monkeypatch, data, tmp_path)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert len(json.loads(state["history"])) == 2


@pytest.mark.parametrize("change", [{"learning_rate": 2e-3}, {"alignment": {"warmup": 2}}])
def test_checkpoint_of_other_settings(data, tmp_path, monkeypatch, capsys, change):
    interrupt(monkeypatch, data, tmp_path / "a")
    run(data, tmp_path / "a", **change)
    assert "from other settings, labels or images; starting over" in capsys.readouterr().err
    assert same(tmp_path / "a", run(data, tmp_path / "b", **change))


def test_checkpoint_of_other_labels(data, tmp_path, monkeypatch, capsys):
    interrupt(monkeypatch, data, tmp_path / "a")
    table, _, scores = read_scores(data / "labels.parquet")
    write_labels(tmp_path / "labels.parquet", table, CLASSES, 1 - scores)
    other = {"labels": tmp_path / "labels.parquet"}
    run(data, tmp_path / "a", **other)
    assert "starting over" in capsys.readouterr().err
    assert same(tmp_path / "a", run(data, tmp_path / "b", **other))


def test_checkpoint_of_another_truth(data, tmp_path, monkeypatch, capsys):
    interrupt(monkeypatch, data, tmp_path / "a")
    run(data, tmp_path / "a", difficult="positive")
    assert "starting over" in capsys.readouterr().err
    interrupt(monkeypatch, data, tmp_path / "b")
    table = pq.read_table(data / "images.parquet")
    write_table(table.slice(1), tmp_path / "images.parquet")
    run(data, tmp_path / "b", images=tmp_path / "images.parquet")
    assert "starting over" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["torn", "empty", "foreign"])
def test_a_checkpoint_that_is_none_is_not_replaced(data, done, tmp_path, monkeypatch, kind):
    interrupt(monkeypatch, data, tmp_path)
    path = tmp_path / "checkpoint.pt"
    if kind == "foreign":
        torch.save([1, 2], path)
    else:
        path.write_bytes(path.read_bytes()[: 10_000 if kind == "torn" else 0])
    assert "checkpoint" in fails(data, tmp_path)
    path.unlink()
    assert same(run(data, tmp_path), done)


@pytest.mark.parametrize("batch_size", [4, 24])
def test_divergence(data, tmp_path, batch_size):
    output = tmp_path / "output"
    message = fails(data, output, learning_rate=1e30, optimizer="sgd", batch_size=batch_size)
    assert message.startswith("training diverged in epoch ")
    assert "smaller learning_rate" in message
    assert not (output / "model").exists()


def test_divergence_keeps_the_last_checkpoint(data, tmp_path, monkeypatch):
    interrupt(monkeypatch, data, tmp_path)
    checkpoint = (tmp_path / "checkpoint.pt").read_bytes()
    step = train.Trainer.train_epoch

    def diverging(self, *positional):
        return step(self, *positional) + float("nan")

    monkeypatch.setattr(train.Trainer, "train_epoch", diverging)
    message = fails(data, tmp_path)
    assert "diverged in epoch 3" in message
    assert str(tmp_path / "checkpoint.pt") in message
    assert (tmp_path / "checkpoint.pt").read_bytes() == checkpoint


def test_weights_that_are_not_finite_in_the_last_step(data, tmp_path, monkeypatch):
    step = train.Trainer.train_epoch

    def breaking(self, *positional):
        loss = step(self, *positional)
        next(self.network.parameters()).data[0] = torch.nan
        return loss

    monkeypatch.setattr(train.Trainer, "train_epoch", breaking)
    assert "diverged in epoch 1" in fails(data, tmp_path, epochs=1)
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("batch_size", [1000, 23])
def test_batches_of_any_size(data, tmp_path, batch_size):
    run(data, tmp_path, epochs=2, batch_size=batch_size, image_size=64)
    assert np.isfinite(history(tmp_path)["loss"]).all()


def test_last_batch_of_one_joins_its_neighbour():
    assert [len(b) for b in batches(np.arange(7), 3)] == [3, 4]
    assert [len(b) for b in batches(np.arange(8), 3)] == [3, 3, 2]
    assert [len(b) for b in batches(np.arange(3), 1)] == [1, 2]
    assert batches(np.array([4]), 3) == [[4]]
    assert batches(np.array([2, 0, 1]), 8) == [[2, 0, 1]]


def test_a_network_of_its_own_size(data, tmp_path):
    """The model folder is enough to rebuild the network."""
    network = {"model": "vit_tiny_patch16_224", "model_args": {"depth": 1}, "image_size": 48}
    run(data, tmp_path, **network, epochs=1)
    loaded, card = load_classifier(tmp_path / "model", torch.device("cpu"))
    assert loaded(torch.zeros(1, 3, 48, 48)).shape == (1, len(card.classes))


def test_one_class(tmp_path):
    data = make_data(tmp_path / "data", classes=["red"])
    run(data, tmp_path / "output", epochs=2)
    assert refined(tmp_path / "output").shape == (24, 1)
    message = fails(data, tmp_path / "softmax", epochs=2, loss="kl_classes")
    assert "one class" in message


def test_one_image(tmp_path):
    data = make_data(tmp_path / "data", images=1, tests=0)
    for size in (32, 64):
        output = run(data, tmp_path / str(size), image_size=size)
        assert refined(output).shape == (1, 3)
        assert np.isfinite(history(output)["loss"]).all()


@pytest.mark.parametrize("loss", ["kl", "kl_reverse", "kl_classes"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_every_choice_runs(data, tmp_path, loss, optimizer, schedule):
    run(
        data,
        tmp_path,
        loss=loss,
        optimizer=optimizer,
        schedule=schedule,
        epochs=1,
        weight_decay=0.1,
        warmup_steps=2,
        alignment={"warmup": 0},
    )
    row = history(tmp_path).iloc[0]
    assert np.isfinite(row["loss"])
    assert row["label_movement"] > 0


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_learning_rates(schedule):
    settings = Training(learning_rate=0.4, warmup_steps=4, schedule=schedule)
    found = [_learning_rate(settings, step, 12) for step in range(12)]
    rest = 0.4 * (1 + np.cos(np.pi * np.arange(8) / 8)) / 2 if schedule == "cosine" else [0.4] * 8
    np.testing.assert_allclose(found, [0.1, 0.2, 0.3, 0.4, *rest])


def test_learning_rate_of_the_history(data, tmp_path):
    run(data, tmp_path, schedule="cosine", batch_size=6, warmup_steps=1, epochs=2)
    # 4 steps per epoch; the learning rate is that of each epoch's last step.
    expected = [0.5e-3 * (1 + np.cos(np.pi * done / 7)) for done in (2, 6)]
    np.testing.assert_allclose(history(tmp_path)["learning_rate"], expected)


def test_too_many_unreadable_images_end_the_training(tmp_path):
    data = make_data(tmp_path / "data")
    for i in (3, 4, 11):
        (data / f"images/{i}.png").unlink()
    said = message_of(lambda: run(data, tmp_path / "output", max_failed_share=0.05))
    assert "3 of its" in said and "more than max_failed_share = 0.05 allows" in said


def test_vanished_images_are_left_out(tmp_path, capsys):
    data = make_data(tmp_path / "data")
    for i in (3, 4, 11):
        (data / f"images/{i}.png").unlink()
    (data / "images/30.png").unlink()
    output = run(data, tmp_path / "output", alignment={"warmup": 0})
    assert "epoch 1: 3 images cannot be read" in capsys.readouterr().err
    labels = read_scores(data / "labels.parquet")[2].clip(EPSILON, 1 - EPSILON)
    stayed = np.abs(refined(output) - labels).max(axis=1) < 1e-6
    assert np.flatnonzero(stayed).tolist() == [3, 4, 11]


def test_image_that_vanishes_later_keeps_its_label(tmp_path, monkeypatch):
    data = make_data(tmp_path / "data")
    epoch, labels = train.Trainer.train_epoch, []

    def vanishing(self, *positional):
        labels.append(self.labels.latents[7].clone())
        result = epoch(self, *positional)
        (data / "images/7.png").unlink(missing_ok=True)
        return result

    monkeypatch.setattr(train.Trainer, "train_epoch", vanishing)
    run(data, tmp_path / "output", alignment={"warmup": 0})
    assert not torch.equal(labels[0], labels[1])
    assert torch.equal(labels[1], labels[3])


def test_no_image_can_be_read(tmp_path):
    data = make_data(tmp_path / "data")
    shutil.rmtree(data / "images")
    message = fails(data, tmp_path / "output")
    assert "none of its images can be read" in message
    assert not (tmp_path / "output/model").exists()


def test_batch_of_which_one_image_is_left(tmp_path):
    data = make_data(tmp_path / "data")
    order = np.random.default_rng((0, 0)).permutation(24)
    for i in order[:4]:
        (data / f"images/{i}.png").unlink()
    run(data, tmp_path / "output", epochs=1)


def test_augmentation_depends_on_epoch_and_image(data):
    settings = Training(**{**SETTINGS, "seed": 3})
    card = Card("m", CLASSES, 32, [0.5] * 3, [0.5] * 3, "bilinear", 0.5)
    paths = pq.read_table(data / "labels.parquet")["path"].combine_chunks()
    images = TrainImages(paths, card.resize, settings, 10_000)
    again = TrainImages(paths, card.resize, settings, 10_000)
    assert images[0, 5][0] == 5
    assert np.array_equal(images[2, 5][1], again[2, 5][1])
    assert not np.array_equal(images[2, 5][1], images[3, 5][1])
    plain = Image.open(paths[5].as_py()).convert("RGB").resize((32, 32), Image.Resampling.BILINEAR)
    assert np.array_equal(images[-1, 5][1], np.asarray(plain).transpose(2, 0, 1))
    flips = [
        np.array_equal(image[:, :, ::-1], np.asarray(plain).transpose(2, 0, 1))
        for epoch in range(40)
        for _, image in [TrainImages(paths, card.resize, Training(model="m"), 10_000)[epoch, 5]]
    ]
    assert 10 < sum(flips) < 30


def test_crops_lie_inside_and_keep_their_share(data):
    settings = Training(model="m", crop_scale=0.3)
    images = TrainImages(None, None, settings, 10_000)
    shares = []
    for seed in range(300):
        x0, y0, x1, y1 = images._crop((90, 40), np.random.default_rng(seed))
        assert 0 <= x0 < x1 <= 90 + 1e-9
        assert 0 <= y0 < y1 <= 40 + 1e-9
        assert (x1 - x0) / (y1 - y0) == pytest.approx(90 / 40)
        shares.append((x1 - x0) * (y1 - y0) / 3600)
    assert min(shares) >= 0.3 - 1e-9
    assert (min(shares) < 0.35, max(shares) > 0.95) == (True, True)
    assert TrainImages(None, None, Training(model="m"), 1)._crop((9, 9), None) is None


def test_start_from_weights(data, tmp_path):
    torch.manual_seed(9)
    network, _ = new_classifier("test_resnet", ["a"], {}, None)
    torch.save(network.state_dict(), tmp_path / "start.pth")
    start = {"weights": str(tmp_path / "start.pth"), "learning_rate": 1e-12, "epochs": 1}
    run(data, tmp_path / "output", **start)
    found = load_file(tmp_path / "output/model/model.safetensors")
    for name, value in network.named_parameters():
        if not name.startswith("fc"):
            torch.testing.assert_close(found[name], value, rtol=0, atol=1e-6)


def test_input_that_does_not_fit(data, tmp_path):
    assert "no such file" in fails(data, tmp_path, labels=tmp_path / "nothing.parquet")
    assert "no such file" in fails(data, tmp_path, images=tmp_path / "nothing.parquet")
    table, _, scores = read_scores(data / "labels.parquet")
    write_labels(tmp_path / "other.parquet", table, ["red", "green", "pink"], scores)
    message = fails(data, tmp_path, labels=tmp_path / "other.parquet")
    assert "not the same class table" in message
    assert "'resnet9999'" in fails(data, tmp_path, model="resnet9999")
    assert not (tmp_path / "model").exists()
