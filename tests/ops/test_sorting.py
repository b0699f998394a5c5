"""Differentiable sorting networks against a loop over the comparisons."""

import conformance
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import Arg, Case

from jaxlab.ops.sorting import odd_even_sort

rng = np.random.default_rng(0)


def compare(gap, steepness, kind):
    v = steepness * gap
    if kind == "cauchy":
        return np.arctan(v) / np.pi + 0.5
    if kind == "logistic":
        return 1 / (1 + np.exp(-v))
    if kind == "logistic_phi":
        return 1 / (1 + np.exp(-v / (abs(gap) + 1e-10) ** 0.25))
    if abs(v) <= 0.25:
        return 0.5 + v
    return 1 - 1 / (16 * v) if v > 0 else -1 / (16 * v)


def oracle(x, steepness=1.0, kind="cauchy"):
    """One vector, float64: the network drawn wire by wire."""
    x = [float(v) for v in x]
    n = len(x)
    P = [[1.0 if i == j else 0.0 for j in range(n)] for i in range(n)]
    for layer in range(n):
        for j in range(layer % 2, n - 1, 2):
            alpha = compare(x[j + 1] - x[j], steepness, kind)
            a, b = x[j], x[j + 1]
            x[j], x[j + 1] = alpha * a + (1 - alpha) * b, (1 - alpha) * a + alpha * b
            for row in P:
                a, b = row[j], row[j + 1]
                row[j], row[j + 1] = alpha * a + (1 - alpha) * b, (1 - alpha) * a + alpha * b
    return np.array(x), np.array(P).reshape(n, n)


@pytest.mark.parametrize("kind", ["cauchy", "logistic", "logistic_phi", "optimal"])
@pytest.mark.parametrize("n", [1, 4, 7])
def test_equals_the_loop_and_is_doubly_stochastic(kind, n):
    x = rng.normal(size=(3, n)) * 2
    got, P = jax.jit(lambda x: odd_even_sort(x, steepness=1.7, kind=kind))(np.float32(x))
    for row, ranked, permutation in zip(x, got, P, strict=True):
        expected, expected_P = oracle(row, 1.7, kind)
        np.testing.assert_allclose(ranked, expected, atol=5e-6)
        np.testing.assert_allclose(permutation, expected_P, atol=2e-6)
    np.testing.assert_allclose(P.sum(-1), 1, atol=2e-6)
    np.testing.assert_allclose(P.sum(-2), 1, atol=2e-6)
    np.testing.assert_allclose(jnp.einsum("bi,bij->bj", x.astype(np.float32), P), got, atol=1e-5)
    np.testing.assert_allclose(got.mean(-1), x.mean(-1), atol=2e-6)


def test_steep_comparisons_sort_exactly():
    x = np.float32(rng.permutation(9))
    for kind in ("cauchy", "logistic", "logistic_phi", "optimal"):
        ranked, P = jax.jit(lambda x, kind=kind: odd_even_sort(x, steepness=1e7, kind=kind))(x)
        np.testing.assert_allclose(ranked, np.sort(x), atol=1e-4)
        np.testing.assert_array_equal(P.argmax(-1), x.astype(int))


def test_masked_entries_take_no_part_at_all():
    n = 8
    x = rng.normal(size=(6, n))
    where = rng.random((6, n)) > 0.4
    where[0], where[1] = False, True
    dirty = np.float32(np.where(where, x, np.nan))

    def weighed(x):
        ranked, P = odd_even_sort(x, where=where)
        return jnp.sum(ranked * jnp.cos(jnp.arange(6.0 * n)).reshape(6, n)) + jnp.sum(P[..., 0]), (ranked, P)

    (_, (ranked, P)), grad = jax.jit(jax.value_and_grad(weighed, has_aux=True))(dirty)
    for b in range(6):
        kept = np.flatnonzero(where[b])
        expected, expected_P = oracle(x[b, kept])
        full = np.zeros((n, n))
        full[kept, : len(kept)] = expected_P
        np.testing.assert_allclose(ranked[b], np.pad(expected, (0, n - len(kept))), atol=5e-6)
        np.testing.assert_allclose(P[b], full, atol=2e-6)
    assert np.all(np.isfinite(grad)) and not np.any(grad[~where])


def test_the_cauchy_tail_does_not_cancel():
    """1 - arctan(v) / pi - 1/2 would be 0 in float32 at this gap."""
    _, P = odd_even_sort(jnp.array([0.0, 1e9], jnp.float32))
    np.testing.assert_allclose(P[0, 1], 1 / (np.pi * 1e9), rtol=1e-2)


def test_refuses():
    with pytest.raises(ValueError, match="steepness=0"):
        odd_even_sort(jnp.ones(3), steepness=0)
    with pytest.raises(ValueError, match="kind='hard' must be one of"):
        odd_even_sort(jnp.ones(3), kind="hard")
    with pytest.raises(ValueError, match="where has shape"):
        odd_even_sort(jnp.ones((2, 3)), where=jnp.ones(3, bool))
    with pytest.raises(ValueError, match="at least one axis"):
        odd_even_sort(jnp.ones(()))


CASES = [
    Case(odd_even_sort, {"x": Arg("scores", (6, 5))}, wrt=("x",), rows={"x": 0}, symmetry="equivariant"),
    Case(
        odd_even_sort,
        {"x": Arg("scores", (6, 5)), "where": Arg("where", (6, 5))},
        static={"kind": "logistic_phi"},
        wrt=("x",),
        name="odd_even_sort masked",
        helper=True,
    ),
]
test_conformance = conformance.conformance_tests(CASES)
