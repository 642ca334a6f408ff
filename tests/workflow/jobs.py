"""Jobs of a running workflow, to be killed, and what is left behind."""

import time
from contextlib import suppress

import psutil
from copies import Project


def workers(job: psutil.Process) -> list[psutil.Process]:
    """The processes that decode for a job: its forks, and no helper that an import starts."""
    return [child for child in job.children() if child.cmdline() == job.cmdline()]


def find_job(run, stage: str, known: tuple = ()) -> psutil.Process:
    """Wait for a running job of a stage that is not one of the known, and is at work."""
    while True:
        assert run.poll() is None, run.stdout.read()
        for process in psutil.Process(run.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                words = process.cmdline()
                if words[1:2] and words[1].endswith("cdul") and words[2] == stage:
                    is_worker = process.parent().cmdline() == words
                    if process not in known and not is_worker and workers(process):
                        return process
        time.sleep(0.01)


def same(project: Project, other: Project, *patterns: str) -> bool:
    """Whether the files of these patterns are the same in both, byte by byte."""
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
