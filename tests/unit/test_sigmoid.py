"""A teacher trained with a sigmoid, through the commands: scores equal the equation's."""

import csv
import json
from pathlib import Path

import numpy as np
import open_clip
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from sklearn.metrics import average_precision_score
from test_gallery import images_of, parts
from typer.testing import CliRunner

from cdul_steps import cli
from cdul_steps.data.tables import read_facts, read_scores
from cdul_steps.steps.manifest import make_manifest

CLASSES = ["cat", "dog", "bird"]
SIZES = {"train": 8, "test": 6}
SETTINGS = {"tau": 0.2, "zeta": 1e-3, "lambda": 0.5, "positives": 1.2}


def run(*words: object) -> str:
    done = CliRunner().invoke(cli.app, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    return done.stderr


def make_data(folder: Path) -> Path:
    """A table of images with truth, and its manifest at `folder/manifest`."""
    random = np.random.default_rng(0)
    rows = []
    for split, size in SIZES.items():
        for i in range(size):
            tiny.noise(folder / f"{split}/{i}.png", seed=len(rows))
            rows.append([f"{split}/{i}.png", split, *random.permutation([1, 0, i % 2])])
    with (folder / "table.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([["path", "split", *CLASSES], *rows])
    (folder / "classes.txt").write_text("\n".join(CLASSES))
    (folder / "context.txt").write_text("beach\ntree\n")
    settings = tiny.Dataset(
        reader="table",
        root=folder / "table.csv",
        classes=folder / "classes.txt",
        splits={split: split for split in SIZES},
        grid=(2, 2),
        max_pixels=tiny.MAX_PIXELS,
    )
    make_manifest(dataset=settings, output=folder / "manifest/images.parquet")
    return folder / "manifest/images.parquet"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, str, str]:
    """The data set's results by the commands, the model's name, and the output of `label`."""
    folder = tmp_path_factory.mktemp("results") / "data"
    images, encoder = make_data(folder), folder / "siglip"
    model, text = tiny.make_siglip(folder.parent / "weights"), encoder / "text.parquet"
    names = ("--classes", folder / "classes.txt", "--context", folder / "context.txt")
    # No context name is left out, however similar these weights find them.
    kept = ("--keep", "beach", "--keep", "tree")
    run("encode-text", *names, *kept, "--model", model, "--template", "a {}", "--output", text)
    for split in SIZES:
        store, table = encoder / f"embeddings/{split}.zarr", encoder / f"encode/{split}/0.parquet"
        of_split = ("--images", images, "--split", split)
        run("store", *of_split, "--text", text, "--output", store)
        shard = ("--manifest", images.parent / f"{split}/0.parquet", "--store", store)
        device = ("--device", "cpu", "--workers", 0)
        run("encode", *shard, "--table", table, "--model", model, *device)
        output = ("--output", encoder / f"similarity/{split}.zarr")
        read = ("--store", store, "--text", text, "--table", table)
        run("similarity", *of_split, *read, *output)
    labels = encoder / "labels/pseudo_labels.parquet"
    train = ("--similarity", encoder / "similarity/train.zarr", "--split", "train")
    settings = ("--settings", json.dumps(SETTINGS))
    told = run("label", *train, "--images", images, *settings, "--output", labels)
    stores = [f"--similarity={s}={encoder / f'similarity/{s}.zarr'}" for s in SIZES]
    output = ("--output", labels.parent / "quality.json")
    run("quality", *stores, "--images", images, "--labels", labels, *output)
    return folder, model, told


def scores_by_hand(folder: Path, model: str, split: str) -> np.ndarray:
    """`sigmoid(cosine / tau + bias)` of a split's images (N, 1+S, C), from open_clip alone."""
    network, tokenizer = open_clip.create_model(model).eval(), open_clip.get_tokenizer(model)
    transform = open_clip.transform.image_transform_v2(
        open_clip.transform.PreprocessCfg(**network.visual.preprocess_cfg), is_train=False
    )
    manifest = pq.read_table(folder / f"manifest/{split}/0.parquet").to_pylist()
    views = [
        transform(tiny.Image.open(view["path"]).crop([view[k] for k in ("x0", "y0", "x1", "y1")]))
        for view in manifest
    ]
    with torch.no_grad():
        images = network.encode_image(torch.stack(views), normalize=True).double().numpy()
        words = tokenizer([f"a {name}" for name in CLASSES])
        text = network.encode_text(words, normalize=True).double().numpy()
    cosines = (images @ text.T).reshape(SIZES[split], -1, len(CLASSES))
    return 1 / (1 + np.exp(-(cosines / SETTINGS["tau"] - 10)))


def labels_by_hand(scores: np.ndarray, bias: float) -> np.ndarray:
    """The final labels from scores, rescaled by a bias at the model's own sharpness, 10."""
    best, worst = scores[:, 1:].max(axis=1), scores[:, 1:].min(axis=1)
    joined = np.where(best >= SETTINGS["zeta"], best, worst)
    y = (scores[:, 0] + joined + 0.5 * abs(scores[:, 0] - joined)) / 2
    odds = (y / (1 - y)) ** (10 * SETTINGS["tau"]) * np.exp(bias)
    return odds / (1 + odds)


def test_labels(made):
    folder, model, told = made
    labels = folder / "siglip/labels/pseudo_labels.parquet"
    facts, (_, names, found) = read_facts(labels), read_scores(labels)
    assert names == CLASSES and facts["logit_bias"] == -10
    assert facts["similarity"]["context"] == ["beach", "tree"]
    assert "the context names are not used" in told and "sigmoid, tau 0.2" in told
    expected = labels_by_hand(scores_by_hand(folder, model, "train"), facts["bias"])
    # Embeddings are stored in half precision.
    np.testing.assert_allclose(found, expected, atol=5e-3)
    assert found.std(axis=0).min() > 0.02
    assert found.sum(axis=1).mean() == pytest.approx(SETTINGS["positives"], rel=1e-4)


def test_quality(made):
    folder, model, _ = made
    labels = folder / "siglip/labels"
    quality = json.loads((labels / "quality.json").read_text())
    bias = read_facts(labels / "pseudo_labels.parquet")["bias"]
    truth = pq.read_table(folder / "manifest/images.parquet").to_pylist()
    for split in SIZES:
        shown = [image["positive"] for image in truth if image["split"] == split]
        shown = np.array([[c in of for c in range(len(CLASSES))] for of in shown])
        scores = scores_by_hand(folder, model, split)
        for name, values in {
            "global": scores[:, 0],
            "local_max": scores[:, 1:].max(axis=1),
            "pseudo_labels": labels_by_hand(scores, bias),
        }.items():
            ap = average_precision_score(shown, values, average="macro")
            assert quality["splits"][split][name]["mAP"] == pytest.approx(100 * ap)


@pytest.mark.parametrize("split", list(SIZES))
def test_gallery(made, tmp_path, split):
    folder, model, _ = made
    labels = folder / "siglip/labels"
    run("gallery", labels, "--split", split, "--output", tmp_path / "gallery")
    data = parts(tmp_path / "gallery")
    assert data["index"]["names"] == CLASSES
    assert "sigmoid" in data["index"]["labels"]["scores"]
    scores = scores_by_hand(folder, model, split)
    expected = labels_by_hand(scores, read_facts(labels / "pseudo_labels.parquet")["bias"])
    images = images_of(data)
    assert len(images) == SIZES[split]
    for image, views, of_image in zip(images, scores, expected, strict=True):
        np.testing.assert_allclose(np.array(image["scores"])[0] / 1000, of_image, atol=6e-3)
        np.testing.assert_allclose(np.array(image["top_scores"]) / 1000, views.max(1), atol=6e-4)
        assert image["top"] == views.argmax(axis=1).tolist()
        assert (image["context"], image["context_top"]) == (0, [])
