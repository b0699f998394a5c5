"""`grouped_matmul` in Pallas, for TPU (Mosaic) and GPU (Triton).

Rows are cut into tiles. A tile is visited once for each group that has rows in it, so at most `tiles + groups` visits
are made, whatever the sizes. The rows behind the last group are one more group, whose product is 0.

Nothing here asks which device is present: block shapes are arguments.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from jaxlab._compat import pallas, pallas_tpu, pallas_triton, shape_like
from jaxlab.ops.masked import compute_dtype

# Imported with this module: JAX 0.12 forgets what it has traced when Pallas is first imported in the middle of a trace.
pl, tpu, triton = pallas(), pallas_tpu(), pallas_triton()

TPU_TILES = (512, 512, 1024)  # rows, inner, columns
GPU_TILES = (64, 64, 128)
GPU_WARPS, GPU_STAGES = 4, 3


def visits(sizes: Array, rows: int, tile: int) -> tuple[Array, Array, Array]:
    """Returns `offsets [E + 2]`, and of every visit its `group` (E = behind the last one) and its `tile` of rows.

    Visits are in the order of the rows. Those that are not needed repeat the last tile for group E; one more entry of
    `group` stands at the end, unlike any group.
    """
    groups, tiles = sizes.shape[0], rows // tile
    ends = jnp.minimum(jnp.cumsum(sizes), rows)
    offsets = jnp.concatenate([jnp.zeros(1, ends.dtype), ends, jnp.full(1, rows, ends.dtype)]).astype(jnp.int32)
    first, last = offsets[:-1] // tile, (offsets[1:] + tile - 1) // tile
    number = jnp.where(offsets[1:] > offsets[:-1], last - first, 0)
    count = tiles + groups
    group = jnp.repeat(jnp.arange(groups + 1, dtype=jnp.int32), number, total_repeat_length=count)
    before = jnp.cumsum(number) - number
    place = jnp.arange(count, dtype=jnp.int32)
    needed = place < jnp.sum(number)
    group = jnp.where(needed, group, groups)
    tile_of = jnp.where(needed, first[group] + place - before[group], tiles - 1)
    return offsets, jnp.concatenate([group, jnp.full(1, groups + 1, jnp.int32)]), tile_of.astype(jnp.int32)


def on_tpu(
    lhs: Array,
    rhs: Array,
    sizes: Array,
    *,
    transpose_rhs: bool,
    dtype=None,
    tiles: tuple[int, int, int] = TPU_TILES,
    interpret=False,
) -> Array:
    """Returns the grouped product [M, N] in `dtype`, by default that of `lhs`; arguments as in `grouped_matmul`."""
    rows, columns, groups = lhs.shape[0], rhs.shape[1 if transpose_rhs else 2], rhs.shape[0]
    height, inner, width = (_block(n, t) for n, t in zip((rows, lhs.shape[1], columns), tiles, strict=True))
    lhs = _padded(lhs, height, inner)
    rhs = _padded(rhs, width, inner) if transpose_rhs else _padded(rhs, inner, width)
    total_rows, depth = lhs.shape
    total_columns = rhs.shape[1 if transpose_rhs else 2]
    offsets, group, tile_of = visits(sizes, total_rows, height)
    steps, wide = depth // inner, compute_dtype(lhs)

    def kernel(offsets, group, tile_of, lhs_ref, rhs_ref, out_ref, total):
        visit, step = pl.program_id(1), pl.program_id(2)
        own, tile = group[visit], tile_of[visit]

        @pl.when(step == 0)
        def _():
            total[...] = jnp.zeros_like(total)

        @pl.when(own < groups)
        def _():
            contract = ((1,), (1,)) if transpose_rhs else ((1,), (0,))
            w = rhs_ref[...].astype(lhs_ref.dtype)
            total[...] += jax.lax.dot_general(lhs_ref[...], w, (contract, ((), ())), preferred_element_type=wide)

        @pl.when(step == steps - 1)
        def _():
            row = tile * height + jax.lax.broadcasted_iota(jnp.int32, out_ref.shape, 0)
            mine = (row >= offsets[own]) & (row < offsets[own + 1])
            new = (visit == 0) | (tile != tile_of[jnp.maximum(visit - 1, 0)])
            # The block stays in memory from one visit of a tile to the next; what it holds at the first is undefined.
            kept = jnp.where(new, jnp.zeros_like(out_ref), out_ref[...])
            out_ref[...] = jnp.where(mine, total[...].astype(out_ref.dtype), kept)

    def of_rhs(n, v, k, offsets, group, tile_of):
        own = jnp.minimum(group[v], groups - 1)
        return (own, n, k) if transpose_rhs else (own, k, n)

    call = pl.pallas_call(
        kernel,
        out_shape=shape_like((total_rows, total_columns), dtype or lhs.dtype, lhs, rhs, sizes),
        grid_spec=tpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(total_columns // width, tile_of.shape[0], steps),
            in_specs=[
                pl.BlockSpec((height, inner), lambda n, v, k, offsets, group, tile_of: (tile_of[v], k)),
                pl.BlockSpec((None, width, inner) if transpose_rhs else (None, inner, width), of_rhs),
            ],
            out_specs=pl.BlockSpec((height, width), lambda n, v, k, offsets, group, tile_of: (tile_of[v], n)),
            scratch_shapes=[tpu.VMEM((height, width), wide)],
        ),
        compiler_params=tpu.CompilerParams(dimension_semantics=("parallel", "arbitrary", "arbitrary")),
        cost_estimate=_cost(lhs, rhs, total_columns),
        interpret=interpret,
    )
    return call(offsets, group, tile_of, lhs, rhs)[:rows, :columns]


def outer_on_tpu(
    lhs: Array, dy: Array, sizes: Array, *, dtype, tiles: tuple[int, int, int] = TPU_TILES, interpret=False
) -> Array:
    """Returns for each group `lhs_e^T dy_e` [E, K, N] in `dtype`."""
    groups, inner_size, columns = sizes.shape[0], lhs.shape[1], dy.shape[1]
    height, inner, width = (_block(n, t) for n, t in zip((*lhs.shape, columns), tiles, strict=True))
    lhs, dy = _padded(lhs, height, inner), _padded(dy, height, width)
    offsets, group, tile_of = visits(sizes, lhs.shape[0], height)
    wide = compute_dtype(lhs)

    def kernel(offsets, group, tile_of, lhs_ref, dy_ref, out_ref, total):
        visit = pl.program_id(2)
        own = group[visit]

        @pl.when((visit == 0) | (own != group[jnp.maximum(visit - 1, 0)]))
        def _():
            total[...] = jnp.zeros_like(total)

        @pl.when(own < groups)
        def _():
            def of_group(ref):
                row = tile_of[visit] * height + jax.lax.broadcasted_iota(jnp.int32, ref.shape, 0)
                mine = (row >= offsets[own]) & (row < offsets[own + 1])
                return jnp.where(mine, ref[...], jnp.zeros_like(ref))

            contract = (((0,), (0,)), ((), ()))
            total[...] += jax.lax.dot_general(
                of_group(lhs_ref), of_group(dy_ref), contract, preferred_element_type=wide
            )

        @pl.when((own < groups) & (own != group[visit + 1]))
        def _():
            out_ref[...] = total[...].astype(out_ref.dtype)

    def of_out(k, n, v, offsets, group, tile_of):
        return jnp.minimum(group[v], groups - 1), k, n

    call = pl.pallas_call(
        kernel,
        out_shape=shape_like((groups, lhs.shape[1], dy.shape[1]), dtype, lhs, dy, sizes),
        grid_spec=tpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(lhs.shape[1] // inner, dy.shape[1] // width, tile_of.shape[0]),
            in_specs=[
                pl.BlockSpec((height, inner), lambda k, n, v, offsets, group, tile_of: (tile_of[v], k)),
                pl.BlockSpec((height, width), lambda k, n, v, offsets, group, tile_of: (tile_of[v], n)),
            ],
            out_specs=pl.BlockSpec((None, inner, width), of_out),
            scratch_shapes=[tpu.VMEM((inner, width), wide)],
        ),
        compiler_params=tpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=_cost(lhs, dy, dy.shape[1]),
        interpret=interpret,
    )
    out = call(offsets, group, tile_of, lhs, dy)
    return _of_groups_with_rows(out, offsets)[:, :inner_size, :columns]


def on_gpu(
    lhs: Array,
    rhs: Array,
    sizes: Array,
    *,
    transpose_rhs: bool,
    dtype=None,
    tiles: tuple[int, int, int] = GPU_TILES,
    interpret=False,
) -> Array:
    """Returns the grouped product [M, N] in `dtype`, by default that of `lhs`; arguments as in `grouped_matmul`."""
    rows, columns, groups = lhs.shape[0], rhs.shape[1 if transpose_rhs else 2], rhs.shape[0]
    height, inner, width = tiles
    lhs = _padded(lhs, height, inner)
    rhs = _padded(rhs, width, inner) if transpose_rhs else _padded(rhs, inner, width)
    total_columns, wide = rhs.shape[1 if transpose_rhs else 2], compute_dtype(lhs)
    offsets, group, tile_of = visits(sizes, lhs.shape[0], height)
    steps = lhs.shape[1] // inner

    def kernel(offsets, group, tile_of, lhs_ref, rhs_ref, out_ref):
        visit, column = pl.program_id(0), pl.program_id(1)
        own, tile = group[visit], tile_of[visit]
        row = tile * height + jnp.arange(height)
        mine = ((row >= offsets[own]) & (row < offsets[own + 1]))[:, None]
        matrix, at = jnp.minimum(own, groups - 1), pl.ds(column * width, width)

        def add(step, total):
            part = pl.ds(step * inner, inner)
            x = triton.load(lhs_ref.at[pl.ds(tile * height, height), part], mask=mine, other=0.0)
            if transpose_rhs:
                w = triton.load(rhs_ref.at[matrix, at, part]).astype(x.dtype).T
            else:
                w = triton.load(rhs_ref.at[matrix, part, at]).astype(x.dtype)
            return total + jnp.dot(x, w, preferred_element_type=wide)

        needed = jnp.where(own < groups, jnp.int32(steps), jnp.int32(0))
        total = jax.lax.fori_loop(jnp.int32(0), needed, add, jnp.zeros((height, width), wide))
        triton.store(out_ref.at[pl.ds(tile * height, height), at], total.astype(out_ref.dtype), mask=mine)

    call = pl.pallas_call(
        kernel,
        out_shape=shape_like((lhs.shape[0], total_columns), dtype or lhs.dtype, lhs, rhs, sizes),
        grid=(tile_of.shape[0], total_columns // width),
        compiler_params=triton.CompilerParams(num_warps=GPU_WARPS, num_stages=GPU_STAGES),
        cost_estimate=_cost(lhs, rhs, total_columns),
        interpret=interpret,
    )
    return call(offsets, group, tile_of, lhs, rhs)[:rows, :columns]


def outer_on_gpu(
    lhs: Array, dy: Array, sizes: Array, *, dtype, tiles: tuple[int, int, int] = GPU_TILES, interpret=False
) -> Array:
    """Returns for each group `lhs_e^T dy_e` [E, K, N] in `dtype`: one program for each block of each matrix."""
    groups, inner_size, columns = sizes.shape[0], lhs.shape[1], dy.shape[1]
    height, inner, width = tiles
    lhs, dy = _padded(lhs, height, inner), _padded(dy, height, width)
    wide = compute_dtype(lhs)
    ends = jnp.minimum(jnp.cumsum(sizes), lhs.shape[0])
    offsets = jnp.concatenate([jnp.zeros(1, ends.dtype), ends]).astype(jnp.int32)

    def kernel(offsets, lhs_ref, dy_ref, out_ref):
        own, k, n = (pl.program_id(i) for i in range(3))
        start, end = offsets[own], offsets[own + 1]

        def add(tile, total):
            row = tile * height + jnp.arange(height)
            mine = ((row >= start) & (row < end))[:, None]
            at = pl.ds(tile * height, height)
            x = triton.load(lhs_ref.at[at, pl.ds(k * inner, inner)], mask=mine, other=0.0)
            g = triton.load(dy_ref.at[at, pl.ds(n * width, width)], mask=mine, other=0.0)
            return total + jnp.dot(x.T, g, preferred_element_type=wide)

        last = jnp.where(end > start, (end + height - 1) // height, start // height)
        total = jax.lax.fori_loop(start // height, last, add, jnp.zeros((inner, width), wide))
        at = (own, pl.ds(k * inner, inner), pl.ds(n * width, width))
        triton.store(out_ref.at[at], total.astype(out_ref.dtype))

    call = pl.pallas_call(
        kernel,
        out_shape=shape_like((groups, lhs.shape[1], dy.shape[1]), dtype, lhs, dy, sizes),
        grid=(groups, lhs.shape[1] // inner, dy.shape[1] // width),
        compiler_params=triton.CompilerParams(num_warps=GPU_WARPS, num_stages=GPU_STAGES),
        cost_estimate=_cost(lhs, dy, dy.shape[1]),
        interpret=interpret,
    )
    return call(offsets, lhs, dy)[:, :inner_size, :columns]


def _block(size: int, tile: int) -> int:
    """Returns the tile, or for an array that is smaller the whole of it in units of 16."""
    return min(tile, -(-size // 16) * 16)


def _padded(x: Array, height: int, width: int) -> Array:
    """Returns the array with zeros behind its last two axes, up to multiples of the block."""
    pads = [(0, 0)] * (x.ndim - 2) + [(0, -x.shape[-2] % height), (0, -x.shape[-1] % width)]
    return jnp.pad(x, pads) if any(p != (0, 0) for p in pads) else x


def _of_groups_with_rows(out: Array, offsets: Array) -> Array:
    """Blocks of empty groups are never written."""
    some = (offsets[1:-1] > offsets[:-2])[:, None, None]
    return jnp.where(some, out, jnp.zeros((), out.dtype))


def _cost(a: Array, b: Array, columns: int):
    size = a.dtype.itemsize
    moved = a.size * size + b.size * b.dtype.itemsize + a.shape[0] * columns * size
    return pl.CostEstimate(flops=2 * a.size * columns, bytes_accessed=moved, transcendentals=0)


# The product and the outer product of each platform.
FORMS = {"tpu": (on_tpu, outer_on_tpu), "cuda": (on_gpu, outer_on_gpu)}
