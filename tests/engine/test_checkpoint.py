"""Checkpoints that are really damaged, really killed and really out of disk."""

import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.engine.checkpoint import MANIFEST, Checkpoints, leaf_paths
from jaxlab.engine.errors import InputError, SaveError


def state_of(step):
    """A state that knows its step in every element."""
    return {"w": jnp.full((40, 50), step, jnp.float32), "n": jnp.int32(step), "h": jnp.full(7, step, jnp.bfloat16)}


@pytest.fixture
def saved(tmp_path):
    """A run directory with the committed steps 2 and 4."""
    checkpoints = Checkpoints(tmp_path, config={"steps": 9})
    for step in (1, 2, 4):
        checkpoints.save(step, state_of(step))
    checkpoints.close()
    return tmp_path


def restored(run_dir):
    """Returns the step, whether every leaf is of that step, and what was said."""
    said = []
    checkpoints = Checkpoints(run_dir, tell=said.append)
    step, state = checkpoints.restore(jax.eval_shape(lambda: state_of(0)))
    checkpoints.close()
    assert all(np.all(np.asarray(leaf, np.float32) == step) for leaf in state.values())
    return step, said


def biggest(directory):
    return max((p for p in directory.rglob("*") if p.is_file() and p.name != MANIFEST), key=lambda p: p.stat().st_size)


def test_the_newest_steps_stay_and_the_manifest_says_all(saved):
    assert restored(saved) == (4, [])
    assert sorted(p.name for p in (saved / "checkpoints").iterdir()) == ["2", "4"]
    manifest = json.loads((saved / "checkpoints" / "4" / MANIFEST).read_text())
    assert manifest["step"] == 4 and manifest["config"] == {"steps": 9}
    assert manifest["leaves"] == {"w": [[40, 50], "float32"], "n": [[], "int32"], "h": [[7], "bfloat16"]}
    on_disk = {p.relative_to(saved / "checkpoints" / "4").as_posix() for p in (saved / "checkpoints/4").rglob("*")}
    assert set(manifest["files"]) | {MANIFEST} == {n for n in on_disk if (saved / "checkpoints/4" / n).is_file()}


def flip(directory):
    file = biggest(directory)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)


def truncate(directory):
    os.truncate(biggest(directory), 10)


def remove(directory):
    biggest(directory).unlink()


def spoil_manifest(directory):
    (directory / MANIFEST).write_text("{")


@pytest.mark.parametrize(
    "harm, word",
    [(flip, "other bytes"), (truncate, "10 bytes, not"), (remove, "is missing"), (spoil_manifest, "cannot be read")],
)
def test_a_damaged_step_is_passed_over_with_one_line(saved, harm, word):
    harm(saved / "checkpoints" / "4")
    step, (line,) = restored(saved)
    assert step == 2 and "step 4 is damaged" in line and word in line and "\n" not in line


def test_what_is_no_committed_step_does_not_count(saved):
    (saved / "checkpoints" / "9").mkdir()
    (saved / "checkpoints" / "notes").mkdir()
    (saved / "checkpoints" / "8").write_text("a file")
    shutil.copytree(saved / "checkpoints" / "4", saved / "checkpoints" / "7")
    (saved / "checkpoints" / "7" / MANIFEST).unlink()  # a save that was killed just before it was committed
    assert restored(saved) == (4, [])


def test_nothing_good_is_an_error_of_one_line(saved):
    for step in (2, 4):
        flip(saved / "checkpoints" / str(step))
    with pytest.raises(InputError, match=r"no good checkpoint in .* step 2 is damaged"):
        restored(saved)


def test_a_damaged_step_is_saved_again_and_never_pushes_out_a_good_one(saved):
    flip(saved / "checkpoints" / "4")
    checkpoints = Checkpoints(saved)
    assert checkpoints.restore(jax.eval_shape(lambda: state_of(0)))[0] == 2
    checkpoints.save(3, state_of(3), wait=True)
    assert checkpoints.steps() == [2, 3]
    checkpoints.save(4, state_of(4), wait=True)
    checkpoints.close()
    assert restored(saved) == (4, [])


def test_another_model_is_refused_by_its_first_leaves(saved):
    checkpoints = Checkpoints(saved)
    other = {**jax.eval_shape(lambda: state_of(0)), "w": jax.ShapeDtypeStruct((40, 51), jnp.float32)}
    with pytest.raises(InputError, match=r"another model: w: float32 \(40, 50\) saved, float32 \(40, 51\) expected"):
        checkpoints.restore(other)
    checkpoints.close()


def test_a_full_disk_costs_one_checkpoint_and_is_said(saved):
    """The limit on file sizes makes the operating system refuse the bytes in the middle of the save."""
    said = []
    checkpoints = Checkpoints(saved, tell=said.append)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    big = {"w": jax.random.normal(jax.random.key(0), (300, 300))}
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
        checkpoints.save(6, big)
        checkpoints.wait()
        with pytest.raises(SaveError, match="step 7 could not be saved"):
            checkpoints.save(7, big, wait=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, old)
    assert len(said) == 2 and "step 6 could not be saved" in said[0]
    assert checkpoints.steps() == [2, 4]
    checkpoints.save(8, big, wait=True)
    assert checkpoints.steps() == [4, 8]
    checkpoints.close()


def test_restores_onto_another_mesh(saved):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    target = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=spread if name == "w" else whole)
        for name, leaf in state_of(0).items()
    }
    checkpoints = Checkpoints(saved)
    step, state = checkpoints.restore(target)
    checkpoints.close()
    assert step == 4 and state["w"].sharding == spread and np.all(np.asarray(state["w"]) == 4)


def save_for_ever(run_dir, begun):
    """What the process that is going to be killed does: restore, then save step after step."""
    checkpoints = Checkpoints(run_dir)
    step = checkpoints.restore(jax.eval_shape(lambda: state_of(0)))[0] if checkpoints.latest() is not None else 0
    while True:
        step += 1
        begun.release()
        checkpoints.save(step, state_of(step))


def test_sigkill_at_any_moment_leaves_a_good_step(tmp_path):
    """Twenty-five kills of a process that does nothing but save, so that most of them fall inside a save."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["jaxlab.engine.checkpoint", "orbax.checkpoint"])
    rng, newest, inside = random.Random(0), 0, 0
    for _ in range(25):
        begun = server.Semaphore(0)
        process = server.Process(target=save_for_ever, args=(tmp_path, begun), daemon=True)
        process.start()
        saves = []
        for _ in range(2):
            assert begun.acquire(timeout=120)
            saves.append(time.monotonic())
        time.sleep(rng.random() * (saves[1] - saves[0]))  # anywhere within the second save
        process.kill()
        process.join()
        checkpoints = Checkpoints(tmp_path)
        committed = {str(step) for step in checkpoints.steps()}
        inside += any(path.name not in committed for path in checkpoints.directory.iterdir())
        step, said = restored(tmp_path)
        assert str(step) in committed and step == max(checkpoints.steps()) >= newest and said == []
        newest = step
    assert newest >= 8 and inside >= 5, "hardly anything was saved, or hardly any kill fell inside a save"


def test_leaves_have_names():
    assert list(leaf_paths({"b": {"c": 1}, "a": [2, 3]})) == ["a/0", "a/1", "b/c"]
