"""benchmark/array.sbatch on a real SLURM of two nodes on this machine: `make test-slurm`. Needs root and Debian's apt.

A task of an array is requeued in the middle: it gets SIGTERM, saves, is started again, resumes, and ends with the same
eval.csv as a run that was never disturbed.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]

CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort=17000
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
NodeName=node[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[17001-17002] CPUs=1
PartitionName=all Nodes=node[1-2] Default=YES MaxTime=INFINITE State=UP
"""


def wait_for(what: str, condition: Callable[[], object], seconds: float = 600.0) -> None:
    """Wait until it holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited in vain: {what}"
        time.sleep(0.5)


def call(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Path]:
    """A controller and two nodes; their folder."""
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        pytest.skip("SLURM is installed and started as root, with Debian's apt-get")
    if not all(map(shutil.which, ("slurmctld", "slurmd", "munged"))):
        install = ["apt-get", "-qq", "install", "-y", "--no-install-recommends", "slurm-wlm", "munge"]
        subprocess.run(["apt-get", "-qq", "update"], capture_output=True)
        if subprocess.run(install, capture_output=True).returncode != 0:
            pytest.skip("SLURM could not be installed: apt-get install slurm-wlm munge failed")
    folder = tmp_path_factory.mktemp("slurm")
    (folder / "state").mkdir()
    configuration = folder / "slurm.conf"
    configuration.write_text(CONFIGURATION.format(host=socket.gethostname(), folder=folder))
    os.environ["SLURM_CONF"] = str(configuration)
    key = Path("/etc/munge/munge.key")
    if not key.exists():
        key.write_bytes(os.urandom(1024))
    for path in (key, Path("/etc/munge"), Path("/var/lib/munge"), Path("/var/log/munge"), Path("/run/munge")):
        path.mkdir(exist_ok=True) if path != key else path.chmod(0o400)
        shutil.chown(path, "munge", "munge")
    daemons = []
    if subprocess.run(["munge", "-n"], capture_output=True).returncode != 0:
        daemons.append(
            subprocess.Popen(["setpriv", "--reuid=munge", "--regid=munge", "--clear-groups", "munged", "-F"])
        )
        wait_for("munge", lambda: subprocess.run(["munge", "-n"], capture_output=True).returncode == 0, 30)
    daemons.append(subprocess.Popen(["slurmctld", "-D"], stderr=subprocess.DEVNULL))
    daemons += [
        subprocess.Popen(["slurmd", "-D", "-N", node], stderr=subprocess.DEVNULL) for node in ("node1", "node2")
    ]
    idle = ["sinfo", "--noheader", "--states=idle", "--format=%D"]
    try:
        wait_for("two idle nodes", lambda: subprocess.run(idle, capture_output=True).stdout.strip() == b"2", 60)
        yield folder
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            daemon.wait(30)


@pytest.mark.slow
def test_a_requeued_task_ends_as_if_never_disturbed(cluster, tmp_path):
    arguments = "--env Platform-v0 --random-episodes 20 --vae-pretrain-steps 20 --total-timesteps 3000"
    arguments += " --eval-frequency 500 --eval-episodes 5 --checkpoint-frequency 200"
    script = f"{sys.executable} {ROOT / 'hyar_td3.py'} --runs-dir {tmp_path} {arguments}"
    jobs = tmp_path / "jobs.txt"
    jobs.write_text("".join(f"{script} --seed {seed} --run-name run-{seed} --resume\n" for seed in (1, 2, 3)))
    command = ["sbatch", "--parsable", "--array=1-3%2", f"--output={tmp_path}/log-%a.txt"]
    job = call(*command, str(ROOT / "benchmark" / "array.sbatch"), str(jobs)).strip()

    def states() -> dict[str, str]:
        """The state of each task that has not ended, by its number."""
        listed = (
            call("squeue", "--noheader", "--array", f"--job={job}", "--format=%K %T") if job in call("squeue") else ""
        )
        return dict(line.split() for line in listed.splitlines())

    checkpoint = tmp_path / "run-1" / "checkpoint.pt"
    wait_for("the first checkpoint", checkpoint.exists)
    assert sorted(states().values()) == ["PENDING", "RUNNING", "RUNNING"]  # two nodes of one core each
    call("scontrol", "requeue", f"{job}_1")
    log = tmp_path / "log-1.txt"
    wait_for("SIGTERM", lambda: "stopped by signal 15" in log.read_text(), 60)
    stopped = torch.load(checkpoint, weights_only=True)
    assert not stopped["finished"] and 0 < stopped["step"] < 3_000
    wait_for("the requeued task", lambda: states().get("1") == "PENDING", 60)
    call("scontrol", "update", f"JobId={job}_1", "StartTime=now")  # else SLURM lets it wait for two minutes
    wait_for("the end of all tasks", lambda: not states())

    assert log.read_text().count("stopped by signal 15") == 1  # appended to, not written anew
    for seed in (1, 2, 3):
        assert torch.load(tmp_path / f"run-{seed}" / "checkpoint.pt", weights_only=True)["finished"]
    subprocess.run([*script.split(), "--seed", "1", "--run-name", "undisturbed"], check=True, capture_output=True)
    ours, theirs = ((tmp_path / name / "eval.csv").read_bytes() for name in ("run-1", "undisturbed"))
    assert ours == theirs
