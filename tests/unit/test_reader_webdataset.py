"""Tars of images in WebDataset's format."""

import gzip
import io
import json
import os
import tarfile
from pathlib import Path

import pytest
from messages import message_of
from packed import member, write_tar
from pictures import encoded, picture

from cdul_steps.data.images import ImageError, decode
from cdul_steps.data.readers import fingerprint, read_dataset
from cdul_steps.data.readers.archives import expand

CLASSES = ("cat", "dog", "train")
ALL = {"train": "."}
IMAGE = encoded(picture(), "JPEG")


def read(root: Path, splits=ALL, **options):
    return read_dataset("webdataset", root, splits, CLASSES, **options)


def ids(root: Path, splits=ALL, **options) -> list[str]:
    return [record.image_id for record in read(root, splits, **options)]


def error(root: Path, splits=ALL) -> str:
    return message_of(read, root, splits)


def test_images_keys_and_labels(tmp_path):
    write_tar(
        tmp_path / "0.tar",
        {
            "./a/000.jpg": IMAGE,
            "./a/000.cls": b"1\n",
            "./a/000.txt": b"a caption",
            "./a/001.PNG": encoded(picture(), "PNG"),
            "./a/001.json": json.dumps({"labels": ["Dog", "cat", "sofa"], "url": "x"}).encode(),
            "./a/001.cls": b"2",
            "./a/002.jpg": IMAGE,
            "./a/002.json": b'{"caption": NaN}',
            "./a/003.jpg": IMAGE,
            "./a/003.cls": b"train",
            "./a/004.jpg": IMAGE,
            "./a/004.json": b'{"labels": []}',
        },
    )
    told = []
    records = read(tmp_path, tell=told.append)
    assert [(r.image_id, r.positive) for r in records] == [
        ("0.tar/a/000", (1,)),
        ("0.tar/a/001", (0, 1)),
        ("0.tar/a/002", None),
        ("0.tar/a/003", (2,)),
        ("0.tar/a/004", ()),
    ]
    assert {decode(record.path).size for record in records} == {(48, 32)}
    assert any("members that are not images" in line and ".txt (1)" in line for line in told)
    assert any(".json without labels (1)" in line for line in told)
    assert any("labels that are no class: sofa (1)" in line for line in told)
    assert any("read 'Dog' as 'dog'" in line for line in told)


def test_labels_come_before_or_after_their_image(tmp_path):
    write_tar(tmp_path / "0.tar", {"b.cls": b"0", "a.jpg": IMAGE, "b.jpg": IMAGE, "a.cls": b"1"})
    assert [r.positive for r in read(tmp_path)] == [(1,), (0,)]


@pytest.mark.parametrize(
    ("name", "data", "parts"),
    [
        ("a.cls", b"3", ["label 3", "numbers 0 to 2"]),
        ("a.cls", b"\xff\xfe\xff", ["'a.cls'", "correct it"]),
        ("a.json", b'{"labels"', ["'a.json'", "cannot be read"]),
        ("a.json", b'{"labels": "dog"}', ["'a.json'", "not a list"]),
        ("a.json", b'{"labels": [1.5]}', ["label 1.5", "neither a name"]),
        ("a.json", b'{"labels": [null]}', ["label None", "neither a name"]),
        ("a.json", b'{"labels": [true]}', ["label True", "neither a name"]),
        ("a.json", b"[" * 100_000, ["'a.json'", "cannot be read"]),
        ("a.json", bytes(2 << 20), ["'a.json'", "too many"]),
    ],
)
def test_labels_that_are_none(tmp_path, name, data, parts):
    path = write_tar(tmp_path / "0.tar", {"a.jpg": IMAGE, name: data})
    message = error(tmp_path)
    for part in [str(path), *parts]:
        assert part in message


def test_a_key_with_several_images_or_labels(tmp_path):
    write_tar(tmp_path / "0.tar", {"a.jpg": IMAGE, "a.seg.png": IMAGE})
    assert ids(tmp_path) == ["0.tar/a"]
    write_tar(tmp_path / "0.tar", {"a.jpg": IMAGE, "a.png": IMAGE})
    message = error(tmp_path)
    assert "'0.tar/a' is used twice" in message
    write_tar(tmp_path / "0.tar", [("a.jpg", IMAGE), ("a.cls", b"0"), ("a.cls", b"1")])
    assert "two members 'a.cls'" in error(tmp_path)


@pytest.fixture
def shards(tmp_path) -> Path:
    for name in ("train/00", "train/01", "train/02", "test/00"):
        write_tar(tmp_path / f"set/{name}.tar", {"x.jpg": IMAGE})
    (tmp_path / "set/train/00_stats.json").write_text("{}")
    return tmp_path / "set"


@pytest.mark.parametrize(
    ("root", "own", "names"),
    [
        ("", ".", ["test/00", "train/00", "train/01", "train/02"]),
        ("", "train", ["train/00", "train/01", "train/02"]),
        ("", "train/*.tar", ["train/00", "train/01", "train/02"]),
        ("", "train/{00..01}.tar", ["train/00", "train/01"]),
        ("", "{test,train}/00.tar", ["test/00", "train/00"]),
        ("", "**/0[12].tar", ["train/01", "train/02"]),
        ("train/{00..01}.tar", ".", ["00", "01"]),
        ("train/{00..01}.tar", "{01..02}.tar", ["01"]),
        ("{train,test}/*.tar", "test", ["test/00"]),
        ("train/*.tar", ".", ["00", "01", "02"]),
        ("train/02.tar", ".", ["02"]),
    ],
)
def test_patterns(shards, root, own, names):
    assert ids(shards / root, {"train": own}) == [f"{name}.tar/x" for name in names]


@pytest.mark.parametrize(
    ("root", "splits", "parts"),
    [
        ("train/{00..03}.tar", ALL, ["03.tar", "no such file"]),
        ("none", ALL, ["none", "no such file"]),
        ("none/*.tar", ALL, ["none/*.tar", "no .tar file"]),
        ("", {"train": "val"}, ["val", "no such file"]),
        ("", {"train": "val/*.tar"}, ["no .tar file", "splits"]),
        ("", {"train": "../set"}, ["not below", "'train'"]),
        ("", {"train": "/"}, ["not below", "'train'"]),
        ("", {"train": "x**.tar"}, []),
        ("", {"train": ".", "test": "test"}, ["test/00.tar", "'train' and 'test'"]),
        ("train/00_stats.json", ALL, ["no .tar file"]),
    ],
)
def test_patterns_that_name_no_archives(shards, root, splits, parts):
    message = error(shards / root, splits)
    for part in [str(shards), *parts]:
        assert part in message


def test_a_brace_pattern():
    assert expand("a/{098..101}-{x,y}.tar") == [
        f"a/{n}-{c}.tar" for n in ("098", "099", "100", "101") for c in "xy"
    ]
    assert expand("{0..10}.tar") == [f"{n}.tar" for n in range(11)]
    assert expand("plain{}.tar") == ["plain{}.tar"]


def test_names_with_the_characters_of_patterns(tmp_path):
    root = tmp_path / "a[b]{c,d}*"
    write_tar(root / "x[1].tar", {"x.jpg": IMAGE})
    assert ids(root) == ids(root, {"train": "x[1].tar"}) == ["x[1].tar/x"]


def test_what_a_folder_holds_besides_is_told(shards):
    (shards / "linked").symlink_to(shards / "train")
    told = []
    read(shards, tell=told.append)
    assert told == [f"{shards}: left out 2 files not ending in .tar: folder (1), .json (1)"]


@pytest.mark.parametrize("name", ["03.tar.gz", "03.tgz", "03.tar.zst"])
def test_a_compressed_tar_by_its_name(shards, name):
    (shards / "train" / name).write_bytes(b"")
    message = error(shards)
    assert name in message
    assert "compressed" in message
    assert len(read(shards / "train/*.tar")) == 3


def test_exclude_leaves_out_archives_unread_and_members_by_name(shards):
    (shards / "train/01.tar").write_text("damaged")
    write_tar(shards / "train/02.tar", {"thumbs/y.jpg": IMAGE, "y.jpg": IMAGE})
    told = []
    exclude = ["01.tar", "thumbs", "test/*"]
    assert ids(shards, exclude=exclude, tell=told.append) == ["train/00.tar/x", "train/02.tar/y"]
    assert any("left out 2 files by 'exclude'" in line for line in told)
    assert any("left out 1 image by 'exclude': thumbs (1)" in line for line in told)


def test_ids_stay_when_archives_are_added(shards):
    before = {r.image_id: r for r in read(shards)}
    write_tar(shards / "a/00.tar", {"x.jpg": IMAGE})
    after = {r.image_id: r for r in read(shards)}
    assert len(after) == len(before) + 1
    assert all(after[image_id] == record for image_id, record in before.items())


def test_the_fingerprint_notices_a_changed_archive(shards):
    marks = {fingerprint(read(shards))}
    path = shards / "train/00.tar"
    time = path.stat().st_mtime_ns
    os.utime(path, ns=(1, time + 1))
    marks.add(fingerprint(read(shards)))
    with path.open("ab") as file:  # the same images at the same places
        file.write(bytes(512))
    os.utime(path, ns=(1, time + 1))
    marks.add(fingerprint(read(shards)))
    path.unlink()
    marks.add(fingerprint(read(shards)))
    assert len(marks) == 4


# Damage and hostile tars


@pytest.mark.parametrize("size", [0, 100, 512, 600, 1024, 2048])
def test_a_tar_that_was_cut_short(tmp_path, size):
    path = write_tar(tmp_path / "0.tar", {"a.jpg": bytes(600), "b.jpg": bytes(600)})
    os.truncate(path, size)
    message = error(tmp_path)
    assert str(path) in message
    assert "is not a tar" in message if size == 100 else "truncated" in message


def test_zeros_in_place_of_most_of_a_tar_are_not_its_end(tmp_path):
    path = write_tar(tmp_path / "0.tar", {"a.jpg": IMAGE})
    os.truncate(path, 1 << 20)
    assert len(read(tmp_path)) == 1
    os.truncate(path, 3 << 20)
    assert "only zeros from byte" in error(tmp_path)


def test_a_damaged_header_ends_nothing_silently(tmp_path):
    path = write_tar(tmp_path / "0.tar", {name: bytes(512) for name in ("a.jpg", "b.jpg", "c.jpg")})
    data = bytearray(path.read_bytes())
    data[1024 + 3] ^= 1
    path.write_bytes(data)
    message = error(tmp_path)
    assert "damaged at byte 1024" in message
    assert "'exclude'" in message


@pytest.mark.parametrize("open_file", [gzip.open])
def test_a_compressed_tar_by_its_content(tmp_path, open_file):
    data = write_tar(tmp_path / "x.tar", {"a.jpg": IMAGE}).read_bytes()
    (tmp_path / "set").mkdir()
    (tmp_path / "set/0.tar").write_bytes(gzip.compress(data))
    assert "compressed with gzip" in error(tmp_path / "set")


@pytest.mark.parametrize("data", [b"Not found", b"x" * 5000, IMAGE])
def test_a_file_that_is_no_tar(tmp_path, data):
    (tmp_path / "0.tar").write_bytes(data)
    assert "is not a tar" in error(tmp_path)


def test_an_archive_that_cannot_be_read(tmp_path):
    (tmp_path / "0.tar").symlink_to(tmp_path / "gone")
    assert "0.tar: cannot be read: No such file" in error(tmp_path)


def test_a_tar_of_nothing(tmp_path):
    write_tar(tmp_path / "0.tar", {})
    assert "has no images" in error(tmp_path)


def test_members_that_are_no_files_are_counted(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name, kind in (
            ("folder.jpg", tarfile.DIRTYPE),
            ("link.jpg", tarfile.SYMTYPE),
            ("hard.jpg", tarfile.LNKTYPE),
            ("null.jpg", tarfile.CHRTYPE),
            ("disk.jpg", tarfile.BLKTYPE),
            ("pipe.jpg", tarfile.FIFOTYPE),
        ):
            tar.addfile(member(name, type=kind, linkname="/etc/passwd"))
        tar.addfile(member("x.jpg", size=len(IMAGE)), io.BytesIO(IMAGE))
        tar.addfile(member("._x.jpg", size=3), io.BytesIO(b"abc"))
        tar.addfile(member("inner.tar", size=1024), io.BytesIO(bytes(1024)))
    told = []
    assert ids(tmp_path, tell=told.append) == ["0.tar/x"]
    (line,) = told
    assert "left out 8 members that are not images" in line
    for part in ("folder (1)", "link (1)", "hard link (1)", "device (2)", "pipe (1)"):
        assert part in line
    for part in ("hidden (1)", ".tar (1)"):
        assert part in line


def test_sparse_files_are_counted(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        sparse = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "s.jpg"}
        tar.addfile(
            member("GNUSparseFile.0/s.jpg", size=512, pax_headers=sparse), io.BytesIO(bytes(512))
        )
        tar.addfile(member("x.jpg", size=len(IMAGE)), io.BytesIO(IMAGE))
    old = bytearray(member("old.jpg", size=512, type=b"S").tobuf(tarfile.GNU_FORMAT))
    old[482] = 1  # another block follows
    old[148:156] = b"%06o\0 " % (sum(old[:148]) + sum(old[156:]) + 256)
    parts = b"x" * 504 + b"\1" + bytes(7) + b"x" * 504 + bytes(8)
    rest = (tmp_path / "0.tar").read_bytes()
    (tmp_path / "0.tar").write_bytes(bytes(old) + parts + b"y" * 512 + rest)
    told = []
    (record,) = read(tmp_path, tell=told.append)
    assert decode(record.path).size == (48, 32)
    assert any("sparse file (2)" in line for line in told)


def test_a_link_has_no_bytes_whatever_its_size(tmp_path):
    write_tar(tmp_path / "0.tar", {"x.jpg": IMAGE})
    rest = (tmp_path / "0.tar").read_bytes()
    link = member("y.jpg", type=tarfile.LNKTYPE, linkname="x.jpg", size=1024)
    (tmp_path / "0.tar").write_bytes(link.tobuf(tarfile.USTAR_FORMAT) + rest)
    assert ids(tmp_path) == ["0.tar/x"]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names(tmp_path, form):
    folder = "/".join(["f" * 30] * 4)
    names = [f"{folder}/{'x' * 60}{i}.jpg" for i in range(2)]
    if form != tarfile.USTAR_FORMAT:
        names.append(f"{'y' * 300}/z\u00e9.jpg")
    write_tar(tmp_path / "0.tar", dict.fromkeys(names, IMAGE), format=form)
    records = read(tmp_path)
    assert [r.image_id for r in records] == [f"0.tar/{name[:-4]}" for name in names]
    assert {decode(r.path).size for r in records} == {(48, 32)}


def test_a_size_in_further_fields_and_in_binary(tmp_path):
    data = bytearray(member("b.jpg", size=len(IMAGE)).tobuf(tarfile.GNU_FORMAT))
    data[124:136] = b"\x80" + len(IMAGE).to_bytes(11, "big")
    data[148:156] = b"%06o\0 " % (sum(data[:148]) + sum(data[156:]) + 256)
    padding = bytes(-len(IMAGE) % 512)
    size = str(len(IMAGE))
    pax = member("a.jpg", size=0, pax_headers={"size": size}).tobuf(tarfile.PAX_FORMAT)
    tar = pax + IMAGE + padding + bytes(data) + IMAGE + padding + bytes(1024)
    (tmp_path / "0.tar").write_bytes(tar)
    records = read(tmp_path)
    assert [r.image_id for r in records] == ["0.tar/a", "0.tar/b"]
    assert {decode(r.path).size for r in records} == {(48, 32)}


@pytest.mark.parametrize("size", ["-512", "1" * 5000, "x"])
def test_further_fields_that_lead_astray(tmp_path, size):
    pax = member("a.jpg", size=0, pax_headers={"size": size}).tobuf(tarfile.PAX_FORMAT)
    (tmp_path / "0.tar").write_bytes(pax + bytes(1024))
    assert "0.tar: damaged at byte" in error(tmp_path)


def test_further_fields_without_end(tmp_path):
    header = member("pax", type=b"x", size=2 << 20).tobuf(tarfile.USTAR_FORMAT)
    (tmp_path / "0.tar").write_bytes(header + bytes(2 << 20) + bytes(1024))
    assert "more than the limit" in error(tmp_path)
    header = member("pax", type=b"x", size=10).tobuf(tarfile.USTAR_FORMAT)
    (tmp_path / "0.tar").write_bytes(header + b"99 path=x\n".ljust(512, b"\0") + bytes(1024))
    assert "damaged at byte 512" in error(tmp_path)


def test_names_are_never_paths(tmp_path):
    names = ["../../up.jpg", "/etc/absolute.jpg", "a/../b.jpg", "line\nend.jpg"]
    root = tmp_path / "set"
    write_tar(root / "0.tar", dict.fromkeys(names, IMAGE))
    records = read(root)
    assert [r.image_id for r in records] == [f"0.tar/{name[:-4]}" for name in names]
    assert all(r.path.startswith(f"{root}/0.tar#") for r in records)
    assert {decode(r.path).size for r in records} == {(48, 32)}


def test_a_name_that_is_not_utf8(tmp_path):
    write_tar(tmp_path / "0.tar", {"caf\udce9.jpg": IMAGE}, format=tarfile.GNU_FORMAT)
    message = error(tmp_path)
    assert str(tmp_path / "0.tar") in message
    assert r"caf\xe9" in message


def test_suffixes_of_any_characters_are_told_in_a_line(tmp_path):
    names = ["x.jpg", "a.jp\udce9", "b.jp\ng", "c." + "y" * 5000]
    write_tar(tmp_path / "0.tar", dict.fromkeys(names, IMAGE), format=tarfile.GNU_FORMAT)
    told = []
    assert ids(tmp_path, tell=told.append) == ["0.tar/x"]
    (line,) = told
    assert line.isprintable()
    assert len(line.encode()) < 300
    assert r".jp\udce9 (1)" in line


def test_very_many_empty_members(tmp_path):
    header = member("x", size=0).tobuf(tarfile.USTAR_FORMAT)
    image = member("x.jpg", size=len(IMAGE)).tobuf(tarfile.USTAR_FORMAT)
    with (tmp_path / "0.tar").open("wb") as file:
        file.write(header * 100_000 + image + IMAGE + bytes(-len(IMAGE) % 512) + bytes(1024))
    told = []
    assert ids(tmp_path, tell=told.append) == ["0.tar/x"]
    assert any("100000 members" in line for line in told)


def test_tars_one_after_the_other(tmp_path):
    parts = [write_tar(tmp_path / f"{n}.tar", {f"{n}.jpg": IMAGE}) for n in "ab"]
    both = tmp_path / "set/0.tar"
    both.parent.mkdir()
    both.write_bytes(b"".join(part.read_bytes() for part in parts))
    assert ids(tmp_path / "set") == ["0.tar/a", "0.tar/b"]


def test_an_empty_or_damaged_image_has_a_status(tmp_path):
    write_tar(tmp_path / "0.tar", {"a.jpg": b"", "b.jpg": IMAGE[:300], "c.jpg": b"Not found"})
    status = []
    for record in read(tmp_path):
        with pytest.raises(ImageError) as caught:
            decode(record.path)
        status.append(str(caught.value.status))
    assert status == ["truncated", "truncated", "not_an_image"]
