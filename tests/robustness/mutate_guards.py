"""Remove guards, one at a time, and show that a test fails for each; print it as JSON.

    python tests/robustness/mutate_guards.py

In a copy of the project, the tests of all guards must pass. Then a text replacement removes one
guard after the other, and its test must fail, or not end within --timeout. A Markdown table goes to
stderr; each row is printed as soon as it is known.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from cdul_steps.provenance import versions

ROOT = Path(__file__).parents[2]
PARTS = ("benchmarks", "cdul_steps", "config", "tests", "workflow", "Snakefile", "pyproject.toml")


@dataclass(frozen=True)
class Guard:
    """What a guard prevents, its source text, the replacement, and the test that must fail."""

    family: str
    against: str
    file: str
    old: str
    new: str
    test: str


GUARDS = (
    Guard(
        "images",
        "an image of more than max_pixels is decoded",
        "cdul_steps/data/images.py",
        "if width * height > limit:",
        "if False:",
        "test_images.py::test_too_large_is_known_before_pixels_are_allocated",
    ),
    Guard(
        "images",
        "a JPEG with endless scans takes hours",
        "cdul_steps/data/images.py",
        "if number > MAX_SCANS:",
        "if False:",
        "test_images.py::test_a_jpeg_of_many_scans_is_refused_before_it_takes_hours",
    ),
    Guard(
        "images",
        "a JPEG that is half missing passes for whole",
        "cdul_steps/data/formats.py",
        "return bool(found)",
        "return True",
        "test_image_kinds.py::test_a_jpeg_cut_and_given_an_end_marker_is_refused",
    ),
    Guard(
        "images",
        "a colour profile in a PNG fills the memory",
        "cdul_steps/data/formats.py",
        "_PROFILE_LIMIT = 1 << 23",
        "_PROFILE_LIMIT = 1 << 30",
        "test_images.py::test_bombs_are_refused_without_memory_for_their_pixels",
    ),
    Guard(
        "images",
        "an extremely thin image fills the memory",
        "cdul_steps/models/embedding.py",
        "if (sides.max(axis=1) > MAX_ASPECT * sides.min(axis=1)).any():",
        "if False:",
        "test_encode.py::test_image_like_a_thread[longest]",
    ),
    Guard(
        "images",
        "an unexpected exception ends the run",
        "cdul_steps/data/images.py",
        "    except Exception as error:\n        # Pillow's own OSErrors",
        "    except OSError as error:\n        # Pillow's own OSErrors",
        "test_images.py::test_not_an_image",
    ),
    Guard(
        "archives",
        "images after a damaged header are silently missing",
        "cdul_steps/data/tar.py",
        'if _number(header[148:156]) != sum(header) - sum(header[148:156]) + 8 * ord(" "):',
        "if False:",
        "test_reader_webdataset.py::test_a_damaged_header_ends_nothing_silently",
    ),
    Guard(
        "archives",
        "a tar that was cut short passes for whole",
        "cdul_steps/data/tar.py",
        "if not ended:",
        "if False:",
        "test_reader_webdataset.py::test_a_tar_that_was_cut_short[1024]",
    ),
    Guard(
        "archives",
        "a tar that points backwards is read forever",
        "cdul_steps/data/tar.py",
        "if number < 0:",
        "if False:",
        "test_reader_webdataset.py::test_further_fields_that_lead_astray[-512]",
    ),
    Guard(
        "archives",
        "a replaced Parquet file returns the images of the old one",
        "cdul_steps/data/sources.py",
        "cells = _cells(file, found.st_size, found.st_mtime_ns, column, group)",
        "cells = _cells(file, 0, 0, column, group)",
        "test_sources.py::test_a_replaced_parquet_file_is_read_anew",
    ),
    Guard(
        "data",
        "a shard of another run passes for this one's",
        "cdul_steps/steps/similarity.py",
        'if not shard.is_file() or digest(shard) != facts["digest"]:',
        "if False:",
        "test_mismatch.py::test_a_shard_of_another_run",
    ),
    Guard(
        "data",
        "a corrupt shard is read as data",
        "cdul_steps/data/stores.py",
        "compressors=Crc32cCodec(),",
        "compressors=None,",
        "test_stores.py::test_a_torn_shard_is_named",
    ),
    Guard(
        "data",
        "classes in another order are mixed up",
        "cdul_steps/data/manifest.py",
        "if [same(name) for name in named] == [same(name) for name in classes]:",
        "if sorted(map(same, named)) == sorted(map(same, classes)):",
        "test_mismatch.py::test_classes_of_another_order_or_number",
    ),
    Guard(
        "data",
        "a file of another schema version is misread",
        "cdul_steps/data/files.py",
        "if found != SCHEMA_VERSION:",
        "if False:",
        "test_tables.py::test_another_schema_is_refused",
    ),
    Guard(
        "models",
        "embeddings that are not finite become labels",
        "cdul_steps/models/embedding.py",
        "if np.isfinite(vectors).all():",
        "if True:",
        "test_encode.py::test_overflow_is_a_status",
    ),
    Guard(
        "models",
        "a training that diverged overwrites its checkpoint",
        "cdul_steps/steps/train.py",
        "if not (np.isfinite(loss) and trainer.is_finite()):",
        "if False:",
        "test_train.py::test_divergence_keeps_the_last_checkpoint",
    ),
    Guard(
        "models",
        "a training continues from a checkpoint of other labels",
        "cdul_steps/steps/train.py",
        'if state["identity"] != identity:',
        "if False:",
        "test_train.py::test_checkpoint_of_other_labels",
    ),
    Guard(
        "faults",
        "a file that was cut short passes for whole",
        "cdul_steps/data/files.py",
        "part = scratch / path.name",
        "part = path",
        "test_files.py::test_an_exception_leaves_the_old_file_and_no_scratch",
    ),
    Guard(
        "faults",
        "files left by killed writers pile up",
        "cdul_steps/data/files.py",
        "    _remove_stale(path)\n",
        "",
        "test_faults.py::test_what_a_killed_writer_left_goes_with_the_next",
    ),
    Guard(
        "faults",
        "running out of GPU memory ends the job",
        "cdul_steps/models/device.py",
        "if self.batch_size == 1:",
        "if True:",
        "test_encode.py::test_out_of_memory_halves_the_batch_for_good",
    ),
    Guard(
        "faults",
        "results dated in the future hide outdated files",
        "cdul_steps/data/files.py",
        "if (date - now).total_seconds() > CLOCKS_DIFFER:",
        "if False:",
        "test_files.py::test_dates_in_the_future",
    ),
    Guard(
        "security",
        "a pickle in a checkpoint is run",
        "cdul_steps/models/__init__.py",
        'os.environ.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None)\n'
        'os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"\n',
        "",
        "test_security.py::test_no_setting_of_torch_makes_a_checkpoint_run",
    ),
    Guard(
        "security",
        "a Zarr store in the format that allows pickles is opened",
        "cdul_steps/data/stores.py",
        ', mode="r", zarr_format=3)',
        ', mode="r")',
        "test_security.py::test_a_store_of_the_format_that_has_pickles_is_refused",
    ),
    Guard(
        "security",
        "a model card loads weights from elsewhere",
        "cdul_steps/models/classifier.py",
        "if elsewhere := ELSEWHERE & set(card.model_args):",
        "if elsewhere := ():",
        "test_security.py::test_a_model_card_names_no_other_weights",
    ),
    Guard(
        "security",
        "an image id leads out of its folder",
        "cdul_steps/data/readers/voc.py",
        'if "/" in name:',
        "if False:",
        "test_security.py::test_an_image_id_leads_nowhere_else",
    ),
    Guard(
        "security",
        "a file name is run by the shell",
        "workflow/rules/label.smk",
        "{input.images:q}",
        "{input.images}",
        "test_security.py::test_every_word_of_a_shell_command_is_quoted",
    ),
    Guard(
        "security",
        "a class name becomes part of the report's HTML",
        "cdul_steps/report/page.py",
        "autoescape=True",
        "autoescape=False",
        "test_report.py::test_the_page_escapes_all_text",
    ),
    Guard(
        "security",
        "YAML creates objects that run code",
        "cdul_steps/data/classes.py",
        "yaml.safe_load(text)",
        "yaml.unsafe_load(text)",
        "test_security.py::test_yaml_is_data",
    ),
    Guard(
        "fuzz",
        "metadata that is not a JSON mapping ends in a traceback",
        "cdul_steps/data/tables.py",
        "except (ValueError, TypeError, RecursionError) as error:",
        "except RecursionError as error:",
        "test_tables.py::test_metadata_that_is_no_mapping",
    ),
)


def outcome(project: Path, tests: Iterable[str], timeout: float) -> str:
    """Whether tests, each `file::name` below tests/unit, pass, fail or hang in a copy."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    try:
        done = subprocess.run(
            [*command, *(f"tests/unit/{test}" for test in tests)],
            cwd=project,
            env={**os.environ, "PYTHONPATH": str(project), "PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            text=True,
            timeout=timeout,
        )
    except subprocess.TimeoutExpired:
        return "hangs"
    if done.returncode not in (0, 1):  # of pytest: no such test, and the like
        raise RuntimeError(f"{done.stdout}{done.stderr}")
    return "passes" if done.returncode == 0 and "passed" in done.stdout else "fails"


def take_out(project: Path, guard: Guard, timeout: float) -> str:
    """Whether the guard's test passes, fails or hangs without it."""
    file = project / guard.file
    text = file.read_text(encoding="utf-8")
    if text.count(guard.old) != 1:
        raise RuntimeError(f"{guard.file}: {guard.old!r} is there {text.count(guard.old)} times")
    file.write_text(text.replace(guard.old, guard.new), encoding="utf-8")
    try:
        return outcome(project, [guard.test], timeout)
    finally:
        file.write_text(text, encoding="utf-8")


def main() -> None:
    """Remove every guard and print the result of its test."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--timeout", type=float, default=900, help="seconds that a test may take")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        project = Path(folder) / "project"
        project.mkdir()
        for part in PARTS:
            copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
            copy(ROOT / part, project / part)
        before = outcome(project, [guard.test for guard in GUARDS], len(GUARDS) * options.timeout)
        if before != "passes":
            sys.exit(f"with all guards in their places, a test {before}")
        print("| family | without its guard | the test | |\n|---|---|---|---|", file=sys.stderr)
        for guard in GUARDS:
            found = take_out(project, guard, options.timeout)
            rows.append({**asdict(guard), "outcome": found})
            cells = (guard.family, guard.against, f"`{guard.test}`", found)
            print(f"| {' | '.join(cells)} |", file=sys.stderr, flush=True)
    missed = sum(row["outcome"] != "passes" for row in rows)
    result = {"guards": rows, "missed": missed, "of": len(rows), "software": versions("pytest")}
    print(json.dumps(result, indent=2))
    sys.exit(missed != len(rows))


if __name__ == "__main__":
    main()
