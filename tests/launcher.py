"""Starts `cdul` and Snakemake in forks of a process that has imported their libraries.

Importing torch, timm and open_clip takes a command up to ten seconds, and the workflow tests start
hundreds of commands. A server therefore imports them once. It forks for each command, and the fork
runs the command with the arguments, folder, environment and streams of the requesting process,
which waits for it like for its own child. The server never imports this project: each fork imports
the package that its own environment names.
"""

import atexit
import gc
import importlib
import json
import os
import runpy
import selectors
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import traceback
from contextlib import suppress
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

LIBRARIES = (
    *("captum.attr", "jinja2", "matplotlib.figure", "open_clip", "pandas"),
    *("PIL.Image", "pyarrow.compute", "pyarrow.dataset", "pyarrow.parquet", "pydantic"),
    *("sklearn.metrics", "snakemake.cli", "timm", "torch", "tqdm", "typer", "zarr"),
)
MODULES = {"cdul": "cdul_steps.cli", "snakemake": "snakemake"}
"""By command name, the module that `python -m` would run."""
CODE_BYTES = 8


@cache
def commands() -> Path:
    """The folder of the commands `cdul`, `snakemake` and `python`; a server runs the first two."""
    folder = Path(mkdtemp(prefix="cdul-launcher-"))
    words = [sys.executable, __file__, str(folder / "socket")]
    python, clients = shlex.quote(sys.executable), {}
    for name in MODULES:
        clients[name] = shlex.join([sys.executable, "-IS", __file__, str(folder / "socket"), name])
        _write(folder / name, f'exec {clients[name]} "$@"')
    # Snakemake starts itself in this way on a cluster.
    again = f'if [ "$1 $2" = "-m snakemake" ]; then shift 2; exec {clients["snakemake"]} "$@"; fi'
    _write(folder / "python", f'{again}\nexec {python} "$@"')
    # The server ends when the tests end and close their end of this pipe.
    server = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert server.stdout.readline() == b"ready\n"
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    atexit.register(server.communicate)
    return folder


def run_snakemake(
    folder: Path, environment: dict[str, str], *words: str
) -> subprocess.CompletedProcess:
    """Run Snakemake in a folder through the server; stdout includes stderr."""
    return subprocess.run(
        [commands() / "snakemake", *words],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _write(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def ask(address: str, name: str, arguments: list[str]) -> int:
    """Let the server at a socket run a command; returns its exit status, negative for a signal."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(address)
    socket.send_fds(connection, [b"\0"], [0, 1, 2])
    request = [name, arguments, str(Path.cwd()), dict(os.environ)]
    connection.sendall(json.dumps(request).encode() + b"\0")
    pid = int(connection.recv(CODE_BYTES))
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, _: os.kill(pid, number))
    return int(connection.recv(CODE_BYTES) or -signal.SIGKILL)


def serve(address: str) -> list[str]:
    """Fork for each request; returns, in the fork, the name and the arguments of its command."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    print("ready", flush=True)
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ)
    selector.register(0, selectors.EVENT_READ)
    while True:
        for key, _ in selector.select():
            if key.data:
                key.data()
                continue
            if key.fileobj == 0:  # the tests have ended
                os._exit(0)
            connection, _ = listener.accept()
            request, streams = _receive(connection)
            pid = os.fork()
            if pid == 0:
                return _become(request, streams)
            for stream in streams:
                os.close(stream)
            connection.sendall(str(pid).encode())
            _watch(selector, pid, connection)


def _watch(selector: selectors.BaseSelector, pid: int, connection: socket.socket) -> None:
    """Tell the client when a command ends; kill the command if the client is gone."""
    ends = os.pidfd_open(pid)

    def end() -> None:
        _, status = os.waitpid(pid, 0)
        selector.unregister(ends)
        os.close(ends)
        with suppress(OSError):
            connection.sendall(str(os.waitstatus_to_exitcode(status)).encode())
        with suppress(KeyError):
            selector.unregister(connection)
        connection.close()

    def kill() -> None:
        # Both events may have happened since the last check, and the end may be handled already.
        with suppress(KeyError, ValueError):
            selector.unregister(connection)
            signal.pidfd_send_signal(ends, signal.SIGKILL)

    selector.register(ends, selectors.EVENT_READ, end)
    selector.register(connection, selectors.EVENT_READ, kill)


def _receive(connection: socket.socket) -> tuple[list, list[int]]:
    _, streams, _, _ = socket.recv_fds(connection, 1, 3)
    text = b""
    while not text.endswith(b"\0"):
        text += connection.recv(1 << 16)
    return json.loads(text[:-1]), streams


def _become(request: list, streams: list[int]) -> list[str]:
    """Make this fork the process of a command."""
    name, arguments, folder, environment = request
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    os.closerange(3, 256)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    own = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:1] = [folder, *own]
    # Snakemake's jobs look for `cdul` next to it.
    sys.executable = str(Path(sys.argv[1]).parent / "python")
    return [name, *arguments]


def main() -> None:
    """Serve at a socket or, with a command, act as a client."""
    address, *command = sys.argv[1:]
    if command:
        code = ask(address, command[0], command[1:])
        if code < 0:
            signal.signal(-code, signal.SIG_DFL)
            os.kill(os.getpid(), -code)
        sys.exit(code)
    for library in LIBRARIES:
        importlib.import_module(library)
    gc.freeze()
    name, *arguments = serve(address)
    sys.argv = [name, *arguments]
    code: int | str | None = 0
    try:
        runpy.run_module(MODULES[name], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    if isinstance(code, str):
        print(code, file=sys.stderr)
    # The interpreter's shutdown without tearing down the libraries, which would copy the memory
    # that the fork shares with the server.
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


if __name__ == "__main__":
    main()
