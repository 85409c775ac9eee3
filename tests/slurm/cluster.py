"""SLURM on one machine: the real daemons, without systemd or cgroups, under a folder of their own.

Debian: `apt-get install slurm-wlm munge`. The daemons run as root, on ports that are free.
"""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

_DAEMONS = ("munged", "slurmctld", "slurmd")
_CLIENTS = ("sbatch", "srun", "scontrol", "scancel", "squeue", "sinfo")
_PATH = f"{os.environ['PATH']}:/usr/sbin"

_CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
JobRequeue=1
KillWait=5
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 RealMemory=4000 State=UNKNOWN
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def why_not() -> str | None:
    """Return why no cluster can be started here; None if one can."""
    missing = [name for name in (*_DAEMONS, *_CLIENTS) if shutil.which(name, path=_PATH) is None]
    if missing:
        return f"{', '.join(missing)} not found (Debian: apt-get install slurm-wlm munge)"
    if os.geteuid() != 0:
        return "SLURM's daemons need root"
    return None


class Cluster:
    """One node with two CPUs; a context manager that starts and ends the daemons.

    Args:
        folder: For keys, sockets, state and logs. Its path must be short: sockets lie in it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.configuration = folder / "slurm.conf"
        self._processes: list[subprocess.Popen] = []

    def __enter__(self) -> "Cluster":
        for name in ("state", "spool"):
            (self.folder / name).mkdir(parents=True)
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        host = socket.gethostname().partition(".")[0]
        controller_port, node_port = _free_ports(2)
        self.configuration.write_text(
            _CONFIGURATION.format(
                host=host,
                folder=self.folder,
                controller_port=controller_port,
                node_port=node_port,
            )
        )
        try:
            self._start(host, key)
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start(self, host: str, key: Path) -> None:
        at = self.folder
        self._daemon(
            "munged", "--foreground", "--force", f"--key-file={key}", f"--socket={at}/munge.sock",
            f"--pid-file={at}/munged.pid", f"--log-file={at}/munged.log",
            f"--seed-file={at}/munged.seed",
        )  # fmt: skip
        self.wait(lambda: (at / "munge.sock").exists(), "munged")
        self._daemon("slurmctld", "-D", "-f", str(self.configuration))
        self._daemon("slurmd", "-D", "-f", str(self.configuration), "-N", host)
        self.wait(lambda: "idle" in self.ask("sinfo", "-h", "-o", "%T"), "the node")

    def _daemon(self, *command: str) -> None:
        log = (self.folder / f"{command[0]}.out").open("w")
        self._processes.append(
            subprocess.Popen(
                command, stdout=log, stderr=log, env=self.environment(), start_new_session=True
            )
        )

    def __exit__(self, *_: object) -> None:
        if self.configuration.is_file():
            self.ask("scancel", "--signal=KILL", "--full", "--user=root")
        for process in reversed(self._processes):
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def environment(self) -> dict[str, str]:
        """Return the environment in which SLURM's commands find this cluster."""
        return {**os.environ, "PATH": _PATH, "SLURM_CONF": str(self.configuration)}

    def ask(self, *command: str) -> str:
        """Run a command of SLURM and return what it prints."""
        done = subprocess.run(command, capture_output=True, text=True, env=self.environment())
        return done.stdout

    def facts(self, job: str) -> dict[str, str]:
        """Return what `scontrol show job` knows, such as JobState and Restarts."""
        pairs = (pair.partition("=") for pair in self.ask("scontrol", "show", "job", job).split())
        return {name: value for name, equals, value in pairs if equals}

    def state(self, job: str) -> str:
        """Return the job's state, such as PENDING, RUNNING or COMPLETED."""
        return self.facts(job).get("JobState", "")

    def wait(self, condition: Callable[[], bool], what: str, seconds: float = 60) -> None:
        """Wait until the condition holds.

        Raises:
            TimeoutError: If it does not; with the daemons' last words.
        """
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                logs = [*self.folder.glob("*.log"), *self.folder.glob("*.out")]
                words = "\n".join(f"{log}: {log.read_text()[-1500:]}" for log in logs)
                raise TimeoutError(f"{what} did not come within {seconds} s.\n{words}")
            time.sleep(0.1)


def _free_ports(number: int) -> list[int]:
    sockets = [socket.socket() for _ in range(number)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports
