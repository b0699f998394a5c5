"""Steps that are not finite change nothing, are named, and end the run when there are too many."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab import cli
from jaxlab.engine import data as data_source
from jaxlab.engine import guard


def update(state, batch, key):
    """A learner whose gradient is the batch, and whose state holds an infinity from the beginning."""
    new = {**state, "w": state["w"] - 0.5 * batch, "best": state["best"]}
    return new, {"loss": jnp.sum(state["w"] * batch)}


def run(batches, limit):
    state = {"w": jnp.array([1.0, 2.0]), "best": jnp.float32(jnp.inf), "count": jnp.int32(3)}
    carry, bads, step = guard.start(state), [], jax.jit(guard.guarded(update, limit=limit))
    for batch in batches:
        carry, metrics = step(carry, jnp.float32(batch), None)
        bads.append(int(metrics["bad"][0]))
        assert metrics["bad"][1:].tolist() == [int(carry.in_row), int(carry.skipped)]
    names = list(guard.checked(state, {"loss": jnp.float32(0)}))
    return carry, [names[bad] if bad >= 0 else "" for bad in bads]


def test_a_bad_step_changes_nothing_and_is_named():
    carry, bads = run([[1, 1], [np.nan, 0], [0, -np.inf], [2, 0]], limit=0)
    np.testing.assert_array_equal(carry.learner["w"], [1 - 0.5 - 1, 2 - 0.5])
    assert bads == ["", "loss", "loss", ""] and (int(carry.skipped), int(carry.in_row)) == (2, 0)
    assert np.isinf(carry.learner["best"])


def test_a_bad_gradient_is_named_by_the_leaf_it_spoils():
    def quiet(state, batch, key):
        return update(state, batch, key)[0], {}

    state = {"a": jnp.float32(0), "w": jnp.zeros(2), "best": jnp.float32(jnp.inf)}
    _, metrics = guard.guarded(quiet, limit=0)(guard.start(state), jnp.float32([np.nan, 0]), None)
    assert list(guard.checked(state, {}))[int(metrics["bad"][0])] == "w"


def test_after_the_limit_nothing_changes_however_late_the_host_looks():
    carry, bads = run([[1, 1], [np.nan, 0], [np.nan, 0], [1, 1], [np.nan, 0]], limit=2)
    np.testing.assert_array_equal(carry.learner["w"], [0.5, 1.5])
    assert bads == ["", "loss", "loss", "", ""] and (int(carry.skipped), int(carry.in_row)) == (2, 2)


TINY = [
    "--steps", "6", "--batch", "32", "--width", "16", "--depth", "1", "--experts", "2", "--hidden", "8",
    "--heads", "2", "--log-every", "1", "--save-every", "2", "--bad-steps", "2",
]  # fmt: skip


@pytest.fixture
def poisoned(monkeypatch):
    """Makes the pictures of the given steps NaN."""

    def poison(steps):
        real = data_source.batch_at

        def batch_at(split, seed, step, batch):
            found = real(split, seed, step, batch)
            return {**found, "x": np.full_like(found["x"], np.nan)} if step in steps else found

        monkeypatch.setattr(data_source, "batch_at", batch_at)

    return poison


def test_a_run_survives_a_bad_step_and_stops_at_the_second_in_a_row(tmp_path, poisoned, capsys):
    poisoned({1, 3, 4})
    arguments = ["train", "--run-dir", str(tmp_path / "run"), *TINY]
    assert cli.main(arguments) == 76
    said = capsys.readouterr().err.splitlines()
    assert "step 2: loss is not finite; the step was skipped" in said
    assert said[-1].startswith("jaxlab: stopped at step 5: 2 steps in a row were not finite, last loss;")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5] and np.isnan(rows[1]["loss"]).all()
    assert [row.get("skipped_steps", 0) for row in rows] == [0, 1, 1, 2, 3]
    assert np.isfinite(rows[2]["loss"]).all()
    assert (tmp_path / "run" / "checkpoints" / "4" / "manifest.json").exists()


def test_a_run_that_goes_on_still_counts_the_bad_steps_before_its_checkpoint(tmp_path, poisoned, capsys):
    poisoned({1, 2})
    arguments = ["train", "--run-dir", str(tmp_path / "run"), *TINY]
    assert cli.main([*arguments, "--quiet"]) == 76  # the checkpoint of step 2 holds one bad step
    assert cli.main(["train", "--resume", str(tmp_path / "run"), "--quiet"]) == 76
    assert "stopped at step 3: 2 steps in a row" in capsys.readouterr().err.splitlines()[-1]


def test_debug_nans_finds_the_operation(tmp_path, poisoned, capsys):
    poisoned({0, 1, 2})
    assert cli.main(["train", "--run-dir", str(tmp_path / "run"), *TINY, "--debug-nans", "--quiet"]) == 1
    assert "nan" in capsys.readouterr().err
