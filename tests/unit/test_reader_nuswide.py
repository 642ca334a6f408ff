import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from layouts import write, write_nuswide, write_nuswide_formatted, write_nuswide_listed
from messages import message_of

from cdul_steps.data.readers import ImageRecord, read_dataset
from cdul_steps.data.readers.nuswide import read_nuswide

CLASSES = ("airport", "clouds", "sky")
SPLITS = {"train": "Train", "test": "Test"}
FORMATTED = {"train": "formatted_train", "test": "formatted_val"}
LISTED = {"train": "train", "test": "val"}
IMAGES = (
    {"actor/0001_212449.jpg": ["sky", "clouds"], "zoo/0002_7.jpg": []},
    {"actor/0003_55.jpg": ["airport"]},
)


def truth(splits):
    return dict(zip(splits.values(), IMAGES, strict=True))


@pytest.fixture
def root(tmp_path):
    """A folder with both the official lists and the arrays."""
    write_nuswide(tmp_path / "nus", truth(SPLITS), CLASSES)
    write_nuswide_formatted(tmp_path / "nus", truth(FORMATTED), CLASSES)
    return tmp_path / "nus"


@pytest.fixture
def listed(tmp_path):
    write_nuswide_listed(tmp_path / "nus_wid_data.csv", truth(LISTED))
    return tmp_path / "nus_wid_data.csv"


def expected(top):
    return [
        ImageRecord("actor/0001_212449.jpg", "train", f"{top}/actor/0001_212449.jpg", (1, 2)),
        ImageRecord("zoo/0002_7.jpg", "train", f"{top}/zoo/0002_7.jpg", ()),
        ImageRecord("actor/0003_55.jpg", "test", f"{top}/actor/0003_55.jpg", (0,)),
    ]


@pytest.mark.parametrize("splits", [SPLITS, FORMATTED])
def test_the_folder(root, splits):
    assert read_dataset("nuswide", root, splits, CLASSES) == expected(root / "Flickr")


def test_the_table(listed):
    assert read_dataset("nuswide", listed, LISTED, CLASSES) == expected(listed.parent)


@pytest.mark.parametrize("splits", [SPLITS, FORMATTED])
def test_indices_are_those_of_the_class_table(root, splits):
    records = read_nuswide(root, splits, ("sky", "airport"))
    assert [r.positive for r in records] == [(0,), (), (1,)]


def test_concepts_beside_the_arrays(root):
    (root / "ConceptsList" / "Concepts81.txt").rename(root / "Concepts81.txt")
    assert read_nuswide(root, FORMATTED, CLASSES) == expected(root / "Flickr")
    (root / "Concepts81.txt").unlink()
    message = message_of(read_nuswide, root, FORMATTED, CLASSES)
    assert "Concepts81.txt: cannot be read: No such file" in message


def test_images_without_labels_are_left_out_on_request_only(root):
    kept = read_dataset("nuswide", root, SPLITS, CLASSES, labelled_only=True)
    assert [r.image_id for r in kept] == ["actor/0001_212449.jpg", "actor/0003_55.jpg"]


@pytest.mark.parametrize(
    ("own", "where"), [("Train", "Labels_cloud_Train.txt"), ("formatted_train", "Concepts81.txt")]
)
def test_an_unknown_class_names_the_nearest_concept(root, own, where):
    message = message_of(read_nuswide, root, {"train": own}, ("sky", "cloud"))
    assert where in message
    assert message.endswith("did you mean 'clouds'?")


def test_a_class_that_the_table_does_not_know(listed):
    message = message_of(read_nuswide, listed, LISTED, ("airport", "cloud", "sky"))
    assert message == f"{listed}: no image has the label 'cloud'; did you mean 'clouds'?"


def test_a_part_of_the_table(listed):
    assert [r.positive for r in read_nuswide(listed, LISTED, ("sky", "airport"))] == [
        (0,),
        (),
        (1,),
    ]
    write_nuswide_listed(listed, {"train": {"a.jpg": ["sky"]}})
    (record,) = read_nuswide(listed, {"train": "train"}, CLASSES)
    assert record.positive == (2,)


@pytest.mark.parametrize("text", ["0\n", "0\n1\n0\n", "0\n2\n", "01\n\n", "0\0\n1\n", ""])
def test_labels_that_do_not_fit_the_list(root, text):
    path = write(root / "Groundtruth/TrainTestLabels/Labels_sky_Train.txt", text)
    message = message_of(read_nuswide, root, SPLITS, CLASSES)
    for part in (str(path), "each of the 2 images", "TrainImagelist.txt"):
        assert part in message


@pytest.mark.parametrize(
    "name",
    [
        "Flickr",
        "ImageList/TrainImagelist.txt",
        "Groundtruth/TrainTestLabels/Labels_sky_Train.txt",
        "Groundtruth",
        "formatted_train_images.npy",
        "formatted_train_labels.npy",
    ],
)
def test_a_missing_file(root, name):
    (root / name).rename(root / "elsewhere")
    splits = FORMATTED if name.endswith("npy") else SPLITS
    message = message_of(read_nuswide, root, splits, CLASSES)
    assert str(root / name) in message
    assert "o such f" in message


def test_an_unknown_split_lists_those_there_are(root, listed):
    message = message_of(read_nuswide, root, {"train": "train"}, CLASSES)
    assert message.endswith("Train, Test, formatted_train, formatted_val")
    message = message_of(read_nuswide, listed, {"train": "test"}, CLASSES)
    assert "no split is called 'test'; known: train, val" in message


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        (np.array(["a/1.jpg"]), np.zeros((2, 3))),
        (np.array(["a/1.jpg"]), np.zeros((1, 4))),
        (np.array(["a/1.jpg"]), np.zeros(3)),
        (np.array([1.0]), np.zeros((1, 3))),
        (np.array([["a/1.jpg"]]), np.zeros((1, 3))),
        (np.array(["a/1.jpg"]), np.full((1, 3), -1)),
        (np.array(["a/1.jpg"]), np.full((1, 3), np.nan)),
        (np.array(["a/1.jpg", None], object), np.zeros((2, 3))),
        (np.array(["a/1.jpg"]), np.zeros((1, 3), [("a", "f4")])),
        (np.array(["a/1.jpg"]), np.full((1, 3), "1")),
    ],
)
def test_arrays_that_do_not_fit(root, images, labels):
    np.save(root / "formatted_train_images.npy", images)
    np.save(root / "formatted_train_labels.npy", labels)
    assert "formatted_train_" in message_of(read_nuswide, root, FORMATTED, CLASSES)


HUGE = "{'descr': '<f8', 'fortran_order': False, 'shape': (99999999999999, 9)}".ljust(117) + "\n"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"<html>Virus scan warning</html>",
        b"PK\x03\x04 and no more",
        b"\x93NUMPY\x01\x00\x76\x00" + HUGE.encode(),
        b"\x93NUMPY\x01\x00\x04\x00{'de",
    ],
)
def test_arrays_that_are_none(root, content):
    (root / "formatted_train_labels.npy").write_bytes(content)
    message = message_of(read_nuswide, root, FORMATTED, CLASSES)
    assert "formatted_train_labels.npy: not a complete NumPy array file" in message
    assert "pickle" not in message


def test_arrays_of_an_archive(root):
    with (root / "formatted_train_labels.npy").open("wb") as file:
        np.savez(file, labels=np.zeros((2, 3)))
    message = message_of(read_nuswide, root, FORMATTED, CLASSES)
    assert "not a complete NumPy array file" in message


def test_a_list_without_images(root):
    write(root / "ImageList/TrainImagelist.txt", "\n")
    assert message_of(read_nuswide, root, SPLITS, CLASSES).endswith(
        "lists no image; download it again"
    )


def test_a_concept_that_is_there_twice(root):
    write(root / "ConceptsList/Concepts81.txt", "airport\nclouds\nclouds\n")
    message = message_of(read_nuswide, root, FORMATTED, ("airport", "clouds"))
    assert "a concept is listed twice" in message


def test_no_table(tmp_path):
    message = message_of(read_nuswide, tmp_path / "nus_wid_data.csv", LISTED, CLASSES)
    assert message.startswith(f"{tmp_path}/nus_wid_data.csv: no such file")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ["columns path, label and split"]),
        ("filepath,split_name,label\n", ["found filepath, split_name, label"]),
        ("filepath,label\n", ["found filepath, label"]),
        ("filepath,label,filepath\n", ["found filepath, label, filepath"]),
        ("filepath,label,split_name\na.jpg,'sky',train\n", ["line 2", "'sky'"]),
        ("filepath,label,split_name\na.jpg,[[]],train\n", ["line 2", "[[]]"]),
        ("filepath,label,split_name\na.jpg,sky,train\n", ["line 2", "'sky'"]),
        ("filepath,label,split_name\na.jpg,3,train\n", ["line 2", "'3'"]),
        ("filepath,label,split_name\na.jpg,[3],train\n", ["line 2", "'[3]'"]),
        ("filepath,label,split_name\na.jpg,[''],train\n", ["line 2", "['']"]),
        ("filepath,label,split_name\na.jpg,\"['sky'\",train\n", ["line 2", "['sky'"]),
        ("filepath,label,split_name\na.jpg,['sky', 'clouds'],train\n", ["line 2", "4 cells"]),
        (f"filepath,label,split_name\na.jpg,{'-' * 10**5}1,train\n", ["line 2", "---"]),
    ],
)
def test_mistakes_in_the_table(listed, text, parts):
    write(listed, text)
    message = message_of(read_nuswide, listed, LISTED, CLASSES)
    for part in [str(listed), *parts]:
        assert part in message


def test_an_image_outside_of_the_set(root):
    write(root / "ImageList/TrainImagelist.txt", "a\\1.jpg\n..\\..\\secret.jpg\n")
    message = message_of(read_nuswide, root, SPLITS, CLASSES)
    assert f"{root}: the image '../../secret.jpg' is outside {root}/Flickr" in message


def test_an_image_twice(root):
    listing = root / "ImageList" / "TestImagelist.txt"
    write(listing, "zoo\\0002_7.jpg\n")
    message = message_of(read_dataset, "nuswide", root, SPLITS, CLASSES)
    for part in ("'zoo/0002_7.jpg'", "(train)", "(test)"):
        assert part in message


NAMES = [f"concept{i}" for i in range(81)]
PATHS = st.from_regex(r"[a-z_]{1,5}/[0-9]{1,6}_[0-9]{1,9}\.jpg", fullmatch=True)
SHOWN = st.lists(st.sampled_from(NAMES), max_size=5, unique=True)


@given(
    images=st.dictionaries(PATHS, SHOWN, min_size=1, max_size=8),
    classes=st.permutations(NAMES),
    own=st.sampled_from(["Test", "formatted_val", "val"]),
)
def test_what_is_read_is_what_was_written(tmp_path_factory, images, classes, own):
    root = tmp_path_factory.mktemp("nus")
    if own == "Test":
        paths = write_nuswide(root, {own: images}, NAMES)
    elif own == "formatted_val":
        paths = write_nuswide_formatted(root, {own: images}, NAMES)
    else:
        root = root / "nus_wid_data.csv"
        paths = write_nuswide_listed(root, {own: images})
    records = read_dataset("nuswide", root, {"train": own}, classes)
    assert [r.path for r in records] == [p.as_posix() for p in paths]
    assert [r.image_id for r in records] == list(images)
    for record, shown in zip(records, images.values(), strict=True):
        assert {classes[c] for c in record.positive} == set(shown)
