"""A one-node SLURM on this machine's loopback interface, with one fake GPU."""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SBIN = "/usr/sbin:/usr/local/sbin"
CONF = Path("/etc/slurm")
MARK = "# Written by the tests of CDUL."
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "sinfo", "scancel")


def why_not() -> str | None:
    """The reason why SLURM cannot be started here; None if it can."""
    if os.geteuid() != 0:
        return "a SLURM can be started by root only"
    path = f"{os.environ['PATH']}:{SBIN}"
    missing = [name for name in PROGRAMS if not shutil.which(name, path=path)]
    if missing:
        return f"{', '.join(missing)} not installed (apt-get install slurm-wlm munge)"
    for file in (CONF / "slurm.conf", CONF / "gres.conf"):
        if file.exists() and not file.read_text().startswith(MARK):
            return f"{file} is there: this machine has a SLURM of its own"
    if subprocess.run(["sinfo"], capture_output=True).returncode == 0:
        return "a SLURM is running here, of another run of these tests"
    return None


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def _write_conf(folder: Path, host: str) -> None:
    """The plugin drops SLURM_CONF from its jobs' environment, so the default path must be used."""
    controller, daemon = _free_ports(2)
    CONF.mkdir(parents=True, exist_ok=True)
    # The node is made to look large enough for what the profile asks for.
    (CONF / "slurm.conf").write_text(
        f"""{MARK}
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={daemon}
SlurmUser=root
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
GresTypes=gpu
ReturnToService=2
KillWait=5
MinJobAge=3600
SchedulerParameters=sched_interval=1,batch_sched_delay=0,sched_min_interval=0
JobAcctGatherType=jobacct_gather/none
NodeName={host} NodeAddr=127.0.0.1 CPUs=16 RealMemory=128000 Gres=gpu:1 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
PartitionName=gpus Nodes={host} MaxTime=INFINITE State=UP
"""
    )
    (CONF / "gres.conf").write_text(f"{MARK}\nName=gpu File=/dev/zero\n")


@contextmanager
def running(folder: Path) -> Iterator[None]:
    """Start munge, the controller and the node's daemon; stop them and remove the files."""
    host = socket.gethostname().split(".")[0]
    _write_conf(folder, host)
    for name in ("state", "spool"):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(64))
    key.chmod(0o600)
    log = (folder / "output.log").open("w")
    environment = {**os.environ, "PATH": f"{os.environ['PATH']}:{SBIN}"}
    started: list[subprocess.Popen] = []

    def start(*words: str) -> None:
        started.append(subprocess.Popen(words, stdout=log, stderr=log, env=environment))

    try:
        munge = [f"--{n}={folder}/munge.{n}" for n in ("socket", "log-file", "pid-file")]
        seed = f"--seed-file={folder}/munge.seed"
        start("munged", "--foreground", "--force", f"--key-file={key}", seed, *munge)
        _wait((folder / "munge.socket").exists, "munged", folder)
        start("slurmctld", "-D", "-c")
        start("slurmd", "-D", "-N", host)
        _wait(_is_idle, "slurmctld and slurmd", folder)
        yield
    finally:
        for process in reversed(started):
            process.terminate()
        for process in reversed(started):
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        log.close()
        for name in ("slurm.conf", "gres.conf"):
            (CONF / name).unlink()


def _is_idle() -> bool:
    done = subprocess.run(["sinfo", "-h", "-o", "%t"], capture_output=True, text=True)
    return done.stdout.strip() == "idle"


def _wait(ready, what: str, folder: Path, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > end:
            logs = [*folder.glob("*.log")]
            said = "\n".join(f"{log.name}: {log.read_text()[-2000:]}" for log in logs)
            raise RuntimeError(f"{what} did not start:\n{said}")
        time.sleep(0.2)
