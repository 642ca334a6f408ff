"""A mixed folder: what is read, what is not, and the messages before anything is encoded."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
import tiny
import yaml
from messages import message_of

from cdul_steps.config import Dataset
from cdul_steps.data.images import decode
from cdul_steps.data.readers import read_dataset
from cdul_steps.data.tables import read_facts
from cdul_steps.report.sections import _data_section
from cdul_steps.steps.manifest import make_manifest
from cdul_steps.tools.doctor import examine

SAMPLES = Path(__file__).with_name("samples")
READ = ["IMG_1.HEIC", "a.jfif", "b.jpe", "c.heif", "d.hif", "e.avif", "f.PNG", "nosuffix", "x.jpg"]


@pytest.fixture
def mixed(tmp_path) -> Path:
    """Images with all kinds of names, and files that are not images."""
    folder = tmp_path / "mixed"
    for number, name in enumerate(READ):
        picture = tiny.noise(folder / "x.png", number)
        if name in ("IMG_1.HEIC", "c.heif", "d.hif", "x.jpg"):
            shutil.copy(SAMPLES / "plain.heic", folder / name)
        elif name == "e.avif":
            decode(picture).save(folder / name)
        else:
            decode(picture).save(folder / name, "PNG" if name == "f.PNG" else "JPEG")
        picture.unlink()
    for name in ("a.txt", "b.TXT", "c.mov", "README", "empty"):
        (folder / name).write_text("" if name == "empty" else "BM and II are no image")
    return folder


def make(folder: Path, output: Path, **changes) -> None:
    (output / "classes.txt").parent.mkdir(parents=True, exist_ok=True)
    (output / "classes.txt").write_text("cat\ndog\n")
    settings = {"root": folder, "classes": output / "classes.txt", "splits": {"train": "."}}
    dataset = Dataset(reader="folder", grid=(2, 2), **settings, **changes)
    make_manifest(dataset=dataset, output=output / "images.parquet")


def test_images_are_found_by_suffix_or_by_content(mixed):
    told = []
    records = read_dataset("folder", mixed, {"train": "."}, (), tell=told.append)
    assert [record.image_id for record in records] == READ
    assert all(decode(record.path).size for record in records)
    what = "non-image files: .txt (2), no suffix (2), .mov (1)"
    assert told == [f"{mixed}: left out 5 {what}"]


def test_log_and_report_say_what_was_left_out(mixed, tmp_path, capsys):
    make(mixed, tmp_path / "manifest")
    assert "manifest: " in capsys.readouterr().err
    images = tmp_path / "manifest/images.parquet"
    assert pq.read_table(images)["width"].to_pylist().count(0) == 0
    (line,) = read_facts(images)["left_out"]
    assert "left out 5 non-image files" in line
    section, _ = _data_section(SimpleNamespace(images=images, names=("mixed",)))
    assert ("left out or interpreted", line) in section.facts


def broken(folder: Path, count: int) -> Path:
    """A folder of ten images, some of which are half a HEIC with another suffix."""
    data = (SAMPLES / "plain.heic").read_bytes()
    for number in range(10):
        tiny.noise(folder / f"{number}.png", number)
        if number < count:
            (folder / f"{number}.png").write_bytes(data[: len(data) // 2])
    return folder


@pytest.mark.parametrize("count", [1, 3])
def test_headers_count_before_anything_is_encoded(tmp_path, count, capsys):
    folder = broken(tmp_path / "photos", count)
    expected = f"train: {count} of 10 images cannot be read, the first is {folder}/0.png: "
    if count == 1:
        make(folder, tmp_path / "manifest", max_failed_share=0.2)
        assert f"manifest: {expected}truncated: is HEIC, but" in capsys.readouterr().err
        return
    message = message_of(lambda: make(folder, tmp_path / "manifest", max_failed_share=0.2))
    assert message.startswith(f"{expected}truncated: is HEIC, but cut short")
    assert message.endswith("or raise max_failed_share (0.2)")
    assert not (tmp_path / "manifest/train").exists()


@pytest.mark.parametrize("count", [1, 3])
def test_the_doctor_looks_at_headers(tmp_path, count, repository, monkeypatch):
    monkeypatch.chdir(repository)
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    dataset = {
        "reader": "folder",
        "root": str(broken(tmp_path / "photos", count)),
        "classes": str(tmp_path / "classes.txt"),
        "splits": {"train": "."},
        "max_failed_share": 0.2,
    }
    run = {"datasets": ["photos"]}
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text(yaml.safe_dump({"datasets": {"photos": dataset}, "run": run}))
    found = {finding.check: finding for finding in examine([overlay], seconds=0)}
    assert found["data photos"].ok == (count == 1)
    text = found["data photos"].text
    assert f"train: {count} of 10 images cannot be read" in text and "is HEIC" in text
