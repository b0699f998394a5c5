"""Experts: E networks of one shape as one set of stacked parameters, applied to what a plan gives them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlab.kernels._tiles import cascade
from jaxlab.kernels.expert_ffn import expert_ffn
from jaxlab.ops.collectives import all_sum, match_varying
from jaxlab.ops.masked import compute_dtype
from jaxlab.ops.sharding import rows_mixed
from jaxlab.types import Array, Layer

_TILES = (256, 32)  # rows that one call of an expert sees, largest first; what is left goes to the next size


class Experts(NamedTuple):
    """E experts as one set of stacked parameters.

    Attributes:
        num_experts: E.
        init: `params = init(key, d)`, every leaf with a leading axis E.
        apply: `y [T, d] = apply(params, x [T, d], plan)`, the weighted sum over a plan's assignments.
        each: `y [N, d] = each(params of one expert, x [N, d])`, row by row; needed by `capacity` and by slot plans.
    """

    num_experts: int
    init: Callable[..., Any]
    apply: Callable[..., Array]
    each: Callable[..., Array] | None = None


def swiglu_experts(
    num_experts: int, hidden: int, *, model_axis: str | None = None, implementation: str = "auto"
) -> Experts:
    """Returns experts `f_e(x) = (silu(x gate_e) * (x up_e)) down_e`.

    Args:
        num_experts: E.
        hidden: width of the hidden layer of one expert.
        model_axis: mapped axis over which the hidden layer is spread: each device holds `gate` and `up` [E, d, part]
            and `down` [E, part, d], and the results are added over the axis.
        implementation: as in `kernels.expert_ffn`.

    Returns:
        `Experts` with parameters `gate`, `up` [E, d, hidden] and `down` [E, hidden, d].
    """

    def init(key, size):
        key_gate, key_up, key_down = jax.random.split(key, 3)
        return {
            "gate": jax.random.normal(key_gate, (num_experts, size, hidden)) * size**-0.5,
            "up": jax.random.normal(key_up, (num_experts, size, hidden)) * size**-0.5,
            "down": jax.random.normal(key_down, (num_experts, hidden, size)) * hidden**-0.5,
        }

    def apply(params, x, plan):
        return all_sum(expert_ffn(x, params, plan, activation="swiglu", implementation=implementation), model_axis)

    def each(params, x):
        product = functools.partial(jnp.matmul, preferred_element_type=compute_dtype(x))
        w = {name: leaf.astype(x.dtype) for name, leaf in params.items()}
        h = (jax.nn.silu(product(x, w["gate"])) * product(x, w["up"])).astype(x.dtype)
        return all_sum(product(h, w["down"]).astype(x.dtype), model_axis)

    return Experts(num_experts, init, apply, each)


def layer_experts(num_experts: int, layer: Layer) -> Experts:
    """Returns E experts that are copies, each with its own parameters, of any layer d -> d.

    Only the assignments of the plan are computed, expert by expert in tiles of rows; the backward pass runs the layer
    again, so that nothing is kept but the arguments.

    Args:
        num_experts: E.
        layer: `Layer` without key or training mode that treats every row by itself. It must be a function of its
            parameters and rows alone. (`apply` of the experts also takes one that changes the size: y is [T, size].)

    Returns:
        `Experts`; its parameters are those of the layer with a leading axis E, drawn from one key each.

    Raises:
        ValueError: `num_experts` is less than 1.

    Example:
        >>> from jaxlab import moe
        >>> scale = Layer(lambda key, d: {"s": jax.random.normal(key, (d,))}, lambda p, x: x * p["s"][None])
        >>> layer = moe.moe_layer(moe.top_k_router(3, 1), layer_experts(3, scale))
        >>> jax.eval_shape(lambda key: layer.apply(layer.init(key, 2), jnp.ones((5, 2))), jax.random.key(0))[0].shape
        (5, 2)
    """
    if num_experts < 1:
        raise ValueError(f"num_experts={num_experts} must be at least 1")

    def init(key, size):
        return jax.vmap(lambda key: layer.init(key, size))(jax.random.split(key, num_experts))

    def apply(params, x, plan):
        args = match_varying(x, params, plan.token, plan.weight, plan.counts)
        rows = plan.token.shape[0]
        one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), params)
        size = jax.eval_shape(layer.apply, one, jax.ShapeDtypeStruct((1, x.shape[1]), x.dtype)).shape[1]
        if 0 in (rows, x.shape[0]):
            return match_varying(jnp.zeros((x.shape[0], size), x.dtype), args)[0]
        tiles = tuple(size for size in _TILES if size <= rows) or (rows,)
        return rows_mixed(functools.partial(_grouped, (layer.apply, tiles, size)))(*args)

    return Experts(num_experts, init, apply, layer.apply)


def upcycle(params: Any, num_experts: int) -> Any:
    """Returns a dense network's parameters E times, as experts that all do the same (sparse upcycling).

    With any router whose weights sum to 1 for every token, the mixture then is the dense network.

    Args:
        params: pytree of arrays, of one feed-forward network.
        num_experts: E.

    Returns:
        The pytree with a leading axis E on every leaf.

    Raises:
        ValueError: `num_experts` is less than 1.

    Example:
        >>> upcycle({"w": jnp.ones((2, 3))}, 4)["w"].shape
        (4, 2, 3)

    Source:
        Komatsuzaki et al., Sparse Upcycling, arXiv 2212.05055.
    """
    if num_experts < 1:
        raise ValueError(f"num_experts={num_experts} must be at least 1")
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf[None], (num_experts, *leaf.shape)), params)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped(static, x, params, token, weight, counts):
    # Under vmap the loops' trip counts would become those of the longest member.
    run = jax.custom_batching.sequential_vmap(functools.partial(_forward, static))
    return run(x, params, token, weight, counts)


def _grouped_forward(static, *args):
    return _grouped(static, *args), args


def _grouped_backward(static, saved, dy):
    dx, dp, d_weight = jax.custom_batching.sequential_vmap(functools.partial(_backward, static))(*saved, dy)
    return dx, dp, None, d_weight, None


_grouped.defvjp(_grouped_forward, _grouped_backward)


def _forward(static, x, params, token, weight, counts):
    function, tiles, features = static
    dtype = compute_dtype(x)
    token, gates = (jnp.pad(a, (0, tiles[-1])) for a in (token, weight.astype(dtype)))

    def expert(y, xs):
        p, first, count = xs

        def tile(size, done, y):
            rows, valid = _rows(token, first + done, size, count - done)
            out = function(p, jnp.where(valid, x[rows], jnp.zeros((), x.dtype))).astype(dtype)
            gate = jax.lax.dynamic_slice_in_dim(gates, first + done, size)[:, None]
            return y.at[rows].add(jnp.where(valid, gate * out, 0.0))

        return cascade(tiles, count, tile, y), None

    start = match_varying(jnp.zeros((x.shape[0], features), dtype), x)[0]
    return jax.lax.scan(expert, start, (params, jnp.cumsum(counts) - counts, counts))[0].astype(x.dtype)


def _backward(static, x, params, token, weight, counts, dy):
    function, tiles, _ = static
    dtype, assignments = compute_dtype(x), token.shape[0]
    token, gates = (jnp.pad(a, (0, tiles[-1])) for a in (token, weight.astype(dtype)))

    def expert(carry, xs):
        p, first, count = xs

        def tile(size, done, carry):
            dx, d_gates, dp = carry
            rows, valid = _rows(token, first + done, size, count - done)
            out, pull = jax.vjp(function, p, jnp.where(valid, x[rows], jnp.zeros((), x.dtype)))
            dy_tile = jnp.where(valid, dy[rows], jnp.zeros((), dy.dtype)).astype(dtype)
            gate = jnp.where(valid, jax.lax.dynamic_slice_in_dim(gates, first + done, size)[:, None], 0.0)
            # Rows of the next expert are set to 0 here and written by it later.
            d_gate = jnp.sum(dy_tile * out.astype(dtype), axis=1)
            d_gates = jax.lax.dynamic_update_slice_in_dim(d_gates, d_gate, first + done, axis=0)
            added, dx_tile = pull((gate * dy_tile).astype(out.dtype))
            dp = jax.tree.map(lambda a, b: a + b.astype(a.dtype), dp, added)
            return dx.at[rows].add(jnp.where(valid, dx_tile.astype(dtype), 0.0)), d_gates, dp

        zeros = jax.tree.map(lambda leaf: match_varying(jnp.zeros(leaf.shape, compute_dtype(leaf)), x)[0], p)
        dx, d_gates, dp = cascade(tiles, count, tile, (*carry, zeros))
        return (dx, d_gates), jax.tree.map(lambda d, leaf: d.astype(leaf.dtype), dp, p)

    start = match_varying((jnp.zeros(x.shape, dtype), jnp.zeros(gates.shape, dtype)), x)[0]
    (dx, d_gates), dp = jax.lax.scan(expert, start, (params, jnp.cumsum(counts) - counts, counts))
    return dx.astype(x.dtype), dp, d_gates[:assignments].astype(weight.dtype)


def _rows(token, start, size, left):
    """Returns the tokens [size] of a tile, and as a column which of its rows belong to the expert."""
    return jax.lax.dynamic_slice_in_dim(token, start, size), (jnp.arange(size) < left)[:, None]
