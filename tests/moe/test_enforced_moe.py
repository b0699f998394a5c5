"""Enforced and sentence-level routing, their loss and the threshold metric against loops."""

import conformance
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import Arg, Case

from jaxlab import moe

rng = np.random.default_rng(0)
D, E, F = 4, 3, 5
SEGMENTS = np.array([0, 0, 2, 1, 1, 1, -1, 2])
WHERE = np.array([1, 1, 1, 1, 0, 1, 1, 1], bool)
W = np.float32(rng.normal(size=(D, E)))


def test_enforced_routing_is_the_fields_network():
    """Copied experts give the dense network for any field; other fields' experts get exactly no gradient."""
    dense = {n: w[0] for n, w in moe.swiglu_experts(1, F).init(jax.random.key(0), D).items()}
    layer = moe.moe_layer(moe.enforced_router(E), moe.swiglu_experts(E, F))
    params = {"router": {}, "experts": moe.upcycle(dense, E)}
    x, ids = rng.normal(size=(8, D)).astype(np.float32), np.array([0, 2, 2, 0, 0, 2, 0, -1])

    def run(p, x):
        y, plan = layer.apply(p, x, ids=ids)
        return jnp.sum(jnp.sin(y)), (y, plan.counts)

    (_, (y, counts)), grads = jax.jit(jax.value_and_grad(run, has_aux=True))(params, x)
    h = x @ dense["gate"]
    expected = (h / (1 + np.exp(-h)) * (x @ dense["up"])) @ dense["down"]
    np.testing.assert_allclose(y[:7], expected[:7], rtol=1e-4, atol=1e-5)
    assert not np.any(y[7]) and counts.tolist() == [4, 0, 3]
    for leaf in jax.tree.leaves(grads["experts"]):
        assert np.any(leaf[0]) and np.any(leaf[2]) and not np.any(leaf[1])


@pytest.mark.parametrize("k", [None, 1, 2])
def test_sentences_go_as_one(k):
    router = moe.sentence_router(E, k, num_segments=3)
    x = rng.normal(size=(8, D)).astype(np.float32)
    dirty = np.where((WHERE & (SEGMENTS >= 0))[:, None], x, np.nan).astype(np.float32)
    run = lambda w: router.apply({"w": w}, dirty, segment_ids=jnp.asarray(SEGMENTS), where=jnp.asarray(WHERE))
    loss = lambda w: (lambda plan: (jnp.sum(moe.dense_weights(plan) ** 2), plan))(run(w))
    (_, plan), grad = jax.jit(jax.value_and_grad(loss, has_aux=True))(W)
    expected, logits = np.zeros((8, E)), np.zeros((8, E))
    for s in range(3):
        members = [t for t in range(8) if SEGMENTS[t] == s and WHERE[t]]
        z = np.mean([x[t].astype(np.float64) @ W for t in members], axis=0)
        p = np.exp(z) / np.exp(z).sum()
        for t in members:
            logits[t] = z
            for e in np.argsort(-p)[: k or 1]:
                expected[t, e] = 1 if k is None else p[e]
    np.testing.assert_allclose(moe.dense_weights(plan), expected, rtol=1e-5)
    np.testing.assert_allclose(plan.logits, logits, rtol=1e-4, atol=1e-6)
    assert np.all(np.isfinite(grad)) and np.any(grad) == (k is not None)


def test_router_loss_equals_the_formula():
    logits, labels, where = rng.normal(size=(2, 6, E)), np.array([0, 2, -1, 1, 1, 0]), np.arange(6) < 5
    terms = []
    for n in (0, 1, 3, 4):
        z = logits[:, n].mean(0)
        terms.append(np.log(np.exp(z).sum()) - z[labels[n]])
    got = jax.jit(moe.specified_expert_loss)(jnp.float32(logits), labels, where=where)
    np.testing.assert_allclose(got, np.mean(terms), rtol=1e-5)
    assert float(moe.specified_expert_loss(jnp.ones((1, 2, 3)), jnp.array([-1, -1]))) == 0


def test_f1_equals_the_search_over_thresholds():
    run = jax.jit(moe.f1_max)
    for seed in range(20):
        draw = np.random.default_rng(seed)
        scores, labels = np.float32(draw.integers(-4, 4, 16)) / 4, draw.integers(0, 2, 16)
        where = draw.random(16) < 0.7
        best, at = 0.0, np.inf
        for t in sorted(set(scores[where]), reverse=True):
            taken = where & (scores >= t)
            hit = (taken & (labels == 1)).sum()
            f1 = 2 * hit / max(1, taken.sum() + (where & (labels == 1)).sum())
            if f1 > best + 1e-9:
                best, at = f1, t
        f1, threshold = run(np.where(where, scores, np.nan), labels, where=where)
        np.testing.assert_allclose([f1, threshold], [best, at], rtol=1e-6)
    assert [float(v) for v in run(scores, labels * 0, where=where)] == [0, np.inf]


def test_pairs_that_are_cited_together():
    citations = [[3, 1, 2], [2, 3, 3], [5], [], [1, 3]]
    count = {}
    for cited in citations:
        for a in set(cited):
            for b in set(cited):
                if a < b:
                    count[a, b] = count.get((a, b), 0) + 1
    for least in (1, 2, 3):
        expected = sorted(list(pair) for pair, n in count.items() if n >= least)
        assert moe.cocitation_pairs(citations, min_count=least).tolist() == expected
    assert moe.cocitation_pairs([]).shape == (0, 2)


def test_refuses():
    for make, match in (
        (lambda: moe.enforced_router(0), "num_experts=0"),
        (lambda: moe.sentence_router(3, 4, num_segments=1), "k=4 must be between 1 and num_experts=3"),
        (lambda: moe.sentence_router(3, num_segments=0), "num_segments=0"),
        (lambda: moe.specified_expert_loss(jnp.ones((2, 3)), jnp.zeros(3, int)), r"must be \[L, N, E\] and \[N\]"),
        (lambda: moe.f1_max(jnp.ones((2, 3)), jnp.ones(3)), r"must be \[N\]"),
        (lambda: moe.cocitation_pairs([[1]], min_count=0), "min_count=0"),
    ):
        with pytest.raises(ValueError, match=match):
            make()
    router = moe.sentence_router(3, num_segments=1)
    with pytest.raises(ValueError, match=r"must be \[T, d\] and \[T\]"):
        router.apply({"w": W}, jnp.ones((2, D)), segment_ids=jnp.zeros(3, int))


def sentence_weights(x, where):
    router = moe.sentence_router(E, 2, num_segments=3)
    w = jnp.asarray(W, jnp.promote_types(x.dtype, jnp.float32))
    plan = router.apply({"w": w}, x, segment_ids=jnp.arange(x.shape[0]) % 3, where=where)
    return moe.dense_weights(plan).astype(x.dtype)


def enforced(x, ids):
    return moe.dense_weights(moe.enforced_router(E).apply({}, x, ids=ids)).astype(x.dtype)


def loss(scores, labels, where, axis_name=None):
    return moe.specified_expert_loss(jnp.stack([scores, scores / 2]), labels, where=where, axis_name=axis_name)


def f1(scores, labels, where):
    return moe.f1_max(scores, labels, where=where)[0]


def pairs(ids):
    return moe.cocitation_pairs(ids)


ROWS = {"x": Arg("activations", (6, D)), "where": Arg("where", (6,))}
CASES = [
    Case(loss, {"scores": Arg("scores", (6, E)), "labels": Arg("labels", (6,)), "where": Arg("where", (6,))},
         wrt=("scores",), rows={"scores": 0, "labels": 0, "where": 0}, symmetry="invariant",
         covers=("moe.specified_expert_loss",)),
    Case(sentence_weights, ROWS, wrt=("x",), helper=True, covers=("moe.sentence_router",)),
    Case(enforced, {"x": ROWS["x"], "ids": Arg("index", (6,))}, reason="ids alone decide", helper=True,
         covers=("moe.enforced_router",)),
    Case(f1, {"scores": Arg("scores", (6,)), "labels": Arg("labels", (6,), high=2), "where": Arg("where", (6,))},
         reason="a metric", helper=True, covers=("moe.f1_max",)),
    Case(pairs, {"ids": Arg("index", (4, 3), high=6)}, host=True, covers=("moe.cocitation_pairs",)),
]  # fmt: skip
test_conformance = conformance.conformance_tests(CASES)
