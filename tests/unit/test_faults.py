"""Machine faults: finished files stay, no partial file is left, and one line says why."""

import io
import os
import shutil
import signal
import time
from contextlib import redirect_stderr
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from faults import as_nobody, open_folder, remount, small_disk
from predict_runs import CLASSES as PREDICTED
from training_runs import make_data, same
from training_runs import run as train

from cdul_steps import cli
from cdul_steps.config import Encoder, Labels
from cdul_steps.data import images
from cdul_steps.data.files import replacing
from cdul_steps.data.images import ImageError, decode
from cdul_steps.data.readers import read_dataset
from cdul_steps.data.stores import shard_file, write_metadata, write_shard
from cdul_steps.data.tables import describe, write_table
from cdul_steps.errors import UserError, explain
from cdul_steps.models.classifier import Card, new_classifier, save_classifier
from cdul_steps.models.encoder import Preprocess
from cdul_steps.models.timm_encoder import TimmEncoder
from cdul_steps.steps import predict
from cdul_steps.steps.encode import encode_shard
from cdul_steps.steps.label import make_labels
from cdul_steps.steps.predict import predict_images


@pytest.fixture(scope="module")
def shard(tmp_path_factory):
    """Twelve images, their manifest with one shard, and a tiny CLIP with large vectors."""
    folder = tmp_path_factory.mktemp("shard")
    for i in range(12):
        tiny.noise(folder / f"images/{i}.png", i)
    manifest = tiny.folder_manifest(folder / "images", folder / "manifest", 12) / "0.parquet"
    return manifest, tiny.make_clip(folder / "clip", embed_dim=2048)


def encode_into(shard, output: Path, **changes) -> dict:
    manifest, clip = shard
    return {
        **{"manifest": manifest, "store": output / "e.zarr", "table": output / "0.parquet"},
        **{"encoder": Encoder(model=clip), "max_pixels": tiny.MAX_PIXELS},
        **tiny.on(changes),
    }


def told(function, **arguments) -> str:
    """The line that the command line would print for the error of a stage."""
    with pytest.raises(Exception) as caught:
        function(**arguments)
    line = explain(caught.value)
    assert line, repr(caught.value)
    assert "\n" not in line
    return line


@pytest.mark.root
def test_full_disk_while_encoding(shard, tmp_path):
    with small_disk(tmp_path / "disk", "64k") as disk:
        line = told(encode_shard, **encode_into(shard, disk))
        assert line == f"No space left on device: {shard_file(disk / 'e.zarr', 0)}"
        assert not [p for p in disk.rglob("*") if p.is_file()]
        remount(disk, "size=8m")
        encode_shard(**encode_into(shard, disk))
        encode_shard(**encode_into(shard, tmp_path))
        objects = [shard_file(place / "e.zarr", 0).read_bytes() for place in (disk, tmp_path)]
        assert objects[0] == objects[1]


@pytest.mark.root
def test_full_disk_while_labelling(tmp_path):
    images = {name: [f"{i}" for i in range(4000)] for name in ("image_id", "path")}
    table = predict.pa.table({**images, "split": ["train"] * 4000, "row": range(4000)})
    write_table(describe(table, "images"), tmp_path / "images.parquet")
    attributes = {"classes": list("abcdef"), "logit_scale": 100.0}
    write_metadata(tmp_path / "s.zarr", (4000, 3, 6), 4000, "float32", attributes)
    cosines = np.random.default_rng(0).random((4000, 3, 6), np.float32)
    write_shard(tmp_path / "s.zarr", 0, cosines, 4000)
    settings = {"settings": Labels(), "split": "train"}
    inputs = {"similarity": tmp_path / "s.zarr", "images": tmp_path / "images.parquet"}
    with small_disk(tmp_path / "disk", "64k") as disk:
        (disk / "labels.parquet").write_text("earlier")
        line = told(make_labels, **inputs, **settings, output=disk / "labels.parquet")
        assert line == f"No space left on device: {disk}"
        assert (disk / "labels.parquet").read_text() == "earlier"
        assert [p.name for p in disk.iterdir()] == ["labels.parquet"]


@pytest.fixture(scope="module")
def train_data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("train") / "data")


# A training of one epoch writes no checkpoint.
@pytest.mark.root
@pytest.mark.parametrize(("epochs", "file"), [(4, "checkpoint.pt"), (1, "model.safetensors")])
def test_full_disk_while_training(train_data, tmp_path, epochs, file):
    with small_disk(tmp_path / "disk", "1m") as disk:
        line = told(train, data=train_data, output=disk, epochs=epochs)
        assert line.startswith(f"No space left on device: {disk}") and line.endswith(file)
        assert not (disk / "model/model.json").exists()
        assert not [p for p in disk.rglob("*") if p.name.startswith(".")]
        remount(disk, "size=64m")
        train(train_data, disk, epochs=epochs)
        assert same(disk, train(train_data, tmp_path / "undisturbed", epochs=epochs))


@pytest.mark.root
def test_read_only_disk(shard, tmp_path):
    with small_disk(tmp_path / "disk", "8m") as disk:
        remount(disk, "ro")
        assert told(encode_shard, **encode_into(shard, disk)).startswith("Read-only file system: ")


def test_a_folder_that_belongs_to_someone_else():
    def write() -> str:
        with pytest.raises(OSError) as caught, replacing(folder / "results/a.parquet") as part:
            part.write_text("x")
        return explain(caught.value)

    with open_folder() as folder:
        (folder / "results").mkdir(mode=0o755)
        if os.geteuid() != 0:
            (folder / "results").chmod(0o555)
        line = as_nobody(write)
        assert line.startswith(f"Permission denied: {folder}/results/")


def test_images_that_may_not_be_read():
    def statuses() -> dict[str, str]:
        folder.joinpath("out").mkdir()
        manifest = tiny.folder_manifest(folder / "images", folder / "out") / "0.parquet"
        encode_shard(**encode_into((manifest, network), folder / "out"))
        rows = pq.read_table(folder / "out/0.parquet").to_pylist()
        return {row["image_id"]: row["status"] for row in rows}

    with open_folder() as folder:
        network = tiny.make_clip(folder / "clip")
        (folder / "clip" / tiny.WEIGHTS).chmod(0o644)
        for name in ("free", "closed", "a/free"):
            tiny.noise(folder / f"images/{name}.png", 0)
        (folder / "images/closed.png").chmod(0)
        (folder / "images/gone.png").symlink_to("nowhere.png")
        (folder / "images/loop.png").symlink_to("loop.png")
        expected = dict.fromkeys(("free.png", "a/free.png"), "ok")
        expected |= {"closed.png": "unreadable", "gone.png": "missing", "loop.png": "unreadable"}
        assert as_nobody(statuses) == expected


def test_a_folder_that_may_not_be_entered():
    def read() -> str:
        with pytest.raises(UserError) as caught:
            read_dataset("folder", folder, {"train": "."}, ())
        with pytest.raises(ImageError) as inside:
            decode(folder / "closed/a.png")
        return f"{caught.value} {inside.value.status}"

    with open_folder() as folder:
        tiny.noise(folder / "closed/a.png", 0)
        (folder / "closed").chmod(0)
        message = as_nobody(read)
        (folder / "closed").chmod(0o755)
        assert "closed: the folder cannot be read: Permission denied" in message
        assert message.endswith("unreadable")


def test_what_a_killed_writer_left_goes_with_the_next(tmp_path):
    child = os.fork()
    if not child:
        with replacing(tmp_path / "a.parquet") as part:
            part.write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    (left,) = tmp_path.iterdir()
    (tmp_path / ".a.parquet.backup").mkdir()  # not ours
    with replacing(tmp_path / "b.parquet") as part:
        part.write_text("other")
    assert left.exists()
    with replacing(tmp_path / "a.parquet") as part:
        part.write_text("whole")
    assert {p.name for p in tmp_path.iterdir()} == {"a.parquet", "b.parquet", ".a.parquet.backup"}


def kill_this_worker(fuse: Path) -> None:
    """SIGKILL the calling process, as the kernel does when memory runs out; only the first time."""
    if torch.utils.data.get_worker_info() is not None and fuse.exists():
        fuse.unlink()
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture
def deadly(tmp_path, monkeypatch):
    """The fifth image kills the process that decodes it."""
    fuse = tmp_path / "fuse"
    fuse.touch()

    opened = images._opened

    def kill_then_open(path, max_pixels):
        if Path(path).stem == "5":
            kill_this_worker(fuse)
        return opened(path, max_pixels)

    monkeypatch.setattr(images, "_opened", kill_then_open)
    return fuse


@pytest.fixture(scope="module")
def classifier(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("classifier")
    network, _ = new_classifier("test_byobnet", PREDICTED, {}, None)
    values = {"mean": [0.5] * 3, "std": [0.2] * 3, "interpolation": "bicubic", "threshold": 0.5}
    save_classifier(network, Card("test_byobnet", PREDICTED, 32, **values), folder)
    return folder


def predict_from(classifier: Path, folder: Path, output: Path, **changes) -> dict:
    return {
        **{"model": classifier, "inputs": [folder]},
        **{"output": output / "scores.parquet", "threshold": None},
        **tiny.on({"max_pixels": tiny.MAX_PIXELS, "engine": "torch", "batch_size": 4, **changes}),
    }


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["encode", "predict", "train"])
def test_a_killed_worker_ends_in_one_line(shard, train_data, classifier, tmp_path, deadly, stage):
    folder = shard[0].parents[2] / "images"
    function, options = {
        "encode": (encode_shard, encode_into(shard, tmp_path, workers=2)),
        "predict": (predict_images, predict_from(classifier, folder, tmp_path, workers=2)),
        "train": (train, {"data": train_data, "output": tmp_path / "training", "workers": 2}),
    }[stage]
    start = time.monotonic()
    line = told(function, **options)
    # Otherwise the signal of the second worker would arrive during the following code.
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    time.sleep(0.5)
    signal.signal(signal.SIGCHLD, handler)
    assert line.startswith("a process that decodes images was killed") and "workers" in line
    assert not deadly.exists() and time.monotonic() - start < 60
    assert not list(tmp_path.rglob("*.parquet")) and not list(tmp_path.rglob("*.safetensors"))
    function(**options)  # and once more, without a kill


class SmallMemory(TimmEncoder):
    """A classifier on a device with memory for two images."""

    sizes: ClassVar[list[int]] = []

    def __call__(self, images):
        self.sizes.append(len(images))
        if len(images) > 2:
            raise torch.OutOfMemoryError
        return super().__call__(images)


def test_predict_goes_on_with_smaller_batches(shard, classifier, tmp_path, monkeypatch, capsys):
    folder = shard[0].parents[2] / "images"
    predict_images(**predict_from(classifier, folder, tmp_path))
    expected = pq.read_table(tmp_path / "scores.parquet").to_pandas()
    monkeypatch.setattr(predict, "TimmEncoder", SmallMemory)
    predict_images(**predict_from(classifier, folder, tmp_path))
    found = pq.read_table(tmp_path / "scores.parquet").to_pandas()
    np.testing.assert_allclose(found[PREDICTED], expected[PREDICTED], atol=1e-6)
    assert [n for n in SmallMemory.sizes if n > 2] == [4]
    assert "continuing in batches of 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmore"),
            "out of GPU memory",
        ),
        (MemoryError("Unable to allocate 9 TiB"), "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out of memory"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. "), "killed"),
        (OSError("Caught OSError in DataLoader worker process 0.\nOriginal Traceback"), "Caught"),
    ],
)
def test_what_a_machine_lacks_is_told_in_one_line(error, words):
    line = explain(error)
    assert words in line and "\n" not in line


def test_no_memory_to_cut_an_image_is_its_status(shard, tmp_path, monkeypatch):
    views = Preprocess.views

    def greedy(self, image, boxes):
        if image.getpixel((0, 0)) == third.getpixel((0, 0)):
            raise MemoryError
        return views(self, image, boxes)

    third = decode(shard[0].parents[2] / "images/3.png")
    monkeypatch.setattr(Preprocess, "views", greedy)
    encode_shard(**encode_into(shard, tmp_path))
    rows = pq.read_table(tmp_path / "0.parquet").to_pylist()
    assert {r["image_id"]: r["status"] for r in rows if r["status"] != "ok"} == {
        "3.png": "too_large"
    }


def test_names_that_are_no_text(classifier, tmp_path):
    bad = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jpg"))
    shutil.copy(tiny.noise(tmp_path / "a.png", 0), bad)
    (tmp_path / "classes.txt").write_text("dog\ncat\n")
    output = ["--output", tmp_path / "o.parquet"]
    classes = ["--classes", tmp_path / "classes.txt", "--split", "train=."]

    def refused(words: list) -> str:
        return told(lambda: cli.app(list(map(str, words)), standalone_mode=False))

    for command in (
        ["predict", "--model", classifier, *output, bad],
        ["predict", "--model", classifier, *output, tmp_path],
        ["manifest", "--reader", "folder", "--root", tmp_path, *classes, *output],
    ):
        assert r"caf\xe9.jpg" in refused(command)
    bad.unlink()
    bad.mkdir()
    tiny.noise(bad / "a.png", 0)
    command = ["manifest", "--reader", "folder", "--root", bad, *classes, *output]
    assert r"caf\xe9.jpg" in refused(command)


def test_a_table_that_names_impossible_files(tmp_path):
    (tmp_path / "data.csv").write_text("path\na\0b.png\n" + "x" * 5000 + ".png\n..\n")
    (tmp_path / "classes.txt").write_text("dog\ncat\n")
    manifest = tmp_path / "out/images.parquet"
    with redirect_stderr(io.StringIO()):
        dataset = tiny.Dataset(
            reader="table",
            root=tmp_path / "data.csv",
            classes=tmp_path / "classes.txt",
            grid=(2, 2),
            shard_size=5,
            max_pixels=tiny.MAX_PIXELS,
            max_failed_share=1,
        )
        tiny.make_manifest(dataset=dataset, output=manifest)
    assert pq.read_table(manifest)["width"].to_pylist() == [0, 0, 0]
