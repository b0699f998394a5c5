"""`expert_ffn` on TPU and GPU: grouped products in Pallas; gathers and elementwise work are the compiler's.

Kept between forward and backward are the arguments alone. What is made for each assignment in the backward are its row,
the hidden layer and their gradients; the output of the down product is never needed there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax import Array

from jaxlab.ops.collectives import match_varying
from jaxlab.ops.masked import compute_dtype


def forward(
    product: Callable[..., Array],
    activation: Callable[..., Array],
    names: tuple[str, ...],
    x: Array,
    weights: Mapping[str, Array],
    token: Array,
    weight: Array,
    counts: Array,
) -> Array:
    """Returns `y [T, d]`; `product(lhs, rhs, sizes, transpose_rhs=, dtype=)` is the grouped product of a platform."""
    wide = compute_dtype(x)
    rows = _gathered(x, token, counts)
    hidden = activation(*_inputs(product, names, rows, weights, counts)).astype(x.dtype)
    out = product(hidden, weights["down"].astype(x.dtype), counts, transpose_rhs=False, dtype=wide)
    return _added(x, token, weight.astype(wide)[:, None] * out)


def backward(
    product: Callable[..., Array],
    outer: Callable[..., Array],
    activation: Callable[..., Array],
    names: tuple[str, ...],
    x: Array,
    weights: Mapping[str, Array],
    token: Array,
    weight: Array,
    counts: Array,
    dy: Array,
) -> tuple[Array, dict[str, Array], Array]:
    """Returns the gradients by x, weights and `weight`; `outer(lhs, dy, sizes, dtype=)` gives lhs_e^T dy_e."""
    wide = compute_dtype(x)
    rows, dy_rows = _gathered(x, token, counts), _gathered(dy, token, counts)
    hidden, pull = jax.vjp(activation, *_inputs(product, names, rows, weights, counts))
    d_hidden = product(dy_rows, weights["down"].astype(x.dtype), counts, transpose_rhs=True, dtype=wide)
    gate = weight.astype(wide)[:, None]
    d_inputs = [d.astype(x.dtype) for d in pull(gate * d_hidden)]
    scaled = (gate * dy_rows.astype(wide)).astype(x.dtype)
    dw = {name: outer(rows, d, counts, dtype=weights[name].dtype) for name, d in zip(names, d_inputs, strict=True)}
    dw["down"] = outer(hidden.astype(x.dtype), scaled, counts, dtype=weights["down"].dtype)
    d_rows = sum(
        product(d, weights[name].astype(x.dtype), counts, transpose_rhs=True, dtype=wide)
        for name, d in zip(names, d_inputs, strict=True)
    )
    d_weight = jnp.sum(d_hidden * hidden.astype(x.dtype).astype(wide), axis=1)
    return _added(x, token, d_rows), dw, d_weight.astype(weight.dtype)


def _inputs(product, names, rows, weights, counts):
    options = {"transpose_rhs": False, "dtype": compute_dtype(rows)}
    return [product(rows, weights[name].astype(rows.dtype), counts, **options) for name in names]


def _gathered(x, token, counts):
    """Returns the row of each assignment; rows that the plan does not use are 0, whatever they point at."""
    used = (jnp.arange(token.shape[0]) < jnp.sum(counts))[:, None]
    return jnp.where(used, jnp.take(x, token, axis=0, mode="clip"), jnp.zeros((), x.dtype))


def _added(like, token, rows):
    start = match_varying(jnp.zeros(like.shape, rows.dtype), rows)[0]
    return start.at[token].add(rows, mode="drop").astype(like.dtype)
