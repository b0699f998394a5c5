"""Capacity, arbitrary experts and slots against loops over tokens and experts."""

import math

import conformance
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import Arg, Case

from jaxlab import moe
from jaxlab.types import Layer

rng = np.random.default_rng(0)
T, D, E, K, F = 12, 5, 4, 2, 6


def silu(x):
    return x / (1 + np.exp(-x))


def expert(w, e, x):
    return (silu(x @ w["gate"][e]) * (x @ w["up"][e])) @ w["down"][e]


def swiglu_layer():
    def apply(p, x):
        return (jax.nn.silu(x @ p["gate"]) * (x @ p["up"])) @ p["down"]

    def init(key, size):
        return {n: w[0] for n, w in moe.swiglu_experts(1, F).init(key, size).items()}

    return Layer(init, apply)


def start():
    draw = np.random.default_rng(1)
    shapes = {"gate": (E, D, F), "up": (E, D, F), "down": (E, F, D)}
    experts = {n: np.float32(draw.normal(size=s)) for n, s in shapes.items()}
    return {"router": {"w": np.float32(draw.normal(size=(D, E)))}, "experts": experts}


PARAMS = start()


def capacity_oracle(gates, size, batch_priority):
    """Places are given out choice by choice and token by token."""
    gates = gates.astype(np.float64)
    ranked = [sorted(np.flatnonzero(row), key=lambda e, row=row: -row[e]) for row in gates]
    order = sorted(range(len(gates)), key=lambda t: (-gates[t].max() if batch_priority else 0, t))
    load, kept = np.zeros(gates.shape[1], int), np.zeros(gates.shape)
    for choice in range(gates.shape[1]):
        for t in order:
            if choice < len(ranked[t]):
                e = ranked[t][choice]
                if load[e] < size:
                    kept[t, e] = gates[t, e]
                    load[e] += 1
    return kept


@pytest.mark.parametrize("batch_priority", [False, True])
def test_capacity_equals_the_loop(batch_priority):
    """Skewed tokens, some of which do not exist; buffers from one row to more than enough."""
    x, where = rng.normal(size=(T, D)).astype(np.float32) + 1, np.arange(T) % 5 != 3
    plain = moe.moe_layer(moe.top_k_router(E, K), moe.swiglu_experts(E, F))
    dirty = np.where(where[:, None], x, np.nan).astype(np.float32)
    wanted = np.asarray(moe.dense_weights(plain.apply(PARAMS, dirty, where=where)[1]))
    each = np.stack([expert(PARAMS["experts"], e, x.astype(np.float64)) for e in range(E)], 1)
    for factor in (0.1, 1.0, 9.0):
        dispatch = moe.capacity(factor, batch_priority=batch_priority)
        layer = moe.moe_layer(moe.top_k_router(E, K), moe.swiglu_experts(E, F), dispatch=dispatch)

        def run(x, layer=layer, factor=factor):
            y, plan = layer.apply(PARAMS, x, where=where)
            cut = moe.limit_capacity(plain.apply(PARAMS, x, where=where)[1], factor, batch_priority=batch_priority)
            return y, plan, moe.dense_weights(plan), moe.dense_weights(cut), moe.drop_rate(plan)

        y, plan, got, cut, rate = jax.jit(run)(dirty)
        size = min(T, max(1, math.ceil(factor * T * K / E)))
        expected = capacity_oracle(wanted, size, batch_priority)
        np.testing.assert_allclose(got, expected, rtol=1e-5)
        np.testing.assert_allclose(cut, expected, rtol=1e-5)
        np.testing.assert_allclose(y, np.einsum("te,ted->td", expected, each), rtol=1e-4, atol=1e-4)
        assert np.array_equal(plan.counts, (wanted > 0).sum(0)), "what the router wanted is forgotten"
        assert int(plan.dropped) == (wanted > 0).sum() - (expected > 0).sum()
        np.testing.assert_allclose(rate, 1 - (expected > 0).sum() / (wanted > 0).sum(), rtol=1e-6)


def test_any_layer_as_expert_and_any_dispatch_give_one_function():
    """Values against the loop, gradients of the grouped kernel, of tiles of a plain layer and of buffers alike."""
    x = rng.normal(size=(T, D)).astype(np.float32)
    router = moe.top_k_router(E, K)
    layers = {
        "kernel": moe.moe_layer(router, moe.swiglu_experts(E, F)),
        "tiles": moe.moe_layer(router, moe.layer_experts(E, swiglu_layer())),
        "buffers": moe.moe_layer(router, moe.layer_experts(E, swiglu_layer()), dispatch=moe.capacity(E / K)),
    }
    loss = lambda layer, p, x: (lambda y: (jnp.sum(jnp.sin(y)), y))(layer.apply(p, x)[0])
    run = jax.jit(
        lambda p, x: {
            n: jax.value_and_grad(lambda p, x, f=f: loss(f, p, x), (0, 1), has_aux=True)(p, x)
            for n, f in layers.items()
        }
    )
    out = run(PARAMS, x)
    dense = np.asarray(moe.dense_weights(router.apply(PARAMS["router"], x)))
    expected = sum(dense[:, e, None] * expert(PARAMS["experts"], e, x.astype(np.float64)) for e in range(E))
    for (_, y), grads in out.values():
        np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), grads, out["buffers"][1])
    drawn = layers["tiles"].init(jax.random.key(0), D)["experts"]
    assert drawn["gate"].shape == (E, D, F) and not np.array_equal(drawn["gate"][0], drawn["gate"][1])


@pytest.mark.parametrize("normalize", [True, False])
def test_soft_router_equals_the_loop(normalize):
    router = moe.soft_router(E, 3, normalize=normalize)
    params = jax.tree.map(lambda a: np.float32(rng.normal(size=a.shape)), router.init(jax.random.key(0), D))
    x, where = rng.normal(size=(T, D)).astype(np.float32), np.arange(T) < T - 3
    dirty = np.where(where[:, None], x, np.nan).astype(np.float32)
    both = {"router": params, "experts": PARAMS["experts"]}
    for dispatch in (moe.dropless(), moe.capacity()):
        layer = moe.moe_layer(router, moe.swiglu_experts(E, F), dispatch=dispatch)
        y, plan = jax.jit(layer.apply)(both, dirty, where=where)
        real, phi = x[where].astype(np.float64), params["phi"].astype(np.float64)
        unit = real / np.linalg.norm(real, axis=1, keepdims=True) if normalize else real
        phi = params["scale"] * phi / np.linalg.norm(phi, axis=0, keepdims=True) if normalize else phi
        z = np.einsum("td,des->tes", unit, phi)
        over_tokens, over_slots = np.exp(z) / np.exp(z).sum(0), np.exp(z) / np.exp(z).sum((1, 2), keepdims=True)
        expected = np.zeros((T, D))
        for e in range(E):
            for s in range(3):
                slot = expert(PARAMS["experts"], e, over_tokens[:, e, s] @ real)
                expected[where] += over_slots[:, e, s, None] * slot[None]
        np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
        assert plan.num_experts == E and not np.any(plan.combine[~where]) and not np.any(plan.dispatch[~where])


@pytest.mark.optimised
def test_capacity_makes_nothing_of_the_size_tokens_by_experts_by_capacity():
    tokens, size, experts = 4096, 16, 64
    dispatch = moe.capacity(1.25, batch_priority=True)
    layer = moe.moe_layer(moe.top_k_router(experts, 2), moe.swiglu_experts(experts, 16), dispatch=dispatch)
    params = jax.eval_shape(lambda key: layer.init(key, size), jax.random.key(0))
    loss = lambda p, x: jnp.sum(layer.apply(p, x)[0] ** 2)
    x = jax.ShapeDtypeStruct((tokens, size), jnp.float32)
    temporary = jax.jit(jax.grad(loss)).lower(params, x).compile().memory_analysis().temp_size_in_bytes
    assert temporary < 16 * 2**20 < tokens * experts * 160, "a one-hot of single bytes would be larger"


def test_refuses():
    plan = moe.plan_from_weights(jnp.ones((3, 2)))
    for make, match in (
        (lambda: moe.capacity(0.0), "capacity_factor=0.0 must be positive"),
        (lambda: moe.limit_capacity(plan, -1.0), "capacity_factor=-1.0 must be positive"),
        (lambda: moe.dropless("fast"), "exchange='fast' must be one of"),
        (lambda: moe.dropless(room=0.0), "room=0.0 must be positive"),
        (lambda: moe.soft_router(0), "num_experts=0"),
        (lambda: moe.layer_experts(0, swiglu_layer()), "num_experts=0"),
        (lambda: moe.upcycle({"w": jnp.ones(2)}, 0), "num_experts=0"),
        (lambda: moe.exchange_bytes({}, jnp.ones((2, 3)), num_experts=6, k=2, devices=4), "devices=4 must divide"),
        (lambda: moe.exchange_bytes({}, jnp.ones((2, 3)), num_experts=6, k=7, devices=2), "k=7 must be between"),
    ):
        with pytest.raises(ValueError, match=match):
            make()
    whole = moe.Experts(E, lambda key, size: None, lambda params, x, plan: x)
    layer = moe.moe_layer(moe.top_k_router(E, 1), whole, dispatch=moe.capacity())
    with pytest.raises(ValueError, match="each is None"):
        layer.apply({"router": PARAMS["router"], "experts": None}, jnp.ones((T, D)))
    layer = moe.moe_layer(moe.top_k_router(E, 1), moe.swiglu_experts(E, F))
    part = {"router": PARAMS["router"], "experts": {n: w[:2] for n, w in PARAMS["experts"].items()}}
    with pytest.raises(ValueError, match="expected a leading axis of 4"):
        layer.apply(part, jnp.ones((T, D)))


def cast(x):
    return jax.tree.map(lambda a: jnp.asarray(a, jnp.promote_types(x.dtype, jnp.float32)), PARAMS)


def capacity_layer(x, where):
    dispatch = moe.capacity(1.0, batch_priority=True)
    layer = moe.moe_layer(moe.top_k_router(E, K), moe.swiglu_experts(E, F), dispatch=dispatch)
    return layer.apply(cast(x), x, where=where)[0]


def soft_layer(x, where):
    layer = moe.moe_layer(moe.soft_router(E, 2, normalize=False), moe.layer_experts(E, swiglu_layer()))
    params = cast(x)
    phi = jnp.stack([params["router"]["w"], -params["router"]["w"]], 2)
    return layer.apply({"router": {"phi": phi}, "experts": params["experts"]}, x, where=where)[0]


def tiles(x):
    layer = moe.moe_layer(moe.top_k_router(E, K), moe.layer_experts(E, swiglu_layer()))
    return layer.apply(cast(x), x)[0]


def cut(scores):
    plan = moe.limit_capacity(moe.plan_from_weights(jax.nn.relu(scores)), 0.5)
    return moe.dense_weights(plan).astype(scores.dtype), moe.drop_rate(plan)


def copies(x):
    return moe.upcycle({"w": x}, 2)["w"]


ROWS = {"x": Arg("activations", (8, D)), "where": Arg("where", (8,))}
CASES = [
    Case(capacity_layer, ROWS, wrt=("x",), rows={"x": 0, "where": 0}, symmetry="equivariant",
         covers=("moe.capacity",), skip={"padding": "the size of a buffer counts rows that do not exist"}),
    Case(soft_layer, ROWS, wrt=("x",), rows={"x": 0, "where": 0}, symmetry="equivariant", helper=True,
         covers=("moe.soft_router", "moe.SlotPlan")),
    Case(tiles, {"x": ROWS["x"]}, wrt=("x",), helper=True, covers=("moe.layer_experts",)),
    Case(cut, {"scores": Arg("scores", (8, E))}, wrt=("scores",), helper=True,
         covers=("moe.limit_capacity", "moe.drop_rate")),
    Case(copies, {"x": ROWS["x"]}, wrt=("x",), helper=True, covers=("moe.upcycle",)),
]  # fmt: skip
test_conformance = conformance.conformance_tests(CASES)
