"""Every command's options: odd values give one line; bounds and defaults equal the config's."""

import inspect
import json
import subprocess
import sys
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
import typer
from annotated_types import Ge, Gt, Le, Lt

from cdul_steps import cli
from cdul_steps.config import (
    Alignment,
    Asl,
    Dataset,
    Encoder,
    Evaluate,
    Labels,
    Runtime,
    Scenes,
    Sweep,
    Training,
)

# All in one process, because starting Python takes most of a command's time.
RUN = """
import json, sys
from cdul_steps import cli
for line in sys.stdin:
    sys.argv = ["cdul", *json.loads(line)]
    try:
        cli.main()
    except SystemExit as end:
        print(end.code if isinstance(end.code, str) else "", file=sys.stderr)
        status = end.code if isinstance(end.code, int) else 1
    except BaseException as bug:
        print(f"Traceback: {bug!r}", file=sys.stderr)
        status = 99
    print(f"status {status}", file=sys.stderr, flush=True)
"""
MISSING = "/none/at-all"
HUGE = str(10**30)


def commands():
    """`(words, function)` of every command."""
    for words, app in (((), cli.app), (("demo",), cli.demo), (("review",), cli.review)):
        for info in app.registered_commands:
            yield (*words, info.name or info.callback.__name__.replace("_", "-")), info.callback


def options(function):
    """`(parameter, option, type without None, typer's information)` of every option."""
    for name, hint in get_type_hints(function, include_extras=True).items():
        if not hasattr(hint, "__metadata__"):
            # `X | None` with an Annotated inside is itself Annotated.
            continue
        of, info = hint.__origin__, hint.__metadata__[-1]
        if isinstance(info, typer.models.OptionInfo):
            named = [n for n in info.param_decls or () if n.startswith("--")]
            option = named[0] if named else f"--{name.replace('_', '-')}"
            kinds = [t for t in get_args(of) if t is not type(None)]
            optional = type(None) in get_args(of)
            yield name, option, kinds[0] if optional else of, info


def odd_values(of, info):
    """Lists of words that an option of this type must reject."""
    if get_origin(of) is Literal:
        return [["foo"], [""], [get_args(of)[0].upper()]]
    if of is int:
        values = ["1.5", "nan", "two", "", HUGE, "-7"]
    elif of is float:
        values = ["nan", "inf", "-inf", "1e400", "two", "", "-0.1", "7e9"]
    elif get_origin(of) is tuple:
        return [["0", "1"], ["1000", "1000"], ["-1", "3"], ["2.5", "1"], ["nan", "1"]]
    else:
        return []
    return [[value] for value in values]


OTHERS = {
    "--split": ["train", "=", "train=", "=x", "validation=x"],
    "--further-grid": ["0x3", "9x9", "1000x1000", "3", "x", "-1x2", "2x2x2", ""],
    "--template": ["", "a photo", "{", "{name}"],
    "--similarity": ["train", "=x", "train="],
    "--training": ["aligned", "=x", "aligned="],
    "--settings": [
        "[1]",
        "{",
        MISSING,
        "x: y",
        "{no_such_key: 1}",
        ".",
        "\x01",
        "{seed: 2001-99-99}",
    ],
    "--figure": ["f.xyz", "f"],
    "--device": ["foo", "cuda:99", "meta", ""],
}
"""Odd values for text options."""


def required(function, but):
    """Words for all required parameters of a command except `but`; no file exists."""
    words = []
    found = {name: (option, of) for name, option, of, _ in options(function)}
    for name, parameter in inspect.signature(function).parameters.items():
        if name == but or parameter.default is not parameter.empty:
            continue
        option, of = found.get(name, (None, None))
        value = get_args(of)[0] if get_origin(of) is Literal else MISSING
        if option in ("--similarity", "--training"):
            value = f"train={MISSING}"
        words += [option, value] if option else [value]
    return words


def cases():
    for words, function in commands():
        for name, option, of, info in options(function):
            texts = of is str or get_args(of) == (str,)
            odd = [[v] for v in OTHERS.get(option, ())] if texts else odd_values(of, info)
            of_shard = words in (("encode",), ("features",))
            if (option == "--split" and of is str) or (name == "device" and of_shard):
                odd = []  # checked after the file has been read
            for values in odd:
                yield [*words, f"{option}={values[0]}", *values[1:], *required(function, name)]


def run(lines):
    """`(status, stderr)` of each command."""
    done = subprocess.run(
        [sys.executable, "-c", RUN],
        input="".join(json.dumps(words) + "\n" for words in lines),
        capture_output=True,
        text=True,
        timeout=600,
    )
    texts = done.stderr.split("status ")
    statuses = [int(text.split("\n", 1)[0]) for text in texts[1:]]
    said = [texts[0], *(text.split("\n", 1)[1] for text in texts[1:-1])]
    assert len(statuses) == len(lines), done.stderr[-2000:]
    return list(zip(statuses, said, strict=True))


def test_odd_values_are_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = list(cases())
    assert len(lines) > 150
    wrong = []
    for words, (status, text) in zip(lines, run(lines), strict=True):
        told = [line for line in text.splitlines() if line.strip()]
        one_line = len(told) == 1 and told[0].startswith("cdul: error: ")
        # About the value, not about the missing files.
        about_files = MISSING in text and MISSING not in words[1]
        if status not in (1, 2) or not one_line or about_files:
            wrong.append((words, status, text))
    assert not wrong, "\n".join(map(str, wrong))


SETTINGS = {"label": Labels, "sweep": Sweep, "train": Training}


def beyond(section):
    """`(key, value)` just outside each bound of a section's numbers."""
    for name, field in section.model_fields.items():
        for bound in field.metadata:
            match bound:
                case Ge(ge=limit):
                    yield field.alias or name, limit - 1
                case Gt(gt=limit) | Lt(lt=limit):
                    yield field.alias or name, limit
                case Le(le=limit):
                    yield field.alias or name, limit + 1
        if float in (field.annotation, *get_args(field.annotation)):
            yield field.alias or name, float("nan")
            yield field.alias or name, float("inf")


@pytest.mark.parametrize("command", ["label", "train"])
def test_settings_have_the_bounds_of_the_config(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    function = dict(commands())[(command,)]
    bad = [{key: value} for key, value in beyond(SETTINGS[command])]
    if command == "train":
        bad += [{"alignment": {k: v}} for k, v in beyond(Alignment)]
        bad += [{"asl": {k: v}} for k, v in beyond(Asl)]
    else:
        bad += [{"grid": [1000, 1000]}, {"harden": {"threshold": 7}}, {"harden": {"top_k": 0}}]
    texts = [json.dumps(of).replace("NaN", ".nan").replace("Infinity", ".inf") for of in bad]
    lines = [[command, "--settings", text, *required(function, "settings")] for text in texts]
    for words, (status, text) in zip(lines, run(lines), strict=True):
        assert (status, text.count("\n")) == (1, 1), (words, text)
        assert "cdul: error: config: '" in text, (words, text)


SHARED = {
    "manifest": Dataset,
    "encode": Encoder,
    "encode-text": Encoder,
    "scenes": Scenes,
}
"""Sections whose keys are options of a command."""
NAMES = {"template": "templates", "devices": "train_devices", "split": "splits"}


def shared():
    """`(words, parameter, typer's information, field)` of options that are config keys."""
    for words, function in commands():
        own = SHARED.get(words[-1])
        for name, _, _, info in options(function):
            sections = [own] if own else []
            sections += [Dataset] if name in ("max_pixels", "max_failed_share") else []
            sections += [Runtime] if words[-1] in ("encode", "train") else []
            sections += [Evaluate] if name in ("difficult", "ap") else []
            for section in sections:
                field = section.model_fields.get(NAMES.get(name, name))
                if field is not None:
                    yield words, inspect.signature(function).parameters[name], info, field
                    break


def test_shared_defaults_are_the_configs():
    found = list(shared())
    assert len(found) > 25
    for words, parameter, _, field in found:
        if field.is_required() or parameter.default is parameter.empty:
            continue
        expected = field.default
        if parameter.name == "split":
            expected = [f"{ours}={theirs}" for ours, theirs in field.default.items()]
        assert parameter.default == expected, (words, parameter.name)


def test_shared_bounds_are_the_configs():
    for words, parameter, info, field in shared():
        for bound in field.metadata:
            for end, limit in (
                ("min", getattr(bound, "ge", None)),
                ("max", getattr(bound, "le", None)),
            ):
                if limit is not None:
                    assert getattr(info, end) == limit, (words, parameter.name)


def test_functions_of_stages_have_no_default_of_their_own_that_the_config_has():
    """`make_manifest` once had another default than the command and the config."""
    from cdul_steps.steps import ablation, encode, evaluate, label, manifest, predict, sweep, train

    keys = {
        name: field.default
        for section in (Dataset, Encoder, Labels, Evaluate, Runtime, Training)
        for name, field in section.model_fields.items()
    }
    for module in (ablation, encode, evaluate, label, manifest, predict, sweep, train):
        for _, function in inspect.getmembers(module, inspect.isfunction):
            if function.__module__ != module.__name__:
                continue
            for name, parameter in inspect.signature(function).parameters.items():
                if name in keys and parameter.default is not parameter.empty:
                    assert parameter.default == keys[name], (function, name)
