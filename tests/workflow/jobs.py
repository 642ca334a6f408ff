"""Find jobs of a running workflow, to kill them, and compare the results."""

import time
from contextlib import suppress

import psutil
from copies import Project


def workers(job: psutil.Process) -> list[psutil.Process]:
    """The decoding processes of a job: its forks, without helpers started by imports."""
    return [child for child in job.children() if child.cmdline() == job.cmdline()]


def find_job(run, stage: str, known: tuple = (), *, decoding: bool = True) -> psutil.Process:
    """Wait for a job of a stage that is running and not one of the `known` ones.

    `decoding`: wait until it has decoding processes.
    """
    while True:
        assert run.poll() is None, run.stdout.read()
        for process in psutil.Process(run.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                words = process.cmdline()
                if words[1:2] and words[1].endswith("cdul") and words[2] == stage:
                    is_worker = process.parent().cmdline() == words
                    if (
                        process not in known
                        and not is_worker
                        and (workers(process) or not decoding)
                    ):
                        return process
        time.sleep(0.01)


def same(project: Project, other: Project, *patterns: str) -> bool:
    """Whether the files of these patterns are identical in both."""
    files = [
        {
            p.relative_to(place.folder): p.read_bytes()
            for pattern in patterns
            for p in place.folder.glob(pattern)
            if p.is_file()
        }
        for place in (project, other)
    ]
    assert files[0]
    return files[0] == files[1]


def leftovers(project: Project) -> list:
    return [p for p in project.results.rglob(".*") if p.name != ".snakemake_timestamp"]


def kill_and_resume(project: Project, stage: str, files: list[str], *targets: str) -> None:
    """Lose all but the first of a stage's files, kill a job that remakes them, and run again.

    The run must fail, and the next one must restore the files and leave the first alone.
    """
    paths = [project.folder / file for file in files]
    before = [path.read_bytes() for path in paths]
    kept = paths[0].stat().st_mtime_ns
    for path in paths[1:]:
        path.unlink()
    run = project.start(*targets)
    find_job(run, stage).kill()
    assert run.communicate() and run.returncode == 1
    project.snakemake(*targets)
    assert [path.read_bytes() for path in paths] == before
    assert paths[0].stat().st_mtime_ns == kept and not leftovers(project)
