"""Sinkhorn against a loop over rows and columns, and against the assignment it tends to."""

import conformance
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import Arg, Case

from jaxlab import ops

rng = np.random.default_rng(0)


def oracle(cost, a, b, epsilon, iterations):
    """Cuturi's scaling of exp(-cost / epsilon), plain, in float64."""
    kernel = np.exp(-cost / epsilon)
    v = np.ones(len(b))
    for _ in range(iterations):
        u = np.array([a[i] / sum(kernel[i, j] * v[j] for j in range(len(b))) for i in range(len(a))])
        v = np.array([b[j] / sum(kernel[i, j] * u[i] for i in range(len(a))) for j in range(len(b))])
    return u[:, None] * kernel * v[None, :]


def test_equals_the_scaling_with_and_without_marginals():
    cost = rng.random((3, 4, 6))
    a, b = rng.random((3, 4)), rng.random(6)
    a, b = a / a.sum(1, keepdims=True), b / b.sum()
    run = jax.jit(lambda c, a, b: ops.sinkhorn(c, epsilon=0.3, iterations=7, row_marginal=a, column_marginal=b))
    got = run(*map(jnp.float32, (cost, a, b)))
    plain = jax.jit(lambda c: ops.sinkhorn(c, epsilon=0.3, iterations=7))(jnp.float32(cost))
    for i in range(3):
        np.testing.assert_allclose(got[i], oracle(cost[i], a[i], b, 0.3, 7), rtol=1e-4, atol=1e-7)
        np.testing.assert_allclose(plain[i], oracle(cost[i], np.full(4, 1 / 4), np.full(6, 1 / 6), 0.3, 7), rtol=1e-4)
    np.testing.assert_allclose(got.sum(-2), np.broadcast_to(b, (3, 6)), rtol=1e-5)


def test_masked_rows_columns_and_empty_marginals_take_no_part():
    cost = rng.random((5, 6))
    where, kv_where = np.array([1, 0, 1, 1, 1], bool), np.array([1, 1, 0, 1, 0, 1], bool)
    a = np.array([0.2, 0.9, 0.5, 0.0, 0.3])  # of which row 1 is masked and row 3 has nothing to give
    dirty = np.where(where[:, None] & kv_where[None, :], cost, np.nan)

    def weighed(cost, a):
        plan = ops.sinkhorn(cost, epsilon=0.5, iterations=50, row_marginal=a, where=where, kv_where=kv_where)
        return jnp.sum(plan**2), plan

    (_, plan), grads = jax.jit(jax.value_and_grad(weighed, (0, 1), has_aux=True))(jnp.float32(dirty), jnp.float32(a))
    rows, columns = [0, 2, 4], np.flatnonzero(kv_where)
    expected = np.zeros((5, 6))
    expected[np.ix_(rows, columns)] = oracle(cost[np.ix_(rows, columns)], a[rows], np.full(4, 1 / 4), 0.5, 50)
    np.testing.assert_allclose(plan, expected, rtol=1e-4, atol=1e-7)
    grads = [np.asarray(grad) for grad in grads]
    assert all(np.all(np.isfinite(grad)) for grad in grads)
    assert not np.any(grads[0][~where]) and not np.any(grads[0][:, ~kv_where]) and not np.any(grads[1][[1, 3]])
    assert not np.any(ops.sinkhorn(jnp.float32(dirty), where=np.zeros(5, bool)))


def test_sharpens_to_the_assignment():
    cost = np.float32(rng.random((8, 8)))
    best = np.asarray(ops.linear_assignment(cost))
    plan = ops.sinkhorn(cost, epsilon=0.02, iterations=800)
    np.testing.assert_allclose(plan.sum(-1), 1 / 8, atol=1e-4)
    assert np.array_equal(plan.argmax(1), best)
    soft = ops.gumbel_sinkhorn(-cost, temperature=0.005, iterations=800)
    np.testing.assert_allclose(soft, np.eye(8)[best], atol=0.02)


def test_gumbel_sinkhorn_equals_alternating_normalisation():
    scores = rng.normal(size=(2, 5, 5))
    key = jax.random.key(3)
    noise = np.asarray(jax.random.gumbel(key, (2, 5, 5)), np.float64)
    run = jax.jit(
        lambda s, t, n: ops.gumbel_sinkhorn(s, temperature=t, iterations=n, noise=0.3, key=key, max_iterations=9)
    )
    for temperature, iterations in ((0.4, 3), (2.0, 9)):
        x = np.exp((scores + 0.3 * noise) / temperature)
        for _ in range(iterations):
            x = x / x.sum(2, keepdims=True)
            x = x / x.sum(1, keepdims=True)
        np.testing.assert_allclose(run(jnp.float32(scores), temperature, iterations), x, rtol=1e-3, atol=1e-6)
    quiet = ops.gumbel_sinkhorn(jnp.float32(scores), iterations=200)
    np.testing.assert_allclose(quiet.sum(1), 1, atol=1e-4)
    np.testing.assert_allclose(quiet.sum(2), 1, atol=1e-4)


def test_the_key_decides_the_noise():
    scores = jnp.zeros((4, 4))
    with jax.debug_key_reuse(True):
        a, b, again = (ops.gumbel_sinkhorn(scores, key=jax.random.key(i)) for i in (0, 1, 0))
    assert np.any(a != b) and np.array_equal(a, again)


def test_refuses():
    cost = jnp.ones((3, 4))
    with pytest.raises(ValueError, match="epsilon=0 must be positive"):
        ops.sinkhorn(cost, epsilon=0)
    with pytest.raises(ValueError, match="iterations=0"):
        ops.sinkhorn(cost, iterations=0)
    with pytest.raises(ValueError, match=r"row_marginal has shape \(4,\), expected \(3,\)"):
        ops.sinkhorn(cost, row_marginal=jnp.ones(4))
    with pytest.raises(ValueError, match="kv_where has shape"):
        ops.sinkhorn(cost, kv_where=jnp.ones(3, bool))
    with pytest.raises(ValueError, match="cost must be"):
        ops.sinkhorn(cost[0])
    with pytest.raises(ValueError, match="scores must be"):
        ops.gumbel_sinkhorn(cost)
    with pytest.raises(ValueError, match="temperature=0"):
        ops.gumbel_sinkhorn(cost[:3, :3], temperature=0)
    with pytest.raises(ValueError, match="max_iterations is needed"):
        ops.gumbel_sinkhorn(cost[:3, :3], iterations=jnp.int32(3))


CASES = [
    Case(
        ops.sinkhorn,
        {"cost": Arg("scores", (6, 4)), "where": Arg("where", (6,)), "column_marginal": Arg("probabilities", (4,))},
        static={"epsilon": 0.5, "iterations": 20},
        wrt=("cost", "column_marginal"),
        rows={"cost": 0, "where": 0},
        symmetry="equivariant",
    ),
    Case(
        ops.gumbel_sinkhorn,
        {"scores": Arg("scores", (6, 4, 4))},
        static={"temperature": 0.5},
        wrt=("scores",),
        rows={"scores": 0},
        symmetry="equivariant",
    ),
    Case(
        ops.gumbel_sinkhorn,
        {"scores": Arg("scores", (6, 4, 4)), "key": Arg("key")},
        wrt=("scores",),
        name="gumbel_sinkhorn with noise",
        helper=True,
    ),
]
test_conformance = conformance.conformance_tests(CASES)
