"""Image sources: places in archives, and what is read from them."""

import os
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from packed import write_parquet, write_tar
from pictures import encoded, picture, pixels, status_of, tiff

from cdul_steps.data import sources
from cdul_steps.data.images import ImageError, decode, read_size
from cdul_steps.data.sources import file_of, in_parquet, in_tar, is_in_archive, locate, state

SAMPLES = Path(__file__).parent / "samples"
KINDS = {
    "jpeg": encoded(picture(), "JPEG"),
    "progressive": encoded(picture(), "JPEG", progressive=True),
    "cmyk": encoded(picture().convert("CMYK"), "JPEG"),
    "png": encoded(picture(), "PNG"),
    "webp": encoded(picture(), "WEBP"),
    "gif": encoded(picture(), "GIF"),
    "bmp": encoded(picture(), "BMP"),
    "avif": encoded(picture(), "AVIF"),
    "tiff": encoded(picture(), "TIFF"),
    "tiff, lzw": encoded(picture(), "TIFF", compression="tiff_lzw"),
    "tiff, jpeg": encoded(picture(), "TIFF", compression="jpeg"),
    "tiff, 12 bits": tiff(16, bytes(range(64)), 32),
    **{path.name: path.read_bytes() for path in sorted(SAMPLES.iterdir()) if path.is_file()},
}


def packed(folder: Path, kinds: dict[str, bytes]) -> dict[str, dict[str, str]]:
    """The places of the same images by form: as files, in a tar, and in a Parquet file."""
    files = {}
    for number, (name, data) in enumerate(kinds.items()):
        files[name] = str(folder / f"{number}.jpg")
        Path(files[name]).write_bytes(data)
    tar = write_tar(folder / "x.tar", kinds)
    whole, places = tar.read_bytes(), {}
    for name, data in kinds.items():
        places[name] = in_tar(str(tar), whole.index(data), len(data))
    table = write_parquet(folder / "x.parquet", list(kinds.values()), group=3)
    cells = {name: in_parquet(str(table), "image", n // 3, n % 3) for n, name in enumerate(kinds)}
    return {"files": files, "tar": places, "parquet": cells}


@pytest.mark.parametrize("form", ["tar", "parquet"])
def test_every_kind_of_image_has_the_pixels_and_the_size_of_its_file(tmp_path, form):
    places = packed(tmp_path, KINDS)
    for name, file in places["files"].items():
        place = places[form][name]
        try:
            expected = pixels(Path(file))
        except ImageError as error:
            assert status_of(place) == error.status, name
        else:
            np.testing.assert_array_equal(np.asarray(decode(place)), expected, name)
            assert read_size(place) == read_size(file)


@pytest.mark.parametrize("form", ["tar", "parquet"])
@pytest.mark.parametrize("cut", [0, 1, 300, -1])
def test_an_image_ends_where_its_place_ends(tmp_path, form, cut):
    """The next file in the archive is not read as the rest of a damaged one."""
    data = KINDS["jpeg"][:cut]
    places = packed(tmp_path, {"cut": data, "whole": KINDS["jpeg"]})
    statuses = set()
    for kind in ("files", form):
        try:
            statuses.add(decode(places[kind]["cut"]).tobytes())
        except ImageError as error:
            statuses.add(str(error))
    assert len(statuses) == 1


def test_a_part_of_a_tar_is_read_like_a_file(tmp_path):
    data = bytes(range(256)) * 100
    (tmp_path / "file").write_bytes(data)
    tar = write_tar(tmp_path / "x.tar", {"a": data, "b": b"x" * 999})

    def done(file, whence: int, offset: int, size: int) -> object:
        try:
            return file.seek(offset, whence), file.read(size), file.tell()
        except OSError as error:
            return error.errno

    _, open_part = locate(in_tar(str(tar), 512, len(data)))
    with open_part() as part, (tmp_path / "file").open("rb") as file:
        for whence, offset, size in product(
            (os.SEEK_SET, os.SEEK_CUR, os.SEEK_END),
            (0, 5, -5, 20_000, -20_000, -99_999, 99_999),
            (0, 10, 9000, -1),
        ):
            assert done(part, whence, offset, size) == done(file, whence, offset, size)


def test_headers_alone_are_read_from_a_tar(tmp_path):
    data = encoded(picture(2000, 2000), "BMP")
    path = write_tar(tmp_path / "x.tar", {"a.bmp": data})
    place = in_tar(str(path), 512, len(data))
    size, open_file = locate(place)
    with open_file() as file:
        file.read(100)
        reached = file.raw._place
    assert size == len(data)
    assert reached < 100_000
    assert read_size(place) == (2000, 2000)


def test_what_a_place_says(tmp_path):
    path = tmp_path / "a#b" / "x.tar"
    place = in_tar(path.as_posix(), 512, 10)
    assert file_of(place) == file_of(Path(place)) == path
    cell = in_parquet("x.parquet#y.parquet", "a:b#c", 1, 2)
    assert file_of(cell) == Path("x.parquet#y.parquet")
    assert is_in_archive(place) and is_in_archive(cell)
    for name in ("x.tar", "x.tar#1", "x.tar#1+", "x.jpg#1+2", "x.parquet#1:2", "x.tar#\u0661+2"):
        assert file_of(name) == Path(name)
        assert not is_in_archive(name)
    assert state(place) is None
    write_tar(path, {"a": bytes(10)})
    assert state(place) == state(path) == (path.stat().st_size, path.stat().st_mtime_ns)
    assert state("nul\0l") is None


@pytest.mark.parametrize("form", ["tar", "parquet"])
def test_an_archive_that_is_gone_or_no_file(tmp_path, form):
    place = packed(tmp_path, {"a": KINDS["jpeg"]})[form]["a"]
    file_of(place).unlink()
    assert status_of(place) == status_of(place, read_size) == "missing"
    os.mkfifo(file_of(place))
    assert status_of(place) == "unreadable"


def test_a_tar_that_became_shorter(tmp_path):
    place = packed(tmp_path, {"a": KINDS["jpeg"]})["tar"]["a"]
    os.truncate(file_of(place), 600)
    with pytest.raises(ImageError, match=r"unreadable: .*x.tar ends before it"):
        decode(place)


@pytest.mark.parametrize("damage", ["bytes", "groups", "rows", "column", "type"])
def test_a_parquet_file_that_changed(tmp_path, damage):
    path = write_parquet(tmp_path / "x.parquet", [KINDS["jpeg"]] * 4)
    place = in_parquet(str(path), "image", 1, 1)
    assert decode(place).size == (48, 32)
    if damage == "bytes":
        data = path.read_bytes()
        path.write_bytes(data[:4] + bytes(len(data) // 2) + data[4 + len(data) // 2 :])
    elif damage == "groups":
        write_parquet(path, [KINDS["jpeg"]])
    elif damage == "rows":
        write_parquet(path, [KINDS["jpeg"]] * 3)
    elif damage == "column":
        pq.write_table(pq.read_table(path).rename_columns(["img"]), path, row_group_size=2)
    else:
        os.truncate(path, 10)
    with pytest.raises(ImageError, match=r"unreadable: .*x.parquet "):
        decode(place)


def test_a_replaced_parquet_file_is_read_anew(tmp_path):
    path = write_parquet(tmp_path / "x.parquet", [encoded(picture(20, 10), "PNG")])
    place = in_parquet(str(path), "image", 0, 0)
    assert decode(place).size == (20, 10)
    write_parquet(path, [encoded(picture(30, 10), "PNG")])
    assert decode(place).size == (30, 10)


def test_reading_in_order_decodes_each_row_group_once(tmp_path):
    path = write_parquet(tmp_path / "x.parquet", [KINDS["jpeg"]] * 12, group=4)
    before = sources._cells.cache_info().misses
    for n in range(12):
        assert read_size(in_parquet(str(path), "image", n // 4, n % 4)) == (48, 32)
    assert sources._cells.cache_info().misses == before + 3


def test_threads_decode_a_row_group_once(tmp_path):
    path = write_parquet(tmp_path / "x.parquet", [bytes(1 << 24)] * 4, group=4)
    before = sources._cells.cache_info().misses
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda row: locate(in_parquet(str(path), "image", 0, row)), range(4)))
    assert sources._cells.cache_info().misses == before + 1
