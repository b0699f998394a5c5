"""Products of groups of rows, each with a matrix of its own."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array

from jaxlab.kernels._grouped_pallas import FORMS
from jaxlab.kernels._select import by_platform, choose
from jaxlab.kernels._tiles import cascade, dot, pack, unpack
from jaxlab.ops.collectives import match_varying
from jaxlab.ops.masked import compute_dtype
from jaxlab.ops.sharding import rows_mixed

_TILES = (512, 128, 64, 32)  # rows of one product, largest first; what is left of a group goes to the next size


def grouped_matmul(
    lhs: Array, rhs: Array, group_sizes: Array, *, transpose_rhs: bool = False, implementation: str = "auto"
) -> Array:
    """Returns `lhs[i] @ rhs[e]` for every row i of group e; rows are sorted by group.

    Group e owns the rows `group_sizes[:e].sum() : group_sizes[:e + 1].sum()`. Products are taken in the dtype of `lhs`
    and accumulate in float32. Rows behind the last group give exactly 0 in value and gradient, whatever stands there,
    and an empty group has gradient 0.

    Args:
        lhs: [M, K], floating.
        rhs: [E, K, N], or [E, N, K] with `transpose_rhs`.
        group_sizes: int [E], at least 0; what exceeds M in their sum does not count.
        transpose_rhs: whether the last two axes of `rhs` stand the other way round.
        implementation: "reference" (every group's matrix on every row), "xla" (only what the sizes ask for), "pallas"
            (kernels for TPU and GPU) or "auto" (the kernel on its platforms, elsewhere "xla").

    Returns:
        [M, N] in the dtype of `lhs`.

    Raises:
        ValueError: shapes do not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> rhs = jnp.array([[[1.0]], [[10.0]], [[100.0]]])
        >>> grouped_matmul(jnp.ones((4, 1)), rhs, jnp.array([2, 0, 1])).ravel().tolist()
        [1.0, 1.0, 100.0, 0.0]
    """
    chosen = choose("grouped_matmul", implementation, ("reference", "xla", "pallas"))
    axis = 2 if transpose_rhs else 1
    if lhs.ndim != 2 or rhs.ndim != 3 or rhs.shape[axis] != lhs.shape[1]:
        form = "[E, N, K]" if transpose_rhs else "[E, K, N]"
        raise ValueError(f"lhs and rhs must be [M, K] and {form}, got {lhs.shape} and {rhs.shape}")
    if group_sizes.shape != rhs.shape[:1]:
        raise ValueError(f"group_sizes has shape {group_sizes.shape}, expected {rhs.shape[:1]}, as rhs has matrices")
    args = match_varying(lhs, rhs, jnp.asarray(group_sizes, jnp.int32))
    rows, columns = lhs.shape[0], rhs.shape[1 if transpose_rhs else 2]
    if 0 in lhs.shape + rhs.shape:
        return match_varying(jnp.zeros((rows, columns), lhs.dtype), *args)[0]
    if chosen == "reference":
        return rows_mixed(functools.partial(_reference, transpose_rhs=transpose_rhs))(*args)
    tiles = tuple(size for size in _TILES if size <= rows) or (rows,)
    return rows_mixed(functools.partial(_sorted, transpose_rhs=transpose_rhs, tiles=tiles, chosen=chosen))(*args)


@functools.partial(jax.jit, static_argnames=("transpose_rhs",))
def _reference(lhs, rhs, sizes, *, transpose_rhs):
    ends = jnp.cumsum(sizes)[None, :]
    row = jnp.arange(lhs.shape[0])[:, None]
    member = (row >= ends - sizes[None, :]) & (row < ends)
    lhs = jnp.where(member.any(1, keepdims=True), lhs, jnp.zeros((), lhs.dtype))
    product = "mk,enk->emn" if transpose_rhs else "mk,ekn->emn"
    dtype = compute_dtype(lhs)
    each = jnp.einsum(product, lhs, rhs.astype(lhs.dtype), preferred_element_type=dtype)
    return jnp.einsum("me,emn->mn", member.astype(dtype), each).astype(lhs.dtype)


@functools.partial(jax.jit, static_argnames=("transpose_rhs", "tiles", "chosen"))
def _sorted(lhs, rhs, sizes, *, transpose_rhs, tiles, chosen):
    sizes = jnp.maximum(sizes, 0)
    ends = jnp.minimum(jnp.cumsum(sizes), lhs.shape[0])
    return _grouped((transpose_rhs, tiles, chosen), lhs, rhs, jnp.diff(ends, prepend=0))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped(static, lhs, rhs, sizes):
    return _product(static)(lhs, rhs, sizes)


def _grouped_forward(static, *args):
    return _grouped(static, *args), args


def _grouped_backward(static, saved, dy):
    transpose_rhs, tiles, chosen = static
    lhs, rhs, sizes = saved
    d_lhs = _product((not transpose_rhs, tiles, chosen))(dy, rhs, sizes)
    left, right = (dy, lhs) if transpose_rhs else (lhs, dy)
    d_rhs = _outer_product(static, rhs.dtype)(left, right, sizes)
    return d_lhs.astype(lhs.dtype), d_rhs, None


_grouped.defvjp(_grouped_forward, _grouped_backward)


def _product(static):
    transpose_rhs, tiles, chosen = static
    kernels = {p: functools.partial(product, transpose_rhs=transpose_rhs) for p, (product, _) in FORMS.items()}
    xla = functools.partial(_forward, transpose_rhs=transpose_rhs, tiles=tiles)
    # Under vmap the loops' trip counts would become those of the longest member, and their slices gathers.
    return jax.custom_batching.sequential_vmap(by_platform(chosen, xla, **kernels))


def _outer_product(static, dtype):
    _, tiles, chosen = static
    kernels = {p: functools.partial(outer, dtype=dtype) for p, (_, outer) in FORMS.items()}
    xla = functools.partial(_outer, dtype=dtype, tiles=tiles)
    return jax.custom_batching.sequential_vmap(by_platform(chosen, xla, **kernels))


def _forward(lhs, rhs, sizes, *, transpose_rhs, tiles):
    """Writes group by group; the tail of a group's last tile lies in the next group, which writes it afterwards."""
    dtype, rows = compute_dtype(lhs), lhs.shape[0]
    columns = rhs.shape[1 if transpose_rhs else 2]
    bits = pack(jnp.pad(lhs, ((0, tiles[-1]), (0, 0))))

    def group(out, xs):
        w_bits, first, size = xs
        w = unpack(w_bits, rhs.dtype).astype(lhs.dtype)

        def tile(height, done, out):
            x = unpack(jax.lax.dynamic_slice_in_dim(bits, first + done, height), lhs.dtype)
            y = dot(x, w, 1, 1 if transpose_rhs else 0, dtype).astype(lhs.dtype)
            return jax.lax.dynamic_update_slice_in_dim(out, pack(y), first + done, axis=0)

        return cascade(tiles, size, tile, out), None

    start = match_varying(pack(jnp.zeros((rows + tiles[-1], columns), lhs.dtype)), lhs)[0]
    out, _ = jax.lax.scan(group, start, (pack(rhs), jnp.cumsum(sizes) - sizes, sizes))
    inside = (jnp.arange(rows) < jnp.sum(sizes))[:, None]
    return jnp.where(inside, unpack(out, lhs.dtype)[:rows], jnp.zeros((), lhs.dtype))


def _outer(lhs, dy, sizes, *, dtype, tiles):
    """Returns for each group `lhs_e^T dy_e`."""
    wide = compute_dtype(lhs)
    lhs_bits, dy_bits = (pack(jnp.pad(a, ((0, tiles[-1]), (0, 0)))) for a in (lhs, dy))

    def group(_, xs):
        first, size = xs

        def tile(height, done, total):
            mine = (jnp.arange(height) < size - done)[:, None]
            x, g = (
                jnp.where(mine, unpack(jax.lax.dynamic_slice_in_dim(b, first + done, height), lhs.dtype), 0)
                for b in (lhs_bits, dy_bits)
            )
            return total + dot(x.astype(lhs.dtype), g.astype(lhs.dtype), 0, 0, wide)

        zeros = match_varying(jnp.zeros((lhs.shape[1], dy.shape[1]), wide), lhs)[0]
        return None, cascade(tiles, size, tile, zeros).astype(dtype)

    _, d_rhs = jax.lax.scan(group, None, (jnp.cumsum(sizes) - sizes, sizes))
    return d_rhs
