"""Blocks of rows against all rows at once."""

import conformance
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import Arg, Case

from jaxlab import ops

rng = np.random.default_rng(0)


@pytest.mark.parametrize("chunk", [None, 1, 3, 4, 5, 9])
def test_equals_the_loop_with_a_rest_and_a_tree(chunk):
    x, y = rng.normal(size=(5, 3)), rng.normal(size=(5,))

    def function(rows):
        return {"pairs": jnp.sum(rows["x"] @ jnp.float32(x).T, axis=1), "twice": 2 * rows["y"]}

    got = jax.jit(lambda rows: ops.map_rows(function, rows, chunk=chunk))({"x": jnp.float32(x), "y": jnp.float32(y)})
    np.testing.assert_allclose(got["pairs"], [sum(a @ b for b in x) for a in x], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got["twice"], 2 * y, rtol=1e-6)


def test_rows_of_the_filling_have_no_gradient():
    grad = jax.jit(jax.grad(lambda x: jnp.sum(ops.map_rows(jnp.square, x, chunk=2))))(jnp.array([1.0, 2.0, 3.0]))
    np.testing.assert_allclose(grad, [2, 4, 6])


def test_refuses():
    with pytest.raises(ValueError, match="chunk=0"):
        ops.map_rows(jnp.square, jnp.ones(3), chunk=0)


def pairs(x, others):
    return ops.map_rows(lambda rows: jnp.sum(jnp.tanh(rows[:, None] * others[None]), axis=(1, 2)), x, chunk=2)


CASES = [
    Case(
        pairs,
        {"x": Arg("embeddings", (5, 3)), "others": Arg("embeddings", (4, 3))},
        wrt=("x", "others"),
        rows={"x": 0},
        symmetry="equivariant",
        covers=("ops.map_rows",),
    )
]
test_conformance = conformance.conformance_tests(CASES)
