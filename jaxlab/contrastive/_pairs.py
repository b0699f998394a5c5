"""What losses over pairs of rows share: the mask, unit rows, and the column of the gathered rows that is one's own."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from jaxlab.ops.collectives import axis_index
from jaxlab.ops.masked import compute_dtype, safe_normalize, zero_where_false


def checked_where(where: Array | None, rows: int, temperature: float | Array = 1.0) -> Array:
    """Returns bool [rows], True where `where` is None; raises if it or the temperature does not fit."""
    if isinstance(temperature, int | float) and not temperature > 0:  # a learnt one is an array, known later
        raise ValueError(f"temperature={temperature} must be positive")
    if where is not None and where.shape != (rows,):
        raise ValueError(f"where has shape {where.shape}, expected ({rows},)")
    return jnp.ones(rows, bool) if where is None else where


def unit_rows(x: Array, keep: Array) -> Array:
    """Returns the rows at length 1 in the accumulation dtype, 0 where they are masked or zero."""
    return safe_normalize(zero_where_false(x, keep).astype(compute_dtype(x)))


def own_index(rows: int, axis_name: str | None) -> Array:
    """Returns int [rows]: which of the gathered rows each row is."""
    return axis_index(axis_name) * rows + jnp.arange(rows)


def own_columns(rows: int, total: int, axis_name: str | None) -> Array:
    """Returns bool [rows, total]: which of the gathered columns is the row itself."""
    return own_index(rows, axis_name)[:, None] == jnp.arange(total)[None, :]
