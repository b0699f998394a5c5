"""Layer normalisation and its relatives against float64 loops; the paper's table of invariances; recurrent cells."""

import conformance
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import Arg, Case

from jaxlab import norm

rng = np.random.default_rng(0)
X = rng.normal(size=(5, 6))
GAIN, BIAS = rng.normal(size=6), rng.normal(size=6)


def oracle(x, gain=None, bias=None, eps=1e-5, keep=None, centre=True):
    """Row by row, feature by feature."""
    y = np.zeros(x.shape)
    for i, row in enumerate(x):
        live = [j for j in range(len(row)) if keep is None or keep[i, j]]
        if not live:
            continue
        mean = sum(row[j] for j in live) / len(live) if centre else 0.0
        var = sum((row[j] - mean) ** 2 for j in live) / len(live)
        for j in live:
            unit = (row[j] - mean) / np.sqrt(var + eps)
            y[i, j] = unit * (1 if gain is None else gain[j]) + (0 if bias is None else bias[j])
    return y


def test_equals_the_loop():
    x = jnp.float32(X)
    np.testing.assert_allclose(norm.layer_norm(x), oracle(X), atol=2e-6)
    got = norm.layer_norm(x, jnp.float32(GAIN), jnp.float32(BIAS), eps=1e-3)
    np.testing.assert_allclose(got, oracle(X, GAIN, BIAS, 1e-3), atol=2e-6)
    got = norm.rms_norm(x, jnp.float32(GAIN))
    np.testing.assert_allclose(got, oracle(X, GAIN, eps=1e-6, centre=False), atol=2e-6)
    swapped = norm.layer_norm(jnp.swapaxes(x, 0, 1), axis=0)
    np.testing.assert_allclose(swapped, oracle(X).T, atol=2e-6)
    both = norm.layer_norm(x[None], axis=(1, 2))[0]
    np.testing.assert_allclose(both, oracle(X.reshape(1, -1)).reshape(X.shape), atol=2e-6)


def test_masked_features_do_not_exist():
    keep = rng.random((5, 6)) > 0.4
    keep[3] = False
    dirty = jnp.float32(np.where(keep, X, np.nan))
    y, pull = jax.vjp(lambda x: norm.layer_norm(x, where=keep), dirty)
    np.testing.assert_allclose(y, oracle(X, keep=keep), atol=2e-6)
    (grad,) = pull(jnp.full((5, 6), jnp.nan, jnp.float32).at[jnp.array(keep)].set(1.5))
    assert np.all(np.isfinite(grad)) and not np.any(np.asarray(grad)[~keep])


def test_closed_form_gradient_equals_differences_and_is_orthogonal():
    with jax.enable_x64(True):
        c = rng.normal(size=X.shape)
        loss = lambda x, g, b: jnp.sum(norm.layer_norm(x, g, b) * c)
        dx, dg, db = jax.grad(loss, argnums=(0, 1, 2))(X, GAIN, BIAS)
        f = lambda x, g, b: np.sum(oracle(x, g, b) * c)
        for i, grad in enumerate((dx, dg, db)):
            args = [X, GAIN, BIAS]
            d = rng.normal(size=args[i].shape)
            plus, minus = ([a + s * 1e-6 * d if j == i else a for j, a in enumerate(args)] for s in (1, -1))
            np.testing.assert_allclose(np.sum(np.asarray(grad) * d), (f(*plus) - f(*minus)) / 2e-6, rtol=1e-6)
        np.testing.assert_allclose(np.sum(dx, axis=1), 0, atol=1e-12)
        exact = jax.grad(lambda x: jnp.sum(norm.layer_norm(x, eps=0.0) * c))(X)
        np.testing.assert_allclose(np.sum(np.asarray(exact) * oracle(X, eps=0.0), axis=1), 0, atol=1e-12)


def test_table_of_invariances():
    """Rows: what is rescaled or recentred; layer, batch and weight normalisation of x w."""
    with jax.enable_x64(True):
        x, w, gain = rng.normal(size=(7, 4)), rng.normal(size=(4, 6)), rng.uniform(1, 2, size=6)
        layer = lambda x, w: norm.layer_norm(x @ w, gain, eps=0.0)
        net = norm.batch_norm(eps=0.0)
        params, state = net.init(None, 6)
        batch = lambda x, w: net.apply(params, state, x @ w, train=True)[0]
        weight = lambda x, w: x @ norm.weight_norm(jnp.asarray(w), jnp.asarray(gain))
        changes = {
            "weight matrix scaled": (x, 3.0 * w, (True, True, True)),
            "weight matrix recentred": (x, w + rng.normal(size=(4, 1)), (True, False, False)),
            "one weight vector scaled": (x, w * np.array([5.0, 1, 1, 1, 1, 1]), (False, True, True)),
            "data set scaled": (2.0 * x, w, (True, True, False)),
            "data set recentred": (x + rng.normal(size=(1, 4)), w, (False, True, False)),
            "one example scaled": (x * np.array([4.0, 1, 1, 1, 1, 1, 1])[:, None], w, (True, False, False)),
        }
        for name, (x2, w2, invariant) in changes.items():
            for f, same in zip((layer, batch, weight), invariant, strict=True):
                difference = np.abs(np.asarray(f(x, w)) - np.asarray(f(x2, w2))).max()
                assert (difference < 1e-10) == same, (name, difference)


def test_edges():
    assert norm.layer_norm(jnp.full((2, 3), 7.0), bias=jnp.array([1.0, 2.0, 3.0]), eps=0.0).tolist() == [[1, 2, 3]] * 2
    assert norm.layer_norm(jnp.array([[4.0]]), bias=jnp.array([5.0])).tolist() == [[5.0]]
    assert norm.weight_norm(jnp.zeros((3, 2)), jnp.ones(2)).tolist() == [[0.0, 0.0]] * 3
    for options, message in (
        ({"axis": 2}, "axis=2"),
        ({"eps": -1.0}, "eps=-1.0"),
        ({"gain": jnp.ones(4)}, "gain has shape"),
        ({"where": jnp.ones(4, bool)}, "where has shape"),
    ):
        with pytest.raises(ValueError, match=message):
            norm.layer_norm(jnp.ones((2, 3)), **options)


def test_batch_norm_statistics_masks_and_axis():
    net = norm.batch_norm(momentum=0.8)
    params, state = net.init(None, 6)
    keep = np.array([1, 1, 0, 1, 1], bool)
    dirty = jnp.float32(np.where(keep[:, None], X, np.nan))
    y, new = net.apply(params, state, dirty, where=keep, train=True)
    kept = X[keep]
    expected = (kept - kept.mean(0)) / np.sqrt(kept.var(0) + 1e-5)
    np.testing.assert_allclose(np.asarray(y)[keep], expected, atol=1e-5)
    np.testing.assert_allclose(new["mean"], 0.2 * kept.mean(0), atol=1e-6)
    np.testing.assert_allclose(new["var"], 0.8 + 0.2 * kept.var(0), atol=1e-6)
    same, after = net.apply(params, new, jnp.float32(X))
    mean, var = np.asarray(new["mean"]), np.asarray(new["var"])
    np.testing.assert_allclose(same, (X - mean) / np.sqrt(var + 1e-5), atol=1e-5)
    assert after is new
    spread = norm.batch_norm(axis_name="data")
    x = jnp.float32(rng.normal(size=(4, 3, 6)))
    whole = norm.batch_norm().apply(params, state, x.reshape(-1, 6), train=True)
    parts = jax.vmap(lambda x: spread.apply(params, state, x, train=True), axis_name="data")(x)
    np.testing.assert_allclose(parts[0].reshape(-1, 6), whole[0], atol=2e-5)
    np.testing.assert_allclose(parts[1]["var"][2], whole[1]["var"], rtol=1e-5)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def test_recurrent_cells_equal_their_formulas():
    x, h, c = (rng.normal(size=s) for s in ((3, 4), (3, 5), (3, 5)))
    as64 = lambda tree: jax.tree.map(lambda a: np.asarray(a, np.float64), tree)
    ln = lambda a, p: oracle(a, p["gain"], p["bias"])
    args = (jnp.float32(x), jnp.float32(h))

    cell = norm.ln_rnn_cell(5)
    p = cell.init(jax.random.key(0), 4)
    w = as64(p)
    expected = np.tanh(ln(h @ w["w_h"] + x @ w["w_x"], w["norm"]))
    np.testing.assert_allclose(cell.apply(p, *args), expected, atol=1e-5)

    for make, state in ((norm.ln_lstm_cell, (args[1], jnp.float32(c))), (norm.ln_gru_cell, args[1])):
        cell = make(5)
        p = cell.init(jax.random.key(1), 4)
        out = cell.apply(p, args[0], state)
        # Scaling a product before its own normalisation changes nothing: each one has statistics of its own.
        scaled = {**p, "w_x": p["w_x"] * 3.0}
        for a, b in zip(jax.tree.leaves(out), jax.tree.leaves(cell.apply(scaled, args[0], state)), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-3)
        for a in jax.tree.leaves(out):
            assert a.shape == (3, 5) and np.all(np.isfinite(a))


def lstm(x, h, c):
    return CELLS["lstm"][0].apply(cast(CELLS["lstm"][1], x), x, (h, c))


def gru(x, h):
    return CELLS["gru"][0].apply(cast(CELLS["gru"][1], x), x, h)


def rnn(x, h):
    return CELLS["rnn"][0].apply(cast(CELLS["rnn"][1], x), x, h)


def batch_norm(x, *, where=None, axis_name=None):
    layer = norm.batch_norm(axis_name=axis_name)
    params, state = {"gain": jnp.ones(4), "bias": jnp.zeros(4)}, {"mean": jnp.zeros(4), "var": jnp.ones(4)}
    return layer.apply(cast(params, x), state, x, where=where, train=True)[0]


def cast(params, x):
    return jax.tree.map(lambda a: jnp.asarray(a, x.dtype), params)


CELLS = {
    name: (cell := make(5), jax.tree.map(np.asarray, cell.init(jax.random.key(2), 4)))
    for name, make in (("rnn", norm.ln_rnn_cell), ("lstm", norm.ln_lstm_cell), ("gru", norm.ln_gru_cell))
}
FEATURES = {"x": Arg("activations", (6, 4)), "gain": Arg("activations", (4,)), "bias": Arg("activations", (4,))}
STATE = {"x": Arg("activations", (6, 4)), "h": Arg("activations", (6, 5))}
CASES = [
    Case(norm.layer_norm, FEATURES, wrt=("x", "gain", "bias"), rows={"x": 0}, symmetry="equivariant"),
    Case(
        norm.rms_norm, {n: FEATURES[n] for n in ("x", "gain")}, wrt=("x", "gain"), rows={"x": 0}, symmetry="equivariant"
    ),
    Case(
        norm.weight_norm,
        {"v": Arg("activations", (3, 4)), "gain": Arg("activations", (4,))},
        wrt=("v", "gain"),
    ),
    Case(
        batch_norm,
        {"x": Arg("activations", (6, 4)), "where": Arg("where", (6,))},
        wrt=("x",),
        rows={"x": 0, "where": 0},
        symmetry="equivariant",
    ),
    Case(rnn, STATE, helper=True),
    Case(gru, STATE, helper=True),
    Case(lstm, {**STATE, "c": Arg("activations", (6, 5))}, helper=True),
]
test_conformance = conformance.conformance_tests(CASES)
