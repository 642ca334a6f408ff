"""Stage encode: a shard's content does not depend on batches and workers."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import open_clip
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from encode_runs import DIMENSION, SHARD, VIEWS, cosines, make_data, run, statuses
from PIL import Image

from cdul_steps.config import Encoder
from cdul_steps.data.classes import ContextList
from cdul_steps.data.files import digest
from cdul_steps.data.images import decode
from cdul_steps.data.manifest import read_shard
from cdul_steps.data.stores import shard_file
from cdul_steps.data.tables import read_facts
from cdul_steps.errors import UserError
from cdul_steps.models import dense
from cdul_steps.models.embedding import BatchedEncoder, ImageViews, embed_images, encode_images
from cdul_steps.steps.encode import encode_text


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> str:
    return tiny.make_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


def test_shard_and_table(data, clip, tmp_path):
    rows, outcome = run(data / "manifest/train/0.parquet", tmp_path, clip)
    assert rows.dtype == np.float16
    assert rows.shape == (SHARD, VIEWS, DIMENSION)
    np.testing.assert_allclose(np.linalg.norm(rows.astype(np.float32), axis=-1), 1, atol=2e-3)
    assert [row["image_id"] for row in outcome] == [f"{i}.png" for i in range(5)]
    assert [row["row"] for row in outcome] == [0, 1, 2, 3, 4]
    assert all(row["status"] == "ok" and row["error"] == "" for row in outcome)
    assert all(row["seconds"] > 0 for row in outcome)


def test_last_shard_is_filled_up_with_nan(data, clip, tmp_path):
    rows, outcome = run(data / "manifest/train/1.parquet", tmp_path, clip)
    assert [row["row"] for row in outcome] == [5, 6, 7]
    assert np.isfinite(rows[:3]).all()
    assert np.isnan(rows[3:]).all()
    assert sorted(p.name for p in (tmp_path / "a.zarr/c").iterdir()) == ["1"]


def test_facts(data, clip, tmp_path):
    run(data / "manifest/train/0.parquet", tmp_path, clip, batch_size=7)
    facts = read_facts(tmp_path / "0.parquet")
    assert facts["kind"] == "encode"
    assert facts["digest"] == digest(shard_file(tmp_path / "a.zarr", 0))
    assert facts["views_per_second"] > 0
    assert facts["images_per_second"] > 0
    assert {"cdul", "python", "torch", "open_clip_torch"} <= set(facts["software"])
    assert (facts["shard"], facts["model"], facts["precision"]) == (0, clip, "fp32")
    assert (facts["device"], facts["batch_size"]) == ("cpu", 7)


@pytest.mark.parametrize("mode", [None, "shortest"])
def test_same_as_open_clip_one_view_at_a_time(data, clip, tmp_path, mode):
    manifest = data / "manifest/train/0.parquet"
    rows, _ = run(manifest, tmp_path, clip, resize_mode=mode)
    network, _, transform = open_clip.create_model_and_transforms(clip, image_resize_mode=mode)
    _, images, boxes = read_shard(manifest)
    for path, of_image, found in zip(images["path"].to_pylist(), boxes, rows, strict=True):
        for box, vector in zip(of_image, found, strict=True):
            view = transform(decode(path).crop(tuple(box.tolist())))
            with torch.no_grad():
                expected = network.eval().encode_image(view[None])[0].numpy()
            assert cosines(vector, expected) > 0.99999


def test_bad_images_are_rows_with_a_status(clip, tmp_path):
    images = tmp_path / "images"
    for i in range(5):
        tiny.noise(images / f"{i}.jpg", i)
    whole = (images / "0.jpg").read_bytes()
    (images / "1.jpg").write_bytes(whole[: len(whole) * 2 // 3])
    (images / "2.jpg").write_text("Not found")
    shards = tiny.folder_manifest(images, tmp_path / "manifest")
    (images / "3.jpg").unlink()
    tiny.noise(images / "4.jpg", 4, (48, 41))
    rows, outcome = run(shards / "0.parquet", tmp_path, clip)
    assert [row["status"] for row in outcome] == [
        "ok",
        "truncated",
        "not_an_image",
        "missing",
        "changed",
    ]
    assert all(bool(row["error"]) == (row["status"] != "ok") for row in outcome)
    assert "48x41" in outcome[4]["error"]
    assert np.isnan(rows[1:]).all()
    alone = tmp_path / "alone"
    shutil.copytree(images, alone / "images", ignore=lambda *_: ["1.jpg", "2.jpg", "4.jpg"])
    shards = tiny.folder_manifest(alone / "images", alone / "manifest")
    assert cosines(rows[0], run(shards / "0.parquet", alone, clip)[0][0]).min() > 0.99999


def test_all_images_bad(clip, tmp_path):
    for i in range(3):
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / f"images/{i}.jpg").write_text("Not found")
    shards = tiny.folder_manifest(tmp_path / "images", tmp_path / "manifest")
    rows, outcome = run(shards / "0.parquet", tmp_path, clip)
    assert set(statuses(outcome).values()) == {"not_an_image"}
    assert np.isnan(rows).all()
    assert read_facts(tmp_path / "0.parquet")["views_per_second"] == 0


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
def test_image_like_a_thread(clip, tmp_path, mode):
    tiny.noise(tmp_path / "images/a.png", 0, (1, 20_000))
    tiny.noise(tmp_path / "images/b.png", 0, (20_000, 2))
    tiny.noise(tmp_path / "images/c.png", 0, (1, 1))
    tiny.noise(tmp_path / "images/d.png", 0, (30, 900))
    shards = tiny.folder_manifest(tmp_path / "images", tmp_path / "manifest")
    _, outcome = run(shards / "0.parquet", tmp_path, clip, resize_mode=mode)
    assert statuses(outcome) == {
        "a.png": "bad_shape",
        "b.png": "bad_shape",
        "c.png": "ok",
        "d.png": "ok",
    }


def test_image_over_the_limit_of_pixels(data, clip, tmp_path):
    _, outcome = run(data / "manifest/train/0.parquet", tmp_path, clip, max_pixels=48 * 40)
    assert list(statuses(outcome).values()) == ["too_large", "ok"] * 2 + ["too_large"]


def bright_overflows(network: torch.nn.Module) -> None:
    network.visual.conv1.weight.data.abs_()
    weights = network.visual.conv1.weight.data
    network.visual.conv1.weight.data.mul_(2e5 / weights.sum(dim=(1, 2, 3), keepdim=True))


def test_overflow_is_a_status(tmp_path):
    clip = tiny.make_clip(tmp_path / "clip", bright_overflows)
    (tmp_path / "images").mkdir()
    for name, colour in (("grey", (127, 115, 102)), ("white", (255, 255, 255))):
        Image.new("RGB", (40, 40), colour).save(tmp_path / f"images/{name}.png")
    manifest = tiny.folder_manifest(tmp_path / "images", tmp_path / "manifest") / "0.parquet"
    rows, outcome = run(manifest, tmp_path, clip, precision="fp16")
    assert statuses(outcome) == {"grey.png": "ok", "white.png": "not_finite"}
    assert "float16" in outcome[1]["error"]
    assert np.isfinite(rows[0]).all()
    assert np.isnan(rows[1:]).all()
    _, outcome = run(manifest, tmp_path, clip)
    assert set(statuses(outcome).values()) == {"ok"}


def test_one_view_that_overflows_takes_its_image_along(tmp_path):
    clip = tiny.make_clip(tmp_path / "clip", bright_overflows)
    image = Image.new("RGB", (40, 40), (127, 115, 102))
    (tmp_path / "images").mkdir()
    image.save(tmp_path / "images/a.png")
    image.paste((255, 255, 255), (20, 20, 40, 40))
    image.save(tmp_path / "images/b.png")
    manifest = tiny.folder_manifest(tmp_path / "images", tmp_path / "manifest") / "0.parquet"
    rows, outcome = run(manifest, tmp_path, clip, precision="fp16")
    assert statuses(outcome) == {"a.png": "ok", "b.png": "not_finite"}
    assert np.isnan(rows[1]).all()


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_same_bytes_again(data, clip, tmp_path, workers):
    manifest = data / "manifest/train/0.parquet"
    for name, count in (("a", 0), ("b", workers)):
        run(manifest, tmp_path / name, clip, workers=count)
    first, second = (shard_file(tmp_path / name / "a.zarr", 0).read_bytes() for name in "ab")
    assert first == second


def test_batch_size_does_not_matter(data, clip, tmp_path):
    manifest = data / "manifest/train/0.parquet"
    expected, _ = run(manifest, tmp_path, clip)
    for batch_size in (1, 3, 5, 12, 1000):
        rows, _ = run(manifest, tmp_path / str(batch_size), clip, batch_size=batch_size)
        assert cosines(rows, expected).min() >= 0.99999


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> Path:
    """The manifest of 61 images, two of which cannot be read."""
    folder = tmp_path_factory.mktemp("many")
    for i in range(61):
        tiny.noise(folder / f"images/{i:02}.png", i)
    shards = tiny.folder_manifest(folder / "images", folder / "manifest", 61)
    for i in (7, 60):
        (folder / f"images/{i:02}.png").write_bytes(b"GIF")
    return shards / "0.parquet"


@pytest.mark.parametrize(("batch_size", "workers"), [(1, 0), (5, 2), (64, 0), (64, 2), (1000, 1)])
def test_batches_through_shared_memory(many, clip, batch_size, workers):
    """As on a GPU, where the workers only decode: each image gets its own vectors."""
    _, tower = dense.load_tower(Encoder(model=clip), torch.device("cpu"), [(2, 2)], 0)
    _, images, boxes = read_shard(many)
    paths = images["path"].combine_chunks()

    def encode(in_workers: BatchedEncoder | None, size: int) -> tuple[np.ndarray, list[str]]:
        views = ImageViews(paths, boxes, tower.preprocess, tiny.MAX_PIXELS, in_workers)
        rows = np.full((61, VIEWS, DIMENSION), np.nan, np.float32)
        batches = BatchedEncoder(tower, size)
        outcome, _ = encode_images(views, batches, tower, rows, np.arange(61), workers)
        return rows, [status for status, _, _ in outcome]

    expected, statuses = encode(BatchedEncoder(tower, VIEWS), VIEWS)
    rows, found = encode(None, batch_size)
    assert found == statuses
    read = np.array(statuses) == "ok"
    assert np.isnan(rows[~read]).all() and not read[[7, 60]].any()
    assert cosines(rows[read], expected[read]).min() >= 0.99999


def test_too_little_shared_memory_is_told(many, clip):
    _, tower = dense.load_tower(Encoder(model=clip), torch.device("cpu"), [(2, 2)], 0)
    _, images, boxes = read_shard(many)
    huge = dataclasses.replace(tower.preprocess, size=(2**22, 2**22))
    views = ImageViews(images["path"].combine_chunks(), boxes, huge, tiny.MAX_PIXELS, None)
    with pytest.raises(UserError, match=r"MiB of shared memory .* smaller batch size"):
        next(embed_images(views, BatchedEncoder(tower, 64), 0))


class SmallDevice(dense.ImageEncoder):
    """A device with memory for two views."""

    sizes: list[int]

    def __call__(self, views: torch.Tensor) -> np.ndarray:
        self.sizes.append(len(views))
        if len(views) > 2:
            raise torch.OutOfMemoryError
        return super().__call__(views)


def test_out_of_memory_halves_the_batch_for_good(data, clip, tmp_path, monkeypatch, capsys):
    manifest = data / "manifest/train/0.parquet"
    expected, _ = run(manifest, tmp_path / "large", clip, batch_size=8)
    SmallDevice.sizes = []
    monkeypatch.setattr(dense, "ImageEncoder", SmallDevice)
    rows, outcome = run(manifest, tmp_path / "small", clip, engine="torch", batch_size=16)
    assert set(statuses(outcome).values()) == {"ok"}
    assert cosines(rows, expected).min() >= 0.99999
    # An image has 5 views: batches of 16, 8 and 4 fail, and from then on none exceeds 2.
    assert [n for n in SmallDevice.sizes if n > 2] == [5, 5, 4]
    assert capsys.readouterr().err.count("out of GPU memory") == 3


def test_out_of_memory_with_one_view_is_an_error(data, clip, tmp_path, monkeypatch):
    class NoMemory(SmallDevice):
        def __call__(self, views: torch.Tensor) -> np.ndarray:
            if views.float().std() > 0:
                raise torch.OutOfMemoryError
            return super().__call__(views)

    monkeypatch.setattr(dense, "ImageEncoder", NoMemory)
    with pytest.raises(torch.OutOfMemoryError):
        run(data / "manifest/train/0.parquet", tmp_path, clip)
    assert not shard_file(tmp_path / "a.zarr", 0).exists()
    assert not (tmp_path / "0.parquet").exists()


def test_wrong_input(data, clip, tmp_path):
    with pytest.raises(UserError, match="not the manifest of a shard"):
        run(data / "manifest/images.parquet", tmp_path, clip)
    with pytest.raises(UserError, match="no such file"):
        run(tmp_path / "nothing.parquet", tmp_path, clip)
    with pytest.raises(UserError, match="device 'gpu9' cannot be used"):
        run(data / "manifest/train/0.parquet", tmp_path, clip, device="gpu9")


def test_classes_of_the_same_prompts_are_told(clip, tmp_path, capsys):
    text = "- {name: crane, aliases: [crane, bird]}\n- {name: kran, aliases: [Crane]}\n- dog\n"
    (tmp_path / "classes.yaml").write_text(text)
    for aliases in (True, False):
        encode_text(
            classes=tmp_path / "classes.yaml",
            encoder=Encoder(model=clip, templates=["{}"], aliases=aliases),
            output=tmp_path / "text.parquet",
        )
        told = "crane, kran have the same prompts" in capsys.readouterr().err
        # Without its other name, the first class has the same prompt as the second.
        assert told != aliases


def test_text(clip, tmp_path):
    (tmp_path / "classes.yaml").write_text("- {name: cat, aliases: [cat, kitten]}\n- dog\n")
    templates = ["a photo of a {}", "a {} in a {}"]
    encode_text(
        classes=tmp_path / "classes.yaml",
        encoder=Encoder(model=clip, templates=templates),
        output=tmp_path / "text.parquet",
    )
    facts = read_facts(tmp_path / "text.parquet")
    table = pq.read_table(tmp_path / "text.parquet")
    assert facts["logit_scale"] == pytest.approx(1 / 0.07, rel=1e-5)
    assert facts["templates"] == templates
    assert table["class"].to_pylist() == ["cat", "dog"]
    assert table["aliases"].to_pylist() == [["cat", "kitten"], ["dog"]]
    network, tokenizer = open_clip.create_model(clip).eval(), open_clip.get_tokenizer(clip)
    for names, found in zip([["cat", "kitten"], ["dog"]], table["embedding"], strict=True):
        prompts = [t.format(*[name] * 2) for t in templates for name in names]
        with torch.no_grad():
            vectors = network.encode_text(tokenizer(prompts), normalize=True)
        assert np.linalg.norm(found.as_py()) == pytest.approx(1, abs=1e-6)
        expected = torch.nn.functional.normalize(vectors.mean(dim=0), dim=0)
        np.testing.assert_allclose(found.as_py(), expected, atol=1e-6)


@pytest.mark.parametrize("templates", [["{}"], ["a photo of a {}", "{}"]])
def test_text_of_many_classes(clip, tmp_path, monkeypatch, capsys, templates):
    """All prompts share a tokenizer, and batches do not mix up the names of classes."""
    made, get_tokenizer = [], open_clip.get_tokenizer
    monkeypatch.setattr(
        open_clip, "get_tokenizer", lambda model: made.append(model) or get_tokenizer(model)
    )
    names = [[f"name {i} {j}" for j in range(1 + i % 3)] for i in range(300)]
    entries = [f"- {{name: {of[0]}, aliases: [{', '.join(of)}]}}\n" for of in names]
    (tmp_path / "classes.yaml").write_text("".join(entries))
    encode_text(
        classes=tmp_path / "classes.yaml",
        encoder=Encoder(model=clip, templates=templates),
        output=tmp_path / "text.parquet",
    )
    assert made == [clip]
    prompts = len(templates) * sum(map(len, names))
    assert f"encode: {prompts}/{prompts} prompts" in capsys.readouterr().err
    found = np.array(pq.read_table(tmp_path / "text.parquet")["embedding"].to_pylist())
    network, tokenizer = open_clip.create_model(clip).eval(), get_tokenizer(clip)
    for index in (0, 1, 63, 64, 127, 128, 299):
        texts = [t.replace("{}", name) for t in templates for name in names[index]]
        with torch.no_grad():
            vectors = network.encode_text(tokenizer(texts), normalize=True)
        expected = torch.nn.functional.normalize(vectors.mean(dim=0), dim=0)
        np.testing.assert_allclose(found[index], expected, atol=1e-6)


def test_text_of_first_names(clip, tmp_path):
    found = []
    for aliases in ("a cat, kitten", "a cat"):
        (tmp_path / "classes.yaml").write_text(f"- {{name: cat, aliases: [{aliases}]}}\n")
        encode_text(
            classes=tmp_path / "classes.yaml",
            encoder=Encoder(model=clip, templates=["{}"], aliases=False),
            output=tmp_path / "text.parquet",
        )
        found.append(pq.read_table(tmp_path / "text.parquet"))
    assert found[0].equals(found[1])
    assert found[0]["aliases"].to_pylist() == [["a cat"]]


def embed_text(folder: Path, model: str, classes: str, context: str | None, **rule) -> pa.Table:
    (folder / "classes.yaml").write_text(classes)
    (folder / "context.txt").write_text(context or "")
    encode_text(
        classes=folder / "classes.yaml",
        encoder=Encoder(model=model, aliases=False),
        output=folder / "text.parquet",
        context=ContextList(folder / "context.txt", **rule) if context else None,
    )
    return pq.read_table(folder / "text.parquet")


CLASSES = "- {name: couch, aliases: [couch, sofa]}\n- dog\n"


def test_text_with_context(clip, tmp_path, capsys):
    alone = embed_text(tmp_path, clip, CLASSES, None)
    assert "context" not in alone.column_names
    assert "context" not in read_facts(tmp_path / "text.parquet")
    names = "tree\nSofas\nriver\ndog\n"
    table = embed_text(tmp_path, clip, CLASSES, names, nearness=1)
    assert table["class"].to_pylist() == ["couch", "dog", "tree", "river"]
    assert table["context"].to_pylist() == [False, False, True, True]
    assert table.select(alone.column_names).slice(0, 2).equals(alone)
    facts = read_facts(tmp_path / "text.parquet")
    assert (facts["context"], facts["nearness"]) == (2, 1)
    assert facts["left_out"] == [
        {"name": "Sofas", "of": "couch", "nearness": None},
        {"name": "dog", "of": "dog", "nearness": None},
    ]
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "context:" in line]
    assert "2 of the 4 names" in line
    assert "left out, too near to couch: Sofas; to dog: dog" in line
    # Each name has the same embedding as a class of that name.
    others = embed_text(tmp_path, clip, "- tree\n- river\n", None)
    found, expected = (t["embedding"].to_pylist() for t in (table.slice(2), others))
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_context_too_near_is_left_out_but_what_is_to_stay(clip, tmp_path):
    names = ["tree", "river", "dog house", "old couch", "hat"]

    def stays(**rule) -> list[str]:
        table = embed_text(tmp_path, clip, CLASSES, "\n".join(names), **rule)
        return table["class"].to_pylist()[2:]

    assert stays(nearness=1) == names
    found = []
    for limit in (0.2, 0.5, 0.8):
        found.append(set(stays(nearness=limit)))
        left_out = {
            n["name"]: n["nearness"] for n in read_facts(tmp_path / "text.parquet")["left_out"]
        }
        assert all(value > limit for value in left_out.values())
        assert set(left_out) == set(names) - found[-1]
    assert found[0] < found[1] < found[2]
    gone = next(iter(set(names) - found[0]))
    assert set(stays(nearness=0.2, keep=(gone,))) == found[0] | {gone}


def test_one_class_that_no_context_stays_beside(clip, tmp_path):
    with pytest.raises(UserError, match="one class, 'dog'"):
        embed_text(tmp_path, clip, "- dog\n", "Dogs\n")


def test_text_that_is_not_finite(tmp_path):
    def broken(network: torch.nn.Module) -> None:
        network.text_projection.data.fill_(torch.nan)

    (tmp_path / "classes.txt").write_text("cat\n")
    with pytest.raises(UserError, match="not finite"):
        encode_text(
            classes=tmp_path / "classes.txt",
            encoder=Encoder(model=tiny.make_clip(tmp_path / "clip", broken)),
            output=tmp_path / "text.parquet",
        )
