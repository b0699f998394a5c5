"""The cluster scripts say what they would do, and say no where the input is wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TPU = Path(__file__).parent.parent / "tpu"


def dry(script, *arguments):
    done = subprocess.run(
        ["bash", str(TPU / script), *arguments], env={**os.environ, "DRY_RUN": "1"}, capture_output=True, text=True
    )
    return done.returncode, done.stdout, done.stderr


def test_create_knows_the_software_of_each_chip():
    for kind, version in (("v5litepod-16", "v2-alpha-tpuv5-lite"), ("v6e-8", "v2-alpha-tpuv6e"), ("v5p-8", "tpuv5")):
        code, out, _ = dry("create.sh", "mine", kind, "zone-a", "--spot")
        assert code == 0 and f"--accelerator-type={kind}" in out and version in out and "--spot" in out
    code, out, _ = dry("create.sh", "mine", "v6e-8", "zone-a", "--queued")
    assert code == 0 and "queued-resources create mine --node-id=mine" in out and "--spot" not in out


def test_run_trains_on_every_worker_and_goes_on_after_75():
    code, out, _ = dry("run.sh", "mine", "zone-a", "/mnt/my runs/first", "--mesh", "data=16")
    assert code == 0 and out.count("--worker=all") == 3
    assert r"jaxlab train --mesh data=16 --run-dir /mnt/my\ runs/first --grace-seconds 25" in out
    assert r"jaxlab train --resume /mnt/my\ runs/first" in out and "while [ $code -eq 75 ]" in out
    assert "jaxlab train --run-dir /mnt/first" in dry("run.sh", "mine", "zone-a", "/mnt/first")[1]


def test_slurm_resumes_what_was_begun(tmp_path):
    code, out, _ = dry("slurm.sbatch", str(tmp_path / "new"), "--mesh", "data=2")
    assert code == 0 and f"jaxlab train --mesh data=2 --run-dir {tmp_path}/new" in out
    (tmp_path / "config.json").write_text("{}")
    code, out, _ = dry("slurm.sbatch", str(tmp_path), "--mesh", "data=2")
    assert code == 0 and f"jaxlab train --resume {tmp_path}" in out and "--mesh" not in out


def test_slurm_forwards_the_signal_and_queues_again(tmp_path):
    """Stand-ins for srun and scontrol: the job is told to stop, saves, and asks for its next turn."""
    for name, body in (
        ("srun", 'trap "exit 75" TERM; touch "$BIN/started"; sleep 30 & wait'),
        ("scontrol", 'echo "$@" >"$BIN/asked"'),
    ):
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    environment = {**os.environ, "BIN": str(tmp_path), "PATH": path, "SLURM_JOB_ID": "7", "DRY_RUN": ""}
    job = subprocess.Popen(
        ["bash", str(TPU / "slurm.sbatch"), str(tmp_path / "run")], env=environment, stdout=subprocess.DEVNULL
    )
    while not (tmp_path / "started").exists():
        assert job.poll() is None
    job.terminate()
    assert job.wait(timeout=20) == 0
    assert (tmp_path / "asked").read_text() == "requeue 7\n"


def test_a_jobset_counts_75_as_no_failure():
    yaml = pytest.importorskip("yaml")
    code, out, _ = dry(
        "jobset.sh", "mine", "tpu-v5-lite-podslice", "4x4", "4", "image:1", "/runs/first", "--steps", "9"
    )
    job = yaml.safe_load(out)["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert code == 0 and job["parallelism"] == job["completions"] == 4
    assert job["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [2, 76]
    (words,) = job["template"]["spec"]["containers"][0]["args"]
    assert "jaxlab train --steps 9 --run-dir /runs/first" in words and "jaxlab train --resume /runs/first" in words


@pytest.mark.parametrize(
    "arguments, word",
    [
        (("create.sh", "mine", "h100", "zone"), "unknown TPU type h100"),
        (("create.sh", "mine", "v4-8", "zone", "--sport"), "unknown flag --sport"),
        (("create.sh", "mine"), "tpu/create.sh NAME TYPE ZONE"),
        (("run.sh", "mine"), "tpu/run.sh NAME ZONE RUN_DIR"),
        (("slurm.sbatch",), "RUN_DIR"),
        (("jobset.sh", "a", "b", "c", "four", "e", "f"), "HOSTS must be a number, got four"),
    ],
)
def test_wrong_input_is_exit_code_2(arguments, word):
    code, out, err = dry(*arguments)
    assert code == 2 and word in err and out == ""


@pytest.mark.aot
def test_the_flagship_compiles_for_slices_and_says_what_it_needs():
    def aot(*arguments):
        return subprocess.run([sys.executable, str(TPU / "aot.py"), *arguments], capture_output=True, text=True)

    done = aot("--target", "tpu:v5e:4x4", "--mesh", "data=4,peer=2,expert=2", "--json")
    found = json.loads(done.stdout)
    assert done.returncode == 0 and found["fits"] and found["mesh"] == {"data": 4, "peer": 2, "expert": 2}
    whole = json.loads(aot("--target", "tpu:v5e:4x4", "--mesh", "data=1", "--json").stdout)
    assert whole["flops_per_device"] > 4 * found["flops_per_device"] > 0
    assert whole["state_and_batch_bytes"] > 2 * found["state_and_batch_bytes"], "peers and experts are spread"
    for arguments, word in (
        (("--target", "tpu:v9:4x4"), "must be like tpu:v5e:4x4"),
        (("--target", "tpu:v5e:2x2", "--mesh", "data=8"), "needs 8 devices"),
        (("--target", "tpu:v5e:2x2", "--recipe", "mutual_mo"), "did you mean"),
    ):
        done = aot(*arguments)
        assert done.returncode == 2 and word in done.stderr
