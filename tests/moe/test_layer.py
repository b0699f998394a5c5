"""The layer, its routers and the balance losses against loops over tokens and experts."""

import conformance
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import Arg, Case

from jaxlab import moe
from jaxlab.kernels import plan_from_top_k, top_k_routing
from jaxlab.ops.layers import mlp

rng = np.random.default_rng(0)
T, D, E, K, F = 7, 5, 4, 2, 6


def silu(x):
    return x / (1 + np.exp(-x))


def layer_oracle(params, x, k):
    w = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    y = np.zeros(x.shape)
    for t in range(len(x)):
        z = x[t] @ w["router"]["w"]
        p = np.exp(z) / np.exp(z).sum()
        best = sorted(range(len(p)), key=lambda e: (-p[e], e))[:k]
        for e in best:
            h = silu(x[t] @ w["experts"]["gate"][e]) * (x[t] @ w["experts"]["up"][e])
            y[t] += p[e] / p[best].sum() * (h @ w["experts"]["down"][e])
    return y


@pytest.mark.parametrize("k", [1, 2, 4])
def test_layer_equals_the_loop(k):
    layer = moe.moe_layer(moe.top_k_router(E, k), moe.swiglu_experts(E, F))
    params = layer.init(jax.random.key(0), D)
    params["router"]["w"] = params["router"]["w"] * 50
    x = rng.normal(size=(T, D)).astype(np.float32)
    y, plan = jax.jit(layer.apply)(params, x)
    np.testing.assert_allclose(y, layer_oracle(params, x.astype(np.float64), k), atol=1e-5)
    assert int(plan.counts.sum()) == T * k and int(plan.dropped) == 0
    assert np.all(np.diff(plan.expert) >= 0)


def test_router_is_noisy_in_training_only():
    router = moe.top_k_router(E, 1, noise=8.0, jitter=0.1)
    params = router.init(jax.random.key(0), D)
    x = jnp.float32(rng.normal(size=(64, D)))
    a, b = (router.apply(params, x, key=jax.random.key(i), train=True) for i in (0, 1))
    assert np.any(a.logits != b.logits)
    quiet = router.apply(params, x)
    np.testing.assert_array_equal(quiet.logits, router.apply(params, x, key=jax.random.key(0)).logits)
    with pytest.raises(ValueError, match="key is needed"):
        router.apply(params, x, train=True)


def test_balance_losses_equal_loops():
    router = moe.top_k_router(E, K)
    params = {"w": jnp.float32(rng.normal(size=(D, E)))}
    x = rng.normal(size=(T, D)).astype(np.float32)
    plan = router.apply(params, x)
    z = x.astype(np.float64) @ np.asarray(params["w"], np.float64)
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    f = np.zeros(E)
    for t in range(T):
        for e in np.argsort(-p[t])[:K]:
            f[e] += 1 / (T * K)
    np.testing.assert_allclose(moe.load_balancing_loss(plan), E * sum(f * p.mean(0)), rtol=1e-5)
    np.testing.assert_allclose(moe.expert_load(plan), f * E, rtol=1e-6)
    np.testing.assert_allclose(moe.router_z_loss(plan), np.mean(np.log(np.exp(z).sum(1)) ** 2), rtol=1e-5)


def test_health_and_further_losses_equal_loops():
    """A plan with a dead expert, cut assignments, padding and two tasks, whole and over a mapped axis."""
    gates = np.abs(rng.normal(size=(16, E)))
    gates[:, 3] = 0
    where, labels = np.arange(16) % 5 != 4, np.array([0, 1, 2, -1] * 4)

    def run(gates, where, labels, axis_name=None):
        plan = moe.plan_from_weights(gates, max_active=2, where=where)
        options = {"where": where, "axis_name": axis_name}
        health = moe.router_health(plan, **options)
        return health, moe.importance_loss(plan, **options), moe.mutual_information_loss(plan, labels, 3, **options)

    health, importance, information = jax.jit(run)(jnp.float32(gates), where, labels)
    real = gates * where[:, None]
    kept = np.where(real >= np.sort(real, axis=1)[:, -2:-1], real, 0)
    counts = (kept > 0).sum(0)
    load = counts / counts.sum()
    entropy = lambda p: -sum(v * np.log(v) for v in p if v > 0) / np.log(E)
    cosines = [
        real[:, a] @ real[:, b] / max(1e-30, np.linalg.norm(real[:, a]) * np.linalg.norm(real[:, b]))
        for a in range(E) for b in range(E) if a != b
    ]  # fmt: skip
    np.testing.assert_allclose(health.load, load * E, rtol=1e-5)
    np.testing.assert_allclose(health.max_violation, load.max() * E - 1, rtol=1e-5)
    np.testing.assert_allclose(health.load_entropy, entropy(load), rtol=1e-5)
    np.testing.assert_allclose(health.token_entropy, np.mean([entropy(g / g.sum()) for g in real[where]]), rtol=1e-5)
    np.testing.assert_allclose(health.overlap, np.mean(cosines), rtol=1e-5)
    np.testing.assert_allclose(health.drop_rate, 1 / 3, rtol=1e-5)
    assert health.dead_experts == 1
    weights = kept.sum(0)
    np.testing.assert_allclose(importance, weights.var() / weights.mean() ** 2, rtol=1e-5)
    joint = np.stack([real[labels == m].sum(0) for m in range(3)])
    joint = joint / joint.sum()
    ratio = [p * np.log(p / (joint[m].sum() * joint[:, e].sum())) for (m, e), p in np.ndenumerate(joint) if p > 0]
    np.testing.assert_allclose(information, -sum(ratio), rtol=1e-4)
    spread = jax.jit(jax.vmap(lambda *args: run(*args, "data"), axis_name="data"))(
        jnp.float32(gates.reshape(4, 4, E)), where.reshape(4, 4), labels.reshape(4, 4)
    )
    for a, b in zip(jax.tree.leaves(spread), jax.tree.leaves((health, importance, information)), strict=True):
        np.testing.assert_allclose(a, np.stack([b] * 4), rtol=1e-4, atol=1e-6)


def test_balance_over_the_global_batch():
    router = moe.top_k_router(E, K)
    params = {"w": jnp.float32(rng.normal(size=(D, E)))}
    x = rng.normal(size=(8, 4, D)).astype(np.float32)
    for loss in (moe.load_balancing_loss, moe.router_z_loss):
        whole = loss(router.apply(params, x.reshape(-1, D)))
        spread = jax.vmap(lambda x, loss=loss: loss(router.apply(params, x), axis_name="data"), axis_name="data")(x)
        np.testing.assert_allclose(spread, np.full(8, whole), rtol=1e-5)


def test_shared_experts_see_every_token_and_no_padding():
    shared = mlp([D])
    layer = moe.moe_layer(moe.top_k_router(E, K), moe.swiglu_experts(E, F), shared=shared)
    params = layer.init(jax.random.key(0), D)
    x, where = rng.normal(size=(T, D)).astype(np.float32), np.arange(T) < T - 2
    dirty = np.where(where[:, None], x, np.nan).astype(np.float32)
    y, plan = layer.apply(params, dirty, where=jnp.asarray(where))
    routed = moe.moe_layer(moe.top_k_router(E, K), moe.swiglu_experts(E, F)).apply(params, x)[0]
    np.testing.assert_allclose(y[where], (routed + shared.apply(params["shared"], x))[where], rtol=1e-5, atol=1e-5)
    grads = jax.grad(lambda p: jnp.sum(layer.apply(p, dirty, where=jnp.asarray(where))[0]))(params)
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(grads)) and int(plan.counts.sum()) == (T - 2) * K


def test_nothing_routed_is_finite():
    plan = moe.top_k_router(E, K).apply({"w": jnp.zeros((D, E))}, jnp.zeros((0, D)))
    assert float(moe.load_balancing_loss(plan)) == 0 and float(moe.router_z_loss(plan)) == 0


def test_refuses():
    with pytest.raises(ValueError, match="k=5 must be between 1 and num_experts=4"):
        moe.top_k_router(4, 5)
    with pytest.raises(ValueError, match="x must be"):
        moe.top_k_router(4, 1).apply({"w": jnp.zeros((D, 4))}, jnp.zeros((2, 3, D)))
    layer = moe.moe_layer(moe.top_k_router(4, 1), moe.swiglu_experts(3, 2))
    with pytest.raises(ValueError, match="router has 4 experts, but experts has 3"):
        layer.apply(layer.init(jax.random.key(0), D), jnp.zeros((2, D)))


LAYER = moe.moe_layer(moe.top_k_router(E, K), moe.swiglu_experts(E, F))
PARAMS = jax.tree.map(np.asarray, jax.jit(lambda key: LAYER.init(key, D))(jax.random.key(0)))
PARAMS["router"]["w"] = PARAMS["router"]["w"] * 20


def moe_layer(x):
    return LAYER.apply(jax.tree.map(lambda a: jnp.asarray(a, jnp.promote_types(x.dtype, jnp.float32)), PARAMS), x)[0]


def plan_of(scores, where):
    return plan_from_top_k(top_k_routing(scores, K, where=where), scores)


def balance(scores, *, where=None, axis_name=None):
    return moe.load_balancing_loss(plan_of(scores, where), where=where, axis_name=axis_name)


def z_loss(scores, *, where=None, axis_name=None):
    scores = scores / 1e3  # a square of logits of 1e4 is far above what float32 differences can resolve
    return moe.router_z_loss(plan_of(scores, where), where=where, axis_name=axis_name)


def load(scores, *, where=None, axis_name=None):
    return moe.expert_load(plan_of(scores, where), axis_name=axis_name).astype(scores.dtype)


def further(scores, labels, where):
    plan = moe.plan_from_weights(jax.nn.relu(scores), where=where)
    health = moe.router_health(plan, where=where)
    information = moe.mutual_information_loss(plan, labels, 3, where=where)
    return moe.importance_loss(plan, where=where) + information, health


SCORES = {"scores": Arg("scores", (6, E)), "where": Arg("where", (6,))}
ROWS = {"rows": {"scores": 0, "where": 0}, "symmetry": "invariant"}
CASES = [
    Case(moe_layer, {"x": Arg("activations", (6, D))}, wrt=("x",), rows={"x": 0}, symmetry="equivariant",
         covers=("moe.moe_layer", "moe.dropless", "moe.swiglu_experts", "moe.top_k_router")),
    Case(balance, SCORES, wrt=("scores",), covers=("moe.load_balancing_loss",), **ROWS,
         skip={"gradient": "the share of assignments is a constant that a shifted score may change"}),
    Case(z_loss, SCORES, wrt=("scores",), covers=("moe.router_z_loss",), **ROWS),
    Case(further, {**SCORES, "labels": Arg("labels", (6,))}, wrt=("scores",), helper=True,
         covers=("moe.importance_loss", "moe.mutual_information_loss", "moe.squared_variation", "moe.router_health",
                 "moe.RouterHealth"), skip={"dtype": "the metrics are float32 whatever comes in"}),
    Case(load, SCORES, reason="counts have no gradient", covers=("moe.expert_load",), **ROWS),
]  # fmt: skip
test_conformance = conformance.conformance_tests(CASES)
