"""Command run: run Snakemake on the workflow that comes with this package."""

from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from cdul_steps.config import check_syntax
from cdul_steps.errors import UserError
from cdul_steps.shipped import CONFIG, SNAKEFILE, require_config


def run_workflow(words: Sequence[str]) -> NoReturn:
    """Run Snakemake in the working directory, with the arguments of its command line.

    Ends the process, with status 0 on success. If neither arguments nor a profile set the number of
    cores, it uses all cores of the machine. Raises UserError for a directory without a config, if
    none is given, and for a config that is not YAML.
    """
    from snakemake.cli import args_to_api, parse_args, parse_cores, print_exception

    try:
        parser, options = parse_args(["--snakefile", str(SNAKEFILE), *words])
        folder = Path(options.directory or ".")
        if not options.configfile:
            require_config(folder)
        for file in (folder / CONFIG, *map(Path, options.configfile or ())):
            if file.is_file():
                check_syntax(file)
        if options.cores is None and options.jobs is None and options.executor is None:
            options.cores = parse_cores("all")
        done = args_to_api(options, parser)
    except UserError:
        raise
    except Exception as error:
        print_exception(error)
        done = False
    raise SystemExit(0 if done else 1)
