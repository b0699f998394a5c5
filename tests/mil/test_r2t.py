"""R2T: regions of images, the whole block against loops over bags and regions, masks, layouts and what reaches whom."""

import conformance
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import Arg, Case

from jaxlab import mil

rng = np.random.default_rng(0)
B, L, D, R, K = 3, 11, 4, 2, 2
KEEP = np.arange(L)[None, :] < np.array([11, 5, 0])[:, None]
X = np.where(KEEP[..., None], rng.normal(size=(B, L, D)), np.nan).astype(np.float32)
SIZES = {"regions": R, "heads": 2, "taps": 3, "representatives": K, "cross_regions": R, "cross_heads": 2}
LAYER = mil.r2t(**SIZES)
SHAPES = jax.eval_shape(lambda key: LAYER.init(key, D), jax.random.key(0))
PARAMS = jax.tree.map(lambda v: np.float32(0.6 * rng.normal(size=v.shape)), SHAPES)


def softmax(s):
    e = np.exp(s - s.max())
    return e / e.sum()


def linear(p, x):
    return x @ p["w"] + p["b"]


def layer_norm(p, u):
    return (u - u.mean()) / np.sqrt(u.var() + 1e-5) * p["gain"] + p["bias"]


def attention(p, x, heads=2):
    """Attention over the rows of x [P, D], with the convolution along the queries."""
    qkv = np.array([linear(p["qkv"], row).reshape(3, heads, -1) for row in x])
    out = np.zeros((len(x), heads, D // heads))
    for h in range(heads):
        a = np.array([[q[0, h] @ k[1, h] / np.sqrt(D // heads) for k in qkv] for q in qkv])
        if "conv" in p:
            half = p["conv"]["w"].shape[1] // 2
            moved = np.zeros_like(a)
            for i, j in np.ndindex(*a.shape):
                moved[i, j] = p["conv"]["b"][h]
                for t, w in enumerate(p["conv"]["w"][h]):
                    if 0 <= i + t - half < len(a):
                        moved[i, j] += w * a[i + t - half, j]
            a = a + moved
        for i in range(len(x)):
            out[i, h] = softmax(a[i]) @ qkv[:, 2, h]
    return np.array([linear(p["out"], row.reshape(-1)) for row in out])


def square(n):
    """The regions of a square for n instances: lists of indices, those above n being empty."""
    side = next(s for s in range(1, 99) if s * s >= n and s % R == 0)
    small = side // R
    grid = np.arange(side * side).reshape(side, side)
    return [grid[r * small : (r + 1) * small, c * small : (c + 1) * small].ravel() for r in range(R) for c in range(R)]


def block(p, x, *, masked=True, shortcut=False):
    n = len(x)
    if not n:
        return x
    regions = square(n)
    chosen = [[i for i in r if i < n] if masked else list(r) for r in regions]

    def filled(params, u):
        normed = [layer_norm(params["norm"], row) for row in u]
        return np.array(normed + [np.zeros(D)] * (regions[-1][-1] + 1 - n))

    u = x.copy()
    y = filled(p["layer_0"], u)
    for r in chosen:
        if r:
            for i, new in zip(r, attention(p["layer_0"], y[r]), strict=True):
                if i < n:
                    u[i] += new
    y = filled(p["cross"], u)
    live = [r for r in chosen if r]
    logits = [y[r] @ p["cross"]["phi"] for r in live]
    new = np.array(
        [
            attention(p["cross"], np.array([softmax(s[:, k]) @ y[r] for r, s in zip(live, logits, strict=True)]))
            for k in range(K)
        ]
    )
    for number, (r, s) in enumerate(zip(live, logits, strict=True)):
        level = (s - s.min(0)) / (s.max(0) - s.min(0) + 1e-8)
        for place, i in enumerate(r):
            if i < n:
                u[i] += sum(new[k, number] * level[place, k] * softmax(s[place])[k] for k in range(K))
    u = u + x if shortcut else u
    return np.array([layer_norm(p["norm"], row) for row in u])


@pytest.mark.parametrize("masked", [True, False])
def test_block_equals_the_loop_in_both_layouts(masked):
    """The ragged list holds the bags of 11, 5 and 0 one after the other, with padding between; a list keeps order."""
    layer = mil.r2t(**SIZES, mask_padding=masked, shortcut=not masked)
    ids = np.where(KEEP, np.arange(B)[:, None], -1).reshape(-1)

    def both(p, x):
        listed = layer.apply(p, x.reshape(-1, D), segment_ids=ids, num_segments=B, max_length=L)
        padded = layer.apply(p, x, where=KEEP)
        return jnp.sum(jnp.sin(padded)), (padded, listed)

    form = jax.value_and_grad(both, argnums=(0, 1), has_aux=True) if masked else lambda p, x: (both(p, x), None)
    (_, (padded, listed)), grads = jax.tree.map(np.asarray, jax.jit(form)(PARAMS, X))
    if masked:
        assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
        assert not grads[1][~KEEP].any() and grads[1][0].any()
    wide = jax.tree.map(np.float64, PARAMS)
    for b in range(B):
        expected = block(wide, X[b][KEEP[b]].astype(np.float64), masked=masked, shortcut=not masked)
        np.testing.assert_allclose(padded[b][KEEP[b]], expected, rtol=1e-3, atol=1e-4)
        assert not padded[b][~KEEP[b]].any()
    np.testing.assert_allclose(listed, padded.reshape(-1, D), atol=1e-5)


def test_partition_and_reverse():
    image = rng.normal(size=(2, 6, 6, 3))
    parts = np.asarray(mil.region_partition(jnp.asarray(image), 3))
    for r, c in np.ndindex(3, 3):
        expected = image[:, 2 * r : 2 * r + 2, 2 * c : 2 * c + 2].reshape(2, 4, 3)
        np.testing.assert_allclose(parts[:, 3 * r + c], expected, rtol=1e-6)
    np.testing.assert_allclose(mil.region_reverse(jnp.asarray(parts), 6, 6), image, rtol=1e-6)


def test_what_reaches_whom():
    """Without CR-MSA's values an instance reaches its own region only; with them everybody."""
    cut = {**PARAMS, "cross": {**PARAMS["cross"], "out": jax.tree.map(np.zeros_like, PARAMS["cross"]["out"])}}
    x = rng.normal(size=(1, 16, D)).astype(np.float32)
    moved = x.copy()
    moved[0, 0, 0] += 1  # one feature, because the norm takes away what all share

    def change(p):
        return jnp.any(LAYER.apply(p, x) != LAYER.apply(p, moved), axis=-1)[0]

    local, everywhere = jax.jit(lambda: (change(cut), change(PARAMS)))()
    assert set(np.flatnonzero(local)) == {0, 1, 4, 5}
    for region in square(16):  # all but places of level 0, which a region can have one of
        assert np.asarray(everywhere)[region].sum() >= 3


def test_without_taps_is_plain_and_dropout_needs_a_key():
    plain = mil.r2t(**{**SIZES, "taps": 0})
    none = jax.tree.map(np.zeros_like, PARAMS["layer_0"]["conv"])
    zero = {**PARAMS, "layer_0": {**PARAMS["layer_0"], "conv": none}}
    less = {**PARAMS, "layer_0": {n: v for n, v in PARAMS["layer_0"].items() if n != "conv"}}

    def run(key):
        noisy = [LAYER.apply(PARAMS, X, where=KEEP, key=k, train=True) for k in jax.random.split(key)]
        return LAYER.apply(zero, X, where=KEEP), plain.apply(less, X, where=KEEP), *noisy

    a, b, first, second = jax.jit(run)(jax.random.key(0))
    np.testing.assert_allclose(a, b, atol=1e-6)
    assert np.all(np.isfinite(first)) and np.any(first != second)
    with pytest.raises(ValueError, match="dropout in training needs a key"):
        LAYER.apply(PARAMS, X, train=True)


def test_refuses():
    with pytest.raises(ValueError, match="taps=4 must be"):
        mil.r2t(taps=4)
    with pytest.raises(ValueError, match="cross_heads=3 must divide"):
        mil.r2t(heads=2, cross_heads=3).init(jax.random.key(0), 4)
    with pytest.raises(ValueError, match="dropout=1 must be"):
        mil.r2t(dropout=1)
    with pytest.raises(ValueError, match="regions=4 divides"):
        mil.region_partition(jnp.ones((6, 8, 1)), 4)
    with pytest.raises(ValueError, match="of 4 x 5 places"):
        mil.region_reverse(jnp.ones((4, 4, 1)), 4, 5)


def block_case(x, where):
    return mil.mean_pool(LAYER.apply(PARAMS, x, where=where), where=where)


CASES = [
    Case(block_case, {"x": Arg("embeddings", (1, 8, D)), "where": Arg("where", (1, 8))}, wrt=("x",), name="r2t",
         rows={"x": 1, "where": 1}, covers=("mil.r2t",), bfloat16_tolerance=0.3),
    Case(lambda x: mil.region_reverse(mil.region_partition(x, 2), 4, 4), {"x": Arg("embeddings", (4, 4, 2))},
         wrt=("x",), helper=True, name="regions", covers=("mil.region_partition", "mil.region_reverse")),
]  # fmt: skip
test_conformance = conformance.conformance_tests(CASES)
