"""Several real processes train one run: the same numbers as one process, and one who is told to stop stops all."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from jaxlab.engine import processes
from jaxlab.engine.errors import InputError

TINY = [
    "--steps", "40", "--batch", "32", "--width", "16", "--depth", "1", "--experts", "2", "--hidden", "8",
    "--heads", "2", "--log-every", "1", "--save-every", "4",
]  # fmt: skip


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(count, devices, *arguments):
    """Starts `jaxlab train` in `count` processes of `devices` devices each."""
    port = free_port()
    base = {**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    started = []
    for index in range(count):
        plan = {"JAXLAB_COORDINATOR": f"127.0.0.1:{port}", "JAXLAB_PROCESSES": str(count), "JAXLAB_PROCESS": str(index)}
        command = [sys.executable, "-m", "jaxlab.cli", "train", *map(str, arguments)]
        started.append(
            subprocess.Popen(command, env={**base, **plan}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    return started


def finish(started):
    said = [process.communicate(timeout=300) for process in started]
    return [process.returncode for process in started], said


def rows(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_two_processes_are_one_run_and_stop_together(tmp_path):
    whole, split = tmp_path / "whole", tmp_path / "split"
    mesh = ["--mesh", "data=2,peer=2"]
    codes, said = finish(start(1, 4, "--run-dir", whole, *TINY, *mesh, "--quiet"))
    assert codes == [0], said
    started = start(2, 2, "--run-dir", split, *TINY, *mesh)
    while not (split / "checkpoints" / "4" / "manifest.json").exists():
        assert all(process.poll() is None for process in started), finish(started)
        time.sleep(0.05)
    started[1].send_signal(signal.SIGTERM)  # only one of them hears it
    codes, said = finish(started)
    assert codes == [75, 75], said
    spoken = [[line for line in out.splitlines() if not line.startswith("[Gloo]")] for out, _ in said]
    assert "--resume" in spoken[0][-1] and spoken[1] == [], "process 0 alone speaks"
    assert rows(split)[-1]["step"] < 40
    codes, said = finish(start(2, 2, "--resume", split, "--quiet"))
    assert codes == [0, 0], said
    one, two = rows(whole), rows(split)
    assert [row["step"] for row in two] == [row["step"] for row in one] == [*range(1, 41), 40]
    np.testing.assert_allclose([r["loss"] for r in two[:40]], [r["loss"] for r in one[:40]], rtol=1e-4)


def test_who_the_processes_are():
    plain = {"JAXLAB_COORDINATOR": "host:1", "JAXLAB_PROCESSES": "4", "JAXLAB_PROCESS": "3"}
    expected = {"coordinator_address": "host:1", "num_processes": 4, "process_id": 3}
    assert processes.arguments({}) is None and processes.arguments({**plain, "SLURM_JOB_ID": "7"}) == expected
    assert processes.arguments({**plain, "JAXLAB_PROCESSES": "1", "JAXLAB_PROCESS": "0"}) is None
    assert processes.arguments({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "1"}) is None
    for several in (
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2"},
        {"TPU_WORKER_HOSTNAMES": "a,b"},
        {"JOBSET_NAME": "train"},
    ):
        assert processes.arguments(several) == {}
    for wrong, word in (
        ({"JAXLAB_PROCESS": "0"}, "is set without JAXLAB_COORDINATOR, JAXLAB_PROCESSES"),
        ({**plain, "JAXLAB_PROCESS": "4"}, "must be between 0"),
        ({**plain, "JAXLAB_PROCESSES": "many"}, "whole numbers"),
    ):
        with pytest.raises(InputError, match=word):
            processes.arguments(wrong)
