import csv
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cdul_steps.config import Dataset
from cdul_steps.data.manifest import read_shard, read_split, read_truth
from cdul_steps.data.tables import read_facts
from cdul_steps.errors import UserError
from cdul_steps.method.snippets import view_boxes
from cdul_steps.steps import manifest
from cdul_steps.steps.manifest import assign_rows, make_manifest

SHARD = 2


class Folder:
    """A folder of images and its manifest, with two images per shard."""

    def __init__(self, path):
        self.images, self.output = path / "images", path / "manifest" / "images.parquet"
        self.classes = path / "classes.txt"
        self.classes.write_text("dog\ncat\n")

    def draw(self, *names, size=(8, 6)):
        for name in names:
            path = self.images / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", size).save(path)

    def make(self, **changes):
        arguments = {
            "reader": "folder",
            "root": self.images,
            "classes": self.classes,
            "splits": {"train": "."},
            "grid": (3, 3),
            "shard_size": SHARD,
            "max_pixels": 10_000,
            "max_failed_share": 1,
        }
        output = changes.pop("output", self.output)
        make_manifest(dataset=Dataset(**{**arguments, **changes}), output=output)
        for path in self.shards():
            os.utime(path, ns=(1, 1))  # everything written later is newer

    def shards(self, split="train"):
        folder = self.output.parent / split
        return sorted(folder.glob("[0-9]*.parquet"), key=lambda p: int(p.stem))

    def remade(self, **changes):
        """Make it again; returns the numbers of the shards that were written."""
        before = {path: path.stat().st_ino for path in self.shards()}
        self.make(**changes)
        return [int(p.stem) for p in self.shards() if before.get(p) != p.stat().st_ino]

    def rows(self):
        table = pq.read_table(self.output)
        return dict(zip(table["image_id"].to_pylist(), table["row"].to_pylist(), strict=True))


@pytest.fixture
def folder(tmp_path):
    folder = Folder(tmp_path)
    folder.draw("a", "b", "c", "d", "e")
    folder.make()
    return folder


def test_headers_are_read_a_few_at_a_time(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "_TOGETHER", 2)
    folder.make(output=tmp_path / "again/images.parquet")
    assert (tmp_path / "again/images.parquet").read_bytes() == folder.output.read_bytes()


def test_columns_and_types(folder):
    schema = pq.read_schema(folder.output)
    indices = pa.list_(pa.int32())
    expected = {
        "image_id": pa.string(),
        "split": pa.string(),
        "path": pa.string(),
        "width": pa.int32(),
        "height": pa.int32(),
        "shard": pa.int32(),
        "row": pa.int64(),
        "known": pa.bool_(),
        "positive": indices,
        "difficult": indices,
    }
    for name, kind in expected.items():
        # Arrow also compares the names of list items, which do not matter.
        assert str(schema.field(name).type).split("<")[0] == str(kind).split("<")[0], name
    table = pq.read_table(folder.output).to_pylist()
    assert [image["image_id"] for image in table] == ["a.png", "b.png", "c.png", "d.png", "e.png"]
    assert [image["row"] for image in table] == [0, 1, 2, 3, 4]
    assert [image["shard"] for image in table] == [0, 0, 1, 1, 2]
    assert {(image["width"], image["height"]) for image in table} == {(8, 6)}
    assert not any(image["known"] for image in table)
    assert table[0]["path"] == (folder.images / "a.png").as_posix()
    facts = read_facts(folder.output)
    assert facts["classes"] == ["dog", "cat"]
    assert facts["rows"] == {"train": 5}


def test_a_shard_has_a_row_a_view(folder):
    assert [path.name for path in folder.shards()] == ["0.parquet", "1.parquet", "2.parquet"]
    table = pq.read_table(folder.shards()[0])
    for name in ("x0", "y0", "x1", "y1", "view"):
        assert table.schema.field(name).type == pa.int32()
    assert table["view"].to_pylist() == 2 * list(range(10))
    assert table["image_id"].to_pylist() == 10 * ["a.png"] + 10 * ["b.png"]
    facts, images, boxes = read_shard(folder.shards()[1])
    assert (facts["split"], facts["shard"], facts["shard_size"]) == ("train", 1, SHARD)
    assert images.to_pylist() == [
        {"image_id": f"{name}.png", "path": f"{folder.images}/{name}.png", "row": row}
        for name, row in (("c", 2), ("d", 3))
    ]
    np.testing.assert_array_equal(boxes, [view_boxes(8, 6), view_boxes(8, 6)])


def test_the_same_input_gives_the_same_bytes(folder, tmp_path):
    other = tmp_path / "other" / "images.parquet"
    folder.make(output=other)
    assert other.read_bytes() == folder.output.read_bytes()
    for path in folder.shards():
        assert (other.parent / "train" / path.name).read_bytes() == path.read_bytes()
    before = folder.output.read_bytes()
    assert folder.remade() == []
    assert folder.output.read_bytes() == before


def test_new_images_come_last_and_touch_only_the_shards_they_are_in(folder):
    folder.draw("0", "f", "g")
    assert folder.remade() == [2, 3]
    rows = folder.rows()
    assert [rows[f"{name}.png"] for name in "abcde"] == [0, 1, 2, 3, 4]
    assert [rows[f"{name}.png"] for name in "0fg"] == [5, 6, 7]
    assert read_shard(folder.shards()[2])[1]["image_id"].to_pylist() == ["e.png", "0.png"]
    assert [path.stat().st_mtime_ns for path in folder.shards()[:2]] == [1, 1]


def test_a_removed_image_rewrites_nothing_and_its_row_stays_empty(folder):
    (folder.images / "b.png").unlink()
    assert folder.remade() == []
    assert "b.png" not in folder.rows()
    folder.draw("f", "g")
    assert folder.remade() == [2, 3]
    assert 1 not in folder.rows().values()
    assert [folder.rows()[f"{name}.png"] for name in "fg"] == [5, 6]


def test_an_image_that_comes_back_gets_a_row_of_its_own(folder):
    (folder.images / "e.png").unlink()
    folder.make()
    folder.draw("e")
    folder.make()
    assert folder.rows()["e.png"] == 5


def test_a_shard_whose_images_all_went_away_stays(folder):
    for name in "ab":
        (folder.images / f"{name}.png").unlink()
    assert folder.remade() == []
    assert len(folder.shards()) == 3


def test_a_shard_without_images_can_be_made_anew(folder):
    for name in "ab":
        (folder.images / f"{name}.png").unlink()
    folder.shards()[0].unlink()
    assert folder.remade() == [0]
    _, images, boxes = read_shard(folder.shards()[0])
    assert (len(images), boxes.shape) == (0, (0, 10, 4))


def test_a_changed_image_rewrites_its_shard(folder):
    folder.draw("d", size=(5, 5))
    os.utime(folder.images / "d.png", ns=(5, 5))
    assert folder.remade() == [1]
    np.testing.assert_array_equal(read_shard(folder.shards()[1])[2][1], view_boxes(5, 5))
    os.utime(folder.images / "d.png", ns=(6, 6))
    assert folder.remade() == [1]


@pytest.mark.parametrize("changes", [{"grid": (2, 2)}, {"shard_size": 3}])
def test_another_layout_lays_all_anew(folder, changes):
    (folder.images / "a.png").unlink()
    folder.make(**changes)
    assert list(folder.rows().values()) == [0, 1, 2, 3]
    size, grid = changes.get("shard_size", SHARD), changes.get("grid", (3, 3))
    assert [int(path.stem) for path in folder.shards()] == list(range(-(-4 // size)))
    for path in folder.shards():
        facts, images, boxes = read_shard(path)
        assert (facts["grid"], facts["shard_size"]) == ([list(grid)], size)
        assert boxes.shape == (len(images), 1 + grid[0] * grid[1], 4)
    assert folder.remade(**changes) == []


def test_several_overlapping_grids(folder):
    grids = [(2, 2), (3, 1)]
    folder.make(grid=grids, overlap=0.5)
    facts, _, boxes = read_shard(folder.shards()[0])
    assert (facts["grid"], facts["overlap"], facts["views"]) == ([[2, 2], [3, 1]], 0.5, 8)
    np.testing.assert_array_equal(boxes, 2 * [view_boxes(8, 6, grids, 0.5)])
    assert read_facts(folder.output)["layout"]["views"] == 8
    assert folder.remade(grid=grids, overlap=0.5) == []
    assert folder.remade(grid=grids, overlap=0.25) == [0, 1, 2]


def test_a_class_list_does_not_touch_the_shards(folder):
    folder.classes.write_text("owl\n")
    assert folder.remade() == []
    assert read_facts(folder.output)["classes"] == ["owl"]


def test_files_of_others_in_the_folder_are_left_alone(folder):
    note = folder.output.parent / "train" / "notes.parquet"
    pq.write_table(pa.table({"a": [1]}), note)
    stale = folder.output.parent / "train" / "9.parquet"
    stale.write_bytes(folder.shards()[0].read_bytes())
    folder.make()
    assert note.exists()
    assert not stale.exists()


def test_a_corrupt_file_has_no_size_and_keeps_its_place(folder):
    (folder.images / "c.png").write_bytes(b"no image")
    folder.draw("d", size=(101, 100))  # more than max_pixels
    assert folder.remade() == [1]
    table = pq.read_table(folder.output).to_pylist()
    assert [(i["width"], i["height"]) for i in table] == [(8, 6), (8, 6), (0, 0), (0, 0), (8, 6)]
    _, images, boxes = read_shard(folder.shards()[1])
    assert images["row"].to_pylist() == [2, 3]
    assert not boxes.any()


def test_splits_have_rows_of_their_own(tmp_path):
    folder = Folder(tmp_path)
    folder.draw("train/a", "train/b", "train/c", "test/x")
    folder.make(splits={"train": "train", "test": "test"})
    assert folder.rows() == {"train/a.png": 0, "train/b.png": 1, "train/c.png": 2, "test/x.png": 0}
    assert len(folder.shards("train")) == 2
    assert len(folder.shards("test")) == 1
    found = read_split(folder.output, "test", ["image_id"])
    assert found["image_id"].to_pylist() == ["test/x.png"]
    with pytest.raises(UserError, match=r"no image of split 'val'; it has train, test"):
        read_split(folder.output, "val", ["image_id"])


def test_truth_is_lists_of_class_indices(tmp_path):
    folder = Folder(tmp_path)
    folder.draw("a", "b", "c")
    table = folder.images / "table.csv"
    with table.open("w", newline="") as file:
        rows = [["path", "dog", "cat"], ["a.png", 0, 1], ["b.png", "", ""], ["c.png", 0, 0]]
        csv.writer(file).writerows(rows)
    folder.make(reader="table", root=table)
    images = pq.read_table(folder.output)
    assert images["known"].to_pylist() == [True, False, True]
    assert images["positive"].to_pylist() == [[1], [], []]
    assert images["difficult"].to_pylist() == [[], [], []]
    truth = read_truth(folder.output, ["dog", "cat"])
    assert truth["image_id"].to_pylist() == ["a.png", "c.png"]
    with pytest.raises(UserError, match="not the same class table"):
        read_truth(folder.output, ["cat", "dog"])


def table_of(folder, text):
    """Images a.png, b.png and c.png, and a table of their truth."""
    folder.draw("a", "b", "c")
    for name in "abc":
        os.utime(folder.images / f"{name}.png", ns=(5, 5))
    table = folder.images / "table.csv"
    table.write_text(text)
    return {"reader": "table", "root": table}


def test_truth_does_not_reach_the_shards(tmp_path):
    shards = []
    for truth in ("1,0", "0,1", ","):
        folder = Folder(tmp_path)
        folder.output = tmp_path / truth / "images.parquet"
        rows = "".join(f"{name}.png,{truth}\n" for name in "abc")
        folder.make(**table_of(folder, "path,dog,cat\n" + rows))
        shards.append([path.read_bytes() for path in folder.shards()])
    assert len(shards[0]) == 2
    assert shards[0] == shards[1] == shards[2]


def test_labelled_only(tmp_path):
    folder = Folder(tmp_path)
    source = table_of(folder, "path,dog,cat\na.png,1,0\nb.png,0,0\nc.png,,\n")
    folder.make(**source)
    assert list(folder.rows()) == ["a.png", "b.png", "c.png"]
    folder.make(**source, labelled_only=True)
    assert list(folder.rows()) == ["a.png"]


@pytest.mark.parametrize(
    ("rows", "unseen"),
    [
        ("a.png,1,0\nb.png,0,1\nc.png,0,0\n", None),
        ("a.png,1,0\nb.png,,\nc.png,1,0\n", "cat"),
        ("a.png,0,0\nb.png,0,0\nc.png,0,0\n", "dog, cat"),
        ("a.png,,\nb.png,,\nc.png,,\n", None),
    ],
)
def test_classes_that_no_image_shows_are_noted(tmp_path, capsys, rows, unseen):
    folder = Folder(tmp_path)
    folder.make(**table_of(folder, "path,dog,cat\n" + rows))
    lines = [line for line in capsys.readouterr().err.splitlines() if "no image shows" in line]
    expected = f"manifest: no image shows {unseen}; check the spelling of the classes"
    assert lines == ([expected] if unseen else [])


@pytest.mark.parametrize(("rows", "unknown"), [("1,0\nb.png,,", 1), ("1,0\nb.png,0,1", None)])
def test_images_of_unknown_truth_are_noted(tmp_path, capsys, rows, unknown):
    folder = Folder(tmp_path)
    folder.make(**table_of(folder, f"path,dog,cat\na.png,{rows}\n"))
    noted = f"the truth is not known for {unknown} of 2 images" in capsys.readouterr().err
    assert noted == (unknown is not None)


def test_image_files_that_are_not_there(tmp_path, capsys):
    folder = Folder(tmp_path)
    source = table_of(folder, "path\na.png\nb.png\nc.png\n")
    folder.make(**source)
    assert "missing" not in capsys.readouterr().err
    (folder.images / "b.png").unlink()
    folder.make(**source)
    (line,) = [x for x in capsys.readouterr().err.splitlines() if "are missing" in x]
    assert "train: 1 of 3 image files are missing" in line
    assert str(folder.images / "b.png") in line
    assert list(folder.rows()) == ["a.png", "b.png", "c.png"]
    with pytest.raises(UserError, match=r"1 of 3 image .*b\.png; .* max_failed_share \(0.3\)"):
        folder.make(**source, max_failed_share=0.3)
    for name in "ac":
        (folder.images / f"{name}.png").unlink()
    with pytest.raises(UserError, match=r"3 of 3 image files are missing.*a\.png; check 'root'"):
        folder.make(**source)


def test_read_shard_refuses_other_tables(folder):
    with pytest.raises(UserError, match="not the manifest of a shard"):
        read_shard(folder.output)


def test_assign_rows():
    assert assign_rows(["a", "b"], {}, 0) == ([0, 1], 2)
    assert assign_rows(["n", "b", "m", "a"], {"a": 0, "b": 1, "gone": 2}, 3) == ([3, 1, 4, 0], 5)
