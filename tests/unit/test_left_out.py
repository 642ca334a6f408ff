"""What readers leave out, and that every command that reads a data set reports it."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from forms import FORMS, SHOWN, every_form, read_form, write_form
from layouts import draw, write
from messages import message_of
from typer.testing import CliRunner

from cdul_steps import cli
from cdul_steps.data.readers import folder, read_dataset
from cdul_steps.data.readers.folder import SERVICE_FOLDERS
from cdul_steps.data.readers.record import pattern_of
from cdul_steps.tools.doctor import examine

KEPT = ["a.jpg", "sub/b.png"]


@pytest.fixture
def photos(tmp_path) -> Path:
    """Two images, and the other files on a network disk."""
    root = tmp_path / "photos"
    for name in KEPT:
        draw(root / name)
    for name in ("sub/@eaDir/b.png/SYNOPHOTO_THUMB_M.jpg", "#recycle/gone.jpg", ".hidden/c.jpg"):
        draw(root / name)
    for name in (".DS_Store", "sub/._b.png", "notes.txt", "sub/b.xmp", "c.xmp"):
        write(root / name)
    draw(root / "raw/d.jpg")
    draw(root / "sub/b_thumb.jpg")
    return root


def read(root: Path, **options) -> tuple[list[str], list[str]]:
    """The ids and the messages, without the root."""
    told: list[str] = []
    records = read_dataset("folder", root, {"train": "."}, (), tell=told.append, **options)
    return [r.image_id for r in records], [line.removeprefix(f"{root}: ") for line in told]


def test_what_is_hidden_or_the_systems_is_left_out_and_told(photos):
    ids, told = read(photos)
    assert ids == ["a.jpg", "raw/d.jpg", "sub/b.png", "sub/b_thumb.jpg"]
    assert sorted(told) == [
        "left out 1 hidden folder: .hidden (1)",
        "left out 2 folders of the system: #recycle (1), @eaDir (1)",
        "left out 2 hidden files: .DS_Store (1), ._b.png (1)",
        "left out 3 non-image files: .xmp (2), .txt (1)",
    ]


@pytest.mark.parametrize("name", SERVICE_FOLDERS)
def test_every_folder_of_a_system_in_any_case(name, tmp_path):
    for place in (name, name.upper(), f"deep/{name}"):
        write(tmp_path / place / "x.jpg")
    write(tmp_path / "x.jpg")
    assert read(tmp_path)[0] == ["x.jpg"]


def test_an_excluded_folder_is_not_entered(photos, monkeypatch):
    entered = []
    walk = folder.os.walk
    monkeypatch.setattr(
        folder.os, "walk", lambda top, **o: (entered.append(x[0]) or x for x in walk(top, **o))
    )
    read(photos, exclude=["raw"])
    assert {Path(name).name for name in entered} == {"photos", "sub"}


def test_patterns_leave_out_files_and_folders(photos):
    ids, told = read(photos, exclude=["*_thumb.*", "raw"])
    assert ids == KEPT
    assert "left out 1 folder by 'exclude': raw (1)" in told
    assert "left out 1 image by 'exclude': *_thumb.* (1)" in told


@pytest.mark.parametrize(
    ("pattern", "out"),
    [
        ("b.jpg", ["a/b.jpg", "b.jpg"]),
        ("a", ["a/b.jpg", "a/c/d.jpg"]),
        ("a/", ["a/b.jpg", "a/c/d.jpg"]),
        ("a/c", ["a/c/d.jpg"]),
        ("a/*.jpg", ["a/b.jpg", "a/c/d.jpg"]),
        ("*/b.jpg", ["a/b.jpg"]),
        ("?.jpg", ["a/b.jpg", "a/c/d.jpg", "b.jpg"]),
        ("A", []),
    ],
)
def test_patterns(pattern, out):
    paths = ["a/b.jpg", "a/c/d.jpg", "b.jpg"]
    assert [path for path in paths if pattern_of(path, ["x", pattern])] == out


@every_form
def test_every_reader_knows_patterns(form, tmp_path):
    names = {"voc": "1.jpg", "coco": "COCO_a_000000000001.jpg"}
    pattern = names.get(FORMS[form][0], "1")
    root = write_form(tmp_path / "set", form)
    told: list[str] = []
    found = read_form(root, form, exclude=[pattern], tell=told.append)
    assert found.keys() == SHOWN.keys() - {"1"}
    assert f"{root}: left out 1 image by 'exclude': {pattern} (1)" in told


@every_form
def test_images_without_a_label_are_counted(form, tmp_path):
    told: list[str] = []
    root = write_form(tmp_path / "set", form)
    assert read_form(root, form, labelled_only=True, tell=told.append).keys() == {"1", "2"}
    assert f"{root}: left out 1 image without a label" in told


@pytest.mark.parametrize("form", ["table, csv", "nuswide, listed"])
def test_rows_of_other_splits_are_counted(form, tmp_path):
    root = write_form(tmp_path / "set", form)
    if form == "table, csv":
        lines = root.read_text().splitlines()
        write(root, "\n".join([f"{lines[0]},split", *(f"{line},a" for line in lines[1:])]))
        extra = "9,0,0,0,b\n"
        write(root, root.read_text() + f"\n{extra}")
    else:
        write(root, root.read_text() + "9,\"['dog']\",b\n")
    told: list[str] = []
    assert read_form(root, form, tell=told.append).keys() == SHOWN.keys()
    assert f"{root}: left out 1 row of other splits: b (1)" in told


def test_nothing_left_says_what_was_left_out(photos):
    message = message_of(lambda: read(photos, exclude=["*.jpg", "*.png"]))
    assert "has no images" in message and "by 'exclude': *.jpg (3), *.png (1)" in message


# Links


def test_a_linked_folder_is_entered_once(tmp_path):
    root, disk = tmp_path / "root", tmp_path / "disk"
    for name in ("x.jpg", "deep/y.jpg"):
        write(disk / name)
    write(root / "sub/z.jpg")
    (root / "one").symlink_to(disk)
    (root / "two").symlink_to(disk / "deep")
    (disk / "back").symlink_to(root)
    (root / "sub/up").symlink_to(root)
    (root / "sub/above").symlink_to(tmp_path)
    (root / "sub/gone").symlink_to(tmp_path / "nowhere")
    ids, told = read(root)
    assert ids == ["one/deep/y.jpg", "one/x.jpg", "sub/z.jpg"]
    (line,) = [line for line in told if "links" in line]
    assert line.startswith("left out 4 links back into the data set: ")
    for name in ("two (1)", "back (1)", "up (1)", "above (1)"):
        assert name in line


def test_a_link_to_another_split_is_not_entered(tmp_path):
    write(tmp_path / "root/train/x.jpg")
    write(tmp_path / "elsewhere/y.jpg")
    (tmp_path / "root/test").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root/train/more").symlink_to(tmp_path / "elsewhere")
    records = read_dataset("folder", tmp_path / "root", {"train": "train", "test": "test"}, ())
    assert [(r.split, r.image_id) for r in records] == [
        ("train", "train/x.jpg"),
        ("test", "test/y.jpg"),
    ]


# Commands


def test_the_manifest_says_it(photos, tmp_path):
    classes = write(tmp_path / "c.txt", "cat\ndog\n")
    output = tmp_path / "out/images.parquet"
    words = ["--reader", "folder", "--root", photos, "--classes", classes, "--output", output]
    words += ["--split", "train=.", "--exclude", "raw", "--exclude", "*_thumb.*"]
    done = CliRunner().invoke(cli.app, ["manifest", *map(str, words)])
    assert done.exit_code == 0, done.exception
    assert pq.read_table(output)["image_id"].to_pylist() == KEPT
    assert f"manifest: {photos}: left out 2 folders of the system" in done.stderr
    assert "by 'exclude': raw (1)" in done.stderr


def test_the_doctor_says_it(photos, tmp_path, repository, monkeypatch):
    monkeypatch.chdir(repository)
    classes = write(tmp_path / "c.txt", "cat\ndog\n")
    dataset = {"reader": "folder", "root": str(photos), "classes": str(classes)}
    dataset |= {"splits": {"train": "."}, "exclude": ["raw"]}
    config = {"datasets": {"mine": dataset}, "run": {"datasets": ["mine"]}}
    write(tmp_path / "o.yaml", yaml.safe_dump(config))
    findings = {f.check: f for f in examine([tmp_path / "o.yaml"], seconds=0)}
    found = findings["data mine"]
    assert found.ok and found.values["images"] == {"train": 3}
    assert "folders of the system: #recycle (1), @eaDir (1)" in found.text
    assert "by 'exclude': raw (1)" in found.text
