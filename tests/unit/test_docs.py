"""The documentation is correct: its links, messages, commands and examples."""

import ast
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest
import typer
import yaml
from click import Context
from snakemake.cli import parse_args

from cdul_steps import __version__, cli
from cdul_steps.config import Config

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("config/*.md")])
FENCE = re.compile(r"^```(\w[^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]


def blocks(page: Path, kind: str) -> list[str]:
    """The fenced blocks of a page whose info string begins with `word`."""
    text = page.read_text(encoding="utf-8")
    return [body for info, body in FENCE.findall(text) if info.split()[0] == kind]


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes from a page's headings."""
    prose = FENCE.sub("", page.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ (.+)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", t.lower()).replace(" ", "-") for t in titles}


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name):
    page = ROOT / name
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        file, _, anchor = target.partition("#")
        found = (page.parent / file) if file else page
        assert found.exists(), target
        assert not anchor or anchor in anchors(found), target


def test_every_page_is_reached_from_the_readme():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for page in ROOT.glob("docs/*.md"):
        assert f"(docs/{page.name}" in text, page.name


# Tables of results

TABLES = ROOT / "experiments/tables.py"


def check_tables(script: Path) -> str:
    """The output of `--check`; nothing if the pages agree with docs/tables."""
    command = [sys.executable, str(script), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == bool(done.stdout) and not done.stderr, done.stderr
    return done.stdout


def test_tables_of_results_are_those_of_the_files():
    assert check_tables(TABLES) == ""
    text = "".join(page.read_text(encoding="utf-8") for page in ROOT.glob("docs/*.md"))
    names = re.findall(r"^<!-- table: (\S+) -->\n\n\|", text, re.MULTILINE)
    assert sorted(names) == sorted(file.stem for file in ROOT.glob("docs/tables/*"))


def test_a_table_edited_by_hand_is_noticed(tmp_path):
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    script = tmp_path / "experiments/tables.py"
    script.parent.mkdir()
    shutil.copy(TABLES, script)
    page = tmp_path / "docs/results-demo.md"
    before = page.read_text(encoding="utf-8")
    page.write_text(before.replace("| 90.27 ± 0.43 |", "| 91.27 ± 0.43 |"), encoding="utf-8")
    assert re.fullmatch(r"results-demo\.md differs.*\n", check_tables(script))
    subprocess.run([sys.executable, str(script)], check=True)
    assert page.read_text(encoding="utf-8") == before


# Messages


@cache
def strings() -> list[str]:
    """All texts in the package, with `...` in place of values."""
    found = []
    for file in (ROOT / "cdul_steps").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                parts = (p.value if isinstance(p, ast.Constant) else "..." for p in node.values)
                found.append("".join(parts))
    rules = "\n".join(p.read_text(encoding="utf-8") for p in ROOT.glob("workflow/rules/*.smk"))
    return [*found, re.sub(r"\{[^{}]*\}", "...", rules)]


def occurs(message: str) -> bool:
    """Whether a text in the source contains the message's pieces in order."""
    pieces = [re.escape(piece.strip()) for piece in message.split("...") if piece.strip()]
    pattern = re.compile(".*?".join(pieces), re.DOTALL)
    return any(pattern.search(text) for text in strings())


MESSAGES = re.findall(r"^### `(.+)`$", (ROOT / "docs/faq.md").read_text(), re.MULTILINE)


@pytest.mark.parametrize("message", MESSAGES)
def test_quoted_messages_are_the_softwares(message):
    assert occurs(message)


def test_a_message_that_is_not_is_noticed():
    assert len(MESSAGES) > 12
    assert not occurs("training exploded in epoch ...")


# Commands


def command_lines() -> list[tuple[str, str]]:
    """All lines of the shell blocks with their page; continued lines are joined."""
    lines = []
    for page in PAGES:
        for block in blocks(page, "sh"):
            for line in block.replace("\\\n", " ").splitlines():
                line = re.sub(r"\s# .*|^#.*", "", line).strip()
                if line:
                    lines.append((page.relative_to(ROOT).as_posix(), line))
    return lines


def check_cdul(words: list[str]) -> None:
    """Parse like `cdul`, without running anything; files need not exist."""
    command, context = typer.main.get_command(cli.app), None
    while hasattr(command, "resolve_command"):
        context = Context(command, parent=context)
        assert words, "a group of commands alone"
        _, command, words = command.resolve_command(context, words)
    command.make_context(command.name, list(words), parent=context)


def check_snakemake(words: list[str]) -> None:
    rules = "\n".join(p.read_text() for p in [ROOT / "Snakefile", *ROOT.glob("workflow/rules/*")])
    _, arguments = parse_args(words)
    for target in arguments.targets:
        assert "/" in target or re.search(rf"^(rule|checkpoint) {target}:", rules, re.M), target
    for file in arguments.configfile or ():
        assert (ROOT / file).is_file(), file


def check_make(words: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for word in words:
        assert "=" in word or re.search(rf"^{word}:", makefile, re.M), word


def check_python(words: list[str]) -> None:
    assert words[0] == "-m" or (ROOT / words[0]).is_file(), words[0]


CHECKS = {
    "cdul": check_cdul,
    "snakemake": check_snakemake,
    "make": check_make,
    "python": check_python,
}
OTHERS = {
    "cd",
    "tmux",
    "ln",
    "nano",
    "pip",
    "conda",
    "docker",
    "buildah",
    "debootstrap",
    "apptainer",
    "pytest",
    "git",
    "export",
    "unzip",
    "tar",
    "for",
    "done",
}


@pytest.mark.parametrize(("page", "line"), command_lines(), ids=lambda x: x[:60])
def test_commands_can_be_given(page, line):
    words = shlex.split(line.partition(" > ")[0])
    while words and re.fullmatch(r"\w+=.*", words[0]):
        words.pop(0)
    program = words[0].removeprefix(".venv/bin/")
    assert program in CHECKS or program in OTHERS, program
    if program in CHECKS:
        CHECKS[program](words[1:])


def test_an_option_that_is_not_is_noticed():
    for words in (["summary", "--colour"], ["nonsense"], ["review", "export"]):
        with pytest.raises(Exception, match=r"(?i)no such|missing|option"):
            check_cdul(words)
    with pytest.raises(AssertionError):
        check_snakemake(["--cores", "1", "nonsense"])


def test_paths_of_the_demo_are_those_that_it_makes():
    run = yaml.safe_load((ROOT / "config/config.yaml").read_text())["run"]
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    of_encoder = set(re.findall(r"results/demo/tiny-clip/(\w+)(?=[/ `\n])", text))
    assert of_encoder - {"embeddings", "encode", "similarity"} == set(run["labels"])
    trainings = re.findall(rf"results/demo/tiny-clip/{run['labels'][0]}/(\w+)(?![\w.])", text)
    assert set(trainings) == set(run["trainings"])


# Examples


def test_the_librarys_example_runs(capsys):
    (code,) = [
        body
        for info, body in FENCE.findall((ROOT / "docs/library.md").read_text())
        if info == "python run"
    ]
    exec(code, {})
    before, after = (
        float(line.rpartition(" ")[2]) for line in capsys.readouterr().out.split("\n", 1)
    )
    assert 0 < before < after <= 100


@pytest.mark.parametrize("name", NAMES)
def test_python_and_yaml_can_be_read(name):
    for code in blocks(ROOT / name, "python"):
        ast.parse(code)
    for text in blocks(ROOT / name, "yaml"):
        yaml.safe_load(text)


# Author and version


def test_versions_agree():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    changes = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert "version" in project["dynamic"] and __version__ == citation["version"]
    assert citation["license"] == project["license"]
    assert changes[0] == "Unreleased" and changes[1].split()[0] == __version__


def test_the_catalogue_finds_what_it_looks_for():
    """Read a repository as snakemake-workflow-catalog does."""
    settings = yaml.safe_load((ROOT / ".snakemake-workflow-catalog.yml").read_text())["usage"]
    assert settings["software-stack-deployment"]["conda"] is False
    assert not any("conda:" in rules.read_text() for rules in ROOT.glob("workflow/rules/*.smk"))
    assert (ROOT / "workflow/Snakefile").is_file() and (ROOT / "config/README.md").is_file()
    readme = (ROOT / "README.md").read_text().lower()
    assert "snakemake" in readme and "workflow" in readme
    # Its page of a workflow has a table of the schema's keys.
    schema = json.loads((ROOT / "workflow/schemas/config.schema.json").read_text())
    assert schema["properties"].keys() == Config.model_fields.keys()
    assert all(key["description"] for key in schema["properties"].values())


def test_contributing_names_files_that_are_there():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    for name in re.findall(r"`([\w/.]+/[\w.]+)`", text):
        if "NAME" not in name:
            assert (ROOT / name).exists(), name


def test_ways_to_run_it_name_tests_that_are_there():
    text = (ROOT / "docs/deployment.md").read_text()
    named = re.findall(r"`((?:tests|\.github)/[\w/.]+)`", text)
    assert len(named) > 12
    for name in named:
        assert (ROOT / name).exists(), name


# Files of a public project


def test_continuous_integration_calls_what_is_there():
    steps = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text())["jobs"].values()
    lines = [s["run"] for job in steps for s in job["steps"] if "run" in s]
    made = [shlex.split(line)[1:] for line in lines if line.startswith("make ")]
    assert len(made) == 3
    for words in made:
        check_make(words)


def test_the_sites_navigation_has_every_page():
    text = (ROOT / "mkdocs.yml").read_text()
    sections = yaml.safe_load(text[text.index("nav:") :])["nav"][1:]
    pages = {page for section in sections for listed in section.values() for page in listed}
    assert {page.name for page in ROOT.glob("docs/*.md")} <= pages


def test_a_bug_report_asks_for_what_the_doctor_says():
    form = yaml.safe_load((ROOT / ".github/ISSUE_TEMPLATE/bug.yml").read_text())
    asked = [field["attributes"]["label"] for field in form["body"]]
    (line,) = [label for label in asked if label.startswith("cdul ")]
    check_cdul(shlex.split(line)[1:])


def test_the_two_recipes_of_an_image_are_one():
    docker = (ROOT / "containers/Dockerfile").read_text()
    apptainer = (ROOT / "containers/apptainer.def").read_text()
    for text in ("debian:trixie-slim", "/whl/cpu", "requirements.lock", "python3 python3-venv"):
        assert text in docker and text in apptainer, text
