"""The claim harness: every rule in both directions, records with history, one JSON value on stdout."""

import argparse
import json
import types

import numpy as np
import optax
import pytest

from jaxlab import catalog
from jaxlab.claims import common, harness
from jaxlab.claims.harness import Outcome, judge

GOOD = [0.9, 0.91, 0.92, 0.9, 0.93]
BAD = [0.8, 0.82, 0.81, 0.79, 0.83]
MIXED = [0.95, 0.8, 0.97, 0.78, 0.93]


def arms(**values):
    return Outcome(arms=values, learnt=dict.fromkeys(values, True))


def spec(kind, evidence="scaled", **more):
    return {"kind": kind, "evidence": evidence, **more}


def test_quantiles_equal_scipy():
    stats = pytest.importorskip("scipy.stats")
    for degrees in (1, 2, 4, 9, 30, 200):
        np.testing.assert_allclose(harness.t_quantile(degrees), stats.t.ppf(0.975, degrees), rtol=1e-6)
    mean, low, high = harness.interval(GOOD)
    expected = stats.ttest_1samp(GOOD, 0).confidence_interval(0.95)
    np.testing.assert_allclose((mean, low, high), (np.mean(GOOD), expected.low, expected.high), rtol=1e-6)


RULES = [
    (spec("better"), arms(m=GOOD, b=BAD), "reproduced"),
    (spec("better"), arms(m=BAD, b=GOOD), "not reproduced"),
    (spec("better"), arms(m=MIXED, b=GOOD), "inconclusive"),
    (spec("better"), arms(m=GOOD, b=GOOD), "inconclusive"),
    (spec("better"), arms(m=[x + 0.125 for x in [0.5] * 5], b=[0.5] * 5), "reproduced"),
    (spec("better", "proxy"), arms(m=BAD, b=GOOD), "effect not seen"),
    (spec("better", "mechanics"), arms(m=GOOD, b=BAD), "checked"),
    (spec("better"), arms(m=GOOD[:4], b=BAD[:4]), "invalid"),
    (spec("better"), arms(m=[float("nan"), *GOOD[1:]], b=BAD), "invalid"),
    (spec("better"), Outcome(arms={"m": GOOD, "b": BAD}, floor=GOOD), "invalid"),
    (spec("better"), Outcome(arms={"m": GOOD, "b": BAD}, floor=[float("nan")] * 5), "invalid"),
    (spec("better"), Outcome(arms={"m": GOOD, "b": BAD}, learnt={"b": False}), "invalid"),
    (spec("better", baseline="c"), arms(m=GOOD, b=BAD), "invalid"),
    (spec("not_worse", margin=0.02, saving=0.5), Outcome({"m": GOOD, "b": GOOD}, saving=0.6), "reproduced"),
    (spec("not_worse", margin=0.02, saving=0.5), Outcome({"m": GOOD, "b": GOOD}, saving=0.4), "not reproduced"),
    (spec("not_worse", margin=0.02, saving=0.5), Outcome({"m": BAD, "b": GOOD}, saving=0.6), "not reproduced"),
    (spec("within", low=0.85, high=0.95), arms(m=GOOD), "reproduced"),
    (spec("within", low=0.1, high=0.2), arms(m=GOOD), "not reproduced"),
    (spec("within", low=0.912, high=0.99), arms(m=GOOD), "inconclusive"),
    (spec("ordered", order=["a", "b", "c"]), arms(a=GOOD, b=BAD, c=[x - 0.1 for x in BAD]), "reproduced"),
    (spec("ordered", order=["a", "b", "c"]), arms(a=GOOD, b=[x - 0.1 for x in BAD], c=BAD), "not reproduced"),
    (spec("ordered", order=["a", "b"]), arms(a=GOOD, b=BAD), "invalid"),
    (spec("all_true", "mechanics"), Outcome(facts={"x": True}), "checked"),
    (spec("all_true", "mechanics"), Outcome(facts={"x": True, "y": False}), "failed"),
    (spec("all_true", "mechanics"), Outcome(), "invalid"),
]


@pytest.mark.parametrize("row, outcome, verdict", RULES)
def test_rules(row, outcome, verdict):
    assert judge(row, outcome).verdict == verdict


def test_unknown_kinds_and_evidence_raise():
    with pytest.raises(ValueError, match="evidence='hearsay'"):
        judge(spec("better", "hearsay"), arms(m=GOOD, b=BAD))
    with pytest.raises(ValueError, match="kind='nicer'"):
        judge(spec("nicer"), arms(m=GOOD, b=BAD))


@pytest.fixture
def paper(monkeypatch):
    """A made-up paper whose claim depends on its seeds."""
    import dataclasses
    import sys

    row = dataclasses.replace(catalog.papers()[0], key="toy", family="toys", claim=spec("better", metric="accuracy"))

    def claim(*, seeds, smoke=False):
        noise = [np.random.default_rng(s).normal() * 0.01 for s in seeds]
        return Outcome({"m": [0.9 + n for n in noise], "b": [0.8 - n for n in noise]}, learnt={"m": True}, data="toy")

    module = types.ModuleType("jaxlab.claims.toys.toy")
    module.claim = claim
    monkeypatch.setitem(sys.modules, "jaxlab.claims.toys", types.ModuleType("jaxlab.claims.toys"))
    monkeypatch.setitem(sys.modules, "jaxlab.claims.toys.toy", module)
    monkeypatch.setattr(catalog, "claim_hash", lambda paper: "hash")
    monkeypatch.setattr(catalog, "source_hash", lambda paper: "bytes")
    return row


def test_records_keep_every_try(paper, tmp_path):
    first = harness.run(paper)
    assert first["verdict"] == "reproduced" and first["hash"] == "hash" and len(first["arms"]["m"]) == 5
    harness.record(paper, first, directory=tmp_path)
    second = harness.run(paper, seeds=range(5, 10))
    assert second["arms"] != first["arms"]
    path = harness.record(paper, second, directory=tmp_path)
    harness.record(paper, second, directory=tmp_path)
    saved = json.loads(path.read_text())
    assert [h["arms"] for h in saved["history"]] == [first["arms"], second["arms"]]
    assert harness.run(paper)["arms"] == first["arms"]


def test_a_record_keeps_the_order_of_the_arms(paper, tmp_path):
    """The method stands first, whatever its name."""
    result = {**harness.run(paper), "arms": {"z": GOOD, "a": BAD}}
    saved = json.loads(harness.record(paper, result, directory=tmp_path).read_text())
    assert list(saved["arms"]) == ["z", "a"]


def test_smoke_gives_no_verdict(paper):
    assert harness.run(paper, smoke=True)["verdict"] == "smoke"


def test_the_command_prints_one_json_value(paper, monkeypatch, capsys):
    monkeypatch.setattr(catalog, "find", lambda text: paper)
    args = argparse.Namespace(keys=["toy"], family=None, stale=False, record=False, smoke=False, json=True)
    assert harness.command(args) == 0
    out = capsys.readouterr()
    assert json.loads(out.out)[0]["verdict"] == "reproduced" and "toy" in out.err
    args.json = False
    assert harness.command(args) == 0
    assert "reproduced (scaled)" in capsys.readouterr().out


def test_a_paper_without_claim_is_named():
    with pytest.raises(LookupError, match="gl_dmnet has no claim yet"):
        harness.run(catalog.find("gl_dmnet"))


def test_digits_are_split_by_the_seed_and_balanced():
    a, b = common.digits(0), common.digits(1)
    assert [len(split["y"]) for split in a] == [1077, 360, 360]
    assert not np.array_equal(a[2]["x"], b[2]["x"])
    assert np.ptp(np.bincount(a[2]["y"])) <= 2
    rows = {split["x"].tobytes() for split in a}
    assert len(rows) == 3 and a[0]["x"].max() <= 1


def test_training_reaches_the_least_squares_solution():
    import jax
    import jax.numpy as jnp

    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, 3)).astype(np.float32)
    truth = np.array([1.0, -2.0, 0.5], np.float32)
    data = {"x": x, "y": x @ truth}
    loss = lambda p, b, key: jnp.mean((b["x"] @ p - b["y"]) ** 2)
    run = lambda key: common.train(loss, jnp.zeros(3), data, optimizer=optax.sgd(0.1), steps=200, batch=16, key=key)
    params, losses = jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(0), 2))
    np.testing.assert_allclose(params, np.stack([truth] * 2), atol=1e-3)
    assert losses.shape == (2, 200) and not np.array_equal(losses[0], losses[1])
    assert float(common.accuracy(jnp.eye(3), jnp.array([0, 1, 0]))) == pytest.approx(2 / 3)
