"""Snippet reconstruction against loops over views, and an LSTM that walks point by point."""

import conformance
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import Arg, Case

from jaxlab.contrastive import (
    aggregate_by_similarity,
    bilstm,
    geometric_mask,
    masked_views,
    snippet_reconstruction_loss,
    uncertainty_weighted_sum,
)

rng = np.random.default_rng(0)


def drawn_params(net, *sizes):
    """Parameters in the shapes that `init` gives, drawn on the host: compiling `init` would cost a second."""
    shapes = jax.eval_shape(lambda key: net.init(key, *sizes), jax.random.key(0))
    return jax.tree.map(lambda leaf: np.float32(0.5 * rng.normal(size=leaf.shape)), shapes)


def cosine(a, b):
    return float(a @ b) / np.sqrt(float(a @ a)) / np.sqrt(float(b @ b))


def weights_oracle(s, i, where, t):
    """The weight of every view [V, N] for snippet i."""
    w = np.zeros(s.shape[:2])
    for v in range(s.shape[0]):
        for j in np.flatnonzero(where):
            if (v, j) != (0, i):
                w[v, j] = np.exp(cosine(s[0, i], s[v, j]) / t)
    return w / w.sum()


def test_the_mean_and_the_losses_equal_the_loops():
    """Five snippets of which one is padding, three views, and a point of one snippet that does not exist."""
    s, z = rng.normal(size=(3, 5, 4)), rng.normal(size=(3, 5, 6, 2))
    x = rng.normal(size=(5, 6, 2))
    where, points = np.arange(5) != 1, np.ones((5, 6), bool)
    points[2, 5] = False
    dirty = [jnp.float32(np.where(where.reshape(shape), v, np.nan)) for v, shape in ((s, (1, 5, 1)), (z, (1, 5, 1, 1)))]
    broken = jnp.float32(np.where(points[:, :, None] & where[:, None, None], x, np.nan))

    @jax.jit
    def run(s, z, x):
        mean = aggregate_by_similarity(s, z, where=where, temperature=0.3)
        options = {"where": where, "kv_where": points, "temperature": 0.3}
        loss = snippet_reconstruction_loss(x, mean, s, contrastive_weight=0.5, **options)
        return mean, loss, snippet_reconstruction_loss(x, mean, s, scales=jnp.array([0.5, 2.0]), **options)

    mean, loss, learnt = run(*dirty, broken)
    expected = np.zeros((5, 6, 2))
    for i in np.flatnonzero(where):
        w = weights_oracle(s, i, where, 0.3)
        expected[i] = sum(w[v, j] * z[v, j] for v in range(3) for j in range(5))
    np.testing.assert_allclose(mean, expected, rtol=1e-4, atol=1e-6)
    error = np.mean([(x[i, p] - expected[i, p]) ** 2 for i, p in np.argwhere(points & where[:, None])])
    terms = []
    for v in range(3):
        for i in np.flatnonzero(where):
            others = {(u, j): np.exp(cosine(s[v, i], s[u, j]) / 0.3) for u in range(3) for j in np.flatnonzero(where)}
            total = sum(others.values()) - others[v, i]
            terms += [-np.log(others[u, i] / total) for u in range(3) if u != v]
    np.testing.assert_allclose(loss, error + 0.5 * np.mean(terms), rtol=1e-5)
    by_scale = error / (2 * 0.5**2) + np.log(1 + 0.5**2) + np.mean(terms) / (2 * 2.0**2) + np.log(1 + 2.0**2)
    np.testing.assert_allclose(learnt, by_scale, rtol=1e-5)


def test_a_sharp_temperature_takes_the_nearest_other_view_and_weights_learn_unless_stopped():
    """Snippets 0 and 1 are duplicates, so that each is made of the other; the third is nearest to its masked view."""
    s = np.stack([np.eye(3)[[0, 0, 1]], np.eye(3)[[2, 2, 1]]]) + 0.01 * rng.normal(size=(2, 3, 3))
    z = jnp.float32(np.arange(6).reshape(2, 3))

    @jax.jit
    def run(s):
        grads = [
            jax.grad(lambda s, stop=stop: jnp.sum(aggregate_by_similarity(s, z, stop_gradient=stop) ** 2))(s)
            for stop in (False, True)
        ]
        return aggregate_by_similarity(s, z, temperature=0.005), grads

    mean, (learns, stopped) = run(jnp.float32(s))
    np.testing.assert_allclose(mean, [1, 0, 5], atol=1e-3)
    assert np.any(learns) and not np.any(stopped)


def test_masks_have_their_share_and_their_runs():
    draw = jax.jit(
        lambda key: [geometric_mask(key, 300, 2000, ratio=r, mean_length=m) for r, m in ((0.5, 3), (0.2, 5))]
    )
    for visible, ratio, length in zip(draw(jax.random.key(0)), (0.5, 0.2), (3, 5), strict=True):
        masked = ~np.asarray(visible)
        np.testing.assert_allclose(masked.mean(), ratio, rtol=0.03)
        starts = masked[:, 1:] & ~masked[:, :-1]
        np.testing.assert_allclose(masked[:, 1:].sum() / starts.sum(), length, rtol=0.03)


def test_views_are_the_snippet_and_copies_with_zeros():
    x = 1 + rng.uniform(size=(30, 8, 2)).astype(np.float32)
    views, shared = jax.jit(lambda x, key: [masked_views(x, key, shared=s) for s in (False, True)])(
        x, jax.random.key(0)
    )
    for v in (np.asarray(views), np.asarray(shared)):
        assert v.shape == (3, 30, 8, 2)
        np.testing.assert_array_equal(v[0], x)
        assert np.all((v[1:] == 0) | (v[1:] == x)) and 0.3 < (v[1:] == 0).mean() < 0.7
        assert np.any(v[1] != v[2])
    assert np.array_equal(shared[..., 0] == 0, shared[..., 1] == 0)
    assert not np.array_equal(views[..., 0] == 0, views[..., 1] == 0)
    assert geometric_mask(jax.random.key(0), 2, 1).shape == (2, 1)


def test_the_network_equals_a_walk_point_by_point():
    """Two layers, two snippets of five points, of which the second has three."""
    x, where = rng.normal(size=(2, 5, 3)), np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], bool)
    layer = bilstm(4)
    params = drawn_params(layer, 3)
    dirty = jnp.float32(np.where(where[:, :, None], x, np.nan))
    got = jax.jit(lambda p, x: layer.apply(p, x, where=where))(params, dirty)
    p = jax.tree.map(lambda w: np.asarray(w, np.float64), params)
    sigmoid = lambda v: 1 / (1 + np.exp(-v))
    for n, length in enumerate((5, 3)):
        value = x[n, :length]
        for i in range(2):
            out = np.zeros((length, 8))
            for half, direction in enumerate(("forward", "backward")):
                w, h, c = p[f"layer_{i}"][direction], np.zeros(4), np.zeros(4)
                for step in range(length) if half == 0 else reversed(range(length)):
                    gates = value[step] @ w["input"]["w"] + w["input"]["b"] + h @ w["state"]["w"]
                    a, f, g, o = gates.reshape(4, 4)
                    c = sigmoid(f) * c + sigmoid(a) * np.tanh(g)
                    h = sigmoid(o) * np.tanh(c)
                    out[step, 4 * half : 4 * half + 4] = h
            value = out
        np.testing.assert_allclose(got[n, :length], value, rtol=1e-4, atol=1e-5)
        assert not np.any(got[n, length:])


def test_refuses():
    x, s = jnp.ones((3, 4, 2)), jnp.ones((2, 3, 5))
    key = jax.random.key(0)
    with pytest.raises(ValueError, match=r"one shape \[N, L, C\]"):
        snippet_reconstruction_loss(x, x[:2], s)
    with pytest.raises(ValueError, match="embeddings has shape"):
        snippet_reconstruction_loss(x, x, s[:, :2])
    with pytest.raises(ValueError, match="kv_where has shape"):
        snippet_reconstruction_loss(x, x, s, kv_where=jnp.ones(3, bool))
    with pytest.raises(ValueError, match="scales has shape"):
        snippet_reconstruction_loss(x, x, s, scales=jnp.ones(3))
    with pytest.raises(ValueError, match="embeddings and features must be"):
        aggregate_by_similarity(s, x)
    with pytest.raises(ValueError, match="temperature=0"):
        aggregate_by_similarity(s, s, temperature=0)
    with pytest.raises(ValueError, match=r"x must be \[N, L, C\]"):
        masked_views(x[0], key)
    with pytest.raises(ValueError, match="num_views=0"):
        masked_views(x, key, num_views=0)
    with pytest.raises(ValueError, match="ratio=1"):
        geometric_mask(key, 2, 3, ratio=1)
    with pytest.raises(ValueError, match="mean_length=3"):
        geometric_mask(key, 2, 3, ratio=0.9, mean_length=3)
    with pytest.raises(ValueError, match="length=0"):
        geometric_mask(key, 2, 0)
    with pytest.raises(ValueError, match=r"one shape \[K\]"):
        uncertainty_weighted_sum(jnp.ones(2), jnp.ones(3))
    with pytest.raises(ValueError, match="hidden=0"):
        bilstm(0)
    with pytest.raises(ValueError, match="x and where must be"):
        bilstm(2).apply({}, x, where=jnp.ones(3, bool))


NETWORK = bilstm(2, num_layers=1)
PARAMS = drawn_params(NETWORK, 2)


def network_case(x, key):
    return NETWORK.apply(PARAMS, masked_views(x, key))


VIEWS = {"embeddings": Arg("embeddings", (2, 6, 4)), "where": Arg("where", (6,))}
CASES = [
    Case(
        aggregate_by_similarity,
        {**VIEWS, "features": Arg("activations", (2, 6, 3))},
        static={"temperature": 0.5},
        wrt=("embeddings", "features"),
        rows={"embeddings": 1, "features": 1, "where": 0},
        symmetry="equivariant",
    ),
    Case(
        snippet_reconstruction_loss,
        {**VIEWS, "x": Arg("activations", (6, 3, 2)), "reconstructed": Arg("activations", (6, 3, 2))},
        static={"temperature": 0.5},
        wrt=("x", "reconstructed", "embeddings"),
        helper=True,
    ),
    Case(
        network_case,
        {"x": Arg("activations", (3, 4, 2)), "key": Arg("key")},
        wrt=("x",),
        helper=True,
        covers=("contrastive.bilstm", "contrastive.masked_views", "contrastive.geometric_mask"),
    ),
    Case(
        uncertainty_weighted_sum,
        {"losses": Arg("scores", (3,)), "scales": Arg("scores", (3,))},
        wrt=("losses", "scales"),
        helper=True,
    ),
]
test_conformance = conformance.conformance_tests(CASES)
