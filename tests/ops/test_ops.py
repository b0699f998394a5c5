"""Masked reductions, layers, sharding and tree arithmetic."""

import conformance
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import Arg, Case

from jaxlab import ops
from jaxlab.ops import layers

rng = np.random.default_rng(0)
MASKED = {"x": Arg("scores", (6, 4)), "where": Arg("where", (6,))}
ROWS = {"x": 0, "where": 0}


def test_masked_reductions_equal_loops():
    x = rng.normal(size=(5, 4))
    where = rng.random((5, 4)) > 0.4
    where[2] = False
    x32 = jnp.float32(np.where(where, x, np.nan))
    kept = [x[i][where[i]] for i in range(5)]
    np.testing.assert_allclose(ops.masked_sum(x32, where, axis=1), [k.sum() for k in kept], rtol=1e-5, atol=1e-6)
    means = [k.mean() if len(k) else 0 for k in kept]
    np.testing.assert_allclose(ops.masked_mean(x32, where, axis=1), means, rtol=1e-5, atol=1e-6)
    lse = [np.log(np.exp(k).sum()) if len(k) else -np.inf for k in kept]
    np.testing.assert_allclose(ops.masked_logsumexp(x32, where), lse, rtol=1e-5)
    soft = np.zeros_like(x)
    for i, k in enumerate(kept):
        soft[i][where[i]] = np.exp(k) / np.exp(k).sum() if len(k) else []
    np.testing.assert_allclose(ops.masked_softmax(x32, where), soft, rtol=1e-5, atol=1e-7)


def test_masked_mean_counts_entries_when_the_mask_is_short():
    x = jnp.arange(6.0).reshape(3, 2)
    assert float(ops.masked_mean(x, jnp.array([True, False, True]))) == 2.5


@pytest.mark.parametrize("size", [1e-30, 1e-3, 1.0, 1e25])
def test_safe_normalize_has_unit_length_at_any_size(size):
    x = jnp.float32(rng.normal(size=(3, 5)) * size)
    y, pull = jax.vjp(lambda x: ops.safe_normalize(x, eps=0.0), x)
    np.testing.assert_allclose(jnp.linalg.norm(y, axis=-1), 1, rtol=1e-5)
    if size == 1.0:
        g = rng.normal(size=(3, 5))
        a = np.asarray(x, np.float64)
        n = np.linalg.norm(a, axis=1, keepdims=True)
        expected = g / n - a * (a * g).sum(1, keepdims=True) / n**3
        np.testing.assert_allclose(pull(jnp.float32(g))[0], expected, rtol=1e-4, atol=1e-5)


def test_safe_divide_and_zero_where_false():
    value, grad = jax.value_and_grad(lambda d: ops.safe_divide(jnp.float32(1), d))(jnp.float32(0))
    assert value == 0 and grad == 0
    with pytest.raises(ValueError, match="where has shape"):
        ops.zero_where_false(jnp.ones((3, 2)), jnp.ones(4, bool))


def test_ema_and_norm():
    a = {"w": jnp.asarray(rng.normal(size=3), jnp.bfloat16)}
    b = {"w": jnp.asarray(rng.normal(size=3), jnp.bfloat16)}
    new = ops.ema_update(a, b, decay=0.9)
    assert new["w"].dtype == jnp.bfloat16
    expected = 0.9 * np.asarray(a["w"], np.float64) + 0.1 * np.asarray(b["w"], np.float64)
    np.testing.assert_allclose(np.asarray(new["w"], np.float64), expected, rtol=2**-8)
    grad = jax.grad(lambda p: ops.tree_norm(ops.ema_update({"w": jnp.ones(2)}, p, decay=0.5)))({"w": jnp.ones(2)})
    assert not np.any(grad["w"])
    np.testing.assert_allclose(ops.tree_norm({"a": jnp.array([3.0]), "b": jnp.array([[4.0]])}), 5.0)


def test_layers_equal_their_formulas():
    x = rng.normal(size=(4, 3)).astype(np.float32)
    dense = layers.dense(5)
    p = dense.init(jax.random.key(0), 3)
    np.testing.assert_allclose(dense.apply(p, x), x @ np.asarray(p["w"]), rtol=1e-5, atol=1e-6)
    net = layers.mlp([6, 2])
    p = net.init(jax.random.key(0), 3)
    hidden = np.maximum(x @ np.asarray(p["dense_0"]["w"]), 0)
    np.testing.assert_allclose(net.apply(p, x), hidden @ np.asarray(p["dense_1"]["w"]), rtol=1e-5, atol=1e-6)
    norm = layers.feature_norm()
    y = np.asarray(norm.apply(norm.init(None, 3), x))
    np.testing.assert_allclose(y.mean(-1), 0, atol=1e-6)
    np.testing.assert_allclose(y.std(-1), 1, rtol=1e-3)


def test_rows_mixed_accepts_explicit_meshes():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,), devices=jax.devices()[:4])
    x = rng.normal(size=(8, 3)).astype(np.float32)
    function = ops.rows_mixed(lambda x, *, power: jnp.sort(x @ x.T, axis=0) ** power)
    with jax.set_mesh(mesh):
        placed = jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data")))
        got = jax.jit(lambda x: function(x, power=2))(placed)
    np.testing.assert_allclose(got, np.sort(x @ x.T, axis=0) ** 2, rtol=1e-4, atol=1e-5)


def masked_mean(x, *, where=None):
    return ops.masked_mean(x, where).astype(x.dtype)


def masked_logsumexp(x, *, where=None):
    lse = ops.masked_logsumexp(x, where[:, None] if where is not None else None, axis=0)
    return jnp.where(jnp.isfinite(lse), lse, 0.0).astype(x.dtype)


def masked_softmax(x, *, where=None):
    return ops.masked_softmax(x, where[:, None] if where is not None else None, axis=0)


def masked_sum(x, *, where=None):
    return ops.masked_sum(x, where).astype(x.dtype)


def reduce_terms(x, *, where=None, axis_name=None):
    terms = ops.zero_where_false(x, where).astype(ops.compute_dtype(x)) ** 2
    return ops.reduce_terms(terms, where, axis_name=axis_name)


def mix_rows(x):
    wide = x.astype(ops.compute_dtype(x))
    product = lambda x: jnp.matmul(x, x.T, precision=jax.lax.Precision.HIGHEST)
    return ops.rows_mixed(product)(wide).astype(x.dtype)


def of_trees(x, y):
    """What the functions over pytrees give, as leaves; the average moves towards a constant."""
    a, b = {"p": x, "q": x[0]}, {"p": y, "q": y[0]}
    norm = ops.tree_norm(jax.tree.map(lambda leaf: leaf + jnp.ones((), leaf.dtype), a))
    return ops.tree_lerp(a, b, 0.25), ops.ema_update(a, b, decay=0.75), norm.astype(x.dtype)


SQUARE = {"x": Arg("activations", (6, 4))}
CASES = [
    Case(masked_mean, MASKED, wrt=("x",), rows=ROWS, symmetry="invariant", covers=("ops.masked_mean",)),
    Case(masked_sum, MASKED, wrt=("x",), rows=ROWS, symmetry="invariant", covers=("ops.masked_sum",), helper=True),
    Case(masked_logsumexp, MASKED, wrt=("x",), rows=ROWS, symmetry="invariant", covers=("ops.masked_logsumexp",)),
    Case(masked_softmax, MASKED, wrt=("x",), rows=ROWS, symmetry="equivariant", covers=("ops.masked_softmax",)),
    Case(ops.safe_normalize, {"x": Arg("embeddings", (6, 4))}, wrt=("x",), rows={"x": 0}, symmetry="equivariant"),
    Case(
        reduce_terms,
        {"x": Arg("scores", (6,)), "where": Arg("where", (6,))},
        wrt=("x",),
        rows=ROWS,
        symmetry="invariant",
        covers=("ops.reduce_terms", "ops.global_mean", "ops.compute_dtype", "ops.zero_where_false"),
    ),
    Case(ops.safe_divide, {"numerator": Arg("scores", (6,)), "denominator": Arg("scores", (6,))},
         wrt=("numerator", "denominator"), helper=True),
    Case(mix_rows, SQUARE, wrt=("x",), covers=("ops.rows_mixed",)),
    Case(of_trees, {"x": Arg("activations", (6, 4)), "y": Arg("activations", (6, 4))}, wrt=("x", "y"), helper=True,
         covers=("ops.tree_lerp", "ops.ema_update", "ops.tree_norm")),
]  # fmt: skip
test_conformance = conformance.conformance_tests(CASES)
