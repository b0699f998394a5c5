"""The network against its blocks written out in NumPy; the pinball loss against quantiles."""

import conformance
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import Arg, Case
from scipy.special import erf

from jaxlab import information
from jaxlab.types import Layer

rng = np.random.default_rng(0)
NET = information.mist(max_size=5, width=4, heads=2, feed_forward=6, feature_layers=1, encoder_layers=1,
                       num_inducing=3, num_seeds=2, head_width=4)  # fmt: skip
# The same without layers of attention between rows.
SMALL = information.mist(max_size=5, width=4, heads=2, feature_layers=0, encoder_layers=0, decoder_layers=0,
                         num_seeds=2, head_width=4)  # fmt: skip


def parameters(net=NET, scale=0.7):
    """Values without a pattern in place of the initial ones, so that no bias is 0."""
    shapes = jax.eval_shape(net.init, jax.random.key(0))
    fill = lambda a: (np.cos(np.arange(a.size) * 1.7 + a.size) * scale).reshape(a.shape).astype(np.float32)
    return jax.tree.map(fill, shapes)


def dense(p, x):
    return x @ p["w"] + p["b"]


def norm(p, x):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6) * p["gain"] + p["bias"]


def gelu(x):
    return x * 0.5 * (1 + erf(x / np.sqrt(2)))


def block(p, a, b, heads=2):
    """A multi-head attention block of one set, one query and one head after the other."""
    q, k, v = dense(p["q"], a), dense(p["k"], b), dense(p["v"], b)
    size, mixed = q.shape[1] // heads, np.zeros_like(q)
    for h in range(heads):
        part = slice(h * size, (h + 1) * size)
        for i in range(len(a)):
            scores = np.array([q[i, part] @ k[j, part] for j in range(len(b))]) / np.sqrt(size)
            weights = np.exp(scores - scores.max())
            mixed[i, part] = (weights / weights.sum()) @ v[:, part]
    hidden = norm(p["norm_1"], a + dense(p["out"], mixed))
    ff = dense(p["ff"]["dense_1"], gelu(dense(p["ff"]["dense_0"], hidden)))
    return norm(p["norm_2"], hidden + ff)


def oracle(p, x, y, tau):
    h = np.concatenate([x, y, np.zeros((len(x), 5 - x.shape[1] - y.shape[1]))], axis=1)
    h = norm(p["embed_norm"][0], gelu(dense(p["embed"][0], h)))
    h = norm(p["embed_norm"][1], gelu(dense(p["embed"][1], h)))
    h = norm(p["features"][0]["norm"], block(p["features"][0]["block"], h, h))
    layer = p["encoder"][0]
    h = block(layer["b"], h, block(layer["a"], layer["seeds"], h))
    pooled = block(p["pool"]["block"], p["pool"]["seeds"], h)
    pooled = block(p["decoder"][0], pooled, pooled)
    told = dense(p["output"], block(p["last"]["block"], p["last"]["seeds"], pooled)[0])
    told = np.concatenate([told, [tau]])
    for i in range(3):
        told = dense(p["head"][f"dense_{i}"], np.maximum(told, 0) if i else told)
    return told[0]


def test_network_equals_the_loop_and_ignores_order_and_padding():
    x, y = rng.normal(size=(2, 6, 2)), rng.normal(size=(2, 6, 2))
    tau, where = np.array([0.3, 0.8]), np.arange(6)[None] < np.array([[6], [4]])
    dirty = [np.where(where[..., None], v, np.nan).astype(np.float32) for v in (x, y)]
    run = jax.jit(lambda p, x, y, w: NET.apply(p, x, y, tau=jnp.float32(tau), where=w))
    params = parameters()
    got = run(params, *dirty, where)
    wide = jax.tree.map(lambda a: a.astype(np.float64), params)
    expected = [oracle(wide, x[b, : 6 - 2 * b], y[b, : 6 - 2 * b], tau[b]) for b in range(2)]
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    order = rng.permutation(6)
    again = run(params, *(v[:, order] for v in dirty), where[:, order])
    np.testing.assert_allclose(again, got, rtol=1e-5, atol=1e-6)


def test_initial_values_depend_on_the_key_and_dropout_on_its_own():
    x, tau = np.float32(rng.normal(size=(1, 6, 2))), jnp.full(1, 0.5)
    keys = jax.random.split(jax.random.key(0, impl="unsafe_rbg"), 2)  # a generator that compiles fast

    @jax.jit
    def run(keys):
        params = [jax.tree.map(lambda a, i=i: a[i], jax.vmap(SMALL.init)(keys)) for i in range(2)]
        quiet = jax.vmap(lambda p: SMALL.apply(p, x, x, tau=tau))(jax.tree.map(lambda *a: jnp.stack(a), *params))
        return quiet, jax.vmap(lambda k: SMALL.apply(params[0], x, x, tau=tau, key=k, train=True))(keys)

    told = np.concatenate(run(keys)).ravel().tolist()
    assert len({round(v, 6) for v in told}) == 4 and np.all(np.isfinite(told))


def test_pinball_loss_is_least_at_the_quantile():
    truth = np.float32(rng.normal(size=201))
    for tau in (0.1, 0.5, 0.8):
        grid = np.linspace(-2, 2, 401, dtype=np.float32)
        loss = jax.jit(jax.vmap(lambda q, tau=tau: information.mist_loss(
            jnp.full(201, q), truth, tau=jnp.full(201, tau))))(grid)  # fmt: skip
        assert abs(grid[int(np.argmin(loss))] - np.quantile(truth, tau)) < 0.03
        expected = [np.mean([max(tau * (t - q), (tau - 1) * (t - q)) for t in truth]) for q in grid[::100]]
        np.testing.assert_allclose(loss[::100], expected, rtol=1e-5)
    where = np.arange(201) < 100
    half = information.mist_loss(jnp.where(where, 0.0, jnp.nan), truth, where=where)
    np.testing.assert_allclose(half, np.mean(truth[:100] ** 2), rtol=1e-5)


def test_intervals():
    crossing = Layer(None, lambda params, x, y, tau, where: (1 - tau) * x[:, 0, 0])
    low, median, high = information.mist_interval(crossing, {}, jnp.ones((2, 3, 1)), jnp.ones((2, 3, 1)), level=0.8)
    np.testing.assert_allclose([low[0], median[0], high[0]], [0.1, 0.5, 0.9], rtol=1e-5)
    x = np.float32(rng.normal(size=(400, 1)))
    run = jax.jit(lambda key: information.bootstrap_interval(lambda x, y: jnp.mean(x), x, x, key=key, draws=400))
    low, high = run(jax.random.key(0))
    half = 1.645 * x.std() / 20  # the normal approximation of the mean
    np.testing.assert_allclose([low, high], [x.mean() - half, x.mean() + half], atol=0.15 * half)


def test_refuses():
    x, tau, params = jnp.ones((2, 6, 2)), jnp.ones(2), parameters()
    with pytest.raises(ValueError, match="tau is needed with quantile=True"):
        NET.apply(params, x, x)
    with pytest.raises(ValueError, match="at most max_size=5 fit"):
        NET.apply(params, x, jnp.ones((2, 6, 4)), tau=tau)
    with pytest.raises(ValueError, match="tau has shape"):
        NET.apply(params, x, x, tau=tau[:1])
    with pytest.raises(ValueError, match="a key is needed"):
        NET.apply(params, x, x, tau=tau, train=True)
    with pytest.raises(ValueError, match="heads=3 must divide width=4"):
        information.mist(width=4, heads=3)
    with pytest.raises(ValueError, match="predictions and information"):
        information.mist_loss(tau, tau[:1])
    with pytest.raises(ValueError, match="level=1"):
        information.mist_interval(NET, params, x, x, level=1.0)
    with pytest.raises(ValueError, match="draws"):
        information.bootstrap_interval(lambda x, y: 0.0, x[0], x[0], key=jax.random.key(0), draws=1)


def network(x, y, where):
    params = jax.tree.map(lambda a: jnp.asarray(a, x.dtype), parameters(SMALL))
    tau = jnp.full(1, 0.5, x.dtype)
    return SMALL.apply(params, x[None], y[None], tau=tau, where=where[None])[0]


def resampled(x, seed):
    estimate = lambda x, y: jnp.mean(x * y)
    low, high = information.bootstrap_interval(estimate, x, 2 * x, key=jax.random.key(seed), draws=3)
    known = Layer(None, lambda params, x, y, tau, where: tau * x[:, 0, 0])
    return low, high, information.mist_interval(known, {}, x[None], x[None])[1]


def loss(predictions, truth, tau, where, axis_name=None):
    return information.mist_loss(predictions, truth, tau=tau, where=where, axis_name=axis_name)


SCORE, WHERE = Arg("scores", (6,)), Arg("where", (6,))
ARGS = {"predictions": SCORE, "truth": SCORE, "tau": Arg("weights", (6,)), "where": WHERE}
SAMPLE = {"x": Arg("embeddings", (6, 2)), "y": Arg("embeddings", (6, 2)), "where": WHERE}
CASES = [
    Case(network, SAMPLE, wrt=("x", "y"), rows=dict.fromkeys(SAMPLE, 0), symmetry="invariant", name="mist",
         covers=("information.mist",)),
    Case(loss, ARGS, wrt=("predictions", "truth"), helper=True, covers=("information.mist_loss",)),
    Case(resampled, {"x": Arg("embeddings", (6, 2)), "seed": Arg("index", (), high=9)}, wrt=("x",), helper=True,
         covers=("information.bootstrap_interval", "information.mist_interval")),
]  # fmt: skip
test_conformance = conformance.conformance_tests(CASES)
