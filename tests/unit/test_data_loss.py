"""No command deletes or replaces a user's files because of a wrong --output."""

import shutil
from pathlib import Path
from typing import get_args, get_type_hints

import made
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer
import zarr
from typer.testing import CliRunner

from cdul_steps import cli
from cdul_steps.data.files import check_replaceable, replacing
from cdul_steps.errors import UserError


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, with its content."""
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


@pytest.fixture
def precious(tmp_path) -> Path:
    """A folder of a user's files, some with the names of our outputs."""
    folder = tmp_path / "precious"
    for name in (
        *("thesis.txt", "README.md", "report.html", "index.html", "model.json", "checkpoint.pt"),
        *("data/index.js", "train/0.parquet", "train/7.parquet", "train/000000.jpg"),
        *("zarr.json", "c/0/0/0", "review.csv", "model/model.safetensors", "holiday/beach.jpg"),
    ):
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{{}} of somebody: {name}")
    return folder


def output_options():
    """`(words, option, whether it is a file)` of every output of a command, from the code."""
    groups = [((), cli.app), *(((g.name,), g.typer_instance) for g in cli.app.registered_groups)]
    for words, group in groups:
        for command in group.registered_commands:
            name = command.name or command.callback.__name__.replace("_", "-")
            hints = get_type_hints(command.callback, include_extras=True)
            for option, hint in hints.items():
                written = option in ("output", "figure")
                if written or (name in ("encode", "features") and option in ("table", "store")):
                    yield (*words, name), f"--{option}", not _information(hint).dir_okay


def _information(hint):
    """The typer information in an annotation."""
    for argument in (*getattr(hint, "__metadata__", ()), *get_args(hint)):
        if isinstance(argument, typer.models.OptionInfo):
            return argument
    raise AssertionError(hint)


FILES = [(words, option) for words, option, is_file in output_options() if is_file]
FOLDERS = [(words, option) for words, option, is_file in output_options() if not is_file]


def test_every_output_is_known():
    """A command with a new output must be added to one of the two tests below."""
    assert {" ".join(w) for w, _ in FILES} == {
        *("manifest", "encode", "encode-text", "label", "quality", "sweep", "predict", "evaluate"),
        *("model-card", "review import", "features", "join-labels", "box-images", "boxes"),
        "applied",
    }
    assert {" ".join(w) for w, _ in FOLDERS} == {
        *("encode", "store", "similarity", "train", "ablation", "export", "gallery", "report"),
        *("review export", "demo scenes", "demo train-clip", "features", "feature-store"),
        "check draw",
    }


@pytest.mark.parametrize("words, option", FILES, ids=lambda v: v if isinstance(v, str) else v[-1])
@pytest.mark.parametrize("place", ["folder", "."])
def test_a_folder_where_a_file_is_meant(words, option, place, precious, monkeypatch):
    before = contents(precious)
    monkeypatch.chdir(precious)
    place = str(precious) if place == "folder" else "."
    result = CliRunner().invoke(cli.app, [*words, option, place])
    assert result.exit_code == 2
    assert "is a directory" in " ".join(result.output.replace("│", " ").split())
    assert contents(precious) == before


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "results"
    made.make_results(
        folder, {"train": [f"{i}.jpg" for i in range(8)], "test": [f"{i}.jpg" for i in range(4)]}
    )
    return folder


def arguments(results: Path, tmp_path: Path) -> dict[tuple[str, ...], list[str]]:
    """For each command that writes a folder, a command line that is valid except for its output."""
    encoder = results / "demo/tiny-clip"
    images = str(results / "demo/manifest/images.parquet")
    labels = str(encoder / "calibrated/pseudo_labels.parquet")
    split = ["--images", images, "--split", "train"]
    table = tmp_path / "table.tsv"
    table.write_text("variant\nplain\n")
    return {
        ("feature-store",): [*split, "--settings", '{"model": "test_byobnet", "image_size": 32}'],
        ("store",): [*split, "--text", str(encoder / "text.parquet")],
        ("similarity",): [
            *("--store", str(encoder / "embeddings/train.zarr")),
            *("--text", str(encoder / "text.parquet"), *split, "--max-failed-share", "1"),
            *("--table", str(encoder / "encode/train/0.parquet")),
        ],
        ("train",): [
            *("--labels", labels, "--images", images, "--device", "cpu", "--workers", "0"),
            *("--settings", '{"model": "test_byobnet", "epochs": 2, "image_size": 32}'),
        ],
        ("gallery",): [str(encoder / "calibrated/aligned")],
        ("report",): [str(results)],
        ("review", "export"): ["--labels", labels, "--format", "csv"],
        ("check", "draw"): ["--scores", labels],
        ("demo", "scenes"): ["--train", "2", "--test", "1", "--size", "64"],
        ("demo", "train-clip"): [],
    }


@pytest.mark.parametrize(
    "words",
    [
        *(("store",), ("feature-store",), ("similarity",), ("train",), ("gallery",), ("report",)),
        *(("review", "export"), ("demo", "scenes"), ("demo", "train-clip"), ("check", "draw")),
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("place", ["folder", "."])
def test_a_folder_of_somebodys_files(words, place, results, precious, tmp_path, monkeypatch):
    if words == ("demo", "train-clip"):
        (precious / "open_clip_config.json").write_text("somebody's model")
    before = contents(precious)
    monkeypatch.chdir(precious)
    place = str(precious) if place == "folder" else "."
    line = [*words, *arguments(results, tmp_path)[words], "--output", place]
    result = CliRunner().invoke(cli.app, line)
    assert isinstance(result.exception, UserError), (result.output, result.exception)
    assert contents(precious) == before


@pytest.mark.parametrize("name", ["README.md", "model.json", "model/model.safetensors"])
def test_export_into_a_folder_of_something_else(name, tmp_path):
    from cdul_steps.tools.export import export_classifier

    file = tmp_path / "mine" / name
    file.parent.mkdir(parents=True)
    file.write_text("{}")
    if name == "model.json":
        (file.parent / "weights.bin").write_text("mine")
    with pytest.raises(UserError, match="give a new folder"):
        export_classifier(model=tmp_path, format_="onnx", output=tmp_path / "mine")
    assert file.read_text() == "{}"


def test_a_manifest_beside_somebodys_tables(results, tmp_path):
    """Shards are named by numbers, and so may a user's own tables be."""
    mine = tmp_path / "train/7.parquet"
    mine.parent.mkdir()
    pq.write_table(pa.table({"a": [1]}), mine)
    line = ["manifest", "--reader", "folder", "--root", str(results / "demo/scenes")]
    classes = tmp_path / "classes.txt"
    classes.write_text("cat\n")
    line += ["--classes", str(classes), "--split", "train=train"]
    result = CliRunner().invoke(cli.app, [*line, "--output", str(tmp_path / "images.parquet")])
    assert isinstance(result.exception, UserError)
    assert pq.read_table(mine)["a"].to_pylist() == [1]


def test_a_store_does_not_replace_one_of_another_kind(results, tmp_path):
    encoder = shutil.copytree(results / "demo/tiny-clip", tmp_path / "encoder")
    shutil.copytree(results / "demo/manifest", tmp_path / "manifest")
    before = contents(encoder / "embeddings")
    line = ["similarity", *arguments(results, tmp_path)["similarity",]]
    result = CliRunner().invoke(
        cli.app, [*line, "--output", str(encoder / "embeddings/train.zarr")]
    )
    assert isinstance(result.exception, UserError)
    assert contents(encoder / "embeddings") == before
    other = zarr.create_array(tmp_path / "other.zarr", shape=(3, 4), dtype="f4")
    other[:] = 1
    line = ["store", *arguments(results, tmp_path)["store",]]
    result = CliRunner().invoke(cli.app, [*line, "--output", str(tmp_path / "other.zarr")])
    assert isinstance(result.exception, UserError)
    assert np.all(zarr.open_array(tmp_path / "other.zarr")[:] == 1)


@pytest.mark.parametrize("command", ["encode", "features"])
def test_a_shard_is_not_written_into_a_store_of_another_kind(command, results, tmp_path):
    other = zarr.create_array(tmp_path / "other.zarr", shape=(3, 4), chunks=(3, 4), dtype="f4")
    other[:] = 1
    of = {"encode": ["--model", "RN50"], "features": ["--settings", '{"model": "test_byobnet"}']}
    line = [command, "--manifest", str(results / "demo/manifest/train/0.parquet"), *of[command]]
    line += ["--store", str(tmp_path / "other.zarr"), "--table", str(tmp_path / "t.parquet")]
    result = CliRunner().invoke(cli.app, line)
    assert isinstance(result.exception, UserError) and "give another name" in str(result.exception)
    assert np.all(zarr.open_array(tmp_path / "other.zarr")[:] == 1)


@pytest.mark.parametrize("words", [("gallery",), ("similarity",)], ids=" ".join)
def test_an_earlier_result_is_replaced(words, results, tmp_path):
    output = tmp_path / "out"
    line = [*words, *arguments(results, tmp_path)[words], "--output", str(output)]
    for _ in range(2):
        result = CliRunner().invoke(cli.app, line)
        assert result.exit_code == 0, result.exception
        # Files that Snakemake and file managers leave there do no harm.
        (output / ".snakemake_timestamp").touch()
        (output / ".DS_Store").touch()
    (output / "notes.txt").write_text("mine")
    result = CliRunner().invoke(cli.app, line)
    assert isinstance(result.exception, UserError) and "'notes.txt'" in str(result.exception)
    assert (output / "notes.txt").read_text() == "mine"


def test_a_folder_is_not_put_in_the_place_of_a_file(tmp_path):
    mine = tmp_path / "mine"
    mine.write_text("mine")
    with pytest.raises(UserError, match="is a file"), replacing(mine, ["*"]):
        pytest.fail("must not begin")
    assert mine.read_text() == "mine"


def test_a_link_to_a_folder_is_a_folder(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with pytest.raises(UserError, match="is a folder"), replacing(tmp_path / "link"):
        pytest.fail("must not begin")


def test_the_root_is_refused():
    for holds in ((), ("*",)):
        with pytest.raises(UserError, match="root"):
            check_replaceable(Path("/"), holds)
