"""Model compression via distillation and quantization (2018, arXiv 1802.05668).

Two ways to a student with few bits a weight. Quantized distillation: forward and backward at quantised weights with the
distillation loss, update of full-precision weights. Differentiable quantization: weights stay, and the points to which
they are rounded are trained. Weights are scaled bucket by bucket (b in a row), so that one outlier spoils one bucket:

    u = (w - beta) / alpha,   beta = min,   alpha = max - min of the bucket
    uniform:  Q(w) = alpha round((s - 1) u) / (s - 1) + beta          (s levels; or rounded at random, without bias)
    points:   Q(w) = alpha p_i + beta,   i = argmin_i |u - p_i|,   dL/dp_i = sum over its weights of alpha g
    loss      0.7 T^2 KL(teacher || student) + 0.3 CE,   T = 2

The gradient by w of the uniform form is the identity (straight-through), or counts in addition what the largest and the
smallest weight do to alpha and beta of their bucket. The official code attributes the latter to the positions of the
largest and smallest quantised value; here they are those of the weights themselves, which is the derivative.

Reconstructed: the last bucket is filled up with its last weight, as in the code; the distillation loss is summed over
classes (the code's also divides by their number).
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from jaxlab.distill.knowledge import distillation_loss
from jaxlab.ops.collectives import value_and_grad
from jaxlab.ops.masked import compute_dtype, zero_where_false
from jaxlab.types import Layer, Learner, LearnerState, PyTree, StatefulLayer, as_stateful


def uniform_quantize(
    w: Array, *, levels: int, bucket: int | None = 256, key: Array | None = None, gradient: str = "identity"
) -> Array:
    """Returns the weights rounded to equally spaced levels between the smallest and the largest of each bucket.

    `alpha round((s - 1) u) / (s - 1) + beta`, see the module's docstring.

    Args:
        w: float, any shape; buckets run along its flattened form.
        levels: s >= 2 (2^bits).
        bucket: weights a bucket, None = all in one.
        key: rounds up with probability equal to the fraction, so that the mean is `w`; None rounds to the nearest.
        gradient: "identity" (straight-through) or "bucket" (counts the bucket's ends as well).

    Returns:
        Shape and dtype of `w`. A bucket of equal weights stays as it is.

    Raises:
        ValueError: an option is out of range.

    Example:
        >>> uniform_quantize(jnp.array([0.0, 0.2, 0.9, 1.0]), levels=2).tolist()
        [0.0, 0.0, 1.0, 1.0]

    Source:
        Polino, Pascanu, Alistarh, arXiv 1802.05668, section 2; code antspy/quantized_distillation (bucket 256).
    """
    _check(levels, bucket)
    if gradient not in ("identity", "bucket"):
        raise ValueError(f"gradient={gradient!r} must be 'identity' or 'bucket'")
    rows = _buckets(w, bucket)
    u, alpha, _ = _scaled(rows)
    steps = levels - 1
    scaled = jax.lax.stop_gradient(u) * steps
    if key is None:
        level = jnp.round(scaled)
    else:
        low = jnp.floor(scaled)
        level = low + (jax.random.uniform(key, scaled.shape, scaled.dtype) < scaled - low)
    error = jnp.clip(level / steps, 0.0, 1.0) - jax.lax.stop_gradient(u)
    # Written as the weight plus its rounding error, so that what differentiates is alpha alone, or nothing.
    alpha = alpha if gradient == "bucket" else jax.lax.stop_gradient(alpha)
    return _unbucketed(rows + alpha * error, w)


def point_quantize(w: Array, points: Array, *, bucket: int | None = 256) -> Array:
    """Returns the weights rounded to the nearest of the given points, which receive the gradient.

    `alpha p_i + beta` with `i = argmin_i |u - p_i|` (the lower on a tie); the weights themselves receive none.

    Args:
        w: float, any shape.
        points: float [s], ascending, in the scaled domain 0 to 1.
        bucket: weights a bucket, None = all in one.

    Returns:
        Shape and dtype of `w`.

    Raises:
        ValueError: `points` is not [s >= 1], or `bucket` is out of range.

    Example:
        >>> jax.jit(point_quantize)(jnp.array([0.0, 0.2, 0.9, 1.0]), jnp.array([0.0, 0.25, 1.0])).tolist()
        [0.0, 0.25, 1.0, 1.0]

    Source:
        Polino, Pascanu, Alistarh, arXiv 1802.05668, section 4.
    """
    _check(2, bucket)
    if points.ndim != 1 or points.shape[0] < 1:
        raise ValueError(f"points must be [s], got {points.shape}")
    u, alpha, beta = _scaled(jax.lax.stop_gradient(_buckets(w, bucket)))
    wide = points.astype(u.dtype)
    middle = jax.lax.stop_gradient((wide[1:] + wide[:-1]) / 2)
    index = jnp.searchsorted(middle, u, side="left")
    return _unbucketed(alpha * wide[index] + beta, w)


def quantile_points(w: Array, *, levels: int, bucket: int | None = 256) -> Array:
    """Returns the points from which differentiable quantization starts: quantiles of the scaled weights.

    `p_k` is the quantile `k / (s - 1)` of u.

    Args:
        w: float, any shape.
        levels: s >= 2.
        bucket: weights a bucket, None = all in one.

    Returns:
        float [s], ascending, in the dtype of `w`.

    Raises:
        ValueError: an option is out of range.

    Example:
        >>> jax.jit(quantile_points, static_argnames="levels")(jnp.arange(5.0), levels=3).tolist()
        [0.0, 0.5, 1.0]

    Source:
        Polino, Pascanu, Alistarh, arXiv 1802.05668, section 4.2.
    """
    _check(levels, bucket)
    u, _, _ = _scaled(_buckets(jax.lax.stop_gradient(w), bucket))
    u = u.reshape(-1)[: w.size]
    return jnp.quantile(u, jnp.linspace(0.0, 1.0, levels, dtype=u.dtype)).astype(w.dtype)


def quantized_distillation(
    net: Layer | StatefulLayer | Callable[..., Any],
    optimizer: optax.GradientTransformation,
    *,
    levels: int,
    bucket: int | None = 256,
    gradient: str = "identity",
    temperature: float = 2.0,
    soft_weight: float = 0.7,
    select: Callable[[Any, Array], bool] | None = None,
    axis_name: str | None = None,
) -> Learner:
    """Returns a learner whose network computes with quantised weights and learns full-precision ones from a teacher.

    `w <- w - eta dL/dw at Q(w)`, with `distillation_loss` as L.

    Args:
        net: network whose `apply` gives logits [N, C].
        optimizer: of the full-precision weights.
        levels: s >= 2.
        bucket: weights a bucket, None = all of a leaf in one.
        gradient: see `uniform_quantize`.
        temperature: of the distillation.
        soft_weight: of the teacher's term.
        select: `select(path, leaf)`, which leaves are quantised; None = all.
        axis_name: mapped axis over which the examples are spread.

    Returns:
        A `Learner` with a `LearnerState`, whose `params` are the full-precision weights. `init(key, batch,
        params=None, net_state=None)`. `batch`: `x [N, ...]`, `teacher_logits [N, C]`, `y int [N]` (-1 = unlabelled),
        optional `where [N]`. Metrics: `loss`. `predict` gives `logits`, of the quantised network.

    Raises:
        ValueError: an option is out of range.

    Example:
        >>> from jaxlab.ops.layers import mlp
        >>> learner = quantized_distillation(mlp([3]), optax.sgd(0.1), levels=4)
        >>> batch = {"x": jnp.ones((4, 2)), "y": jnp.array([0, 1, 2, 0]), "teacher_logits": jnp.ones((4, 3))}
        >>> state = jax.jit(learner.init)(jax.random.key(0), batch)
        >>> jax.jit(learner.update)(state, batch, jax.random.key(1))[1]["loss"].shape
        ()

    Source:
        Polino, Pascanu, Alistarh, arXiv 1802.05668, algorithm 1.
    """
    _check(levels, bucket)
    net = as_stateful(net)

    def quantize(params):
        one = lambda leaf: uniform_quantize(leaf, levels=levels, bucket=bucket, gradient=gradient)
        chosen = lambda path, leaf: one(leaf) if select is None or select(path, leaf) else leaf
        return jax.tree.map_with_path(chosen, params)

    def init(key, batch, *, params=None, net_state=None):
        if params is None:
            x = batch["x"]
            params, net_state = net.init(key, x.shape[1] if x.ndim == 2 else jax.ShapeDtypeStruct(x.shape[1:], x.dtype))
        net_state = {} if net_state is None else net_state
        return LearnerState(params, net_state, optimizer.init(params), jnp.zeros((), jnp.int32))

    options = {"temperature": temperature, "soft_weight": soft_weight, "axis_name": axis_name}
    return _learner(net, optimizer, init, quantize, lambda params: params, options)


def differentiable_quantization(
    net: Layer | StatefulLayer | Callable[..., Any],
    weights: PyTree,
    optimizer: optax.GradientTransformation,
    *,
    levels: int,
    bucket: int | None = 256,
    temperature: float = 2.0,
    soft_weight: float = 0.7,
    net_state: PyTree | None = None,
    axis_name: str | None = None,
) -> Learner:
    """Returns a learner that leaves the weights as they are and trains the points to which they are rounded.

    `p <- sort(p - eta dL/dp)`, one set of points for each leaf of `weights`.

    Args:
        net: network whose `apply` gives logits [N, C].
        weights: its trained parameters.
        optimizer: of the points.
        levels: s >= 2.
        bucket: weights a bucket, None = all of a leaf in one.
        temperature: of the distillation, in which the unquantised network may be the teacher.
        soft_weight: of the teacher's term.
        net_state: what the network remembers.
        axis_name: mapped axis over which the examples are spread.

    Returns:
        A `Learner` as `quantized_distillation` describes it, whose `params` are the points.

    Raises:
        ValueError: an option is out of range.

    Example:
        >>> from jaxlab.ops.layers import mlp
        >>> weights = {"dense_0": {"w": jnp.arange(6.0).reshape(2, 3), "b": jnp.arange(3.0)}}
        >>> learner = differentiable_quantization(mlp([3]), weights, optax.sgd(0.1), levels=4)
        >>> jax.tree.map(jnp.shape, jax.jit(learner.init)(jax.random.key(0), {}).params)
        {'dense_0': {'b': (4,), 'w': (4,)}}

    Source:
        Polino, Pascanu, Alistarh, arXiv 1802.05668, algorithm 2.
    """
    _check(levels, bucket)
    net = as_stateful(net)

    def init(key, batch):
        del key, batch
        points = jax.tree.map(lambda leaf: quantile_points(leaf, levels=levels, bucket=bucket), weights)
        return LearnerState(points, net_state or {}, optimizer.init(points), jnp.zeros((), jnp.int32))

    def quantize(points):
        return jax.tree.map(lambda leaf, p: point_quantize(leaf, p, bucket=bucket), weights, points)

    options = {"temperature": temperature, "soft_weight": soft_weight, "axis_name": axis_name}
    return _learner(net, optimizer, init, quantize, lambda points: jax.tree.map(jnp.sort, points), options)


def allocate_points(norms: np.ndarray, *, average: int) -> np.ndarray:
    """Returns how many points each tensor gets: half of them evenly, the rest by the size of its gradients.

    `n_t = average // 2 + round(rest norm_t / sum norm)`; what rounding leaves goes to (or comes from) the tensor with
    the largest norm.

    Args:
        norms: float >= 0 [T], gradient norms of the tensors, averaged over a few batches.
        average: points a tensor on average, >= 2.

    Returns:
        int64 [T] with sum `T average`; equal shares where all norms are 0.

    Raises:
        ValueError: `norms` is not [T] or `average` is below 2.

    Example:
        >>> allocate_points(np.array([1.0, 3.0]), average=8).tolist()
        [6, 10]

    Source:
        Polino, Pascanu, Alistarh, arXiv 1802.05668, section 4.2. Reconstructed: who gets the remainder.
    """
    norms = np.asarray(norms, np.float64)
    if norms.ndim != 1 or len(norms) < 1:
        raise ValueError(f"norms must be [T], got {norms.shape}")
    if average < 2:
        raise ValueError(f"average={average} must be at least 2")
    share = norms / norms.sum() if norms.sum() > 0 else np.full(len(norms), 1 / len(norms))
    rest = len(norms) * (average - average // 2)
    points = average // 2 + np.round(rest * share).astype(np.int64)
    points[np.argmax(norms)] += len(norms) * average - points.sum()
    return points


def compressed_bits(params: PyTree, *, levels: int, bucket: int | None = 256) -> float:
    """Returns how many bits uniformly quantised parameters take with Huffman's code, scales included.

    `sum over leaves of (size * mean code length + 64 * buckets)`: each bucket stores alpha and beta in 32 bits.

    Args:
        params: pytree of arrays.
        levels: s >= 2.
        bucket: weights a bucket, None = all of a leaf in one.

    Returns:
        The number of bits. Between the entropy of the levels and one bit more, for each weight.

    Raises:
        ValueError: an option is out of range.

    Example:
        >>> compressed_bits({"w": np.array([0.0, 1.0, 1.0, 1.0])}, levels=2)
        68.0

    Source:
        Polino, Pascanu, Alistarh, arXiv 1802.05668, section 5 (size estimates).
    """
    _check(levels, bucket)
    total = 0.0
    for leaf in jax.tree.leaves(params):
        flat = np.asarray(leaf, np.float64).reshape(-1)
        rows = [flat] if bucket is None else [flat[i : i + bucket] for i in range(0, len(flat), bucket)]
        counts = np.zeros(levels)
        for row in rows:
            span = np.ptp(row)
            u = (row - row.min()) / (span if span > _FLAT else 1.0)
            counts += np.bincount(np.round(u * (levels - 1)).astype(int), minlength=levels)
        total += _huffman_bits(counts) + 64.0 * len(rows)
    return total


def _huffman_bits(counts: np.ndarray) -> float:
    """Returns the total length of the codes: the sum of all inner nodes; a single symbol still takes a bit each."""
    heap = [float(c) for c in counts if c > 0]
    if len(heap) <= 1:
        return sum(heap)
    heapq.heapify(heap)
    total = 0.0
    while len(heap) > 1:
        node = heapq.heappop(heap) + heapq.heappop(heap)
        total += node
        heapq.heappush(heap, node)
    return total


_FLAT = 1e-10  # below this span a bucket counts as constant, as in the official code


def _learner(net, optimizer, init, quantize, settle, options):
    def update(state, batch, key):
        where, y = batch.get("where"), batch["y"]
        x = zero_where_false(batch["x"], where)

        def loss(params):
            logits, net_state = net.apply(quantize(params), state.net_state, x, key=key, train=True)
            return distillation_loss(logits, batch["teacher_logits"], y, where=where, **options), net_state

        run = value_and_grad(loss, axis_name=options["axis_name"], has_aux=True)
        (value, net_state), grads = run(state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = settle(optax.apply_updates(state.params, updates))
        return LearnerState(params, net_state, opt_state, state.step + 1), {"loss": value}

    def predict(state, batch):
        logits, _ = net.apply(quantize(state.params), state.net_state, batch["x"], train=False)
        return {"logits": logits}

    return Learner(init, update, predict)


def _buckets(w: Array, bucket: int | None) -> Array:
    """Returns the flattened weights in rows [buckets, b], filled up with the last one, in the accumulation dtype."""
    flat = w.reshape(-1).astype(compute_dtype(w))
    width = flat.shape[0] if bucket is None else min(bucket, flat.shape[0])
    missing = -flat.shape[0] % width
    filled = jnp.concatenate([flat, jnp.broadcast_to(flat[-1:], (missing,))]) if missing else flat
    return filled.reshape(-1, width)


def _scaled(rows: Array) -> tuple[Array, Array, Array]:
    beta = jnp.min(rows, axis=1, keepdims=True)
    span = jnp.max(rows, axis=1, keepdims=True) - beta
    alpha = jnp.where(span > _FLAT, span, jnp.ones_like(span))
    return (rows - beta) / alpha, alpha, beta


def _unbucketed(rows: Array, like: Array) -> Array:
    return rows.reshape(-1)[: like.size].reshape(like.shape).astype(like.dtype)


def _check(levels, bucket):
    if levels < 2:
        raise ValueError(f"levels={levels} must be at least 2")
    if bucket is not None and bucket < 1:
        raise ValueError(f"bucket={bucket} must be at least 1, or None")
