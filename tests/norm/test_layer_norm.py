"""Layer, batch and weight normalisation: loops, the closed-form gradient, and the paper's table of invariances."""

import conformance
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import Arg, Case
from jax.sharding import PartitionSpec as P

from jaxlab import norm

rng = np.random.default_rng(0)


def oracle(x, gain, bias, eps, where=None, centre=True):
    """One example after the other, float64."""
    result = np.zeros_like(x)
    for i, row in enumerate(x):
        kept = range(len(row)) if where is None else np.flatnonzero(where[i])
        if len(kept) == 0:
            continue
        mean = sum(row[j] for j in kept) / len(kept) if centre else 0.0
        var = sum((row[j] - mean) ** 2 for j in kept) / len(kept)
        for j in kept:
            result[i, j] = gain[j] * (row[j] - mean) / np.sqrt(var + eps) + bias[j]
    return result


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def test_equals_the_loop_and_the_closed_form_gradient_equals_autodiff():
    x, gain, bias, weights = rng.normal(size=(5, 7)) * 3 + 1, *rng.normal(size=(2, 7)), rng.normal(size=(5, 7))
    where = rng.random((5, 7)) > 0.3
    where[2] = False
    dirty = np.where(where, x, np.nan)

    def plain(x, gain, bias):
        count = jnp.maximum(where.sum(1, keepdims=True), 1)
        x = jnp.where(where, x, 0.0)
        centred = jnp.where(where, x - x.sum(1, keepdims=True) / count, 0.0)
        y = centred / jnp.sqrt((centred**2).sum(1, keepdims=True) / count + 1e-3) * gain[None] + bias[None]
        return jnp.sum(jnp.where(where, y, 0.0) * weights)

    def ours(x, gain, bias):
        y = norm.layer_norm(x, gain, bias, eps=1e-3, where=where)
        return jnp.sum(y * weights), y

    with jax.enable_x64(True):
        run = jax.jit(
            lambda *a: (jax.value_and_grad(ours, (0, 1, 2), has_aux=True)(*a), jax.grad(plain, (0, 1, 2))(*a))
        )
        ((_, y), grads), expected = run(dirty, gain, bias)
        np.testing.assert_allclose(y, oracle(x, gain, bias, 1e-3, where), rtol=1e-12, atol=1e-12)
        for got, wanted in zip(grads, expected, strict=True):
            np.testing.assert_allclose(got, wanted, rtol=1e-10, atol=1e-12)
        assert not np.any(np.asarray(grads[0])[~where])
        rms = norm.rms_norm(dirty, gain, eps=1e-3, where=where)
        np.testing.assert_allclose(rms, oracle(x, gain, np.zeros(7), 1e-3, where, centre=False), rtol=1e-12, atol=1e-12)


def test_moments_and_the_directions_without_gradient():
    x = np.float32(rng.normal(size=(4, 9)) * 5 + 100)
    y, pull = jax.vjp(lambda x: norm.layer_norm(x, eps=0.0), x)
    np.testing.assert_allclose(y.mean(1), 0, atol=1e-5)
    np.testing.assert_allclose(y.var(1), 1, rtol=1e-4)
    (dx,) = pull(jnp.float32(rng.normal(size=x.shape)))
    np.testing.assert_allclose(dx.sum(1), 0, atol=1e-5)  # a shift of x changes nothing
    np.testing.assert_allclose((dx * y).sum(1), 0, atol=1e-5)  # nor does its scale


def test_axes_and_degenerate_inputs():
    x = rng.normal(size=(3, 4, 5)).astype(np.float32)
    gain = rng.normal(size=(4, 5)).astype(np.float32)
    flat = norm.layer_norm(x.reshape(3, 20), gain.reshape(20))
    np.testing.assert_allclose(norm.layer_norm(x, gain, axis=(-1, 1)).reshape(3, 20), flat, atol=1e-5)
    for eps in (0.0, 1e-5):  # a constant input, and a single feature, give the bias
        value, grad = jax.value_and_grad(lambda x, e=eps: norm.layer_norm(x, None, jnp.full(3, 2.0), eps=e).sum())(
            jnp.full((2, 3), 7.0)
        )
        assert value == 12 and not np.any(grad)
    assert norm.layer_norm(jnp.array([[5.0]]), jnp.array([3.0]), jnp.array([2.0])).tolist() == [[2.0]]


@pytest.mark.parametrize("shift", [0, 4096])
def test_bfloat16_statistics_are_taken_in_float32(shift):
    x = jnp.asarray(rng.normal(size=(2, 512)) * 64 + shift, jnp.bfloat16)
    got = np.asarray(norm.layer_norm(x), np.float64)
    exact = oracle(np.asarray(x, np.float64), np.ones(512), np.zeros(512), 1e-5)
    np.testing.assert_allclose(got, exact, rtol=2**-8, atol=1e-4)


def layer(kind, x, w, gain):
    """The summed inputs x w of one layer, normalised in one of the three ways, eps = 0."""
    if kind == "weight":
        return x @ norm.weight_norm(w, gain)
    if kind == "layer":
        return norm.layer_norm(x @ w, gain, eps=0.0)
    net = norm.batch_norm(eps=0.0)
    _, state = net.init(jax.random.key(0), w.shape[1])
    return net.apply({"gain": gain, "bias": jnp.zeros_like(gain)}, state, x @ w, train=True)[0]


# Table 1 of the paper: to which change of weights or data the output of each normalisation is invariant.
CHANGES = ("matrix scale", "matrix shift", "vector scale", "data scale", "data shift", "case scale")
INVARIANT = {
    "batch": (True, False, True, True, True, False),
    "weight": (True, False, True, False, False, False),
    "layer": (True, True, False, True, False, True),
}


@pytest.mark.parametrize("kind", INVARIANT)
def test_table_of_invariances(kind):
    x, w, gain = rng.normal(size=(6, 5)), rng.normal(size=(5, 4)), rng.normal(size=4)
    vector, case = np.ones((1, 4)), np.ones((6, 1))
    vector[0, 1], case[2, 0] = 3.0, 3.0
    changed = {
        "matrix scale": (x, w * 2.5),
        "matrix shift": (x, w + rng.normal(size=(5, 1))),  # the same vector added to the weights of every unit
        "vector scale": (x, w * vector),
        "data scale": (x * 2.5, w),
        "data shift": (x + rng.normal(size=(1, 5)), w),
        "case scale": (x * case, w),
    }
    with jax.enable_x64(True):
        run = jax.jit(lambda x, w: layer(kind, x, w, jnp.asarray(gain)))
        before = run(x, w)
        for change, invariant in zip(CHANGES, INVARIANT[kind], strict=True):
            same = np.allclose(run(*changed[change]), before, rtol=1e-9, atol=1e-9)
            assert same == invariant, f"{kind} normalisation, {change}: invariant {same}"


def test_batch_norm_equals_the_loop_in_training_and_test_and_on_a_mesh():
    net = norm.batch_norm(momentum=0.8)
    x, where = rng.normal(size=(16, 3)) * 2 + 1, np.arange(16) < 13
    params = {"gain": jnp.float32(rng.normal(size=3)), "bias": jnp.float32(rng.normal(size=3))}
    _, state = net.init(jax.random.key(0), 3)
    dirty = jnp.float32(np.where(where[:, None], x, np.nan))
    gain, bias = (np.asarray(params[n], np.float64) for n in ("gain", "bias"))
    expected = oracle(x[:13].T, np.ones(13), np.zeros(13), 1e-5).T * gain + bias
    running = {"mean": 0.2 * x[:13].mean(0), "var": 0.8 + 0.2 * x[:13].var(0)}

    def run(net, x, where):
        def total(x):
            y, new = net.apply(params, state, x, where=where, train=True)
            return jnp.sum(y**3), (y, new)

        grad, out = jax.grad(total, has_aux=True)(x)
        return out, grad

    (y, new), grad = jax.jit(lambda x: run(net, x, where))(dirty)
    np.testing.assert_allclose(y[:13], expected, atol=2e-5)
    assert not np.any(y[13:]) and not np.any(grad[13:]) and np.all(np.isfinite(grad))
    for name in running:
        np.testing.assert_allclose(new[name], running[name], rtol=1e-5)
    y, same = net.apply(params, new, jnp.float32(x), train=False)
    np.testing.assert_allclose(
        y, (x - running["mean"]) / np.sqrt(running["var"] + 1e-5) * gain + bias, rtol=1e-4, atol=1e-5
    )
    assert same is new
    _, kept = net.apply(params, new, dirty, where=np.zeros(16, bool), train=True)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), kept, new)

    spread = norm.batch_norm(momentum=0.8, axis_name="data")
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def loss(x, form):
        y, state = form(x)
        return jnp.sum(y**3), (y, state)

    mapped = jax.shard_map(
        lambda x, w: spread.apply(params, state, x, where=w, train=True),
        mesh=mesh,
        in_specs=(P("data"), P("data")),
        out_specs=(P("data"), P()),
    )
    grad8, (y8, new8) = jax.jit(jax.grad(lambda x: loss(x, lambda x: mapped(x, jnp.asarray(where))), has_aux=True))(
        dirty
    )
    np.testing.assert_allclose(y8[:13], expected, atol=2e-5)
    np.testing.assert_allclose(grad8, grad, rtol=1e-4, atol=1e-4)
    for name in running:
        np.testing.assert_allclose(new8[name], running[name], rtol=1e-5)


def test_cells_equal_their_equations():
    x, h, c = rng.normal(size=(3, 2)), rng.normal(size=(3, 4)), rng.normal(size=(3, 4))
    ln = lambda a, p: oracle(a, p["gain"], p["bias"], 1e-5)
    noisy = lambda tree: jax.tree.map(lambda a: np.asarray(a + rng.normal(size=a.shape) * 0.3, np.float64), tree)
    single = lambda tree: jax.tree.map(jnp.float32, tree)

    cell = norm.ln_rnn_cell(4)
    p = noisy(cell.init(jax.random.key(0), 2))
    got = jax.jit(cell.apply)(single(p), jnp.float32(x), jnp.float32(h))
    np.testing.assert_allclose(got, np.tanh(ln(h @ p["w_h"] + x @ p["w_x"], p["norm"])), atol=1e-5)

    cell = norm.ln_lstm_cell(4)
    p = noisy(cell.init(jax.random.key(1), 2))
    sums = ln(h @ p["w_h"], p["norm_h"]) + ln(x @ p["w_x"], p["norm_x"]) + p["b"]
    f, i, o, u = sums[:, :4], sums[:, 4:8], sums[:, 8:12], sums[:, 12:]
    new_c = sigmoid(f) * c + sigmoid(i) * np.tanh(u)
    new_h = sigmoid(o) * np.tanh(ln(new_c, p["norm_c"]))
    got = jax.jit(cell.apply)(single(p), jnp.float32(x), (jnp.float32(h), jnp.float32(c)))
    np.testing.assert_allclose(got[0], new_h, atol=1e-5)
    np.testing.assert_allclose(got[1], new_c, atol=1e-5)

    cell = norm.ln_gru_cell(4)
    p = noisy(cell.init(jax.random.key(2), 2))
    gates = ln((h @ p["w_h"])[:, :8], p["norm_h_gates"]) + ln((x @ p["w_x"])[:, :8], p["norm_x_gates"])
    z, r = sigmoid(gates[:, :4]), sigmoid(gates[:, 4:])
    new = np.tanh(ln((x @ p["w_x"])[:, 8:], p["norm_x_update"]) + r * ln((h @ p["w_h"])[:, 8:], p["norm_h_update"]))
    got = jax.jit(cell.apply)(single(p), jnp.float32(x), jnp.float32(h))
    np.testing.assert_allclose(got, (1 - z) * h + z * new, atol=1e-5)


def test_refuses():
    x = jnp.ones((2, 3))
    with pytest.raises(ValueError, match="axis=2 must name"):
        norm.layer_norm(x, axis=2)
    with pytest.raises(ValueError, match="gain has shape"):
        norm.layer_norm(x, jnp.ones(2))
    with pytest.raises(ValueError, match="where has shape"):
        norm.rms_norm(x, where=jnp.ones(2, bool))
    with pytest.raises(ValueError, match="eps=-1"):
        norm.layer_norm(x, eps=-1)
    with pytest.raises(ValueError, match="momentum=2"):
        norm.batch_norm(momentum=2)
    with pytest.raises(ValueError, match="without axis 0"):
        norm.weight_norm(x, jnp.ones(2))
    with pytest.raises(ValueError, match="hidden=0"):
        norm.ln_rnn_cell(0)
    with pytest.raises(ValueError, match="the state has shape"):
        cell = norm.ln_gru_cell(4)
        cell.apply(cell.init(jax.random.key(0), 3), x, jnp.ones((2, 5)))


def cell_case(make, state):
    """A cell as a function of named arrays, at fixed parameters."""
    params = make(3).init(jax.random.key(0), 4)

    def step(x, h, c=None):
        p = jax.tree.map(lambda a: a.astype(x.dtype), params)
        return make(3).apply(p, x, h if c is None else (h, c))

    step.__name__ = make.__name__
    args = {"x": Arg("activations", (6, 4)), **{n: Arg("activations", (6, 3)) for n in state}}
    return Case(step, args, wrt=("x", *state), rows=dict.fromkeys(args, 0), symmetry="equivariant", helper=True,
                covers=(f"norm.{make.__name__}",))  # fmt: skip


def batch_norm_case(x, where, axis_name=None):
    params = {"gain": jnp.ones(4, x.dtype), "bias": jnp.zeros(4, x.dtype)}
    state = {"mean": jnp.zeros(4, x.dtype), "var": jnp.ones(4, x.dtype)}
    layer = norm.batch_norm(axis_name=axis_name)
    return layer.apply(params, state, x, where=where, train=True)[0]


FEATURES = {"gain": Arg("scores", (6,)), "bias": Arg("scores", (6,)), "where": Arg("where", (6,))}
CASES = [
    Case(
        norm.layer_norm,
        {"x": Arg("activations", (6, 4)), **FEATURES},
        static={"axis": 0},
        wrt=("x", "gain", "bias"),
        rows={"x": 0, "gain": 0, "bias": 0, "where": 0},  # the rows are the masked features
        symmetry="equivariant",
    ),
    Case(norm.layer_norm, {"x": Arg("activations", (6, 4))}, wrt=("x",), rows={"x": 0}, symmetry="equivariant",
         name="layer_norm of rows", helper=True),
    Case(
        norm.rms_norm,
        {"x": Arg("activations", (6, 4)), **{n: FEATURES[n] for n in ("gain", "where")}},
        static={"axis": 0},
        wrt=("x", "gain"),
        rows={"x": 0, "gain": 0, "where": 0},
        symmetry="equivariant",
    ),
    Case(norm.weight_norm, {"v": Arg("activations", (5, 4)), "gain": Arg("scores", (4,))}, wrt=("v", "gain"),
         helper=True),
    Case(
        batch_norm_case,
        {"x": Arg("activations", (6, 4)), "where": Arg("where", (6,))},
        wrt=("x",),
        rows={"x": 0, "where": 0},
        symmetry="equivariant",
        name="batch_norm",
        covers=("norm.batch_norm",),
    ),
    cell_case(norm.ln_rnn_cell, ("h",)),
    cell_case(norm.ln_lstm_cell, ("h", "c")),
    cell_case(norm.ln_gru_cell, ("h",)),
]  # fmt: skip
test_conformance = conformance.conformance_tests(CASES)
