"""QuantMoE-Bench: Examining Post-Training Quantization for Mixture-of-Experts (2024, arXiv 2406.08155).

Few bits for weights, more where a mixture needs them: shared experts and attention before routed experts, first blocks
before last ones, busy experts before idle ones; and two ways to find out from data, the outliers of a matrix and how
much a block changes its tokens.

    grid        scale = (max - min) / (2^b - 1), zero = 2^(b-1), or round(-min / scale) if not symmetric
    quantised   scale (clip(round(w / scale) + zero, 0, 2^b - 1) - zero), one grid for each output and 128 inputs
    GPTQ        input by input: err_j = (w_j - q_j) / U_jj, later w_i -= U_ji err_j, U the upper Cholesky factor of
                H^-1, H = 2 X'X + damping mean(diag) I
    outliers    max over inputs j of  max_i |w_ji| / mean_i |w_ji|: the matrices with the largest scores get more bits
    importance  mean of cos(block input, block output), predicted from the input: blocks of the lowest get more bits
    average     sum of bits times weights over weights

Matrices are [inputs, outputs], as y = x w wants them; the official ones stand the other way round.

Reconstructed: allocation up to a budget; the share of layers with outliers (25%). A row of one sign gets a symmetric
grid too: officially it keeps one end at 0, which cuts its upper half off.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxlab.ops.masked import compute_dtype, masked_mean, safe_divide, safe_normalize, zero_where_false
from jaxlab.types import Layer


def gptq(
    w: Array, hessian: Array, *, bits: int | Array, group_size: int = 128, damping: float = 0.01, symmetric: bool = True
) -> Array:
    """Returns a matrix with quantised weights that change its outputs least, input by input (GPTQ).

    Args:
        w: float [n, m], inputs by outputs.
        hessian: float [n, n], `2 X'X` of calibration inputs, up to a factor (`update_hessian`); inputs that are always
            0 get weight 0.
        bits: of a weight, 1 to 16 (an array for many matrices under `vmap`).
        group_size: inputs that share a grid, at least 1; grids are set when their group is reached.
        damping: > 0, added to the diagonal, as a share of its mean.
        symmetric: whether grids are.

    Returns:
        [n, m] in the dtype of `w`: dequantised weights. No gradient.

    Raises:
        ValueError: a shape does not fit or an option is out of range.

    Example:
        >>> w = jnp.array([[0.9, -0.2], [0.4, 0.7]])
        >>> run = jax.jit(lambda w: gptq(w, jnp.eye(2), bits=8))
        >>> bool(np.abs(np.asarray(run(w)) - np.asarray(w)).max() < 0.01)
        True

    Source:
        Frantar et al., GPTQ, arXiv 2210.17323; official code of arXiv 2406.08155 (blocks do not change the result).
    """
    if w.ndim != 2 or hessian.shape != (w.shape[0],) * 2:
        raise ValueError(f"w and hessian must be [n, m] and [n, n], got {w.shape} and {hessian.shape}")
    _check(bits, group_size)
    if not damping > 0:
        raise ValueError(f"damping={damping} must be positive")
    size, dtype = w.shape[0], compute_dtype(w)
    weights = jax.lax.stop_gradient(w).astype(dtype)
    hessian = jax.lax.stop_gradient(hessian).astype(dtype)
    dead = jnp.diagonal(hessian) == 0
    weights = jnp.where(dead[:, None], 0.0, weights)
    hessian = hessian + jnp.diag(dead.astype(dtype))
    hessian = hessian + damping * jnp.mean(jnp.diagonal(hessian)) * jnp.eye(size, dtype=dtype)
    inverse = jax.scipy.linalg.cho_solve((jnp.linalg.cholesky(hessian), True), jnp.eye(size, dtype=dtype))
    upper = jnp.linalg.cholesky((inverse + inverse.T) / 2).T
    row = jnp.arange(size)

    def step(carry, j):
        rest, grid = carry

        def fresh():
            own = (row >= j) & (row < j + group_size)
            return _grid(rest, own[:, None], bits, symmetric)

        grid = jax.lax.cond(j % group_size == 0, fresh, lambda: grid)
        value = fake_quantize(rest[j], *grid, bits=bits)
        error = (rest[j] - value) / upper[j, j]
        later = jnp.where(row > j, upper[j], 0.0)
        return (rest - later[:, None] * error[None], grid), value

    start = (weights, _grid(weights, jnp.ones(weights.shape, bool), bits, symmetric))
    return jax.lax.scan(step, start, row)[1].astype(w.dtype)


def quantize_groups(
    w: Array, *, bits: int | Array, group_size: int = 128, symmetric: bool = True, search: bool = False
) -> Array:
    """Returns a matrix with every weight rounded to the grid of its output and group of inputs.

    Args:
        w: float [n, m], inputs by outputs.
        bits: 1 to 16 (an array under `vmap`).
        group_size: inputs that share a grid; the last group may be smaller.
        symmetric: whether grids are.
        search: whether every grid is shrunk to 100% .. 21% of its range, where the sum of |error|^2.4 is least.

    Returns:
        [n, m] in the dtype of `w`; no gradient.

    Raises:
        ValueError: a shape does not fit or an option is out of range.

    Example:
        >>> jax.jit(lambda w: quantize_groups(w, bits=2))(jnp.array([[3.0], [1.0], [-2.5]])).tolist()
        [[2.0], [0.0], [-2.0]]

    Source:
        Official code of arXiv 2406.08155 (round to nearest).
    """
    if w.ndim != 2:
        raise ValueError(f"w must be [n, m], got shape {w.shape}")
    _check(bits, group_size)
    groups = -(-w.shape[0] // group_size)
    wide = jax.lax.stop_gradient(w).astype(compute_dtype(w))
    padded = jnp.pad(wide, ((0, groups * group_size - w.shape[0]), (0, 0))).reshape(groups, group_size, w.shape[1])
    scale, zero = quantization_grid(padded, bits=bits, symmetric=symmetric, search=search, axis=1)
    return fake_quantize(padded, scale, zero, bits=bits).reshape(-1, w.shape[1])[: w.shape[0]].astype(w.dtype)


def quantization_grid(
    x: Array, *, bits: int | Array, symmetric: bool = True, search: bool = False, axis: int = 0
) -> tuple[Array, Array]:
    """Returns scale and zero of the grid over one axis of an array.

    Args:
        x: float [...].
        bits: 1 to 16.
        symmetric: whether the grid has its zero in the middle.
        search: as in `quantize_groups`.
        axis: over which the weights share a grid.

    Returns:
        `(scale, zero)`, of the shape of `x` with length 1 on the axis, at least float32. Scale is positive: a row of
        zeros has the range of [-1, 1].

    Example:
        >>> [v.item() for v in jax.jit(lambda x: quantization_grid(x, bits=2, symmetric=False))(jnp.array([-1.0, 2.0]))]
        [1.0, 1.0]
    """
    _check(bits, 1)
    x = jax.lax.stop_gradient(x).astype(compute_dtype(x))
    x = jnp.moveaxis(x, axis, 0)
    keep = jnp.ones(x.shape, bool)
    grids = _grid(x, keep, bits, symmetric)
    if search:

        def better(best, i):
            least, found = best
            shrunk = _grid(x, keep, bits, symmetric, 1 - i / 100)
            error = jnp.sum(jnp.abs(fake_quantize(x, *(g[None] for g in shrunk), bits=bits) - x) ** 2.4, axis=0)
            won = error < least
            found = tuple(jnp.where(won, new, old) for new, old in zip(shrunk, found, strict=True))
            return (jnp.where(won, error, least), found), None

        start = (jnp.full_like(grids[0], jnp.inf), grids)
        grids = jax.lax.scan(better, start, jnp.arange(80))[0][1]
    return tuple(jnp.expand_dims(g, axis % x.ndim) for g in grids)


def fake_quantize(x: Array, scale: Array, zero: Array, *, bits: int | Array) -> Array:
    """Returns the values of the grid that are nearest: `scale (clip(round(x / scale) + zero, 0, 2^bits - 1) - zero)`.

    Args:
        x: float [...]; halves are rounded to the even number.
        scale: > 0, broadcast against `x` (of the same rank).
        zero: likewise.
        bits: 1 to 16.

    Returns:
        Shape and dtype of `x`; the gradient by `x` is 0.

    Example:
        >>> round_to_grid = jax.jit(lambda x: fake_quantize(x, jnp.array([0.5]), jnp.array([2.0]), bits=2))
        >>> round_to_grid(jnp.array([0.2, 0.8, 9.0])).tolist()
        [0.0, 0.5, 0.5]
    """
    top = 2.0 ** jnp.asarray(bits, compute_dtype(x)) - 1
    level = jnp.clip(jnp.round(x / scale) + zero, 0, top)
    return (scale * (level - zero)).astype(x.dtype)


def update_hessian(hessian: Array, count: Array, x: Array, *, where: Array | None = None) -> tuple[Array, Array]:
    """Returns `2 X'X / N` over all rows so far, batch by batch.

    Args:
        hessian: float [n, n], zeros at first.
        count: [] rows so far, 0 at first.
        x: float [T, n], inputs of the matrix (for an expert: its own tokens, or `where` for them).
        where: bool [T], rows that exist.

    Returns:
        `(hessian, count)`.

    Raises:
        ValueError: a shape does not fit.

    Example:
        >>> jax.jit(update_hessian)(jnp.zeros((1, 1)), jnp.zeros(()), jnp.array([[1.0], [3.0]]))[0].tolist()
        [[10.0]]
    """
    if x.ndim != 2 or hessian.shape != (x.shape[1],) * 2:
        raise ValueError(f"hessian and x must be [n, n] and [T, n], got {hessian.shape} and {x.shape}")
    x = zero_where_false(x, where).astype(hessian.dtype)
    rows = jnp.asarray(x.shape[0] if where is None else jnp.sum(where), hessian.dtype)
    total = count.astype(hessian.dtype) + rows
    added = 2 * jnp.matmul(x.T, x, precision=jax.lax.Precision.HIGHEST)
    new = safe_divide(hessian * count.astype(hessian.dtype) + added, jnp.broadcast_to(total, hessian.shape))
    return new, total.astype(count.dtype)


def outlier_score(w: Array) -> Array:
    """Returns how far single weights stand out: max over inputs of the largest over the mean absolute weight.

    Args:
        w: float [..., n, m], inputs by outputs.

    Returns:
        [...] in at least float32, from 1 to m; 0 for a matrix of zeros. It needs no data.

    Raises:
        ValueError: `w` has fewer than two dimensions.

    Example:
        >>> float(jax.jit(outlier_score)(jnp.array([[1.0, 1.0], [0.0, 3.0]])))
        2.0

    Source:
        Li et al., arXiv 2406.08155, section 4.1.
    """
    if w.ndim < 2:
        raise ValueError(f"w must be [..., n, m], got shape {w.shape}")
    size = jnp.abs(w.astype(compute_dtype(w)))
    size = safe_divide(size, jnp.broadcast_to(jnp.max(size, axis=-1, keepdims=True), size.shape))
    return jnp.max(safe_divide(jnp.max(size, axis=-1), jnp.mean(size, axis=-1)), axis=-1)


def block_cosine(x: Array, y: Array, *, where: Array | None = None) -> Array:
    """Returns the mean cosine of a block's input and output tokens: low where the block changes them much.

    Args:
        x: float [T, d], residual stream before the block.
        y: float [T, d], after it, residual included.
        where: bool [T], tokens that exist.

    Returns:
        Scalar in at least float32, in [-1, 1]; 0 without tokens.

    Raises:
        ValueError: a shape does not fit.

    Example:
        >>> float(jax.jit(block_cosine)(jnp.eye(2), jnp.array([[1.0, 0.0], [1.0, 0.0]])))
        0.5

    Source:
        Li et al., arXiv 2406.08155, section 4.2.
    """
    if x.ndim != 2 or x.shape != y.shape:
        raise ValueError(f"x and y must both be [T, d], got {x.shape} and {y.shape}")
    x, y = (safe_normalize(zero_where_false(a, where).astype(compute_dtype(a))) for a in (x, y))
    return masked_mean(jnp.sum(x * y, axis=1), where)


def block_predictor(hidden: int = 1024) -> Layer:
    """Returns the network that guesses a token's cosine of a block from its input: `tanh(relu(x up) down)`.

    Trained by the squared error (officially AdamW at 1e-4, decay 1e-2, at most 100 epochs).

    Args:
        hidden: width.

    Returns:
        A `Layer`: `init(key, d)`, `apply(params, x [T, d])` gives [T] in (-1, 1). Its mean over tokens ranks blocks.

    Raises:
        ValueError: `hidden` is less than 1.

    Example:
        >>> net = block_predictor(8)
        >>> jax.jit(lambda key: net.apply(net.init(key, 4), jnp.ones((3, 4))))(jax.random.key(0)).shape
        (3,)

    Source:
        Official code of arXiv 2406.08155.
    """
    if hidden < 1:
        raise ValueError(f"hidden={hidden} must be at least 1")

    def init(key, size):
        key_up, key_down = jax.random.split(key)
        return {
            "up": jax.random.normal(key_up, (size, hidden)) * size**-0.5,
            "down": jax.random.normal(key_down, (hidden, 1)) * hidden**-0.5,
        }

    def apply(params, x):
        h = jax.nn.relu(jnp.matmul(x, params["up"].astype(x.dtype), preferred_element_type=compute_dtype(x)))
        return jnp.tanh(jnp.matmul(h, params["down"].astype(h.dtype))[..., 0]).astype(x.dtype)

    return Layer(init, apply)


def allocate_bits(
    scores: Sequence[float], sizes: Sequence[int], *, budget: float, low: int = 2, high: int = 4
) -> np.ndarray:
    """Returns the bits of each matrix: `high` for those of the largest scores, as long as the mean stays in the budget.

    Args:
        scores: float [N], importance (minus the cosine for blocks).
        sizes: int [N], weights of each.
        budget: bits a weight on average.
        low: for the others.
        high: more than `low`.

    Returns:
        int64 [N] (host). One that does not fit is passed over, smaller ones may still fit.

    Raises:
        ValueError: a length or an option does not fit.

    Example:
        >>> allocate_bits([1.0, 5.0, 3.0], [10, 10, 20], budget=3.0).tolist()
        [4, 4, 2]
    """
    scores, sizes = np.asarray(scores, np.float64), np.asarray(sizes, np.int64)  # pyright: ignore[reportAssignmentType]
    if scores.ndim != 1 or scores.shape != sizes.shape:
        raise ValueError(f"scores and sizes must both be [N], got {scores.shape} and {sizes.shape}")
    if not low < high or budget < low:
        raise ValueError(f"low={low} must be less than high={high} and at most budget={budget}")
    bits, spare = np.full(len(scores), low), (budget - low) * sizes.sum()
    for i in np.argsort(-scores, kind="stable"):  # pyright: ignore[reportOperatorIssue]
        if (high - low) * sizes[i] <= spare + 1e-9:
            bits[i] = high
            spare -= (high - low) * sizes[i]
    return bits


def average_bits(bits: Any, sizes: Any) -> float:
    """Returns the mean number of bits of a weight (host).

    Args:
        bits: pytree of numbers or arrays, such as a plan of `moe_bit_plan`.
        sizes: pytree of the same structure, weights of each; a number stands for all of an array.

    Returns:
        A float; 0 without weights.

    Example:
        >>> average_bits({"a": np.array([2, 4]), "b": 8}, {"a": np.array([3, 1]), "b": 1})
        3.6
    """
    pairs = jax.tree.map(
        lambda b, n: (float(np.sum(np.asarray(b) * n)), float(np.sum(n + 0 * np.asarray(b)))), bits, sizes
    )
    leaves = np.asarray(jax.tree.leaves(pairs), np.float64).reshape(-1, 2).sum(axis=0)
    return float(leaves[0] / leaves[1]) if leaves[1] else 0.0


def moe_bit_plan(
    usage: np.ndarray,
    *,
    bits: int = 2,
    attention: int = 4,
    shared: int = 4,
    first_blocks: int = 0,
    top_experts: int = 0,
    more: int = 4,
) -> dict[str, np.ndarray]:
    """Returns how many bits each part of every block gets, by the paper's rules of structure (host).

    Args:
        usage: float [L, E], the share of tokens of each routed expert.
        bits: of routed experts.
        attention: of attention (the paper: 4 or 8).
        shared: of shared experts.
        first_blocks: so many blocks from the first on have `more` bits in all their experts.
        top_experts: so many of the most used experts of every block have `more` bits.
        more: see above.

    Returns:
        A dict of `attention` [L], `shared` [L] and `experts` [L, E], int64.

    Raises:
        ValueError: a shape or an option does not fit.

    Example:
        >>> moe_bit_plan(np.array([[0.1, 0.9], [0.6, 0.4]]), top_experts=1)["experts"].tolist()
        [[2, 4], [4, 2]]

    Source:
        Li et al., arXiv 2406.08155, section 3.
    """
    usage = np.asarray(usage, np.float64)
    if usage.ndim != 2:
        raise ValueError(f"usage must be [L, E], got shape {usage.shape}")
    layers, experts = usage.shape
    if not 0 <= first_blocks <= layers or not 0 <= top_experts <= experts:
        raise ValueError(
            f"first_blocks={first_blocks} must be at most {layers}, top_experts={top_experts} at most {experts}"
        )
    routed = np.full(usage.shape, bits)
    order = np.argsort(-usage, axis=1, kind="stable")[:, :top_experts]
    np.put_along_axis(routed, order, np.maximum(more, bits), axis=1)
    routed[:first_blocks] = np.maximum(routed[:first_blocks], more)
    return {"attention": np.full(layers, attention), "shared": np.full(layers, shared), "experts": routed}


def _check(bits, group_size):
    if isinstance(bits, int) and not 1 <= bits <= 16:
        raise ValueError(f"bits={bits} must be between 1 and 16")
    if group_size < 1:
        raise ValueError(f"group_size={group_size} must be at least 1")


def _grid(x, keep, bits, symmetric, shrink=1.0):
    """Returns scale and zero [...] of the kept entries over axis 0."""
    low = shrink * jnp.minimum(jnp.min(jnp.where(keep, x, 0.0), axis=0), 0.0)
    high = shrink * jnp.maximum(jnp.max(jnp.where(keep, x, 0.0), axis=0), 0.0)
    if symmetric:
        high = jnp.maximum(-low, high)
        low = -high
    empty = (low == 0) & (high == 0)
    low, high = jnp.where(empty, -1.0, low), jnp.where(empty, 1.0, high)
    top = 2.0 ** jnp.asarray(bits, x.dtype) - 1
    scale = (high - low) / top
    zero = jnp.broadcast_to((top + 1) / 2, scale.shape) if symmetric else jnp.round(-low / scale)
    return scale, zero
