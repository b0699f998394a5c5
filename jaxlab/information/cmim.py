"""cMIM: A Contrastive Mutual Information Framework for Unified Generative and Discriminative Representation Learning.

2025, arXiv 2502.19642. The Mutual Information Machine (arXiv 1910.03175) is an auto-encoder trained by the symmetric
cross entropy of encoder joint q(z | x) q(x) and decoder joint p(x | z) P(z): it raises the information between inputs
and codes, but codes lie in clusters without a global order. cMIM asks in addition that a code be nearer to its own
input than to others, without augmentation and hardly depending on the batch size.

    MIM       = -mean [ log p(x|z) + ( log q(z|x) + log P(z) ) / 2 ]                         (q(x) tied to p(x|z))
              = -mean [ log p(x|z) + log P(z) + beta (log q(z|x) + log q(x)) ] / 2           (q(x) given or constant)
    s_ij      = cos(z_i, mu(x_j)),   z_i ~ N(mu(x_i), sigma(x_i)^2)
    p_i(k=1)  = exp(s_ii / t) / ( exp(s_ii / t) + mean_{j != i} exp(s_ij / t) )
    cMIM      = MIM - weight mean_i log p_i(k=1)

With the mean over negatives, not the sum of InfoNCE, the expected term does not grow with the batch. Against a VAE the
entropy of the encoder has the other sign: it is driven down, so sigma needs a floor or the loss is unbounded below.

Reconstructed: the contrastive term's form, temperature 0.1 and weight 1, and the floor -6 of log sigma; samples come
from the encoder joint alone (A-MIM), as in the author's later code.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from jaxlab.ops.collectives import axis_index, gather_rows
from jaxlab.ops.masked import compute_dtype, masked_logsumexp, masked_mean, safe_normalize, zero_where_false
from jaxlab.ops.reduction import reduce_terms
from jaxlab.ops.sharding import rows_mixed


def cmim_loss(
    log_likelihood: Array,
    codes: Array,
    mean: Array,
    log_std: Array,
    *,
    weight: float | Array = 1.0,
    temperature: float | Array = 0.1,
    negatives: str = "mean",
    beta: float = 1.0,
    min_log_std: float = -6.0,
    where: Array | None = None,
    axis_name: str | None = None,
    reduction: str = "mean",
) -> Array:
    """Returns the loss of the contrastive mutual information machine, `MIM - weight mean_i log p_i(k=1)`.

    The prior of the codes is the standard normal.

    Args:
        log_likelihood: float [N], log p(x_i | z_i) of the decoder.
        codes: float [N, D], z, one draw for each input, see `draw_codes`.
        mean: float [N, D], of the encoder's Gaussian.
        log_std: float [N, D], of the encoder's Gaussian.
        weight: of the contrastive term; 0 is MIM.
        temperature: t > 0.
        negatives: "mean", or "sum" as in InfoNCE.
        beta: see `mim_loss`.
        min_log_std: floor of `log_std`, the same as in `draw_codes`.
        where: bool [N], real examples.
        axis_name: mapped axis over which the examples are spread: negatives come from all shards.
        reduction: "mean" (over all shards) or "none", `[N]`.

    Returns:
        Scalar in nats, in the accumulation dtype (float32 for bfloat16 input), or `[N]` in the dtype of `codes`; 0
        without any example.

    Raises:
        ValueError: shapes do not fit or an option is out of range.

    Example:
        >>> z = 3 * jnp.eye(4)
        >>> loss = jax.jit(lambda codes: cmim_loss(jnp.zeros(4), codes, z, jnp.zeros((4, 4))))
        >>> bool(loss(z) < loss(z[::-1]))
        True

    Source:
        Livne, arXiv 2502.19642.
    """
    if mean.shape != codes.shape or log_std.shape != codes.shape:
        raise ValueError(f"mean {mean.shape} and log_std {log_std.shape} must have the shape of codes, {codes.shape}")
    keep = _rows({"codes": codes, "log_likelihood": log_likelihood}, where)
    zero = lambda a: zero_where_false(a, keep)
    log_std = jnp.maximum(zero(log_std), min_log_std)
    log_q = gaussian_log_density(zero(codes), zero(mean), log_std)
    log_prior = gaussian_log_density(zero(codes))
    dtype = compute_dtype(codes)
    mim = mim_loss(zero(log_likelihood).astype(dtype), log_prior, log_q, beta=beta, reduction="none")
    contrast = {"temperature": temperature, "negatives": negatives, "where": where, "axis_name": axis_name}
    terms = mim + weight * _contrastive(codes, mean, **contrast)
    return reduce_terms(terms, keep, reduction=reduction, axis_name=axis_name, dtype=codes.dtype)


def mim_loss(
    log_likelihood: Array,
    log_prior: Array,
    log_posterior: Array,
    *,
    log_marginal: Array | None = None,
    tied: bool = True,
    beta: float = 1.0,
    where: Array | None = None,
    axis_name: str | None = None,
    reduction: str = "mean",
) -> Array:
    """Returns the loss of the mutual information machine from log densities of one draw.

    `-mean [ log p(x|z) + log P(z) + beta (log q(z|x) + log q(x)) ] / 2`, where tied takes log p(x|z) for log q(x).

    Args:
        log_likelihood: float [N], log p(x | z).
        log_prior: float [N], log P(z).
        log_posterior: float [N], log q(z | x).
        log_marginal: float [N], log q(x), for `tied=False`; None = the data's own, which is constant and left out.
        tied: whether q(x) is the decoder's marginal, estimated by p(x | z) at the draw.
        beta: weight of the encoder's joint, 1 in the paper.
        where: bool [N], real examples.
        axis_name: mapped axis over which the examples are spread.
        reduction: "mean" (over all shards) or "none", `[N]`.

    Returns:
        Scalar in nats, in the accumulation dtype (float32 for bfloat16 input), or `[N]` in the dtype of
        `log_likelihood`; 0 without any example.

    Raises:
        ValueError: shapes do not fit, or `log_marginal` is given with `tied=True`.

    Example:
        >>> float(mim_loss(jnp.array([-1.0]), jnp.array([-2.0]), jnp.array([-4.0])))
        4.0

    Source:
        Livne, Swersky, Fleet, MIM, arXiv 1910.03175; code seraphlabs-ca/MIM.
    """
    if tied and log_marginal is not None:
        raise ValueError("log_marginal is given: with tied=True the decoder's marginal takes its place")
    arrays = {"log_likelihood": log_likelihood, "log_prior": log_prior, "log_posterior": log_posterior}
    if log_marginal is not None:
        arrays["log_marginal"] = log_marginal
    keep = _rows(arrays, where)
    for name, array in arrays.items():
        if array.ndim != 1:
            raise ValueError(f"{name} must be [N], got {array.shape}")
    dtype = compute_dtype(*arrays.values())
    wide = {name: zero_where_false(array, keep).astype(dtype) for name, array in arrays.items()}
    marginal = wide["log_likelihood"] if tied else wide.get("log_marginal", 0.0)
    joint = wide["log_posterior"] + marginal
    terms = -(wide["log_likelihood"] + wide["log_prior"] + beta * joint) / 2
    return reduce_terms(terms, keep, reduction=reduction, axis_name=axis_name, dtype=log_likelihood.dtype)


def cmim_contrastive_loss(
    codes: Array,
    mean: Array,
    *,
    temperature: float | Array = 0.1,
    negatives: str = "mean",
    where: Array | None = None,
    axis_name: str | None = None,
    reduction: str = "mean",
) -> Array:
    """Returns `-mean_i log p_i(k=1)`: how badly codes are told from those of other inputs.

    `log(1 + mean_{j != i} exp((s_ij - s_ii) / t))` with `s_ij = cos(z_i, mu_j)`; with "sum" it is InfoNCE.

    Args:
        codes: float [N, D], z_i; need not be normalised, a zero vector has cosine 0 with everything.
        mean: float [N, D], mu(x_j).
        temperature: t > 0.
        negatives: "mean" or "sum".
        where: bool [N], real examples; the others are neither anchors nor negatives.
        axis_name: mapped axis over which the examples are spread: negatives come from all shards.
        reduction: "mean" (over all shards) or "none", `[N]`.

    Returns:
        Scalar in the accumulation dtype (float32 for bfloat16 input), or `[N]` in the dtype of `codes`: log 2 where all
        codes are equal. An example without negatives has loss 0; no example gives 0.

    Raises:
        ValueError: shapes do not fit or an option is out of range.

    Example:
        >>> z = jnp.ones((5, 3))
        >>> round(float(jax.jit(cmim_contrastive_loss)(z, z)), 4)
        0.6931

    Source:
        Livne, arXiv 2502.19642 and 2509.21511.
    """
    if codes.ndim != 2 or mean.shape != codes.shape:
        raise ValueError(f"codes and mean must have one shape [N, D], got {codes.shape} and {mean.shape}")
    keep = _rows({"codes": codes}, where)
    options = {"temperature": temperature, "negatives": negatives, "where": where, "axis_name": axis_name}
    terms = _contrastive(codes, mean, **options)
    return reduce_terms(terms, keep, reduction=reduction, axis_name=axis_name, dtype=codes.dtype)


def draw_codes(mean: Array, log_std: Array, *, key: Array, min_log_std: float = -6.0) -> Array:
    """Returns one draw of each encoder Gaussian, `mu + exp(max(log_std, min_log_std)) e` with standard normal e.

    Args:
        mean: float [N, D].
        log_std: float [N, D].
        key: draws e.
        min_log_std: floor; below it `log_std` has no gradient.

    Returns:
        Shape and dtype of `mean`.

    Raises:
        ValueError: shapes differ.

    Example:
        >>> mean = jnp.ones((2, 3))
        >>> jax.jit(lambda mean: draw_codes(mean, mean - 99, key=jax.random.key(0)))(mean).round(1).tolist()[0]
        [1.0, 1.0, 1.0]
    """
    if mean.shape != log_std.shape:
        raise ValueError(f"log_std has shape {log_std.shape}, expected {mean.shape}, as mean")
    wide = compute_dtype(mean, log_std)
    noise = jax.random.normal(key, mean.shape, wide)
    return (mean.astype(wide) + jnp.exp(jnp.maximum(log_std.astype(wide), min_log_std)) * noise).astype(mean.dtype)


def gaussian_log_density(x: Array, mean: Array | float = 0.0, log_std: Array | float = 0.0) -> Array:
    """Returns the log density of a Gaussian with independent coordinates, summed over the last axis.

    Args:
        x: float [..., D].
        mean: float [..., D], or a number.
        log_std: float [..., D], or a number.

    Returns:
        float [...] in nats, in the accumulation dtype.

    Example:
        >>> round(float(gaussian_log_density(jnp.zeros((1, 2)))[0]), 4)
        -1.8379
    """
    wide = compute_dtype(x)
    mean, log_std = (jnp.broadcast_to(jnp.asarray(a, wide), x.shape) for a in (mean, log_std))
    away = (x.astype(wide) - mean) * jnp.exp(-log_std)
    return -jnp.sum(away * away / 2 + log_std + math.log(2 * math.pi) / 2, axis=-1)


def informative_embedding(
    hidden: Callable[..., Array],
    codes: Array,
    x: Array | None = None,
    *,
    where: Array | None = None,
    pool: str = "mean",
    normalize: bool = False,
) -> Array:
    """Returns what a decoder knows before it speaks: its last hidden states, pooled over the tokens.

    No training: it serves any encoder-decoder. An autoregressive decoder reads the true tokens as it goes (teacher
    forcing), others the code alone.

    Args:
        hidden: `hidden(codes)`, or `hidden(codes, x)` where `x` is given: the last hidden layer before the output's
            parameters, float [N, T, D] or [N, D].
        codes: float [N, Z], in evaluation the encoder's means.
        x: what the decoder reads.
        where: bool [N, T], real tokens.
        pool: see `pool_hidden`.
        normalize: whether to normalise each embedding to mean 0 and variance 1 over its features.

    Returns:
        float [N, D] in the dtype of the hidden states.

    Raises:
        ValueError: the hidden states are neither [N, T, D] nor [N, D], or an option is unknown.

    Example:
        >>> informative_embedding(lambda z: jnp.stack([z, 3 * z], axis=1), jnp.ones((1, 2))).tolist()
        [[2.0, 2.0]]

    Source:
        Livne, arXiv 2502.19642 and 2509.21511.
    """
    states = hidden(codes) if x is None else hidden(codes, x)
    if states.ndim not in (2, 3):
        raise ValueError(f"hidden must return [N, T, D] or [N, D], got {states.shape}")
    pooled = states if states.ndim == 2 else pool_hidden(states, where=where, pool=pool)
    if not normalize:
        return pooled
    wide = pooled.astype(compute_dtype(pooled))
    centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
    unit = safe_normalize(centred) * math.sqrt(pooled.shape[-1])
    return unit.astype(pooled.dtype)


def pool_hidden(hidden: Array, *, where: Array | None = None, pool: str = "mean") -> Array:
    """Returns one vector for each sequence: the mean, the maximum or the last of its hidden states.

    Args:
        hidden: float [N, T, D].
        where: bool [N, T], real tokens; "last" is the last of them.
        pool: "mean", "max" or "last".

    Returns:
        float [N, D] in the dtype of `hidden`; 0 for a sequence without tokens.

    Raises:
        ValueError: shapes do not fit or `pool` is unknown.

    Example:
        >>> h = jnp.array([[[1.0], [3.0], [9.0]]])
        >>> where = jnp.array([[True, True, False]])
        >>> [float(pool_hidden(h, where=where, pool=pool)[0, 0]) for pool in ("mean", "max", "last")]
        [2.0, 3.0, 3.0]
    """
    if hidden.ndim != 3:
        raise ValueError(f"hidden must be [N, T, D], got {hidden.shape}")
    if where is not None and where.shape != hidden.shape[:2]:
        raise ValueError(f"where has shape {where.shape}, expected {hidden.shape[:2]}")
    if pool not in ("mean", "max", "last"):
        raise ValueError(f"pool={pool!r} must be 'mean', 'max' or 'last'")
    keep = jnp.ones(hidden.shape[:2], bool) if where is None else where
    if pool == "mean":
        return masked_mean(hidden, keep, axis=1).astype(hidden.dtype)
    clean = zero_where_false(hidden, keep)
    if pool == "max":
        top = jnp.max(jnp.where(keep[:, :, None], clean, -jnp.inf), axis=1)
        return jnp.where(jnp.any(keep, axis=1)[:, None], top, jnp.zeros_like(top)).astype(hidden.dtype)
    number = jnp.arange(hidden.shape[1])[None, :]
    last = number == jnp.max(jnp.where(keep, number, -1), axis=1, keepdims=True)
    return jnp.sum(jnp.where(last[:, :, None], clean, jnp.zeros((), clean.dtype)), axis=1)


def similarity_logits(
    codes: Array, mean: Array, keep: Array, *, temperature: float | Array, axis_name: str | None
) -> tuple[Array, Array, Array]:
    """Returns `cos(z_i, mu_j) / t` [n, N] over the means of all shards, which one is the own, which are negatives."""
    wide = compute_dtype(codes, mean)
    a, b = (safe_normalize(zero_where_false(v, keep).astype(wide)) for v in (codes, mean))
    others, exist = gather_rows(b, axis_name), gather_rows(keep, axis_name)
    logits = jnp.matmul(a, others.T, precision=jax.lax.Precision.HIGHEST) / temperature
    rows = axis_index(axis_name) * a.shape[0] + jnp.arange(a.shape[0])
    own = rows[:, None] == jnp.arange(others.shape[0])[None, :]
    return logits, own, exist[None, :] & ~own & keep[:, None]


def _contrastive(codes, mean, *, temperature, negatives, where, axis_name):
    """Returns -log p(k=1) of each row [n]."""
    if isinstance(temperature, int | float) and not temperature > 0:
        raise ValueError(f"temperature={temperature} must be positive")
    if negatives not in ("mean", "sum"):
        raise ValueError(f"negatives={negatives!r} must be 'mean' or 'sum'")
    keep = jnp.ones(codes.shape[0], bool) if where is None else where

    def run(codes, mean, keep):
        logits, own, other = similarity_logits(codes, mean, keep, temperature=temperature, axis_name=axis_name)
        positive = jnp.sum(jnp.where(own, logits, 0.0), axis=1)
        some = jnp.any(other, axis=1)
        negative = jnp.where(some, masked_logsumexp(logits, other), 0.0)
        if negatives == "mean":
            negative = negative - jnp.log(jnp.maximum(jnp.sum(other, axis=1, dtype=logits.dtype), 1))
        return jnp.where(some, jax.nn.softplus(negative - positive), 0.0)

    return rows_mixed(run)(codes, mean, keep)


def _rows(arrays: dict[str, Array], where: Array | None) -> Array:
    rows = next(iter(arrays.values())).shape[:1]
    for name, array in arrays.items():
        if array.shape[:1] != rows or array.ndim < 1:
            raise ValueError(f"{name} has shape {array.shape}, expected {rows[0]} rows")
    if where is not None and where.shape != rows:
        raise ValueError(f"where has shape {where.shape}, expected {rows}")
    return jnp.ones(rows, bool) if where is None else where
