import json
import os
import re
import shlex
import subprocess
import sys
import time

import pytest
from messages import message_of

from cdul_steps.data.files import (
    SCHEMA_VERSION,
    check_dates,
    digest,
    read_json,
    replacing,
    write_if_changed,
    write_text,
)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_new_file_appears_with_its_folders(tmp_path):
    path = tmp_path / "a" / "b" / "file"
    with replacing(path) as part:
        part.write_text("new")
        assert not path.exists()
        assert part.parent.parent == path.parent  # the same file system, so a rename is enough
    assert path.read_text() == "new"
    assert names(path.parent) == ["file"]


def test_an_exception_leaves_the_old_file_and_no_scratch(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as part:
        part.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_a_folder_replaces_a_folder_whole(tmp_path):
    path = tmp_path / "folder"
    for content in ("first", "second"):
        with replacing(path, ["first", "second"]) as part:
            part.mkdir()
            (part / content).write_text(content)
    assert names(path) == ["second"]
    assert names(tmp_path) == ["folder"]


def test_an_exception_leaves_the_old_folder(tmp_path):
    path = tmp_path / "folder"
    path.mkdir()
    (path / "old").touch()
    with pytest.raises(ValueError, match="stop"), replacing(path, ["old"]) as part:
        part.mkdir()
        raise ValueError("stop")
    assert names(path) == ["old"]
    assert names(tmp_path) == ["folder"]


def test_a_writer_that_writes_nothing_leaves_the_old_folder(tmp_path):
    path = tmp_path / "folder"
    path.mkdir()
    (path / "old").touch()
    with pytest.raises(FileNotFoundError), replacing(path, ["old"]):
        pass
    assert names(path) == ["old"]
    assert names(tmp_path) == ["folder"]


WRITER = """
import sys, time
from pathlib import Path
from cdul_steps.data.files import replacing
with replacing(Path(sys.argv[1])) as part:
    part.write_text("half")
    print("writing", flush=True)
    time.sleep(60)
"""


def test_a_killed_writers_scratch_goes_with_the_next_writer_a_living_ones_stays(tmp_path):
    path = tmp_path / "file"
    command = [sys.executable, "-c", WRITER, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as writer:
        writer.stdout.readline()
        (alive,) = names(tmp_path)
        write_text(path, "first")
        assert names(tmp_path) == [alive, "file"]
        assert (tmp_path / alive / "file").read_text() == "half"
        writer.kill()
    write_text(tmp_path / "other", "")
    assert names(tmp_path) == [alive, "file", "other"]
    write_text(path, "second")
    assert names(tmp_path) == ["file", "other"]
    assert path.read_text() == "second"


def test_a_stop_at_any_time_leaves_a_whole_file_and_no_scratch(tmp_path):
    """A stop signal raises SystemExit at the start of a function or the end of a C function."""
    path = tmp_path / "file"
    write_text(path, "old")
    contents, stops = set(), 0

    def is_stopped(moment: int) -> bool:
        moments = iter(range(moment))

        def stop(frame, event, argument):
            if event in ("call", "c_return") and next(moments, None) is None:
                raise SystemExit

        sys.setprofile(stop)
        try:
            write_text(path, "new")
        # In Python 3.11, rmtree may therefore close its folder twice.
        except (SystemExit, OSError):
            return True
        finally:
            sys.setprofile(None)
        return False

    while is_stopped(stops):
        stops += 1
        assert names(tmp_path) == ["file"], stops
        contents.add(path.read_text())
        write_text(path, "old")
    assert stops > 50 and contents == {"old", "new"}


def test_a_folder_that_is_no_scratch_stays(tmp_path):
    (tmp_path / ".file.mine").mkdir()
    write_text(tmp_path / "file", "text")
    assert names(tmp_path) == [".file.mine", "file"]


def test_files_have_the_usual_permissions(tmp_path):
    plain = tmp_path / "plain"
    plain.touch()
    write_text(tmp_path / "file", "text")
    assert (tmp_path / "file").stat().st_mode == plain.stat().st_mode


def test_text_is_utf8(tmp_path):
    write_text(tmp_path / "file", "Müller\n")
    assert (tmp_path / "file").read_bytes() == "Müller\n".encode()


def test_text_that_cannot_be_written_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "\ud800")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_write_if_changed_keeps_the_time_of_an_equal_file(tmp_path):
    path = tmp_path / "file"
    assert write_if_changed(path, b"one")
    os.utime(path, ns=(1, 1))
    assert not write_if_changed(path, b"one")
    assert path.stat().st_mtime_ns == 1
    assert write_if_changed(path, b"two")
    assert path.read_bytes() == b"two"
    assert path.stat().st_mtime_ns != 1


def test_digest_sees_content_and_names_but_not_place_or_time(tmp_path):
    def folder(name, files):
        for file, content in files.items():
            path = tmp_path / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
            os.utime(path, ns=(len(name), len(name)))
        return digest(tmp_path / name)

    first = folder("one", {"a": "x", "sub/b": "y"})
    assert len(first) == 32
    assert folder("another", {"sub/b": "y", "a": "x"}) == first
    assert folder("content", {"a": "x", "sub/b": "z"}) != first
    assert folder("name", {"a": "x", "sub/c": "y"}) != first
    assert digest(tmp_path / "one" / "a") == digest(tmp_path / "another" / "a")
    assert digest(tmp_path / "one" / "a") != digest(tmp_path / "one" / "sub" / "b")


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", "[" * 100_000])
def test_json_that_is_no_mapping(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    assert message_of(read_json, tmp_path / "a.json").startswith(f"{tmp_path}/a.json: not a JSON")


def test_json_of_another_version_or_none(tmp_path):
    path = tmp_path / "a.json"
    assert message_of(read_json, path) == f"{path}: no such file"
    path.write_text(json.dumps({"schema_version": SCHEMA_VERSION + 1}))
    assert "written by another version" in message_of(read_json, path)
    path.write_text(json.dumps({"schema_version": SCHEMA_VERSION}))
    assert read_json(path) == {"schema_version": SCHEMA_VERSION}


def test_dates_in_the_future(tmp_path):
    folder = tmp_path / "it's here"
    write_text(folder / "a/file", "text")
    (folder / "gone").symlink_to("nowhere")
    os.utime(folder / "a/file", (0, time.time() + 30))
    check_dates(folder)
    check_dates(tmp_path / "nothing")
    os.utime(folder / "a/file", (0, time.time() + 300))
    message = message_of(check_dates, folder)
    assert message.startswith(f"{folder}/a/file is dated in the future, 20")
    command = re.search("'(find .*)', or else", message)[1]
    subprocess.run(shlex.split(command), check=True)
    check_dates(folder)
