"""The table of routers through one layer, merged experts and the count of costs."""

import conformance
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import Arg, Case

from jaxlab import moe
from jaxlab.types import StatefulLayer, as_stateful

rng = np.random.default_rng(0)
T, D, E, F = 8, 5, 4, 6


def test_every_router_of_the_table_makes_a_plan_and_copied_experts_are_the_dense_network():
    x = rng.normal(size=(T, D)).astype(np.float32)
    routers = {name: make() for name, make in moe.taxonomy(E).items()}
    assert list(routers)[:3] == ["dense", "top_k", "switch"] and len(routers) == 14
    params, states = {}, {}
    for name, router in routers.items():
        shapes = jax.eval_shape(lambda key, r=router: as_stateful(r).init(key, D), jax.random.key(0))
        params[name], states[name] = jax.tree.map(lambda a: np.float32(rng.normal(size=a.shape)), shapes)
    dense = {"gate": rng.normal(size=(D, F)), "up": rng.normal(size=(D, F)), "down": rng.normal(size=(F, D))}
    dense = {n: np.float32(w) for n, w in dense.items()}
    layer = moe.moe_layer(routers["top_k"], moe.swiglu_experts(E, F))

    def run(params):
        totals = {}
        for name, router in routers.items():
            extra = {"ids": jnp.arange(T) % E} if name == "enforced" else {}
            plan, _ = as_stateful(router).apply(params[name], states[name], x, **extra)
            totals[name] = jnp.sum(plan.combine, (1, 2)) if name == "soft" else jnp.sum(moe.dense_weights(plan), axis=1)
        return totals, layer.apply({"router": params["top_k"], "experts": moe.upcycle(dense, E)}, x)[0]

    totals, y = jax.jit(run)(params)
    for name in ("dense", "top_k", "noisy_top_k", "sigmoid_bias", "comet", "enforced", "soft"):
        np.testing.assert_allclose(totals[name], np.ones(T), rtol=1e-4, err_msg=name)
    assert all(np.all(np.isfinite(total)) and np.any(total > 0) for total in totals.values())
    h = x @ dense["gate"]
    np.testing.assert_allclose(y, (h / (1 + np.exp(-h)) * (x @ dense["up"])) @ dense["down"], rtol=1e-3, atol=1e-4)
    assert isinstance(routers["sigmoid_bias"], StatefulLayer)


def test_merged_experts_equal_the_loop():
    params = {"w": rng.normal(size=(E, D, 3)), "b": rng.normal(size=(E, 3))}
    probs, where = rng.random((T, E)), np.arange(T) < 5
    dirty = np.where(where[:, None], probs, np.nan).astype(np.float32)
    got = jax.jit(lambda p, q: moe.smear_merge(p, q, where=where))(jax.tree.map(np.float32, params), dirty)
    for name, leaf in params.items():
        expected = sum(probs[:5, e].mean() * leaf[e] for e in range(E))
        np.testing.assert_allclose(got[name], expected, rtol=1e-5, atol=1e-6)


def test_costs():
    layer = moe.moe_layer(moe.top_k_router(E, 2), moe.swiglu_experts(E, F))
    params = jax.eval_shape(lambda key: layer.init(key, D), jax.random.key(0))
    cost = moe.moe_accounting(params, num_experts=E, k=2, size=D, devices=4, itemsize=4)
    assert cost.total_params == D * E + E * 3 * D * F and cost.active_params == D * E + 2 * 3 * D * F
    assert cost.flops_per_token == 2 * cost.active_params
    # What `exchange_bytes` states for a device's tokens, without padding.
    x = jax.ShapeDtypeStruct((16, D), jnp.float32)
    sent, padding = moe.exchange_bytes({}, x, num_experts=E, k=2, devices=4)["all_to_all"]
    assert cost.sent_bytes_per_token * 16 == sent - padding
    assert moe.moe_accounting(params, num_experts=E, k=2, size=D).sent_bytes_per_token == 0


def test_refuses():
    for make, match in (
        (lambda: moe.smear_merge({"w": jnp.ones((3, 2))}, jnp.ones((2, 4))), "leading axis of 4 experts"),
        (lambda: moe.smear_merge({}, jnp.ones(4)), "probs must be"),
        (lambda: moe.moe_accounting({"experts": {}}, num_experts=2, k=3, size=1), "k=3"),
        (
            lambda: moe.moe_accounting({"experts": {"w": np.ones((3, 2))}}, num_experts=2, k=1, size=1),
            "leading axis of 2",
        ),
    ):
        with pytest.raises(ValueError, match=match):
            make()


def merged(w, probs, where):
    return moe.smear_merge({"w": w}, probs, where=where)["w"]


def costs(w):
    cost = moe.moe_accounting({"experts": {"w": w}}, num_experts=4, k=1, size=3)
    return np.asarray([*cost, len(moe.taxonomy(4))])


CASES = [
    Case(merged, {"w": Arg("activations", (E, 3)), "probs": Arg("probabilities", (6, E)), "where": Arg("where", (6,))},
         wrt=("w", "probs"), rows={"probs": 0, "where": 0}, symmetry="invariant", covers=("moe.smear_merge",)),
    Case(costs, {"w": Arg("activations", (4, 3, 2))}, host=True,
         covers=("moe.moe_accounting", "moe.taxonomy", "moe.LayerCost")),
]  # fmt: skip
test_conformance = conformance.conformance_tests(CASES)
