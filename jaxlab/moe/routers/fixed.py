"""Routers without parameters: what is known of a token, not what it looks like, decides its experts."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxlab.moe.plans import plan_from_ids
from jaxlab.ops.masked import compute_dtype
from jaxlab.types import Layer


def hash_router(table: Array, num_experts: int) -> Layer:
    """Returns a router without parameters that sends each token to the experts that a table holds for its id.

    Args:
        table: int [V] or [V, k], experts of each id; distinct in a row, and -1 = none. Random
            (`jax.random.randint`), or balanced by frequency (`balanced_hash`).
        num_experts: E.

    Returns:
        A `Layer`: `init(key, d)` gives `{}`; `apply(params, x [T, d], ids=int [T], where=None)` gives a `RoutingPlan`
        of A = T k assignments of weight 1 / k. Ids outside 0 .. V - 1 get none.

    Raises:
        ValueError: `table` is not [V] or [V, k]; in `apply`, a shape does not fit.

    Example:
        >>> router = hash_router(jnp.array([2, 0, 1]), num_experts=3)
        >>> plan = jax.jit(router.apply)({}, jnp.ones((4, 8)), ids=jnp.array([0, 0, 1, 2]))
        >>> plan.counts.tolist()
        [1, 1, 2]

    Source:
        Roller et al., Hash Layers For Large Sparse Models, arXiv 2106.04426. Several experts an id, with equal weights,
        as in the comparison of COMET, arXiv 2306.02824.
    """
    table = jnp.asarray(table)
    if table.ndim not in (1, 2) or not jnp.issubdtype(table.dtype, jnp.integer):
        raise ValueError(f"table must be int [V] or [V, k], got {table.dtype} {table.shape}")
    table = table[:, None] if table.ndim == 1 else table
    size, k = table.shape

    def init(key, size):
        del key, size
        return {}

    def apply(params, x, *, ids, where=None):
        del params
        if x.ndim != 2 or ids.shape != x.shape[:1]:
            raise ValueError(f"x and ids must be [T, d] and [T], got {x.shape} and {ids.shape}")
        known = (ids >= 0) & (ids < size)
        experts = jnp.where(known[:, None], jnp.take(table, jnp.clip(ids, 0, size - 1), axis=0), -1)
        weights = jnp.full(experts.shape, 1 / k, compute_dtype(x))
        each = jax.nn.one_hot(experts, num_experts, dtype=weights.dtype)
        probs = jnp.sum(each, axis=1) / k
        keep = known if where is None else known & where
        return plan_from_ids(experts, weights, probs, jnp.zeros_like(probs), where=keep)

    return Layer(init, apply)


def balanced_hash(frequencies: np.ndarray, num_experts: int) -> np.ndarray:
    """Returns the table that gives ids, from the most frequent on, to the expert with the least load so far (host).

    Args:
        frequencies: >= 0 [V], how often each id occurs.
        num_experts: E.

    Returns:
        int32 [V], for `hash_router`.

    Raises:
        ValueError: `frequencies` is not [V] or `num_experts` is less than 1.

    Example:
        >>> balanced_hash(np.array([5, 1, 4, 1]), 2).tolist()
        [0, 1, 1, 0]

    Source:
        Roller et al., arXiv 2106.04426, section 3.2 ("balanced assignment").
    """
    frequencies = np.asarray(frequencies, np.float64)
    if frequencies.ndim != 1 or num_experts < 1:
        raise ValueError(f"frequencies must be [V] and num_experts={num_experts} at least 1, got {frequencies.shape}")
    table, load = np.zeros(len(frequencies), np.int32), np.zeros(num_experts)
    for i in np.argsort(-frequencies, kind="stable"):
        table[i] = load.argmin()
        load[table[i]] += frequencies[i]
    return table
