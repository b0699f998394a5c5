"""MoGE against a loop over groups, and its dispatch against the layer on one device."""

import conformance
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import Arg, Case
from jax.sharding import PartitionSpec as P

from jaxlab import moe
from jaxlab.ops.layers import mlp

rng = np.random.default_rng(0)
T, D, E, M = 8, 5, 12, 4


def start(router, scale=1.0):
    shapes = jax.eval_shape(lambda key: router.init(key, D), jax.random.key(0))
    return jax.tree.map(lambda a: np.float32(rng.normal(size=a.shape) * scale), shapes)


def oracle(params, x, k, groups, allowed=None):
    z = x.astype(np.float64) @ np.asarray(params["w"], np.float64)
    p = np.exp(z - z.max(1, keepdims=True))
    p = p / p.sum(1, keepdims=True)
    g, size = np.zeros(p.shape), p.shape[1] // groups
    for t in range(len(x)):
        for m in range(groups):
            members = [e for e in range(m * size, (m + 1) * size) if allowed is None or allowed[e]]
            for e in sorted(members, key=lambda e: -p[t, e])[: k // groups]:
                g[t, e] = p[t, e] * params["scale"][e] if "scale" in params else p[t, e]
    return p, g


@pytest.mark.parametrize("groups, k", [(4, 4), (4, 8), (1, 3), (3, 12)])
def test_equals_the_loop_and_every_group_has_the_same_load(groups, k):
    router = moe.moge_router(E, k, groups=groups)
    params, x = start(router), rng.normal(size=(T, D)).astype(np.float32)

    def run(x):
        plan = router.apply(params, x)
        return plan, moe.imbalance_score(plan, num_devices=groups)

    plan, score = jax.jit(run)(x)
    p, g = oracle(params, x, k, groups)
    np.testing.assert_allclose(plan.scores, p, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(moe.dense_weights(plan), g, rtol=1e-4, atol=1e-6)
    assert np.all(np.asarray(plan.counts).reshape(groups, -1).sum(1) == T * k // groups) and score == 0
    if k == E:  # the dense mixture
        np.testing.assert_allclose(moe.dense_weights(plan), p * params["scale"], rtol=1e-4, atol=1e-6)


def test_votes_keep_the_wanted_experts_in_evaluation_only():
    router = moe.moge_router(E, M, groups=M, num_voted=2, expert_scale=False)
    params, x = start(router), rng.normal(size=(32, D)).astype(np.float32)
    p, everyone = oracle(params, x, M, M)
    votes = np.zeros(E)
    for t in range(32):
        for m in range(M):
            votes[m * 3 + int(np.argmax(p[t, m * 3 : m * 3 + 3]))] += 1
    allowed = np.zeros(E, bool)
    for m in range(M):
        allowed[m * 3 + np.argsort(-votes[m * 3 : m * 3 + 3], kind="stable")[:2]] = True
    train, test = jax.jit(lambda x: tuple(router.apply(params, x, train=t) for t in (True, False)))(x)
    np.testing.assert_allclose(moe.dense_weights(train), everyone, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(moe.dense_weights(test), oracle(params, x, M, M, allowed)[1], rtol=1e-4, atol=1e-6)
    assert np.array_equal(moe.voted_experts(jnp.float32(p), groups=M, num_voted=2), allowed)
    assert np.all(moe.voted_experts(jnp.float32(p), groups=M, num_voted=3))
    few = moe.voted_experts(jnp.float32(p), groups=M, num_voted=1, where=np.arange(32) == 5)
    assert np.array_equal(np.flatnonzero(few), [m * 3 + int(np.argmax(p[5, m * 3 : m * 3 + 3])) for m in range(M)])


def test_plain_top_k_is_not_balanced():
    plan = moe.top_k_router(E, 4).apply({"w": start(moe.moge_router(E, M, groups=M))["w"]}, jnp.ones((T, D)))
    assert float(moe.imbalance_score(plan, num_devices=M)) > 0
    load = np.asarray(plan.counts).reshape(M, -1).sum(1)
    np.testing.assert_allclose(moe.imbalance_score(plan, num_devices=M), np.ptp(load) / T)


def test_one_group_on_each_of_eight_devices_equals_one_device():
    """Values, and gradients outside the map, with a shared expert and tokens that do not exist."""
    groups, experts = 8, 16
    router, shared = moe.moge_router(experts, 8, groups=groups), mlp([4, D])
    make = lambda **options: moe.moe_layer(router, moe.swiglu_experts(experts, 3), shared=shared, **options)
    one, spread = make(), make(dispatch=moe.group_dispatch(), axis_name="expert")
    params = jax.tree.map(
        lambda a: np.float32(rng.normal(size=a.shape)), jax.eval_shape(lambda k: one.init(k, D), jax.random.key(0))
    )
    x, where = rng.normal(size=(4 * groups, D)).astype(np.float32), np.arange(4 * groups) % 5 != 3
    mesh = jax.make_mesh((groups,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = {"router": P(), "experts": P("expert"), "shared": P()}
    mapped = jax.shard_map(
        lambda p, x, w: spread.apply(p, x, where=w)[0],
        mesh=mesh,
        in_specs=(specs, P("expert"), P("expert")),
        out_specs=P("expert"),
    )
    form = {"one": lambda p: one.apply(p, x, where=where)[0], "spread": lambda p: mapped(p, x, where)}
    both = jax.jit(lambda p: {n: jax.value_and_grad(lambda p, f=f: jnp.sum(f(p) ** 2))(p) for n, f in form.items()})
    results = both(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), results["one"], results["spread"])


def test_refuses():
    for make, match in (
        (lambda: moe.moge_router(12, 6, groups=4), "groups=4 must divide k=6"),
        (lambda: moe.moge_router(12, 4, groups=4, num_voted=4), "num_voted=4 must be between"),
        (lambda: moe.voted_experts(jnp.ones((3, 5)), groups=2, num_voted=1), "multiple of groups=2"),
        (lambda: moe.voted_experts(jnp.ones((3, 4)), groups=2, num_voted=3), "num_voted=3"),
        (lambda: moe.moge_router(12, 4, groups=4).apply({}, jnp.ones(3)), "x must be"),
    ):
        with pytest.raises(ValueError, match=match):
            make()
    layer = moe.moe_layer(moe.moge_router(4, 2, groups=2), moe.swiglu_experts(4, 2), dispatch=moe.group_dispatch())
    with pytest.raises(ValueError, match="axis_name is needed"):
        layer.apply(layer.init(jax.random.key(0), D), jnp.ones((T, D)))
    plan = moe.moge_router(4, 2, groups=2).apply({"w": jnp.ones((D, 4)), "scale": jnp.ones(4)}, jnp.ones((T, D)))
    with pytest.raises(ValueError, match="num_devices=3 must divide num_experts=4"):
        moe.imbalance_score(plan, num_devices=3)


ROUTER = moe.moge_router(E, M, groups=M)
PARAMS = start(ROUTER)


def moge_router(x, where):
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    plan = ROUTER.apply(jax.tree.map(lambda a: jnp.asarray(a, dtype), PARAMS), x, where=where)
    return moe.dense_weights(plan).astype(x.dtype), plan.scores.astype(x.dtype)


def voted_experts(scores, where):
    return moe.voted_experts(scores, groups=M, num_voted=1, where=where)


def exchanged(x):
    scaled = moe.Experts(E, lambda key, size: None, lambda p, x, plan: (moe.dense_weights(plan) @ p)[:, None] * x)
    layer = moe.moe_layer(ROUTER, scaled, dispatch=moe.group_dispatch(), axis_name="expert")
    weights = jnp.arange(E, dtype=x.dtype).reshape(M, E // M)
    run = lambda w, x: layer.apply({"router": PARAMS, "experts": w}, x)
    y, plan = jax.vmap(run, axis_name="expert")(weights, x)
    return y, jax.vmap(lambda p: moe.imbalance_score(p, num_devices=M, axis_name="i"), axis_name="i")(plan)


CASES = [
    Case(
        moge_router,
        {"x": Arg("activations", (T, D)), "where": Arg("where", (T,))},
        wrt=("x",),
        rows={"x": 0, "where": 0},
        symmetry="equivariant",
        covers=("moe.moge_router",),
    ),
    Case(voted_experts, {"scores": Arg("scores", (T, E)), "where": Arg("where", (T,))}, reason="a choice of experts",
         helper=True, covers=("moe.voted_experts",)),
    Case(lambda x: exchanged(x)[0], {"x": Arg("activations", (M, 2, D))}, wrt=("x",), helper=True, name="exchanged",
         covers=("moe.group_dispatch", "moe.imbalance_score")),
]  # fmt: skip
test_conformance = conformance.conformance_tests(CASES)
