"""Smooth steps and soft trees against a recursion over the nodes."""

import conformance
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import Arg, Case

from jaxlab import ops

rng = np.random.default_rng(0)


def step(u, width):
    if u <= -width / 2:
        return 0.0
    if u >= width / 2:
        return 1.0
    return -2 * u**3 / width**3 + 3 * u / (2 * width) + 0.5


def walk(splits, node=0, chance=1.0):
    """The leaves from left to right: (number in the heap, probability)."""
    if node >= len(splits):
        return [(node, chance)]
    left, right = splits[node] * chance, (1 - splits[node]) * chance
    return walk(splits, 2 * node + 1, left) + walk(splits, 2 * node + 2, right)


@pytest.mark.parametrize("width", [0.01, 1.0, 7.0])
def test_smooth_step_equals_the_cubic_and_has_no_kink(width):
    u = np.concatenate([rng.normal(size=50) * width, [-width / 2, width / 2, 0, 1e30, -1e30]])
    f = lambda u: ops.smooth_step(u, width=width)
    with jax.enable_x64(True):
        got, slope = map(np.asarray, jax.jit(jax.vmap(jax.value_and_grad(f)))(u))
    np.testing.assert_allclose(got, [step(x, width) for x in u], atol=1e-12)
    inside = np.where(abs(u) < width / 2, 1.5 / width - 6 * np.clip(u, -width, width) ** 2 / width**3, 0)
    np.testing.assert_allclose(slope, inside, atol=1e-9)
    ends = f(np.float32([-width / 2, width / 2]))
    assert ends.tolist() == [0, 1], "0 and 1 must be exact in float32"


def test_leaves_equal_the_recursion_for_any_number():
    for n in (1, 2, 3, 6, 8, 13):
        splits = np.clip(rng.normal(size=(3, n - 1)) + 0.5, 0, 1)  # some exactly 0 or 1
        with jax.enable_x64(True):
            got = np.asarray(ops.soft_tree_leaves(splits))
        expected = [walk(row) for row in splits]
        np.testing.assert_allclose(got, [[p for _, p in leaves] for leaves in expected], atol=1e-12)
        np.testing.assert_allclose(got.sum(-1), 1, atol=1e-12)
        ancestors, left, nodes = ops.soft_tree_tables(n)
        assert nodes.tolist() == [node for node, _ in expected[0]]
        for way, sides, node in zip(ancestors, left, nodes, strict=True):
            heap = 0
            for ancestor, goes_left in zip(way[way >= 0], sides, strict=False):
                assert ancestor == heap
                heap = 2 * heap + (1 if goes_left else 2)
            assert heap == node


def test_hard_splits_reach_one_leaf_and_keep_exact_gradients():
    splits = np.float32(rng.integers(0, 2, (20, 6)))
    leaves = ops.soft_tree_leaves(splits)
    assert np.all(np.sort(leaves, axis=1) == [0] * 6 + [1])
    # The derivative by a split is what the two subtrees would give: finite even where the product is 0.
    with jax.enable_x64(True):
        grad = np.asarray(jax.jit(jax.jacobian(ops.soft_tree_leaves))(np.float64(splits[0])))
        for node in range(6):
            change = [np.where(np.arange(6) == node, value, splits[0]).astype(np.float64) for value in (0.25, 0.75)]
            ends = [np.array([p for _, p in walk(s)]) for s in change]
            np.testing.assert_allclose(grad[:, node], (ends[1] - ends[0]) / 0.5, atol=1e-12)


def test_refuses():
    with pytest.raises(ValueError, match="width=0 must be positive"):
        ops.smooth_step(jnp.ones(2), width=0)
    with pytest.raises(ValueError, match="num_leaves=0"):
        ops.soft_tree_tables(0)
    with pytest.raises(ValueError, match="at least one axis"):
        ops.soft_tree_leaves(jnp.ones(()))


def tables():
    return ops.soft_tree_tables(6)


CASES = [
    Case(ops.smooth_step, {"u": Arg("scores", (6, 4))}, static={"width": 3.0}, wrt=("u",), rows={"u": 0},
         symmetry="equivariant"),
    Case(ops.soft_tree_leaves, {"splits": Arg("probabilities", (6, 4))}, wrt=("splits",), rows={"splits": 0},
         symmetry="equivariant"),
    Case(tables, {}, host=True, covers=("ops.soft_tree_tables",), name="soft_tree_tables"),
]  # fmt: skip
test_conformance = conformance.conformance_tests(CASES)
