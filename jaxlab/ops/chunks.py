"""Work over many rows in blocks, so that memory follows the block and not the square of the rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def map_rows(function: Callable[..., Any], *rows: Any, chunk: int | None = None) -> Any:
    """Returns `function(*rows)`, computed for `chunk` rows at a time, forward and backward.

    The backward pass computes each block again instead of keeping what the forward pass made of it: a loss over all
    pairs of N rows needs memory for `chunk x N` pairs in place of `N x N`.

    Args:
        function: of blocks of rows to a pytree of arrays with the same leading axis; what it makes of one row must not
            depend on the other rows of the block.
        *rows: arrays (or pytrees) with one leading axis N.
        chunk: rows of a block; None, or at least N, does all at once. Need not divide N.

    Raises:
        ValueError: `chunk` is below 1.

    Example:
        >>> x = jnp.arange(5.0)
        >>> map_rows(lambda block: jnp.sum(block[:, None] * x[None, :], axis=1), x, chunk=2).tolist()
        [0.0, 10.0, 20.0, 30.0, 40.0]
    """
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk={chunk} must be at least 1")
    size = jax.tree.leaves(rows)[0].shape[0]
    if chunk is None or chunk >= size:
        return function(*rows)
    blocks = -(-size // chunk)

    def split(x):
        # The last block is filled with copies of the first row, which are real values, so that nothing becomes NaN.
        filled = jnp.concatenate([x, jnp.broadcast_to(x[:1], (blocks * chunk - size, *x.shape[1:]))])
        return filled.reshape(blocks, chunk, *x.shape[1:])

    out = jax.lax.map(lambda block: jax.checkpoint(function)(*block), jax.tree.map(split, rows))
    return jax.tree.map(lambda y: y.reshape(blocks * chunk, *y.shape[2:])[:size], out)
