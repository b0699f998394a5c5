"""What linear routers share: one matrix, and tokens checked, cleaned and widened."""

from __future__ import annotations

import jax
from jax import Array

from jaxlab.ops.masked import compute_dtype, zero_where_false


def linear_init(num_experts: int):
    """Returns the `init(key, d)` of one matrix `w` [d, E]."""

    def init(key, size):
        return {"w": jax.random.normal(key, (size, num_experts)) * 0.02}

    return init


def clean_tokens(x: Array, where: Array | None) -> Array:
    """Returns `x` [T, d] in at least float32, with zeros in the rows that the mask leaves out."""
    if x.ndim != 2:
        raise ValueError(f"x must be [tokens, features], got shape {x.shape}")
    if where is not None and where.shape != x.shape[:1]:
        raise ValueError(f"where has shape {where.shape}, expected {x.shape[:1]}")
    x = zero_where_false(x, where)
    return x.astype(compute_dtype(x))


def linear(params: dict, x: Array) -> Array:
    """Returns the logits `x w`."""
    return x @ params["w"].astype(x.dtype)
