"""Input from strangers is only data: nothing in it is executed, and no name leads elsewhere."""

import ast
import json
import os
import pickle
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from messages import message_of
from networks import CLASSES, CPU, MODEL, card
from safetensors.torch import load_file
from snakemake.common.configfile import load_configfile
from snakemake_interface_common.exceptions import WorkflowError

from cdul_steps.config import read_training
from cdul_steps.data.classes import load_classes
from cdul_steps.data.readers import read_dataset
from cdul_steps.data.stores import open_store, read_blocks
from cdul_steps.models.classifier import load_classifier, new_classifier, save_classifier
from cdul_steps.models.encoder import load_clip

ROOT = Path(__file__).parents[2]
SOURCES = sorted([*(ROOT / "cdul_steps").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")])
MODULES = {"pickle", "cPickle", "marshal", "shelve", "dill", "joblib", "tarfile", "zipfile"}
CALLS = {
    *("eval", "exec", "compile", "__import__", "os.system", "os.popen", "shutil.unpack_archive"),
    *("yaml.load", "yaml.unsafe_load", "yaml.full_load", "pd.read_pickle"),
}
LOADS = {"np.load", "numpy.load"}  # unless pickles are refused
DECODERS = {"Image.open", "simplejpeg.decode_jpeg", "pi_heif.open_heif", "pi_heif.HeifImageFile"}
ALLOWED = {
    "cdul_steps/data/images.py": DECODERS,
    "cdul_steps/data/formats.py": DECODERS,
    # Benchmarks compare with the usual way of decoding, and make their own images and tar files.
    "benchmarks/encode.py": DECODERS,
    "benchmarks/forms.py": DECODERS,
    "benchmarks/memory.py": {"tarfile"},
}


def breaches(source: str) -> list[str]:
    """Code in a Python source that could execute its input, or decode images elsewhere."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
            found += [name for name in names if name and name.partition(".")[0] in MODULES]
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
            if name in CALLS | DECODERS:
                found.append(name)
            if keywords.get("shell", "False") != "False":
                found.append(name)
            if keywords.get("allow_pickle", str(name in LOADS)) != "False":
                found.append(name)
            if name == "torch.load" and keywords.get("weights_only") != "True":
                found.append(name)
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_no_source_runs_what_it_reads(path):
    found = set(breaches(path.read_text(encoding="utf-8")))
    assert found <= ALLOWED.get(path.relative_to(ROOT).as_posix(), set())


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path)",
        "read(path, allow_pickle=True)",
        "yaml.load(text)",
        "subprocess.run(line, shell=True)",
        "eval(text)",
        "Image.open(path)",
        "simplejpeg.decode_jpeg(data)",
        "import tarfile",
    ],
)
def test_the_check_itself_finds(source):
    assert breaches(source)


# Numbers, and words from a list that the config allows.
BARE = {
    *("precision", "max_pixels", "tau", "zeta", "difficult", "ap", "construction", "reader"),
    *("grid", "shard_size", "seed", "train", "test", "size", "max_failed_share", "batch_size"),
    *("workers", "threads", "split", "overlap", "gpu", "engine", "aliases", "labelled_only"),
    "devices",
}


@pytest.mark.parametrize("path", sorted((ROOT / "workflow").rglob("*.smk")), ids=lambda p: p.name)
def test_every_word_of_a_shell_command_is_quoted(path):
    for command in re.findall(r"shell:\n((?: +[\"'].*\n)+)", path.read_text(encoding="utf-8")):
        for name, quoted in re.findall(r"\{([\w.]+)(:q)?\}", command):
            assert quoted or name.rpartition(".")[2] in BARE, f"{path.name}: {name}"


class Evil:
    """A pickle that leaves a file behind when it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch '{self.mark}'",)


@pytest.fixture
def mark(tmp_path):
    yield tmp_path / "pwned"
    assert not (tmp_path / "pwned").exists()


def evil_checkpoint(path: Path, mark: Path) -> Path:
    torch.save({"state_dict": {"a": torch.zeros(1)}, "evil": Evil(mark)}, path)
    return path


def test_the_pickle_of_these_tests_does_run(tmp_path):
    pickle.loads(pickle.dumps(Evil(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("suffix", ["pt", "pth", "bin", "ckpt", "safetensors"])
def test_a_checkpoint_of_the_encoder_is_data(tmp_path, mark, suffix):
    file = evil_checkpoint(tmp_path / f"weights.{suffix}", mark)
    assert "cannot be loaded" in message_of(load_clip, "RN50", str(file))


@pytest.mark.parametrize("suffix", ["npy", "npz"])
def test_an_array_of_the_encoder_is_data(tmp_path, mark, suffix):
    file = tmp_path / f"weights.{suffix}"
    evil = np.array([Evil(mark)], object)
    (np.save if suffix == "npy" else np.savez)(file, evil, allow_pickle=True)
    assert "cannot be loaded" in message_of(load_clip, "RN50", str(file))


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_the_start_of_a_training_is_data(tmp_path, mark, suffix):
    file = evil_checkpoint(tmp_path / f"weights.{suffix}", mark)
    message = message_of(new_classifier, MODEL, CLASSES, {}, str(file))
    assert "cannot be made" in message


@pytest.fixture
def model(tmp_path) -> Path:
    save_classifier(new_classifier(MODEL, CLASSES, {}, None)[0], card(), tmp_path / "model")
    return tmp_path / "model"


def test_a_trained_model_is_data(model, tmp_path, mark):
    (model / "model.safetensors").write_bytes(pickle.dumps(Evil(mark)))
    assert "cannot be loaded" in message_of(load_classifier, model, CPU)


@pytest.mark.parametrize(
    "arguments",
    [
        {"checkpoint_path": "elsewhere.pth"},
        {"pretrained": True},
        {"pretrained_cfg": {"file": "elsewhere.pth"}},
        {"pretrained_cfg_overlay": {"file": "elsewhere.pth"}},
    ],
)
def test_a_model_card_names_no_other_weights(model, mark, tmp_path, arguments):
    evil_checkpoint(tmp_path / "elsewhere.pth", mark)
    values = json.loads((model / "model.json").read_text())
    (model / "model.json").write_text(json.dumps({**values, "model_args": arguments}))
    assert "weights outside the folder" in message_of(load_classifier, model, CPU)


def test_no_setting_of_torch_makes_a_checkpoint_run(tmp_path, mark):
    # Older releases of timm and open_clip leave the choice to torch, and torch to this variable.
    file = evil_checkpoint(tmp_path / "weights.pth", mark)
    code = f"""
import torch
import cdul_steps.models.classifier
try:
    torch.load({str(file)!r}, weights_only=False)
except Exception as error:
    print(type(error).__name__)
"""
    environment = {**os.environ, "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert done.stdout == "UnpicklingError\n", done.stderr


def test_a_model_may_not_bring_code(tmp_path):
    model = tiny.make_clip(tmp_path)
    file = tmp_path / "open_clip_config.json"
    config = json.loads(file.read_text())
    text = config["model_cfg"]["text_cfg"]
    text |= {"hf_tokenizer_name": "x", "tokenizer_kwargs": {"trust_remote_code": True}}
    file.write_text(json.dumps(config))
    assert "its own code" in message_of(load_clip, model)


@pytest.mark.parametrize("filters", [[{"id": "pickle"}], None])
def test_a_store_of_the_format_that_has_pickles_is_refused(tmp_path, mark, filters):
    store = tmp_path / "e.zarr"
    store.mkdir()
    metadata = {
        **{"zarr_format": 2, "shape": [1, 1, 1], "chunks": [1, 1, 1], "dtype": "<f4"},
        **{"compressor": None, "fill_value": None, "order": "C", "filters": filters},
    }
    (store / ".zarray").write_text(json.dumps(metadata))
    (store / "0.0.0").write_bytes(pickle.dumps(Evil(mark)))
    message = message_of(lambda: list(read_blocks(store, open_store(store))))
    assert "not a Zarr array (of format 3)" in message


YAML = "!!python/object/apply:os.system ['touch {}']"


def test_yaml_is_data(tmp_path, mark):
    text = YAML.format(mark)
    (tmp_path / "classes.yaml").write_text(f"- {text}\n")
    assert "not valid YAML" in message_of(load_classes, tmp_path / "classes.yaml")
    (tmp_path / "settings.yaml").write_text(f"epochs: {text}\n")
    assert "not readable" in message_of(read_training, str(tmp_path / "settings.yaml"))
    # Snakemake reads the config itself.
    with pytest.raises(WorkflowError):
        load_configfile(tmp_path / "settings.yaml")


def test_yaml_that_unfolds_without_end_is_one_line(tmp_path):
    lists = ["&a [x, x, x, x, x, x, x, x, x]"]
    for inner, outer in zip("abcdefgh", "bcdefghi", strict=True):
        lists.append(f"&{outer} [{', '.join([f'*{inner}'] * 9)}]")
    (tmp_path / "classes.yaml").write_text(f"- [{', '.join(lists)}]")
    start = time.monotonic()
    assert len(message_of(load_classes, tmp_path / "classes.yaml")) < 500
    assert time.monotonic() - start < 10


def test_yaml_that_nests_without_end_is_one_line(tmp_path):
    (tmp_path / "classes.yaml").write_text("[" * 100_000)
    assert "not valid YAML" in message_of(load_classes, tmp_path / "classes.yaml")


@pytest.fixture
def voc(tmp_path) -> Path:
    root = tmp_path / "VOC"
    (root / "ImageSets/Main").mkdir(parents=True)
    (root / "JPEGImages").mkdir()
    (root / "Annotations").mkdir()
    (root / "ImageSets/Main/train.txt").write_text("a\n")
    return root


@pytest.mark.parametrize("name", ["../../secret", "/etc/secret", "a/../../b"])
def test_an_image_id_leads_nowhere_else(voc, name):
    (voc / "ImageSets/Main/train.txt").write_text(f"{name}\n")
    message = message_of(read_dataset, "voc", voc, {"train": "train"}, ["dog"])
    assert "line 1" in message and name in message


@pytest.mark.parametrize(("split", "name"), [("../train", "dog"), ("train", "../../dog")])
def test_a_split_or_class_leads_nowhere_else(voc, split, name):
    assert "'/'" in message_of(read_dataset, "voc", voc, {"train": split}, [name])


def test_xml_that_unfolds_without_end_is_one_line(voc):
    entities = "".join(
        f'<!ENTITY {b} "{f"&{a};" * 10}">' for a, b in zip("abcdefghi", "bcdefghij", strict=True)
    )
    text = f'<!DOCTYPE x [<!ENTITY a "ha">{entities}]><annotation><object>&j;</object></annotation>'
    (voc / "Annotations/a.xml").write_text(text)
    start = time.monotonic()
    message = message_of(read_dataset, "voc", voc, {"train": "train"}, ["dog"])
    assert "a.xml: cannot be read" in message
    assert time.monotonic() - start < 10


def test_xml_reads_no_other_file(voc, tmp_path):
    (tmp_path / "secret").write_text("dog")
    text = f'<!DOCTYPE x [<!ENTITY a SYSTEM "file://{tmp_path}/secret">]>'
    text += "<annotation><object><name>&a;</name></object></annotation>"
    (voc / "Annotations/a.xml").write_text(text)
    assert "cannot be read" in message_of(read_dataset, "voc", voc, {"train": "train"}, ["dog"])


def test_weights_are_written_as_safetensors(model):
    assert load_file(model / "model.safetensors")
    assert sorted(p.name for p in model.iterdir()) == ["model.json", "model.safetensors"]
