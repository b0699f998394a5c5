"""Clusters against a search over all, and the emergent mixture against the dense network and a loop over tokens."""

import itertools
import math

import conformance
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import Arg, Case

from jaxlab import moe

rng = np.random.default_rng(0)
T, D, F, E = 9, 5, 12, 4


def network(gated, bias, seed=0):
    draw = np.random.default_rng(seed)
    params = {"up": draw.normal(size=(D, F)), "down": draw.normal(size=(F, D))}
    if gated:
        params["gate"] = draw.normal(size=(D, F))
    if bias:
        params |= {"up_bias": draw.normal(size=F), "down_bias": draw.normal(size=D)}
    return {n: np.float32(w) for n, w in params.items()}


def gelu(x):
    return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2


def neurons(p, x, chosen):
    """The dense network of some neurons, without the bias of the output."""
    up = x @ p["up"][:, chosen] + (p["up_bias"][chosen] if "up_bias" in p else 0)
    hidden = gelu(x @ p["gate"][:, chosen]) * up if "gate" in p else gelu(up)
    return hidden @ p["down"][chosen]


LABELS = np.array([0, 1, 2, 3] * 3)[np.random.default_rng(5).permutation(F)]


@pytest.mark.parametrize("gated, bias, k", [(False, True, E), (True, False, 2)])
def test_equals_the_loop_over_tokens(gated, bias, k):
    dense = network(gated, bias)
    wide = {n: w.astype(np.float64) for n, w in dense.items()}
    x, where = rng.normal(size=(T, D)).astype(np.float32), np.arange(T) < T - 2
    dirty = np.where(where[:, None], x, np.nan).astype(np.float32)
    params = moe.dense_to_emoe(dense, LABELS, k=k)

    def run(p):
        y, plan = moe.emoe_ffn(k).apply(p, dirty, where=where)
        return jnp.sum(jnp.sin(y)), (y, plan)

    (_, (y, plan)), grads = jax.jit(jax.value_and_grad(run, has_aux=True))(params)
    expected = np.zeros((T, D))
    keys = wide["gate" if gated else "up"]
    for t in np.flatnonzero(where):
        scores = [x[t] @ keys[:, e == LABELS].mean(1) for e in range(E)]
        for e in np.argsort(scores)[::-1][:k]:
            expected[t] += neurons(wide, x[t].astype(np.float64), e == LABELS)
        expected[t] += wide.get("down_bias", 0)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(grads)) and np.any(grads["up"])
    assert int(plan.counts.sum()) == k * where.sum() and np.all(np.isin(plan.weight, (0, 1)))
    if k == E:  # the dense network
        whole = neurons(wide, x.astype(np.float64), np.ones(F, bool)) + wide.get("down_bias", 0)
        np.testing.assert_allclose(y[where], whole[where], rtol=1e-4, atol=1e-4)
    back = moe.emoe_to_dense(params, k=k)
    order = np.argsort(LABELS, kind="stable")
    for name, leaf in dense.items():
        axis = {"up": 1, "gate": 1, "down": 0, "up_bias": 0, "down_bias": None}[name]
        np.testing.assert_allclose(back[name], leaf if axis is None else np.take(leaf, order, axis), rtol=1e-6)


def test_scores_follow_the_keys_and_noise_is_for_training():
    params = moe.dense_to_emoe(network(False, False), LABELS, k=1)
    x = jnp.float32(rng.normal(size=(64, D)))
    layer = moe.emoe_ffn(1, noise=30.0)
    plans = jax.jit(lambda key: [layer.apply(params, x, key=key, train=t)[1].logits for t in (True, False)])
    (noisy, quiet), (other, same) = plans(jax.random.key(0)), plans(jax.random.key(1))
    assert np.any(noisy != other) and np.array_equal(quiet, same)
    np.testing.assert_allclose(np.std(noisy - quiet), 30 / E, rtol=0.15)
    keys = np.asarray(params["up"], np.float64).mean(2)
    unit = lambda a: a / np.linalg.norm(a, axis=1, keepdims=True)
    np.testing.assert_allclose(
        moe.avg_k_scores(params, x, normalize=True), unit(np.float64(x)) @ unit(keys).T, atol=1e-5
    )


def test_clusters_are_equal_and_the_best_there_are():
    """The assignment of every step is the best of all; planted clusters are found."""
    from jaxlab.moe.emoe import _equal_assignment

    for seed in range(5):
        cost = np.random.default_rng(seed).normal(size=(6, 3))
        labels = _equal_assignment(cost)
        every = set(itertools.permutations([0, 0, 1, 1, 2, 2]))
        best = min(sum(cost[i, e] for i, e in enumerate(p)) for p in every)
        np.testing.assert_allclose(cost[np.arange(6), labels].sum(), best)
        assert np.all(np.bincount(labels) == 2)
    centres = np.eye(4)
    planted = np.repeat(np.arange(4), 6)[rng.permutation(24)]
    x = (centres[planted] + 0.1 * rng.normal(size=(24, 4))) * rng.uniform(0.5, 2, (24, 1))
    labels = moe.balanced_kmeans(x, 4)
    assert len({(a, b) for a, b in zip(labels, planted, strict=True)}) == 4
    same = moe.balanced_kmeans(np.ones((6, 2)), 3)
    assert np.all(np.bincount(same) == 2)


def test_refuses():
    dense = network(False, False)
    params = moe.dense_to_emoe(dense, LABELS, k=1)
    for make, match in (
        (lambda: moe.emoe_ffn(0), "k=0"),
        (lambda: moe.emoe_ffn(1, noise=-1.0), "noise=-1.0"),
        (lambda: moe.emoe_ffn(5).apply(params, jnp.ones((2, D))), "k=5 must be between 1 and num_experts=4"),
        (lambda: moe.emoe_ffn(1).apply(params, jnp.ones((2, D)), train=True), "key is needed"),
        (lambda: moe.emoe_ffn(1).apply(params, jnp.ones(D)), "x must be"),
        (lambda: moe.emoe_ffn(1).init(jax.random.key(0), D), "starts from a dense network"),
        (lambda: moe.dense_to_emoe(dense, np.array([0] * 5 + [1] * 7), k=1), r"equal size, got sizes \[5, 7\]"),
        (lambda: moe.dense_to_emoe(dense, LABELS, k=5), "k=5"),
        (lambda: moe.dense_to_emoe({"up": dense["up"]}, LABELS, k=1), "must have up and down"),
        (lambda: moe.dense_to_emoe(dense, np.array([0, 1]), k=1), "expected 2 neurons on axis"),
        (lambda: moe.balanced_kmeans(np.ones((5, 2)), 2), "num_clusters=2 must divide"),
    ):
        with pytest.raises(ValueError, match=match):
            make()


PARAMS = jax.tree.map(np.asarray, moe.dense_to_emoe(network(False, True), LABELS, k=2))


def emoe_ffn(x, where):
    params = jax.tree.map(lambda a: jnp.asarray(a, jnp.promote_types(x.dtype, jnp.float32)), PARAMS)
    return moe.emoe_ffn(2).apply(params, x, where=where)[0]


def there_and_back(x):
    params = moe.dense_to_emoe({"up": x, "down": x.T}, LABELS, k=1)
    dense = moe.emoe_to_dense(params, k=1)
    return dense["up"] + dense["down"].T, moe.avg_k_scores(params, x.T).astype(x.dtype)


def balanced_kmeans(x):
    return moe.balanced_kmeans(x, 3)


CASES = [
    Case(emoe_ffn, {"x": Arg("activations", (8, D)), "where": Arg("where", (8,))}, wrt=("x",),
         rows={"x": 0, "where": 0}, symmetry="equivariant", covers=("moe.emoe_ffn",)),
    Case(there_and_back, {"x": Arg("activations", (F, F))}, wrt=("x",), helper=True,
         covers=("moe.dense_to_emoe", "moe.emoe_to_dense", "moe.avg_k_scores")),
    Case(balanced_kmeans, {"x": Arg("activations", (6, 3))}, host=True, covers=("moe.balanced_kmeans",)),
]  # fmt: skip
test_conformance = conformance.conformance_tests(CASES)
