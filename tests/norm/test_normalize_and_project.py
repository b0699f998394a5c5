"""Normalize-and-Project against NumPy steps, and the argument that makes its projection free of effect."""

import conformance
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conformance import Arg, Case

from jaxlab import norm

rng = np.random.default_rng(0)
NET = norm.normalized_mlp([6, 5, 3], eps=1e-12)
X, Y = rng.normal(size=(7, 4)), rng.normal(size=(7, 3))
HIDDEN = ("dense_0", "dense_1")


def weights():
    """Parameters of the network in float64, far from the norms that the initialisation gives."""
    sizes = {"dense_0": (4, 6), "dense_1": (6, 5), "out": (5, 3)}
    params = {name: {"w": rng.normal(size=size)} for name, size in sizes.items()}
    params["out"]["b"] = rng.normal(size=3)
    return params


def oracle_forward(params, x, eps):
    """The network by hand: LayerNorm before ReLU, no bias before the norm."""
    hidden = []
    for name in HIDDEN:
        z = x @ params[name]["w"]
        z = (z - z.mean(1, keepdims=True)) / np.sqrt(z.var(1, keepdims=True) + eps)
        x = np.maximum(z, 0)
        hidden.append(x)
    return x @ params["out"]["w"] + params["out"]["b"], hidden


def loss(params, net=NET):
    return jnp.mean((net.apply(params, jnp.asarray(X)) - jnp.asarray(Y)) ** 2)


def frobenius(w):
    return np.sqrt(sum(float(v) ** 2 for v in np.asarray(w).ravel()))


def trajectory(optimizer, params, steps):
    """Function values [steps, 7, 3] and the parameters [steps, ...] after every step."""

    def step(carry, _):
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), (NET.apply(params, jnp.asarray(X)), params)

    return jax.jit(lambda p: jax.lax.scan(step, (p, optimizer.init(p)), None, length=steps)[1])(params)


def test_the_network_equals_the_loop_and_ignores_the_length_of_its_hidden_matrices():
    with jax.enable_x64(True):
        params = weights()
        norms = norm.record_norms(params, exclude=("out",))
        scaled = {n: {**p, "w": p["w"] * {"dense_0": 7.0, "dense_1": 0.2}.get(n, 1.0)} for n, p in params.items()}
        y, hidden = jax.jit(lambda p: NET.apply(p, X, hidden=True))(params)
        expected, units = oracle_forward(params, X, 1e-12)
        np.testing.assert_allclose(y, expected, rtol=1e-9)
        for got, wanted in zip(hidden, units, strict=True):
            np.testing.assert_allclose(got, wanted, rtol=1e-9, atol=1e-12)
        both = jax.jit(jax.value_and_grad(loss))
        value, grads = both(params)
        value_scaled, grads_scaled = both(scaled)
        np.testing.assert_allclose(value_scaled, value, rtol=1e-9)
        for name, factor in (("dense_0", 7.0), ("dense_1", 0.2)):
            np.testing.assert_allclose(grads_scaled[name]["w"], grads[name]["w"] / factor, rtol=1e-8, atol=1e-10)
            assert abs(np.sum(grads[name]["w"] * params[name]["w"])) < 1e-9  # the gradient only turns
        back = norm.project(scaled, norms)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), back, params)
        rates = norm.effective_learning_rate(0.1, scaled, norms, power=2)
        assert rates["out"]["w"] is None
        np.testing.assert_allclose([rates[n]["w"] for n in HIDDEN], [0.1 / 49, 0.1 / 0.04], rtol=1e-9)


def test_rms_and_affine_networks_equal_the_loop():
    net = norm.normalized_mlp([6, 3], norm="rms", affine=True, activation=jnp.tanh)
    params = net.init(jax.random.key(0), 4)
    assert jax.tree.map(jnp.shape, params["norm_0"]) == {"gain": (6,)}
    params["norm_0"]["gain"] = jnp.float32(rng.normal(size=6))
    z = X @ np.asarray(params["dense_0"]["w"], np.float64)
    z = np.tanh(z / np.sqrt((z**2).mean(1, keepdims=True) + 1e-6) * np.asarray(params["norm_0"]["gain"]))
    np.testing.assert_allclose(net.apply(params, jnp.float32(X)), z @ np.asarray(params["out"]["w"]), atol=1e-5)
    layer = norm.normalized_mlp([6, 3], affine=True).init(jax.random.key(0), 4)["norm_0"]
    assert jax.tree.map(lambda a: a.tolist(), layer) == {"gain": [1.0] * 6, "bias": [0.0] * 6}


@pytest.mark.parametrize("interval", [1, 3])
def test_adam_steps_equal_numpy_and_norms_come_back_at_every_interval(interval):
    """Adam written out; its moments never see the projection, and the output layer is free."""
    with jax.enable_x64(True):
        params = weights()
        tx = optax.chain(optax.adam(0.05), norm.normalize_and_project(exclude=("out",), interval=interval))
        _, got = trajectory(tx, params, 7)
        gradient = jax.jit(jax.grad(loss))
        start = {name: frobenius(params[name]["w"]) for name in HIDDEN}
        p, first, second = params, jax.tree.map(np.zeros_like, params), jax.tree.map(np.zeros_like, params)
        for t in range(1, 8):
            g = jax.tree.map(np.asarray, gradient(p))
            first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, first, g)
            second = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g**2, second, g)
            p = jax.tree.map(
                lambda p, m, v, t=t: p - 0.05 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8),
                *(p, first, second),
            )
            if t % interval == 0:
                for name in HIDDEN:
                    p[name] = {"w": p[name]["w"] * start[name] / frobenius(p[name]["w"])}
            jax.tree.map(lambda a, b, t=t: np.testing.assert_allclose(a[t - 1], b, rtol=1e-6, atol=1e-9), got, p)
            for name in HIDDEN:
                kept = np.isclose(frobenius(got[name]["w"][t - 1]), start[name], rtol=1e-9)
                assert kept == (t % interval == 0)
        assert not np.isclose(frobenius(got["out"]["w"][-1]), frobenius(params["out"]["w"]), rtol=1e-3)


def test_rescaled_gradient_descent_computes_the_same_functions_as_projection():
    with jax.enable_x64(True):
        params = weights()
        projected = optax.chain(optax.sgd(0.3), norm.normalize_and_project(exclude=("out",)))
        growing = optax.chain(optax.sgd(0.3), norm.scale_by_norm_growth(exclude=("out",), power=2))
        kept, _ = trajectory(projected, params, 6)
        grown, last = trajectory(growing, params, 6)
        plain, _ = trajectory(optax.sgd(0.3), params, 6)
        np.testing.assert_allclose(grown, kept, rtol=1e-7, atol=1e-9)
        assert np.abs(plain - kept).max() > 1e-3
        lengths = [frobenius(params["dense_0"]["w"]), *map(frobenius, last["dense_0"]["w"])]
        assert np.all(np.diff(lengths) > 0)  # a step at right angles only lengthens
        tx = norm.scale_by_norm_growth(exclude=("out",), power=1)
        ones, double = jax.tree.map(np.ones_like, params), jax.tree.map(lambda a: 2 * a, params)
        updates, _ = tx.update(ones, tx.init(params), double)
        np.testing.assert_allclose(updates["dense_0"]["w"], 2, rtol=1e-12)
        assert updates["out"]["w"] is ones["out"]["w"]


def test_gain_and_offset_are_projected_together_or_pulled_back():
    gain, bias = rng.normal(size=5), rng.normal(size=5)
    params = {"w": jnp.ones((5, 5)), "deep": {"norm": {"gain": jnp.float32(gain), "bias": jnp.float32(bias)}}}
    still = jax.tree.map(jnp.zeros_like, params)

    def after(**options):
        tx = norm.normalize_and_project(exclude=(), **options)
        updates, _ = tx.update(still, tx.init(params), params)
        return optax.apply_updates(params, updates)["deep"]["norm"]

    names = {"scale_offset": ("gain", "bias")}
    factor = np.sqrt(5 / (np.sum(gain**2) + np.sum(bias**2)))
    joint, pulled, free = after(**names), after(**names, pull=0.25), after()
    np.testing.assert_allclose(joint["gain"], gain * factor, rtol=1e-5)
    np.testing.assert_allclose(joint["bias"], bias * factor, rtol=1e-5)
    np.testing.assert_allclose(pulled["gain"], gain + 0.25 * (1 - gain), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(pulled["bias"], 0.75 * bias, rtol=1e-5)
    np.testing.assert_array_equal(free["gain"], params["deep"]["norm"]["gain"])
    # What the next layer sees after ReLU is only scaled.
    before, now = np.maximum(gain * 0.7 + bias, 0), np.maximum(np.asarray(joint["gain"]) * 0.7 + joint["bias"], 0)
    np.testing.assert_allclose(now, before * factor, rtol=1e-5)


def test_degenerate_matrices():
    params = {"zero": jnp.zeros((2, 2)), "huge": jnp.full((2, 2), 1e30), "stack": [jnp.eye(2)], "b": jnp.ones(2)}
    tx = norm.normalize_and_project(exclude=lambda path, leaf: path[0] == "stack" and leaf.shape == (2, 2))
    state = tx.init(params)
    assert state.norms["stack"] == [None] and state.norms["b"] is None
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
    new = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(new["zero"], np.ones((2, 2)))  # started at 0: free
    np.testing.assert_allclose(new["huge"], 1e30, rtol=1e-5)
    np.testing.assert_array_equal(new["stack"][0], jnp.eye(2) + 1)
    to_zero, _ = tx.update(jax.tree.map(jnp.negative, params), state, params)
    assert all(np.all(np.isfinite(u)) for u in jax.tree.leaves(to_zero))
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, half), tx.init(half), half)
    assert {u.dtype for u in jax.tree.leaves(updates)} == {jnp.dtype(jnp.bfloat16)}


def test_dormant_units_are_counted_over_real_examples():
    h = np.abs(rng.normal(size=(3, 4, 8)))
    h[..., 2] = 0
    h[..., 5] *= 1e-3
    where = rng.random((3, 4)) > 0.4
    score = np.array([np.mean([h[i, j, u] for i, j in zip(*np.nonzero(where), strict=True)]) for u in range(8)])
    dirty = jnp.float32(np.where(where[..., None], h, np.nan))
    assert float(norm.dormant_fraction(dirty, where=where)) == np.mean(score / score.mean() <= 0.025) == 0.25
    assert float(norm.dormant_fraction(dirty, where=where, tau=0.0)) == 0.125
    assert norm.dormant_fraction(jnp.zeros((3, 4))) == 1


def test_refuses():
    params = {"w": jnp.ones((2, 2)), "b": jnp.ones(2)}
    with pytest.raises(ValueError, match="interval=0"):
        norm.normalize_and_project(exclude=(), interval=0)
    with pytest.raises(ValueError, match=r"pull=0.1 .* needs scale_offset"):
        norm.normalize_and_project(exclude=(), pull=0.1)
    with pytest.raises(ValueError, match=r"no leaf of params lies under \['out'\]"):
        norm.normalize_and_project(exclude=("out",)).init(params)
    with pytest.raises(ValueError, match="nothing to project"):
        norm.record_norms({"b": jnp.ones(2)}, exclude=())
    with pytest.raises(ValueError, match="no dict of params holds both"):
        norm.normalize_and_project(exclude=(), scale_offset=("gain", "bias")).init(params)
    for make in (norm.normalize_and_project, norm.scale_by_norm_growth):
        tx = make(exclude=())
        with pytest.raises(ValueError, match="params=None"):
            tx.update(params, tx.init(params))
    with pytest.raises(ValueError, match="must have one shape"):
        norm.project_scale_offset(jnp.ones(2), jnp.ones(3))
    with pytest.raises(ValueError, match="norm='batch'"):
        norm.normalized_mlp([4, 2], norm="batch")
    with pytest.raises(ValueError, match="hidden size"):
        norm.normalized_mlp([4])
    with pytest.raises(ValueError, match="tau=-1"):
        norm.dormant_fraction(jnp.ones((2, 2)), tau=-1)
    with pytest.raises(ValueError, match="where has shape"):
        norm.dormant_fraction(jnp.ones((2, 2)), where=jnp.ones(3, bool))


START = {"w": rng.normal(size=(4, 3)), "norm": {"gain": np.ones(3), "bias": np.zeros(3)}}


def transformed(make):
    """One update of a transformation as a function of named arrays."""

    def run(w, gain, update):
        params = {"w": w, "norm": {"gain": gain, "bias": jnp.zeros_like(gain)}}
        tx = make()
        state = tx.init(jax.tree.map(lambda a: jnp.asarray(a, w.dtype), START))
        updates = {"w": update, "norm": jax.tree.map(lambda a: a * 0.1, params["norm"])}
        updates, _ = tx.update(updates, state, params)
        return updates["w"], updates["norm"]["gain"]

    return run


def mlp_case(x):
    net = norm.normalized_mlp([5, 3])
    return net.apply(jax.tree.map(lambda a: a.astype(x.dtype), net.init(jax.random.key(0), 4)), x)


def projected_case(w, other):
    norms = norm.record_norms({"w": other}, exclude=())
    return norm.project({"w": w}, norms)["w"]


def rate_case(w, other):
    return norm.effective_learning_rate(0.1, {"w": w}, norm.record_norms({"w": other}, exclude=()))["w"]


UPDATE = {"w": Arg("activations", (4, 3)), "gain": Arg("activations", (3,)), "update": Arg("activations", (4, 3))}
CASES = [
    Case(
        transformed(lambda: norm.normalize_and_project(exclude=(), scale_offset=("gain", "bias"))),
        UPDATE,
        wrt=("w", "gain", "update"),
        name="normalize_and_project",
        covers=("norm.normalize_and_project",),
    ),
    Case(
        transformed(lambda: norm.scale_by_norm_growth(exclude=())),
        UPDATE,
        wrt=("w", "update"),
        name="scale_by_norm_growth",
        covers=("norm.scale_by_norm_growth",),
        helper=True,
    ),
    Case(
        mlp_case,
        {"x": Arg("activations", (6, 4))},
        wrt=("x",),
        rows={"x": 0},
        symmetry="equivariant",
        name="normalized_mlp",
        covers=("norm.normalized_mlp",),
        helper=True,
    ),
    Case(
        projected_case,
        {"w": Arg("activations", (4, 3)), "other": Arg("activations", (4, 3))},
        wrt=("w", "other"),
        name="project",
        covers=("norm.project", "norm.record_norms"),
        helper=True,
    ),
    Case(
        rate_case,
        {"w": Arg("activations", (4, 3)), "other": Arg("activations", (4, 3))},
        wrt=("w", "other"),
        name="effective_learning_rate",
        covers=("norm.effective_learning_rate",),
        helper=True,
    ),
    Case(
        norm.project_scale_offset,
        {"scale": Arg("activations", (4,)), "offset": Arg("activations", (4,))},
        wrt=("scale", "offset"),
        helper=True,
    ),
    Case(
        norm.dormant_fraction,
        {"activations": Arg("activations", (6, 5)), "where": Arg("where", (6,))},
        reason="a count of units, constant almost everywhere",
        rows={"activations": 0, "where": 0},
        symmetry="invariant",
        helper=True,
    ),
]
test_conformance = conformance.conformance_tests(CASES)
