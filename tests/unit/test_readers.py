import os
from pathlib import Path
from typing import get_args

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from layouts import write, write_voc
from messages import message_of

from cdul_steps.config import Dataset
from cdul_steps.data.classes import load_classes
from cdul_steps.data.readers import (
    READERS,
    ImageRecord,
    check_counts,
    fingerprint,
    read_dataset,
    read_folder,
    read_table,
    read_voc,
)

CLASSES = ("cat", "dog", "train")
BOTH = {"train": "trainval", "test": "test"}


@pytest.fixture
def voc(tmp_path):
    """A VOC tree whose class lists agree with its annotations."""
    root = tmp_path / "VOC2007"
    main = root / "ImageSets" / "Main"
    (root / "JPEGImages").mkdir(parents=True)
    write(main / "trainval.txt", "000012\n000003\n\n")
    write(main / "test.txt", "000001\n")
    for name, first, second in (("cat", "1", "-1"), ("dog", "0", " 1"), ("train", "-1", "-1")):
        write(main / f"{name}_trainval.txt", f"000012  {first}\n000003 {second}\n")
    for name in CLASSES:
        write(main / f"{name}_test.txt", "000001 -1\n")
    objects = {
        "000012": [("cat", 0), ("cat", 1), ("dog", 1), ("sofa", 0)],
        "000003": [("dog", None)],
        "000001": [],
    }
    for image_id, items in objects.items():
        body = "".join(
            f"<object><name>{name}</name><part><name>train</name></part>"
            + (f"<difficult>{flag}</difficult>" if flag is not None else "")
            + "</object>"
            for name, flag in items
        )
        write(root / "Annotations" / f"{image_id}.xml", f"<annotation>{body}</annotation>")
    return root


def without_lists(root: Path) -> Path:
    for path in (root / "ImageSets" / "Main").glob("*_*.txt"):
        path.unlink()
    return root


def test_voc_lists_give_records_in_file_order(voc):
    images = voc / "JPEGImages"
    assert read_voc(voc, BOTH, CLASSES) == [
        ImageRecord("000012", "train", str(images / "000012.jpg"), (0,), (1,)),
        ImageRecord("000003", "train", str(images / "000003.jpg"), (1,), ()),
        ImageRecord("000001", "test", str(images / "000001.jpg"), (), ()),
    ]


def test_voc_annotations_say_the_same_as_lists(voc):
    expected = read_voc(voc, BOTH, CLASSES)
    assert read_voc(without_lists(voc), BOTH, CLASSES) == expected


def test_voc_without_lists_and_annotation_is_unknown(voc):
    (without_lists(voc) / "Annotations" / "000001.xml").unlink()
    known = {r.image_id: r.positive for r in read_voc(voc, BOTH, CLASSES)}
    assert known == {"000012": (0,), "000003": (1,), "000001": None}


def test_voc_class_indices_follow_the_class_table(voc):
    assert read_voc(voc, BOTH, ("dog", "cat"))[0].positive == (1,)


def test_voc_class_named_train_is_not_the_split_train(voc):
    main = voc / "ImageSets" / "Main"
    write(main / "train_trainval.txt", "000012 1\n000003 -1\n")
    assert read_voc(voc, {"train": "trainval"}, CLASSES)[0].positive == (0, 2)
    assert "train.txt" in message_of(read_voc, voc, {"train": "train"}, CLASSES)


@pytest.mark.parametrize(
    ("file", "text", "parts"),
    [
        ("dog_trainval.txt", "000012 1\n000003 1\n000009 1\n", ["line 3", "'000009'", "not in"]),
        ("dog_trainval.txt", "000012 1\n000012 0\n000003 1\n", ["line 2", "'000012'", "twice"]),
        ("dog_trainval.txt", "000012 1\n000003 2\n", ["line 2", "'2'", "1, 0 or -1"]),
        ("dog_trainval.txt", "000012 1\n000003\n", ["line 2", "'000003'", "1, 0 or -1"]),
        ("dog_trainval.txt", "000012 1\n", ["'000003'", "trainval.txt, line 2", "missing here"]),
        ("trainval.txt", "000012\n000003\n000012\n", ["line 3", "'000012'", "line 1"]),
        ("trainval.txt", "000012 1\n", ["line 1", "an image id", "'000012 1'"]),
    ],
)
def test_voc_lists_that_disagree(voc, file, text, parts):
    path = write(voc / "ImageSets" / "Main" / file, text)
    message = message_of(read_voc, voc, BOTH, CLASSES)
    for part in [str(path), *parts]:
        assert part in message


def test_voc_lists_of_some_classes_only(voc):
    message = message_of(read_voc, voc, BOTH, ("cat", "kat", "cow"))
    assert "kat_trainval.txt" in message
    assert "cow" not in message


def test_voc_missing_parts(voc, tmp_path):
    message = message_of(read_voc, tmp_path, BOTH, CLASSES)
    assert "JPEGImages is not a folder" in message
    assert "VOCdevkit/VOC2007" in message
    message = message_of(read_voc, voc, {"test": "val"}, CLASSES)
    assert "val.txt: no such image list" in message
    assert "test, trainval" in message


@pytest.mark.parametrize(
    "text",
    [
        "<annotation><object>",
        "<annotation><object><difficult>0</difficult></object></annotation>",
        "<annotation><object><name>cat</name><difficult>x</difficult></object></annotation>",
        "<html><body>Not found</body></html>",
    ],
)
def test_voc_bad_annotation_is_named(voc, text):
    path = write(without_lists(voc) / "Annotations" / "000003.xml", text)
    assert str(path) in message_of(read_voc, voc, BOTH, CLASSES)


@given(
    images=st.dictionaries(
        st.from_regex("[0-9]{6}", fullmatch=True),
        st.lists(st.sampled_from(CLASSES), unique=True),
        min_size=1,
    ),
    classes=st.permutations(CLASSES),
)
def test_voc_as_written(tmp_path_factory, images, classes):
    root = tmp_path_factory.mktemp("voc")
    paths = write_voc(root, {"trainval": images}, CLASSES)
    records = read_dataset("voc", root, {"train": "trainval"}, classes)
    assert [r.path for r in records] == [p.as_posix() for p in paths]
    for record, shown in zip(records, images.values(), strict=True):
        assert {classes[c] for c in record.positive} == set(shown)


def test_folder_finds_images_recursively_sorted_by_id(tmp_path):
    for name in ("b.JPG", "a/z.png", "a.webp", "a/b/x.tiff", "notes.txt", ".x.jpg", ".h/x.jpg"):
        write(tmp_path / name)
    (tmp_path / "dir.jpg").mkdir()
    records = read_folder(tmp_path, {"train": "."}, CLASSES)
    assert [r.image_id for r in records] == ["a.webp", "a/b/x.tiff", "a/z.png", "b.JPG"]
    assert records[2] == ImageRecord("a/z.png", "train", str(tmp_path / "a/z.png"), None, ())


def test_folder_inner_split_keeps_its_images(tmp_path):
    for name in ("x.jpg", "test/x.jpg", "test/deep/x.jpg", "tests/x.jpg"):
        write(tmp_path / name)
    records = read_folder(tmp_path, {"train": ".", "test": "./test/"}, CLASSES)
    assert [(r.split, r.image_id) for r in records] == [
        ("train", "tests/x.jpg"),
        ("train", "x.jpg"),
        ("test", "test/deep/x.jpg"),
        ("test", "test/x.jpg"),
    ]


def test_folder_links(tmp_path):
    outside = write(tmp_path / "outside.jpg")
    root = tmp_path / "root"
    write(root / "sub" / "x.jpg")
    (root / "link.jpg").symlink_to(outside)
    (root / "gone.jpg").symlink_to(root / "nowhere")
    (root / "sub" / "loop").symlink_to(root)
    (root / "folder.jpg").symlink_to(root / "sub")
    ids = [r.image_id for r in read_folder(root, {"train": "."}, CLASSES)]
    assert ids == ["gone.jpg", "link.jpg", "sub/x.jpg"]


@pytest.mark.parametrize("own", ["none", "../other", "/", "file.jpg"])
def test_folder_split_must_be_inside_root(tmp_path, own):
    root = tmp_path / "root"
    write(root / "file.jpg")
    (tmp_path / "other").mkdir()
    message = message_of(read_folder, root, {"train": own}, CLASSES)
    assert "'train'" in message
    assert "sub-folder" in message


def test_folder_missing_root(tmp_path):
    assert "no such folder" in message_of(read_folder, tmp_path / "no", {"train": "."}, CLASSES)


def test_folder_error_while_walking_is_not_swallowed(tmp_path, monkeypatch):
    def scandir(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", scandir)
    assert "Permission denied" in message_of(read_folder, tmp_path, {"train": "."}, CLASSES)


def test_folder_name_that_is_not_utf8(tmp_path):
    bad = os.fsencode(tmp_path) + b"/caf\xe9.jpg"
    Path(os.fsdecode(bad)).touch()
    assert r"caf\xe9.jpg" in message_of(read_folder, tmp_path, {"train": "."}, CLASSES)


def test_a_suffix_that_is_not_utf8_is_told_in_characters_that_tables_hold(tmp_path):
    (tmp_path / "x.jpg").touch()
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/x.\xe9")).touch()
    told = []
    read_folder(tmp_path, {"train": "."}, CLASSES, told.append)
    (line,) = told
    assert r".\udce9 (1)" in line
    assert line.encode()


def table(folder: Path, text: str) -> Path:
    return write(folder / "table.csv", text)


def test_table_full(tmp_path):
    path = table(
        tmp_path,
        "note,image_id,path,split,dog,train,cat\n"
        "x,000001,a.jpg,tr,1,0,TRUE\n"
        'x,NA,"b,1.jpg",te,0,0,false\n'
        "x,000003,/abs/c.jpg,tr,,,\n"
        "x,000004,../d.jpg,other,7,7,7\n",
    )
    assert read_table(path, {"test": "te", "train": "tr"}, ("cat", "dog")) == [
        ImageRecord("NA", "test", str(tmp_path / "b,1.jpg"), (), ()),
        ImageRecord("000001", "train", str(tmp_path / "a.jpg"), (0, 1), ()),
        ImageRecord("000003", "train", "/abs/c.jpg", None, ()),
    ]


def test_table_path_alone(tmp_path):
    path = table(tmp_path, "\ufeffpath\nimages/000001.jpg\n\n../x.jpg\n")
    assert read_table(path, {"train": "whatever"}, CLASSES) == [
        ImageRecord("images/000001.jpg", "train", str(tmp_path / "images/000001.jpg"), None, ()),
        ImageRecord("../x.jpg", "train", str(tmp_path / "../x.jpg"), None, ()),
    ]


def test_table_class_names_compare_in_nfc(tmp_path):
    path = table(tmp_path, "path, cafe\u0301\nx.jpg,1\n")
    assert read_table(path, {"train": "."}, ("caf\u00e9",))[0].positive == (0,)


@pytest.mark.parametrize("labels", [[1, 0, None], [True, False, None], [1.0, 0.0, None]])
def test_table_parquet(tmp_path, labels):
    path = tmp_path / "table.parquet"
    columns = {"path": ["a.jpg", "b.jpg", "c.jpg"], "image_id": ["007", "008", "009"]}
    pq.write_table(pa.table({**columns, "cat": labels, "split": ["s", "s", "s"]}), path)
    assert read_table(path, {"train": "s"}, ("cat",)) == [
        ImageRecord("007", "train", str(tmp_path / "a.jpg"), (0,), ()),
        ImageRecord("008", "train", str(tmp_path / "b.jpg"), (), ()),
        ImageRecord("009", "train", str(tmp_path / "c.jpg"), None, ()),
    ]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("image;path\nx;y\n", ["no column 'path'", "image;path"]),
        ("", ["no column 'path'", "none"]),
        ("path,cat\nx,1\n", ["dog, train"]),
        ("path,cat,dog,train\nx,1,0,0\ny,1,,\n", ["line 3", "dog, train"]),
        ("path,cat,dog,train\nx,1,0,0.5\n", ["line 2", "'train'", "'0.5'"]),
        ("path,cat,dog,train\nx,1,0,-1\n", ["line 2", "'train'", "'-1'"]),
        ("path,cat,cat,dog,train\nx,1,0,1,1\n", ["'cat'", "twice"]),
        ("path\na,b.jpg\n", ["line 2", "2 cells", "quotes"]),
        ("path,image_id\n,1\n", ["line 2", "'path' is blank"]),
        ("path,image_id\nx, \n", ["line 2", "'image_id' is blank"]),
        ('path\n"x\n', ["cannot be read"]),
    ],
)
def test_table_mistakes(tmp_path, text, parts):
    path = table(tmp_path, text)
    message = message_of(read_table, path, {"train": "tr"}, CLASSES)
    for part in [str(path), *parts]:
        assert part in message


def test_table_without_split_column_serves_one_split(tmp_path):
    message = message_of(read_table, table(tmp_path, "path\nx\n"), BOTH, CLASSES)
    assert "no column 'split'" in message
    assert "train, test" in message


def test_table_files_that_are_no_tables(tmp_path):
    splits = {"train": "tr"}
    assert "no such file" in message_of(read_table, tmp_path / "x.csv", splits, CLASSES)
    assert "no such file" in message_of(read_table, tmp_path / "x.parquet", splits, CLASSES)
    assert ".csv or a .parquet" in message_of(read_table, tmp_path, splits, CLASSES)
    assert "read" in message_of(read_table, write(tmp_path / "b.parquet", "path"), splits, CLASSES)
    (tmp_path / "l.csv").write_bytes(b"path\ncaf\xe9.jpg\n")
    assert "utf-8" in message_of(read_table, tmp_path / "l.csv", splits, CLASSES)


def test_dataset_uses_the_named_reader(voc, tmp_path):
    assert read_dataset("voc", voc, BOTH, CLASSES) == read_voc(voc, BOTH, CLASSES)
    write(tmp_path / "images" / "x.jpg")
    assert len(read_dataset("folder", tmp_path / "images", {"train": "."}, CLASSES)) == 1
    assert len(read_dataset("table", table(tmp_path, "path\nx\n"), {"train": "."}, CLASSES)) == 1


def test_config_knows_the_readers():
    named = get_args(Dataset.model_fields["reader"].annotation)
    assert set(named) == {"demo", *READERS}


def test_labelled_only_keeps_difficult_and_leaves_out_unknown(voc):
    (without_lists(voc) / "Annotations" / "000001.xml").unlink()
    write(
        voc / "Annotations" / "000003.xml",
        "<annotation><object><name>dog</name><difficult>1</difficult></object></annotation>",
    )
    write(voc / "ImageSets" / "Main" / "trainval.txt", "000001\n000003\n000012\n")
    splits = {"train": "trainval"}
    kept = read_dataset("voc", voc, splits, CLASSES, labelled_only=True)
    assert [r.image_id for r in kept] == ["000003", "000012"]
    message = message_of(
        lambda: read_dataset("voc", voc, {"test": "test"}, CLASSES, labelled_only=True)
    )
    assert "has no labelled images" in message


def test_counts():
    records = [ImageRecord(str(i), "train", f"{i}.jpg", None) for i in range(3)]
    root = Path("data/coco2014")
    check_counts(records, {}, root)
    check_counts(records, {"train": 3, "test": 7}, root)
    message = message_of(check_counts, records, {"train": 82081}, root)
    for part in ("data/coco2014: ", "'train' has 3 images, not 82081", "expected_images: null"):
        assert part in message


def test_dataset_with_an_empty_split(tmp_path):
    path = table(tmp_path, "path,split\nx,a\n")
    message = message_of(read_dataset, "table", path, {"train": "a", "test": "b"}, CLASSES)
    assert str(path) in message
    assert "split 'test' ('b') has no images" in message


def test_dataset_with_one_id_twice(voc, tmp_path):
    path = table(tmp_path, "path,image_id,split\nx.jpg,7,a\ny.jpg,7,b\n")
    message = message_of(read_dataset, "table", path, {"train": "a", "test": "b"}, CLASSES)
    for part in ("'7'", "x.jpg (train)", "y.jpg (test)"):
        assert part in message
    message = message_of(read_dataset, "voc", voc, {"a": "test", "b": "test"}, CLASSES)
    assert "(a)" in message
    assert "(b)" in message


def test_fingerprint_notices_every_change(tmp_path):
    path = write(tmp_path / "x.jpg", "one")
    os.utime(path, ns=(1, 1))
    first = ImageRecord("x", "train", str(path), (1,), ())
    second = ImageRecord("y", "train", str(tmp_path / "none.jpg"), None, ())
    marks = [
        fingerprint(records)
        for records in (
            [first, second],
            [second, first],
            [first],
            [ImageRecord("x", "test", str(path), (1,), ()), second],
            [ImageRecord("x", "train", str(path), (), (1,)), second],
            [ImageRecord("x", "train", str(path), None, ()), second],
        )
    ]
    os.utime(path, ns=(1, 2))
    marks.append(fingerprint([first, second]))
    path.write_text("longer")
    os.utime(path, ns=(1, 1))
    marks.append(fingerprint([first, second]))
    path.unlink()
    marks.append(fingerprint([first, second]))
    assert len(set(marks)) == len(marks)
    assert all(len(mark) == 32 for mark in marks)


def test_fingerprint_is_repeatable(voc):
    records = read_voc(voc, BOTH, CLASSES)
    assert fingerprint(iter(records)) == fingerprint(read_voc(voc, BOTH, CLASSES))


@pytest.mark.skipif("CDUL_TEST_DATA" not in os.environ, reason="CDUL_TEST_DATA is not set")
def test_voc2007_photographs():
    root = Path(os.environ["CDUL_TEST_DATA"]) / "voc2007" / "VOCdevkit" / "VOC2007"
    classes = load_classes(Path(__file__).parents[2] / "config" / "classes" / "voc.yaml").names
    records = read_dataset("voc", root, BOTH, classes)
    for split, own, count in (("train", "trainval", 1000), ("test", "test", 600)):
        part = [r for r in records if r.split == split]
        assert len(part) == count
        assert all(Path(r.path).is_file() for r in part)
        for index, name in enumerate(classes):
            text = (root / "ImageSets" / "Main" / f"{name}_{own}.txt").read_text()
            values = text.split()[1::2]
            assert sum(index in r.positive for r in part) == values.count("1"), name
            assert sum(index in r.difficult for r in part) == values.count("0"), name
