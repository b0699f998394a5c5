"""The linear assignment problem, solved exactly inside `jit` and `vmap`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from jaxlab.ops.collectives import match_varying
from jaxlab.ops.masked import compute_dtype
from jaxlab.ops.sharding import rows_mixed


def linear_assignment(
    cost: Array, *, maximize: bool = False, where: Array | None = None, kv_where: Array | None = None
) -> Array:
    """Returns the column of each row in the assignment of least total cost, every row and column used at most once.

    `argmin over one-to-one maps s of sum_i cost[i, s(i)]`, with as many pairs as the smaller side has entries: shortest
    augmenting paths in reduced costs, O(n^2 m) steps for n <= m. Exact: sums and differences of costs are all that is
    computed, so that only their rounding (none for whole numbers below 2^24) can tell two assignments apart wrongly.

    Args:
        cost: float [..., n, m]; arithmetic is float32 (float64 for float64). A pair whose cost is not finite (NaN
            included) is forbidden.
        maximize: whether the total is to be the largest instead.
        where: bool [..., n], rows that exist; the others get -1 and take no column.
        kv_where: bool [..., m], columns that exist.

    Returns:
        int32 [..., n], the column of each row; -1 for rows left over where rows outnumber columns, and -1 for ALL rows
        where no complete assignment of allowed pairs exists. It is constant almost everywhere and has no gradient.

    Raises:
        ValueError: `cost` has fewer than two axes, or a mask has another shape.

    Example:
        >>> linear_assignment(jnp.array([[4.0, 1.0, 3.0], [2.0, 0.0, 5.0], [3.0, 2.0, 2.0]])).tolist()
        [1, 0, 2]

    Source:
        Jonker and Volgenant, A shortest augmenting path algorithm for dense and sparse linear assignment problems,
        Computing 38 (1987); the rectangular form of Crouse, IEEE TAES 52 (2016). Reconstructed: masks.
    """
    if cost.ndim < 2:
        raise ValueError(f"cost must be [..., n, m], got shape {cost.shape}")
    for name, mask, shape in (
        ("where", where, cost.shape[:-1]),
        ("kv_where", kv_where, (*cost.shape[:-2], cost.shape[-1])),
    ):
        if mask is not None and mask.shape != shape:
            raise ValueError(f"{name} has shape {mask.shape}, expected {shape}")
    cost = jax.lax.stop_gradient(cost)
    if where is None and kv_where is None:
        return rows_mixed(_solve)(cost, maximize=maximize)
    where = jnp.ones(cost.shape[:-1], bool) if where is None else where
    kv_where = jnp.ones((*cost.shape[:-2], cost.shape[-1]), bool) if kv_where is None else kv_where
    return rows_mixed(_solve_masked)(*match_varying(cost, where, kv_where), maximize=maximize)


def _solve(cost: Array, *, maximize: bool) -> Array:
    dtype = compute_dtype(cost)
    wide = -cost.astype(dtype) if maximize else cost.astype(dtype)
    wide = jnp.where(jnp.isfinite(wide), wide, jnp.inf)
    return _over_batch(_columns_of_rows, wide)


def _solve_masked(cost: Array, where: Array, kv_where: Array, *, maximize: bool) -> Array:
    """Solves the square problem in which what does not exist costs nothing, but may only make up for a missing side."""
    n, m = cost.shape[-2:]
    size, dtype = max(n, m), compute_dtype(cost)
    wide = -cost.astype(dtype) if maximize else cost.astype(dtype)
    both = where[..., :, None] & kv_where[..., None, :]
    wide = jnp.where(both & jnp.isfinite(wide), wide, jnp.where(both, jnp.inf, 0.0))
    more_rows = jnp.sum(where, axis=-1) > jnp.sum(kv_where, axis=-1)
    pad = [(0, 0)] * (cost.ndim - 2)
    wide = jnp.pad(wide, [*pad, (0, size - n), (0, size - m)])
    rows = jnp.pad(where, [*pad, (0, size - n)])[..., :, None]
    columns = jnp.pad(kv_where, [*pad, (0, size - m)])[..., None, :]
    forbidden = jnp.where(more_rows[..., None, None], ~rows & columns, rows & ~columns)
    found = _over_batch(_columns_of_rows, jnp.where(forbidden, jnp.inf, wide))[..., :n]
    taken = jnp.take_along_axis(jnp.pad(kv_where, [*pad, (0, size - m)]), jnp.maximum(found, 0), axis=-1)
    return jnp.where(where & taken & (found >= 0), found, -1)


def _over_batch(solve, cost: Array) -> Array:
    batch = cost.shape[:-2]
    if not batch:
        return solve(cost)
    return jax.vmap(solve)(cost.reshape(-1, *cost.shape[-2:])).reshape(*batch, cost.shape[-2])


def _columns_of_rows(cost: Array) -> Array:
    n, m = cost.shape
    if 0 in (n, m):
        return match_varying(jnp.full(n, -1, jnp.int32), cost)[0]
    if n > m:
        rows = _columns_of_rows(cost.T)
        free = match_varying(jnp.full(n, -1, jnp.int32), rows)[0]
        return free.at[jnp.where(rows >= 0, rows, n)].set(jnp.arange(m, dtype=jnp.int32), mode="drop")
    infinity = jnp.full((), jnp.inf, cost.dtype)

    def add_row(state, row):
        """Finds the cheapest path from an unassigned row to a free column, and swaps the pairs along it."""
        u, v, column_of, row_of, feasible = state
        row = match_varying(row, u)[0]

        def extend(search):
            """Settles the nearest column that is not settled yet, as Dijkstra does."""
            current, length, distance, parent, settled, _ = search
            through = length + cost[current] - u[current] - v
            shorter = ~settled & (through < distance)
            distance, parent = jnp.where(shorter, through, distance), jnp.where(shorter, current, parent)
            open_distance = jnp.where(settled, infinity, distance)
            column = jnp.argmin(open_distance).astype(jnp.int32)
            length = open_distance[column]
            settled = settled.at[column].set(True)
            # The end of the path: a free column, or -2 where no column can be reached.
            end = jnp.where(jnp.isfinite(length), jnp.where(row_of[column] < 0, column, -1), -2)
            return row_of[column], length, distance, parent, settled, end

        nothing = jnp.full_like(row_of, -1)
        search = (row, jnp.zeros_like(u[0]), jnp.full_like(v, jnp.inf), nothing, nothing >= 0, jnp.full_like(row, -1))
        search = match_varying(search, u)[0]
        _, length, distance, parent, settled, end = jax.lax.while_loop(lambda s: s[-1] == -1, extend, search)
        found = end >= 0

        # Rows on settled columns, and the new row, grow cheaper by what the path was longer than their own way.
        spare = jnp.where(settled & found, jnp.where(jnp.isfinite(length), length, 0.0) - distance, 0.0)
        spare = jnp.where(jnp.isfinite(spare), spare, 0.0)
        u = u.at[jnp.where(row_of >= 0, row_of, n)].add(spare, mode="drop")
        u = u.at[row].add(jnp.where(found, length, 0.0))
        v = v - spare

        def swap(pairs):
            column, column_of, row_of = pairs
            owner = parent[column]
            before = column_of[owner]
            column_of, row_of = column_of.at[owner].set(column), row_of.at[column].set(owner)
            return jnp.where(owner == row, -1, before), column_of, row_of

        start = (jnp.where(found, end, -1), column_of, row_of)
        _, column_of, row_of = jax.lax.while_loop(lambda p: p[0] >= 0, swap, start)
        return (u, v, column_of, row_of, feasible & found), None

    start = (
        jnp.zeros(n, cost.dtype),
        jnp.zeros(m, cost.dtype),
        jnp.full(n, -1, jnp.int32),
        jnp.full(m, -1, jnp.int32),
        jnp.ones((), bool),
    )
    start, cost = match_varying(start, cost)
    (_, _, column_of, _, feasible), _ = jax.lax.scan(add_row, start, jnp.arange(n, dtype=jnp.int32))
    return jnp.where(feasible, column_of, -1)
