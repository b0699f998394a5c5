"""Matryoshka Representation Learning (MRL, 2022, arXiv 2205.13147).

Train one embedding so that each of its prefixes is a good embedding as well: the sum of the losses of all prefixes. One
network then serves every size, and search goes from coarse to fine.

    L       = sum_m c_m loss(z[:m]),   m in a nested list such as 8, 16, ..., d
    heads   W_m z[:m] + b_m, one for each size (MRL), or all of them the columns W[:m] of one matrix (MRL-E)
    contrastive: each prefix is normalised by itself
    adaptive classification: the smallest m whose largest probability reaches t_m
    funnel: shortlist with few dimensions, then half the candidates with twice the dimensions, and again

Reconstructed: how thresholds are chosen (from the last size back, the smallest of a grid that keeps the target
accuracy of the cascade); average precision is divided by the number of rows shown.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxlab.contrastive.info_nce import info_nce_loss
from jaxlab.ops.layers import dense
from jaxlab.ops.masked import compute_dtype, safe_normalize, zero_where_false
from jaxlab.ops.sharding import rows_mixed
from jaxlab.types import Layer


def matryoshka_loss(
    loss: Callable[..., Array],
    *embeddings: Array,
    dims: Sequence[int],
    weights: Sequence[float] | Array | None = None,
    normalize: bool = False,
) -> Array:
    """Returns `sum_m weights_m loss(prefixes of m features)`, of any loss of one or more embeddings.

    Args:
        loss: takes the prefixes `[..., m]` of all `embeddings` and returns an array of one shape for all m.
        *embeddings: float [..., D].
        dims: the sizes m.
        weights: float [M] >= 0, importance of the sizes; None = 1 each (the paper).
        normalize: whether each prefix is brought to length 1 first.

    Returns:
        What `loss` returns.

    Raises:
        ValueError: `dims` is empty or reaches beyond an embedding, or `weights` has another length.

    Example:
        >>> loss = jax.jit(lambda z: matryoshka_loss(jnp.sum, z, dims=(1, 2, 4)))
        >>> float(loss(jnp.array([[1.0, 2.0, 3.0, 4.0]])))
        14.0

    Source:
        Kusupati et al., arXiv 2205.13147, equation 1; code RAIVNLab/MRL.
    """
    if not embeddings:
        raise ValueError("embeddings are missing: matryoshka_loss(loss, z, dims=...)")
    dims = _checked_dims(dims, min(z.shape[-1] for z in embeddings))
    if weights is not None and np.shape(weights) != (len(dims),):
        raise ValueError(f"weights has shape {np.shape(weights)}, expected ({len(dims)},), one for each of dims={dims}")
    total = None
    for i, m in enumerate(dims):
        parts = [z[..., :m] for z in embeddings]
        term = loss(*(map(safe_normalize, parts) if normalize else parts))
        term = term if weights is None else term * jnp.asarray(weights[i], term.dtype)
        total = term if total is None else total + term
    return total


def matryoshka_contrastive_loss(
    a: Array,
    b: Array,
    *,
    dims: Sequence[int],
    weights: Sequence[float] | Array | None = None,
    temperature: float | Array = 0.1,
    where: Array | None = None,
    axis_name: str | None = None,
    reduction: str = "mean",
) -> Array:
    """Returns `sum_m weights_m info_nce_loss(a[:, :m], b[:, :m])`, each prefix normalised by itself.

    Args:
        a: float [N, D], anchors.
        b: float [N, D], `b[i]` belongs to `a[i]`.
        dims: the sizes m.
        weights: float [M] >= 0, importance of the sizes; None = 1 each.
        temperature: t > 0, shared by all sizes.
        where: bool [N], real pairs.
        axis_name: mapped axis over which the pairs are spread: negatives come from all shards.
        reduction: "mean" (over all shards) or "none", `[N]`.

    Returns:
        As `info_nce_loss`; for both directions, add that of (b, a).

    Raises:
        ValueError: as `matryoshka_loss` and `info_nce_loss`.

    Example:
        >>> loss = jax.jit(lambda a, b: matryoshka_contrastive_loss(a, b, dims=nesting_dims(4, smallest=2)))
        >>> x = np.eye(4, dtype=np.float32) + 0.1
        >>> float(loss(x, x)) < float(loss(x, x[::-1]))
        True

    Source:
        Kusupati et al., arXiv 2205.13147, section 3 and appendix C (ALIGN).
    """
    if a.ndim != 2 or a.shape != b.shape:
        raise ValueError(f"a and b must have one shape [N, D], got {a.shape} and {b.shape}")

    def loss(a, b):
        options = {"where": where, "axis_name": axis_name, "reduction": reduction}
        return info_nce_loss(a, b, temperature=temperature, **options)

    return matryoshka_loss(loss, a, b, dims=dims, weights=weights)


def nesting_dims(size: int, *, smallest: int = 8) -> tuple[int, ...]:
    """Returns the sizes that double from `smallest` up to `size`, which is always the last.

    Example:
        >>> nesting_dims(64), nesting_dims(768, smallest=12)
        ((8, 16, 32, 64), (12, 24, 48, 96, 192, 384, 768))
    """
    if not 1 <= smallest <= size:
        raise ValueError(f"smallest={smallest} must be between 1 and size={size}")
    dims = [smallest]
    while dims[-1] * 2 < size:
        dims.append(dims[-1] * 2)
    return (*dims, size) if dims[-1] < size else tuple(dims)


def matryoshka_head(num_classes: int, *, dims: Sequence[int], tied: bool = False) -> Layer:
    """Returns linear classifiers of every prefix: `logits_m = z[:m] W_m + b_m`.

    Args:
        num_classes: C.
        dims: the sizes m, ascending.
        tied: whether all heads are the first m rows of one matrix with one bias (MRL-E).

    Returns:
        A `Layer`: `params = init(key, size)`; `logits = apply(params, z)`, z float `[..., size]`, logits
        `[M, ..., C]`, for `optax.softmax_cross_entropy...` and a sum over the sizes.

    Raises:
        ValueError: `dims` is empty, does not ascend, or reaches beyond the embedding.

    Example:
        >>> head = matryoshka_head(3, dims=(2, 4))
        >>> run = lambda key, x: head.apply(head.init(key, 4), x)
        >>> jax.eval_shape(run, jax.random.key(0), jnp.ones((5, 4))).shape
        (2, 5, 3)

    Source:
        Kusupati et al., arXiv 2205.13147, section 3; code RAIVNLab/MRL.
    """
    dims = tuple(dims)
    if list(dims) != sorted(set(dims)):
        raise ValueError(f"dims={dims} must ascend")
    layer = dense(num_classes)

    def init(key, size):
        _checked_dims(dims, size)
        if tied:
            return layer.init(key, size)
        return {f"head_{m}": layer.init(k, m) for m, k in zip(dims, jax.random.split(key, len(dims)), strict=True)}

    def apply(params, z):
        _checked_dims(dims, z.shape[-1])
        if not tied:
            return jnp.stack([layer.apply(params[f"head_{m}"], z[..., :m]) for m in dims])
        # The features between two sizes are multiplied once: the logits of a size add to those of the one before.
        logits, total = [], 0.0
        dtype = compute_dtype(z)
        for start, end in zip((0, *dims[:-1]), dims, strict=True):
            w = params["w"][start:end].astype(z.dtype)
            total = total + jnp.matmul(z[..., start:end], w, preferred_element_type=dtype)
            logits.append(total)
        stacked = jnp.stack(logits)
        return (stacked + params["b"].astype(dtype).reshape((1,) * (stacked.ndim - 1) + (-1,))).astype(z.dtype)

    return Layer(init, apply)


def adaptive_classify(logits: Array, thresholds: Array, *, dims: Sequence[int]) -> tuple[Array, Array]:
    """Returns the class that the smallest confident prefix predicts, and how many features it took.

    Args:
        logits: float [M, N, C], of every size, ascending.
        thresholds: float [M - 1], of the largest probability at each size but the last: 0 stops at once, above 1 never.
        dims: the M sizes.

    Returns:
        `labels` int32 [N] and `used` int32 [N], the size that decided.

    Raises:
        ValueError: shapes do not fit.

    Example:
        >>> classify = jax.jit(lambda logits, thresholds: adaptive_classify(logits, thresholds, dims=(8, 16)))
        >>> [a.item() for a in classify(jnp.array([[[3.0, 0.0]], [[0.0, 3.0]]]), jnp.array([0.9]))]
        [0, 8]

    Source:
        Kusupati et al., arXiv 2205.13147, section 4.2.1.
    """
    dims = _checked_cascade(logits, dims)
    if thresholds.shape != (len(dims) - 1,):
        raise ValueError(
            f"thresholds has shape {thresholds.shape}, expected ({len(dims) - 1},), all sizes but the last"
        )
    confidence = jnp.max(jax.nn.softmax(logits.astype(compute_dtype(logits)), axis=-1), axis=-1)
    limits = jnp.append(thresholds.astype(confidence.dtype), -jnp.ones((), confidence.dtype))
    stage = jnp.argmax(confidence >= limits[:, None], axis=0)
    predicted = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    labels = jnp.take_along_axis(predicted, stage[None, :], axis=0)[0]
    return labels, jnp.asarray(dims, jnp.int32)[stage]


def tune_thresholds(
    logits: np.ndarray, labels: np.ndarray, *, target: float | None = None, grid: int = 101
) -> np.ndarray:
    """Returns thresholds for `adaptive_classify` that keep an accuracy on validation data. Host work, NumPy.

    Args:
        logits: float [M, N, C], of every size, ascending.
        labels: int [N].
        target: accuracy to keep; None = that of the last size.
        grid: number of values between 0 and 1 to try.

    Returns:
        float64 [M - 1]; 2 where no value of the grid keeps the target, so that this size never stops.

    Raises:
        ValueError: shapes do not fit.

    Example:
        >>> logits = np.array([[[3.0, 0.0], [0.1, 0.0]], [[3.0, 0.0], [0.0, 3.0]]])
        >>> tune_thresholds(logits, np.array([0, 1]), grid=11).round(2).tolist()
        [0.6]

    Source:
        Kusupati et al., arXiv 2205.13147, appendix D; the order of the search is reconstructed.
    """
    logits, labels = np.asarray(logits, np.float64), np.asarray(labels)
    if logits.ndim != 3 or labels.shape != logits.shape[1:2]:
        raise ValueError(f"logits {logits.shape} and labels {labels.shape} must be [M, N, C] and [N]")
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    confidence = (shifted / shifted.sum(axis=-1, keepdims=True)).max(axis=-1)
    right = logits.argmax(axis=-1) == labels[None]
    cascade, thresholds = right[-1], np.full(len(logits) - 1, 2.0)
    target = cascade.mean() if target is None else target
    for m in range(len(logits) - 2, -1, -1):
        for t in np.linspace(0, 1, grid):
            mixed = np.where(confidence[m] >= t, right[m], cascade)
            if mixed.mean() >= target:
                thresholds[m], cascade = t, mixed
                break
    return thresholds


def prefix_search(query: Array, database: Array, *, dim: int, k: int, where: Array | None = None) -> Array:
    """Returns the rows of the database that are nearest by the cosine of the first `dim` features.

    Args:
        query: float [Q, D].
        database: float [N, D].
        dim: number of features, 1 to D.
        k: number of rows, 1 to N.
        where: bool [N], real rows of the database.

    Returns:
        int32 [Q, k], nearest first; -1 where the database has fewer real rows.

    Raises:
        ValueError: shapes do not fit, or a number is out of range.

    Example:
        >>> search = jax.jit(lambda query, database: prefix_search(query, database, dim=2, k=1))
        >>> search(jnp.array([[1.0, 0.0]]), jnp.array([[0.0, 1.0], [2.0, 0.1]])).tolist()
        [[1]]

    Source:
        Kusupati et al., arXiv 2205.13147, section 4.3.
    """
    _checked_search(query, database, where, ((k, dim),))
    keep = jnp.ones(database.shape[0], bool) if where is None else where
    return rows_mixed(_funnel)(query, database, keep, schedule=((k, dim),))


def funnel_search(
    query: Array,
    database: Array,
    *,
    schedule: Sequence[tuple[int, int]] = ((200, 16), (100, 32), (50, 64), (25, 128), (10, 256)),
    where: Array | None = None,
) -> Array:
    """Returns the nearest rows by search with few features among all, then with more among the shortlist, and so on.

    Args:
        query: float [Q, D].
        database: float [N, D].
        schedule: pairs (candidates to keep, features), from coarse to fine. `((200, 16), (200, 2048))` is the paper's
            adaptive retrieval, shortlist and rerank; the default is its funnel.
        where: bool [N], real rows of the database.

    Returns:
        int32 [Q, K], K the last number of candidates, nearest first; -1 where the database has fewer real rows.

    Raises:
        ValueError: shapes do not fit, or the schedule's candidates grow or its numbers are out of range.

    Example:
        >>> x = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
        >>> jax.jit(lambda x: funnel_search(x, x, schedule=((4, 2), (1, 4))))(x)[:, 0].tolist()
        [0, 1, 2, 3, 4]

    Source:
        Kusupati et al., arXiv 2205.13147, section 4.3.1.
    """
    schedule = tuple((int(k), int(m)) for k, m in schedule)
    _checked_search(query, database, where, schedule)
    keep = jnp.ones(database.shape[0], bool) if where is None else where
    return rows_mixed(_funnel)(query, database, keep, schedule=schedule)


def retrieval_cost(num_rows: int, schedule: Sequence[tuple[int, int]]) -> int:
    """Returns the multiplications of one query of `funnel_search`: `N m_1 + sum_{i > 1} K_{i-1} m_i`.

    Args:
        num_rows: N of the database.
        schedule: as in `funnel_search`.

    Example:
        >>> retrieval_cost(1000, ((200, 16), (10, 64)))
        28800
    """
    return sum(n * m for n, (_, m) in zip((num_rows, *(k for k, _ in schedule)), schedule, strict=False))


def mean_average_precision(found: Array, labels: Array) -> Array:
    """Returns mAP@k: the mean over queries of `(1 / k) sum_j precision(j) relevant(j)`.

    Args:
        found: int [Q, k], labels of the rows found, nearest first; -1 is no row.
        labels: int [Q], of the queries.

    Returns:
        float32 []; 1 if every row found is of the query's class.

    Raises:
        ValueError: shapes do not fit.

    Example:
        >>> float(jax.jit(mean_average_precision)(jnp.array([[1, 0]]), jnp.array([1])))
        0.5

    Source:
        Kusupati et al., arXiv 2205.13147, section 4.3 (mAP@10); the divisor is reconstructed.
    """
    if found.ndim != 2 or labels.shape != found.shape[:1]:
        raise ValueError(f"found {found.shape} and labels {labels.shape} must be [Q, k] and [Q]")
    relevant = ((found == labels[:, None]) & (found >= 0)).astype(jnp.float32)
    precision = jnp.cumsum(relevant, axis=1) / jnp.arange(1, found.shape[1] + 1, dtype=jnp.float32)[None, :]
    return jnp.mean(precision * relevant)


def _funnel(query, database, keep, *, schedule):
    dtype = compute_dtype(query, database)
    query, database = query.astype(dtype), zero_where_false(database, keep).astype(dtype)
    precision = jax.lax.Precision.HIGHEST
    chosen = None
    for k, m in schedule:
        unit, rows = safe_normalize(query[:, :m]), safe_normalize(database[:, :m])
        if chosen is None:
            scores = jnp.matmul(unit, rows.T, precision=precision)
            real = jnp.broadcast_to(keep[None, :], scores.shape)
        else:
            scores = jnp.einsum("qd,qkd->qk", unit, rows[chosen], precision=precision)
            real = keep[chosen]
        # Cosines are at least -1, so that rows that do not exist come last.
        _, place = jax.lax.top_k(jnp.where(real, scores, -2.0), k)
        chosen = place if chosen is None else jnp.take_along_axis(chosen, place, axis=1)
    return jnp.where(keep[chosen], chosen, -1).astype(jnp.int32)


def _checked_dims(dims: Sequence[int], size: int) -> tuple[int, ...]:
    dims = tuple(dims)
    if not dims or not all(1 <= m <= size for m in dims):
        raise ValueError(f"dims={dims} must hold sizes between 1 and the embedding's {size}")
    return dims


def _checked_cascade(logits: Array, dims: Sequence[int]) -> tuple[int, ...]:
    dims = tuple(dims)
    if logits.ndim != 3 or logits.shape[0] != len(dims):
        raise ValueError(f"logits has shape {logits.shape}, expected [{len(dims)}, N, C] for dims={dims}")
    return dims


def _checked_search(query, database, where, schedule):
    if query.ndim != 2 or database.ndim != 2 or query.shape[1] != database.shape[1]:
        raise ValueError(f"query and database must be [Q, D] and [N, D], got {query.shape} and {database.shape}")
    if where is not None and where.shape != database.shape[:1]:
        raise ValueError(f"where has shape {where.shape}, expected {database.shape[:1]}, one for each row")
    numbers = [database.shape[0], *(k for k, _ in schedule)]
    falling = all(1 <= now <= before for before, now in itertools.pairwise(numbers))
    if not schedule or not falling or not all(1 <= m <= query.shape[1] for _, m in schedule):
        raise ValueError(
            f"(candidates, features)={schedule} must keep at most {numbers[0]} rows, never more than before, and use "
            f"1 to {query.shape[1]} features"
        )
