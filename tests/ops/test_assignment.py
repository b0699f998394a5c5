"""The assignment problem against SciPy, and against trying every permutation."""

import itertools

import conformance
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import Arg, Case

from jaxlab.ops import linear_assignment

rng = np.random.default_rng(0)
solve = jax.jit(linear_assignment)


def total(cost, columns):
    return sum(cost[i, j] for i, j in enumerate(columns) if j >= 0)


def scipy_total(cost, **options):
    optimize = pytest.importorskip("scipy.optimize")
    rows, columns = optimize.linear_sum_assignment(cost, **options)
    return cost[rows, columns].sum()


def check(cost, columns, **options):
    best = scipy_total(cost, **options)
    used = columns[columns >= 0]
    assert len(set(used.tolist())) == len(used) == min(cost.shape)
    np.testing.assert_allclose(total(cost, columns), best, rtol=1e-6)


@pytest.mark.parametrize("shape", [(1, 1), (7, 7), (4, 9), (9, 4), (60, 60)])
def test_totals_equal_scipy(shape):
    small = 4 if shape == (60, 60) else 40
    costs = np.stack(
        [
            *(rng.normal(size=(small, *shape)) * 100).round(),  # whole numbers, in which nothing is rounded
            *rng.integers(0, 3, (small, *shape)),  # many ties
            *rng.integers(-(10**6), 10**6, (small, *shape)),
        ]
    ).astype(np.float32)
    for cost, columns in zip(costs, np.asarray(jax.jit(jax.vmap(linear_assignment))(costs)), strict=True):
        check(cost.astype(np.float64), columns)


def test_equals_trying_every_permutation_in_float64_and_maximises():
    with jax.enable_x64(True):
        for _ in range(5):
            cost = rng.normal(size=(5, 5))
            ways = list(itertools.permutations(range(5)))
            totals = [total(cost, way) for way in ways]
            assert tuple(solve(cost).tolist()) == ways[int(np.argmin(totals))]
            assert tuple(linear_assignment(cost, maximize=True).tolist()) == ways[int(np.argmax(totals))]


def test_forbidden_pairs_are_avoided_and_impossible_problems_say_so():
    cost = np.float32(rng.integers(0, 50, (30, 6, 8)))
    cost[rng.random(cost.shape) < 0.35] = np.inf
    cost[0, 2] = np.inf  # no column at all
    cost[1, :3, 2:] = np.inf  # three rows want two columns
    cost[2, 0, 0] = cost[3, 1, 1] = np.nan
    for case, columns in zip(cost, np.asarray(jax.jit(jax.vmap(linear_assignment))(cost)), strict=True):
        clean = np.where(np.isfinite(case), case, np.inf).astype(np.float64)
        try:
            check(clean, columns)
        except ValueError:  # SciPy finds the problem infeasible
            assert np.all(columns == -1)
    assert np.all(np.asarray(solve(cost[0])) == -1) and np.all(np.asarray(solve(cost[1])) == -1)
    assert solve(np.float32([[np.nan]])).tolist() == [-1]
    assert linear_assignment(jnp.zeros((2, 0))).tolist() == [-1, -1]


def test_masks_give_what_the_kept_part_gives():
    cost = np.float32(rng.integers(0, 1000, (40, 5, 7)))
    where, kv_where = rng.random((40, 5)) > 0.3, rng.random((40, 7)) > 0.5
    where[0], kv_where[1], kv_where[2] = False, False, np.arange(7) == 3
    dirty = np.where(where[:, :, None] & kv_where[:, None, :], cost, np.nan)
    run = jax.jit(jax.vmap(lambda c, w, k: linear_assignment(c, where=w, kv_where=k)))
    for c, w, k, columns in zip(cost, where, kv_where, np.asarray(run(dirty, where, kv_where)), strict=True):
        used = columns[columns >= 0]
        assert np.all(columns[~w] == -1) and np.all(k[used]) and len(set(used.tolist())) == len(used)
        part = c[w][:, k].astype(np.float64)
        assert len(used) == min(part.shape)
        np.testing.assert_allclose(total(c.astype(np.float64), columns), scipy_total(part))


def test_hundreds_of_rows():
    cost = np.float32(rng.integers(0, 10**5, (200, 200)))
    check(cost.astype(np.float64), np.asarray(solve(cost)))


def test_refuses():
    with pytest.raises(ValueError, match="cost must be"):
        linear_assignment(jnp.ones(3))
    with pytest.raises(ValueError, match="where has shape"):
        linear_assignment(jnp.ones((2, 3)), where=jnp.ones(3, bool))
    with pytest.raises(ValueError, match="kv_where has shape"):
        linear_assignment(jnp.ones((2, 3)), kv_where=jnp.ones(2, bool))


CASES = [
    Case(
        linear_assignment,
        {"cost": Arg("scores", (6, 8)), "where": Arg("where", (6,))},
        reason="an assignment is constant almost everywhere",
        rows={"cost": 0, "where": 0},
        symmetry="equivariant",
    ),
    Case(
        linear_assignment,
        {"cost": Arg("scores", (6, 4))},
        reason="an assignment is constant almost everywhere",
        name="linear_assignment with more rows than columns",
        helper=True,
    ),
]
test_conformance = conformance.conformance_tests(CASES)
