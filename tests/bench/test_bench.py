"""Every benchmark runs in its quick form, both sides compute the same, and runs are appended."""

import json

import jax
import numpy as np
import pytest

from jaxlab import cli
from jaxlab.bench import kernels, losses, peers, runner


@pytest.mark.parametrize("name", kernels.BENCHES)
def test_ours_and_the_peer_compute_the_same(name):
    """A ratio means nothing between two different things; a window is compared with a different thing on purpose."""
    for contest in kernels.BENCHES[name](True):
        with jax.numpy_rank_promotion("allow"):
            ours, peer = (jax.tree.leaves(jax.jit(f)(*contest.args)) for f in (contest.ours, contest.peer[1]))
        pairs = list(zip(ours, peer, strict=True))
        if name == "top_k_routing":
            pairs = pairs[:2]  # the order is sorted positions there, ranks here
        if "window" not in contest.params:
            for a, b in pairs:
                np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-3)
        assert contest.work_ratio is None or 1 <= contest.work_ratio < 4


def test_rows_and_records(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runner, "RESULTS", tmp_path)
    monkeypatch.setattr(runner.record, "__kwdefaults__", {"directory": tmp_path})
    monkeypatch.setattr(runner, "matmul_gflops", lambda: 1.0)
    arguments = ["bench", "selective_scan", "--quick", "--rounds", "2", "--json", "--record"]
    for _ in range(2):
        assert cli.main(arguments) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["params"]["pass"] for row in rows] == ["fwd", "fwd_bwd"]
    assert all(row["ms"] > 0 and row["ratio"] > 0 and row["ceiling_ms"] is None for row in rows)
    runs = json.loads((tmp_path / "selective_scan.json").read_text())
    assert len(runs) == 2 and runs[1]["rows"] == rows and runs[0]["rounds"] == 2
    assert "of lax.scan" in runner.render(rows)


def test_every_loss_that_is_imported_is_measured():
    contests = list(losses.losses(True))
    names = {contest.case for contest in contests}
    assert len(names) == len(contests) and {"info_nce_loss", "groco_multiview_loss", "nwj_bound"} <= names
    for contest in contests:
        value, grads = jax.eval_shape(contest.ours, *contest.args)
        assert value.shape == () and grads.shape == contest.args[0].shape


def test_a_peer_of_another_library_and_no_peer(capsys):
    calls = []
    x = jax.numpy.ones(3)
    theirs = ("theirs", lambda: calls.append(1))
    contest = runner.Contest("toy", {"pass": "fwd"}, jax.numpy.sum, (x,), theirs, foreign=True)
    row = runner.run(contest, rounds=2)
    assert len(calls) == 3 and row["peer"] == "theirs" and row["ratio"] > 0 and row["peer_temp_bytes"] is None
    alone = runner.run(runner.Contest("toy", {"pass": "fwd"}, jax.numpy.sum, (x,), None), rounds=2)
    assert (alone["peer"], alone["peer_ms"], alone["ratio"]) == (None, None, None) and alone["ms"] > 0
    assert "geometric mean of 2 ratios" in runner.render([row, row, alone])


def test_a_step_of_peers_is_the_loop_over_one_peers_step():
    """The loop learns from the predictions that stand at the start, as the first step of all peers at once does."""
    contests = list(peers.BENCHES["peers"](True))
    assert [contest.case for contest in contests] == ["mlp peers", "vit peers"]
    for contest in contests:
        rows = contest.peer[1]()
        new, _ = jax.jit(contest.ours)(*contest.args)
        for k, (params, _, opt_state, _) in enumerate(rows):
            ours = jax.tree.map(lambda leaf, k=k: leaf[k], (new.params, new.opt_state))
            pairs = zip(jax.tree.leaves(ours), jax.tree.leaves((params, opt_state)), strict=True)
            for a, b in pairs:
                np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)
    row = runner.run(contests[0], rounds=1)
    assert row["ms"] > 0 and row["ratio"] > 0 and row["compile_ratio"] > 0
    line = runner.render([row])
    assert "of a loop over one peer's step" in line and "of one peer's time" in line


def test_executed_rows_are_those_of_the_cascade():
    assert [kernels._executed_rows(n) for n in (0, 1, 32, 33, 127, 128, 700)] == [0, 32, 32, 64, 128, 128, 704]


def test_refuses(capsys):
    assert cli.main(["bench", "attenton"]) == 2
    assert "did you mean 'attention'" in capsys.readouterr().err
    assert cli.main(["bench", "attention", "--rounds", "0"]) == 2
