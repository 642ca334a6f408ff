"""Images on remote storage: a web server with faults, and fsspec's file systems."""

import os
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from layouts import write
from messages import message_of
from pictures import encoded, picture, status_of, tiff

from cdul_steps.cli import app
from cdul_steps.config import Dataset
from cdul_steps.data import remote
from cdul_steps.data.images import ImageError, decode, read_size
from cdul_steps.data.outcomes import RETRIED
from cdul_steps.data.readers import fingerprint, read_dataset
from cdul_steps.data.sources import file_of, is_in_archive, locate, state
from cdul_steps.data.stores import open_store
from cdul_steps.steps.gallery import _link
from cdul_steps.steps.manifest import make_manifest
from cdul_steps.tools.doctor import _data
from cdul_steps.tools.retry import retry_failed

CHANGED = "Wed, 21 Oct 2015 07:28:00 GMT"
KINDS = {
    "a.jpg": encoded(picture(), "JPEG"),
    "b.png": encoded(picture(300, 200), "PNG"),
    "c d/e.webp": encoded(picture(), "WEBP"),
    "large.bmp": encoded(picture(400, 300), "BMP"),
    "large.tif": encoded(picture(400, 300), "TIFF"),
    "12.tif": tiff(16, bytes(range(64)), 32),
    "empty.jpg": b"",
    "cut.jpg": encoded(picture(), "JPEG")[:300],
    "text.jpg": b"no image",
}


class Server(ThreadingHTTPServer):
    """Serves `files` with the `faults` of each path, and counts requests."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.faults: dict[str, str] = {}
        self.asked: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()
        self.headers: dict[str, str] = {"Last-Modified": CHANGED}
        self.over = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        name = self.path.lstrip("/").replace("%20", " ")
        self.server.asked[name] += 1
        fault = self.server.faults.get(name, "")
        if fault == "hang":
            self.server.over.wait(30)
            return
        if fault == "reset":
            return
        if fault.startswith("/") or "://" in fault:
            self._answer(302, b"", {"Location": fault})
        elif fault.isdecimal():
            self._answer(int(fault), b"")
        elif fault == "503 twice" and self.server.asked[name] < 3:
            self._answer(503, b"")
        elif name not in self.server.files:
            self._answer(404, b"")
        else:
            self._file(name, fault)

    def _file(self, name: str, fault: str) -> None:
        data = whole = self.server.files[name]
        headers = dict(self.server.headers)
        code = 200
        if (asked := self.headers["Range"]) and fault not in ("no ranges", "no length"):
            if not whole:
                return self._answer(416, b"", {"Content-Range": "bytes */0"})
            first, last = map(int, asked.removeprefix("bytes=").split("-"))
            data, code = whole[first : last + 1], 206
            headers["Content-Range"] = f"bytes {first}-{first + len(data) - 1}/{len(whole)}"
        length = {} if fault == "no length" else {"Content-Length": str(len(data))}
        if fault == "huge":
            length = {"Content-Length": str(1 << 40)}
        self._answer(code, data[: len(data) // 2] if fault == "short" else data, headers | length)
        self.server.sent[name] += len(data)

    def _answer(self, code: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(code)
        for header, value in (headers or {"Content-Length": str(len(data))}).items():
            self.send_header(header, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *words: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(remote, "PAUSES", (0.0, 0.0))
    monkeypatch.setattr(remote, "_silent", {})
    server = Server()
    server.files |= KINDS
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield server
    server.over.set()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def places(tmp_path, server) -> dict[str, str]:
    """The beginning of the images' URLs, by kind of storage."""
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    for name, data in KINDS.items():
        path = tmp_path / "files" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        memory.pipe_file(f"/bucket/{name}", data)
    files = f"{tmp_path}/files"
    return {
        "local": files,
        "file": f"file://{files}",
        "memory": "memory://bucket",
        "http": server.url,
    }


def outcome(function, place: str) -> object:
    try:
        found = function(place)
    except ImageError as error:
        return str(error)
    return found if isinstance(found, tuple) else (found.size, found.tobytes())


@pytest.mark.parametrize("form", ["file", "memory", "http"])
@pytest.mark.parametrize("fault", ["", "no ranges", "no length"])
def test_pixels_sizes_and_errors_are_those_of_local_files(places, server, form, fault):
    server.faults = dict.fromkeys(KINDS, fault)
    for name in KINDS:
        for function in (decode, read_size):
            expected = outcome(function, f"{places['local']}/{name}")
            assert outcome(function, f"{places[form]}/{name}") == expected, name


def test_a_header_needs_the_first_bytes_alone(server, monkeypatch):
    monkeypatch.setattr(remote, "HEAD", 1000)
    server.files["x.bmp"] = encoded(picture(1000, 1000), "BMP")
    assert read_size(f"{server.url}/x.bmp") == (1000, 1000)
    assert server.sent["x.bmp"] == 1000
    _, open_file = locate(f"{server.url}/x.bmp", whole=False)
    with open_file() as file:
        assert file.read(10) + file.read() == server.files["x.bmp"]
        assert file.read() == b""
    monkeypatch.setattr(remote, "HEAD", 100)  # less than its header
    assert read_size(f"{server.url}/large.tif") == (400, 300)
    assert server.asked["large.tif"] == 2
    fsspec.filesystem("memory").pipe_file("/large.tif", KINDS["large.tif"])
    assert read_size("memory://large.tif") == (400, 300)


@pytest.mark.parametrize(
    ("fault", "status", "reason", "requests"),
    [
        ("404", "missing", "404 Not Found", 1),
        ("410", "missing", "410 Gone", 1),
        ("403", "unreachable", "403 Forbidden", 1),
        ("401", "unreachable", "401 Unauthorized", 1),
        ("503", "unreachable", "503 Service Unavailable", 3),
        ("429", "unreachable", "429 Too Many Requests", 3),
        ("reset", "unreachable", "without response", 3),
        ("short", "unreachable", "broken off after", 3),
        ("huge", "too_large", "1099511627776 bytes", 1),
        ("ftp://127.0.0.1/a.jpg", "unreachable", "ftp", 1),
        ("file:///etc/hostname", "unreachable", "file", 1),
    ],
)
def test_what_a_server_may_do(server, fault, status, reason, requests):
    server.faults["a.jpg"] = fault
    with pytest.raises(ImageError) as caught:
        decode(f"{server.url}/a.jpg")
    assert caught.value.status == status
    assert reason in caught.value.detail
    assert "\n" not in caught.value.detail
    assert server.asked["a.jpg"] == requests


def test_what_passes_is_tried_again_and_a_redirection_is_followed(server):
    server.faults |= {"a.jpg": "503 twice", "b.png": "/large.bmp"}
    assert decode(f"{server.url}/a.jpg").size == (48, 32)
    assert server.asked["a.jpg"] == 3
    assert decode(f"{server.url}/b.png").size == (400, 300)


def test_a_server_that_hangs_is_left_alone_for_a_while(server, monkeypatch):
    monkeypatch.setattr(remote, "TIMEOUT", 0.1)
    server.faults = dict.fromkeys(("h.jpg", "i.jpg", "j.jpg", "k.jpg"), "hang")
    start = time.monotonic()
    details = []
    for name in server.faults:
        with pytest.raises(ImageError) as caught:
            decode(f"{server.url}/{name}")
        assert caught.value.status == "unreachable"
        details.append(caught.value.detail)
    assert time.monotonic() - start < 5
    assert "timed out" in details[0]
    assert details[3] == f"{server.url} did not answer for 3 images in a row"
    assert server.asked == {"h.jpg": 3, "i.jpg": 3, "j.jpg": 3}
    monkeypatch.setattr(remote, "REST", 0.0)
    remote._silent.clear()
    for name in server.faults:
        assert status_of(f"{server.url}/{name}") == "unreachable"
    assert server.asked["k.jpg"] == 3
    assert decode(f"{server.url}/a.jpg").size == (48, 32)
    assert not remote._silent


def test_an_image_that_comes_by_drops_ends(server, monkeypatch):
    monkeypatch.setattr(remote, "WHOLE", -1.0)
    with pytest.raises(ImageError, match="unreachable: not complete after"):
        decode(f"{server.url}/a.jpg")


def test_a_host_that_is_not_there(monkeypatch):
    monkeypatch.setattr(remote, "PAUSES", (0.0,))
    monkeypatch.setattr(remote, "_silent", {})
    for place in ("http://no-such-host.invalid/a.jpg", "http://127.0.0.1:9/a.jpg"):
        assert status_of(place) == status_of(place, read_size) == "unreachable"
        assert state(place) is None
    assert status_of("http://[/a.jpg") == status_of("http://x:y/a.jpg") == "unreachable"


def test_folders_and_pipes_behind_file_urls(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert status_of(f"file://{tmp_path}/pipe") == "unreachable"
    assert status_of(f"file://{tmp_path}") == "unreachable"
    assert status_of(f"file://{tmp_path}/none.jpg") == "missing"


def test_what_is_a_url(tmp_path):
    for text in ("https://x/y", "http://x/y", "s3://b/k", "gs://b/k", "memory://x", "file:///x"):
        assert remote.is_url(text)
        assert not is_in_archive(text)
    assert not is_in_archive("https://x/y.tar#1+2")
    others = ("simplecache::https://x", "a/https://x", "C:/x", "https:/x", "zip://x::s3://y", "x")
    for text in others:
        assert not remote.is_url(text)
        assert file_of(text) == Path(text)
    # Nor a chain of file systems.
    (tmp_path / "x.jpg").write_bytes(KINDS["a.jpg"])
    assert status_of(f"memory://y::file://{tmp_path}/x.jpg") == "missing"
    assert _link("https://x/y z.jpg", tmp_path) == "https://x/y z.jpg"
    assert _link("s3://x/y.jpg", tmp_path) is None
    assert "unreachable" in RETRIED


def table(folder: Path, paths: list[str]) -> Path:
    return write(folder / "table.csv", "path\n" + "".join(f'"{path}"\n' for path in paths))


def dataset(folder: Path, root: object, reader: str = "table", **changes) -> Dataset:
    write(folder / "classes.txt", "cat\ndog\nbird\n")
    values = {
        "reader": reader,
        "root": str(root),
        "classes": str(folder / "classes.txt"),
        "splits": {"train": "."},
        "shard_size": 4,
        "max_failed_share": 0.5,
    }
    return Dataset(**values | changes)


def manifest(folder: Path, data: Dataset) -> pd.DataFrame:
    make_manifest(dataset=data, output=folder / "images.parquet")
    return pd.read_parquet(folder / "images.parquet")


@pytest.mark.parametrize("form", ["file", "memory", "http"])
def test_the_rows_of_a_manifest_are_those_of_local_files(places, tmp_path, form):
    tables = {}
    for of in ("local", form):
        root = table(tmp_path / of, [f"{places[of]}/{name}" for name in KINDS])
        tables[of] = manifest(tmp_path / of / "m", dataset(tmp_path / of, root))
    same = ["split", "width", "height", "shard", "row", "known", "bytes"]
    assert tables[form][same].equals(tables["local"][same])
    # For an empty file, a web server gives no time.
    tables = {of: rows[rows["bytes"] > 0] for of, rows in tables.items()}
    assert (tables[form]["modified"] > 0).all()
    if form == "file":
        assert (abs(tables[form]["modified"] - tables["local"]["modified"]) < 1000).all()
    if form == "http":
        assert set(tables[form]["modified"]) == {1_445_412_480 * 10**9}
    shards = [pq.read_table(tmp_path / of / "m/train/1.parquet") for of in tables]
    corners = [shard.select(["view", "x0", "y0", "x1", "y1"]) for shard in shards]
    assert corners[0].equals(corners[1])


@pytest.mark.parametrize("form", ["file", "memory"])
def test_a_folder_that_is_a_url(places, tmp_path, form):
    more = {
        ".hidden.jpg": b"",
        "@eaDir/x.jpg": b"",
        "notes.txt": b"",
        "plain": b"",
        "old/o.jpg": b"",
    }
    for name, data in more.items():
        write(tmp_path / "files" / name)
        fsspec.filesystem("memory").pipe_file(f"/bucket/{name}", data)
    found = {}
    for of in ("local", form):
        for splits in ({"train": "."}, {"train": ".", "test": "c d"}):
            told = []
            root = places[of] if of == "local" else f"{places[of]}/"
            arguments = ("folder", root, splits, ())
            records = read_dataset(*arguments, exclude=["old", "12.*"], tell=told.append)
            assert [r.path for r in records] == [f"{places[of]}/{r.image_id}" for r in records]
            told = [line.partition(": ")[2] for line in told]
            found[of, *splits] = [(r.image_id, r.split) for r in records], sorted(told)
    for splits in (("train",), ("train", "test")):
        assert found[form, *splits] == found["local", *splits]
    data = manifest(tmp_path / "m", dataset(tmp_path, places[form], "folder"))
    assert data["image_id"].tolist() == sorted({*KINDS, "old/o.jpg"})
    for own in ("../x", "/x"):
        message = message_of(read_dataset, "folder", places[form], {"train": own}, ())
        assert "is not inside" in message


def test_roots_and_protocols_that_are_not_read(tmp_path):
    split = {"train": "."}
    assert "cannot be listed" in message_of(read_dataset, "folder", "https://x/y", split, ())
    for reader in ("webdataset", "parquet", "table", "voc"):
        message = message_of(read_dataset, reader, "s3://x/y", split, ())
        assert message.startswith(f"s3://x/y: the reader '{reader}' reads no 'root' that is a URL")
    root = table(tmp_path, ["ftp://x/y.jpg"])
    assert "line 2: the column 'path': ftp:// is none of http://" in message_of(
        read_dataset, "table", root, split, ()
    )
    message = message_of(read_dataset, "folder", "memory://nothing", split, ())
    assert "has no images" in message


def test_a_missing_package_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(remote.PROTOCOLS, "memory", "no_such_package")
    root = table(tmp_path, ["memory://x/y.jpg"])
    expected = "memory:// needs the package no_such_package: pip install no_such_package"
    for arguments in (("table", str(root)), ("folder", "memory://x")):
        assert expected in message_of(read_dataset, *arguments, {"train": "."}, ())
    assert expected in message_of(_data, dataset(tmp_path, root))


def test_a_change_is_noticed_where_the_store_tells_it(places, tmp_path, server):
    def of(*paths: str) -> str:
        root = table(tmp_path, [*paths])
        return fingerprint(read_dataset("table", root, {"train": "."}, ()))

    for form in ("memory", "file"):
        place = f"{places[form]}/a.jpg"
        before, earlier = of(place), state(place)
        system, path = remote._system(place)
        assert of(place) == before
        time.sleep(0.01)
        system.pipe_file(path, KINDS["a.jpg"])
        assert of(place) != before
        assert state(place) != earlier
    # A web server is asked when the manifest is made, not during planning.
    place = f"{server.url}/a.jpg"
    before, earlier = of(place), state(place)
    server.asked.clear()
    server.headers = {"ETag": '"1"'}
    assert of(place) == before
    assert not server.asked
    assert state(place) != earlier
    tagged = state(place)
    server.headers = {"ETag": '"2"'}
    assert state(place) != tagged
    server.headers = {}
    assert state(place) == (len(KINDS["a.jpg"]), 0)


def test_known_images_are_not_fetched_again(places, tmp_path, server):
    data = dataset(tmp_path, table(tmp_path, [f"{server.url}/large.tif"]))
    first = manifest(tmp_path / "m", data)
    server.asked.clear()
    assert manifest(tmp_path / "m", data).equals(first)
    assert server.asked == {"large.tif": 1}


def test_servers_that_fail_fall_under_max_failed_share(server, tmp_path, monkeypatch):
    names = [f"{i}.png" for i in range(8)]
    server.files |= dict.fromkeys(names, KINDS["b.png"])
    server.faults = {"0.png": "403", "1.png": "404"}
    root = table(tmp_path, [f"{server.url}/{name}" for name in names])
    found = manifest(tmp_path / "m", dataset(tmp_path, root, max_failed_share=0.25))
    assert found["width"].tolist() == [0, 0, *[300] * 6]
    text, _ = _data(dataset(tmp_path, root, max_failed_share=0.25))
    assert "2 of 8 images cannot be read" in text
    share = dataset(tmp_path, root, max_failed_share=0.2)
    for function in (lambda: manifest(tmp_path / "m", share), lambda: _data(share)):
        message = message_of(function)
        assert f"{server.url}/0.png: unreachable: 403 Forbidden" in message
    down = table(tmp_path / "down", [f"http://127.0.0.1:9/{i}.jpg" for i in range(100)])
    monkeypatch.setattr(remote, "_silent", {})
    start = time.monotonic()
    message = message_of(manifest, tmp_path / "m", dataset(tmp_path, down))
    assert "100 of 100 images cannot be read" in message
    assert time.monotonic() - start < 10


def run(command: str, *words: object) -> None:
    app([command, *map(str, words)], standalone_mode=False)


def test_embeddings_are_those_of_local_files_and_failed_ones_are_retried(
    places, server, repository, tmp_path
):
    model = ["--model", f"local-dir:{repository}/cdul_steps/demo/tiny-clip"]
    classes = ["--classes", write(tmp_path / "classes.txt", "cat\ndog\n")]
    names = ["b.png", "a.jpg", "c d/e.webp", "cut.jpg", "large.bmp"]
    vectors, statuses = {}, {}
    for form in ("local", "http"):
        folder = tmp_path / form / "d"
        root = table(tmp_path / form, [f"{places[form]}/{name}" for name in names])
        run(
            *("manifest", "--reader", "table", "--root", root, *classes, "--shard-size", 8),
            *("--max-failed-share", 0.5, "--output", folder / "manifest/images.parquet"),
        )
        text = ["--text", folder / "e/text.parquet"]
        run("encode-text", *classes, *model, "--output", text[1])
        images = ["--images", folder / "manifest/images.parquet", "--split", "train"]
        store = ["--store", folder / "e/embeddings/train.zarr"]
        run("store", *images, *text, "--output", store[1])
        server.faults["b.png"] = "403" * (form == "http")
        run(
            *("encode", "--manifest", folder / "manifest/train/0.parquet", *store, *model),
            *("--table", folder / "e/encode/train/0.parquet", "--workers", 2, "--threads", 1),
            *("--device", "cpu", "--engine", "torch"),
        )
        vectors[form] = np.asarray(open_store(store[1]))
        statuses[form] = pd.read_parquet(folder / "e/encode/train/0.parquet")
    assert statuses["http"]["status"].tolist() == ["unreachable", "ok", "ok", "truncated", "ok"]
    assert statuses["http"]["error"][0] == "403 Forbidden"
    assert statuses["http"]["error"][1:].tolist() == statuses["local"]["error"][1:].tolist()
    assert np.isnan(vectors["http"][0]).all()
    assert vectors["http"][1:].tobytes() == vectors["local"][1:].tobytes()
    results = tmp_path / "http"
    assert retry_failed(results) == 0
    server.faults.clear()
    assert retry_failed(results) == 1
    assert not (results / "d/e/encode/train/0.parquet").exists()


def test_a_root_that_is_a_url_stays_one_on_the_command_line(places, tmp_path):
    classes = write(tmp_path / "classes.txt", "cat\n")
    output = tmp_path / "m/images.parquet"
    words = ("--classes", classes, "--split=train=.", "--max-failed-share", 0.5, "--output", output)
    run("manifest", "--reader", "folder", "--root", places["memory"], *words)
    paths = pd.read_parquet(output)["path"].tolist()
    assert paths == [f"memory://bucket/{name}" for name in sorted(KINDS)]


def test_plain_files_need_neither_fsspec_nor_a_web_client(tmp_path):
    path = tmp_path / "a.jpg"
    path.write_bytes(KINDS["a.jpg"])
    code = (
        "import sys; from cdul_steps.data.images import decode, read_size; "
        f"from cdul_steps.data.sources import state; p = {str(path)!r}; "
        "decode(p); read_size(p); state(p); "
        "print({'fsspec', 'urllib.request', 'http.client'} & {*sys.modules})"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert answer.stdout.strip() == "set()", answer.stderr


def test_a_local_file_is_opened_as_before(tmp_path):
    path = tmp_path / "a.jpg"
    path.write_bytes(KINDS["a.jpg"])
    for whole in (True, False):
        size, open_file = locate(path, whole=whole)
        with open_file() as file:
            assert (size, file.fileno() > 0) == (len(KINDS["a.jpg"]), True)
