"""Contrastive Mutual Information Learning: Toward Robust Representations without Positive-Pair Augmentations.

2025, arXiv 2509.21511. The grown-up statement of cMIM (see `cmim_loss`): negatives enter as an expectation, so the
contrastive term hardly depends on the batch, and the decoder's hidden states are embeddings for any task. This file
adds what the claim about batches is made of: the weight of each negative in the gradient, and the protocol.

    pi_ij = exp(s_ij / t) / M_i / ( exp(s_ii / t) + mean_{l != i} exp(s_il / t) ),  M_i negatives,
    sum_{j != i} pi_ij = 1 - p_i(k=1);  for InfoNCE ("sum") without M_i, and with the sum below

E[mean_j exp(s_ij / t)] is the same for every batch size, so only its noise, of order 1 / N, depends on it; the sum
grows as N - 1, its loss as log N. Across devices the mean form needs the means of all shards (`axis_name`).

Reconstructed: the slope over log2 of the batch size as the summary of the protocol.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxlab.information.cmim import similarity_logits
from jaxlab.ops.masked import masked_logsumexp
from jaxlab.ops.sharding import rows_mixed


def contrastive_weights(
    codes: Array,
    mean: Array,
    *,
    temperature: float | Array = 0.1,
    negatives: str = "mean",
    where: Array | None = None,
    axis_name: str | None = None,
) -> Array:
    """Returns how much each negative pushes: the derivative of `cmim_contrastive_loss` of row i by `s_ij / t`.

    Args:
        codes: float [N, D].
        mean: float [N, D], mu(x_j).
        temperature: t > 0.
        negatives: "mean", or "sum" as in InfoNCE.
        where: bool [N], real examples.
        axis_name: mapped axis over which the examples are spread: columns are those of all shards.

    Returns:
        float [N, N] (columns of all shards) in the dtype of `codes`, >= 0, 0 for the own column and what is not real;
        rows sum to 1 - p_i(k=1).

    Raises:
        ValueError: shapes do not fit or an option is out of range.

    Example:
        >>> z = jnp.ones((3, 2))  # nothing tells them apart: p = 1/2, shared by two negatives
        >>> jax.jit(contrastive_weights)(z, z).round(4).tolist()[0]
        [0.0, 0.25, 0.25]

    Source:
        Livne, arXiv 2509.21511; the closed form is reconstructed.
    """
    if codes.ndim != 2 or mean.shape != codes.shape:
        raise ValueError(f"codes and mean must have one shape [N, D], got {codes.shape} and {mean.shape}")
    if where is not None and where.shape != codes.shape[:1]:
        raise ValueError(f"where has shape {where.shape}, expected {codes.shape[:1]}")
    if isinstance(temperature, int | float) and not temperature > 0:
        raise ValueError(f"temperature={temperature} must be positive")
    if negatives not in ("mean", "sum"):
        raise ValueError(f"negatives={negatives!r} must be 'mean' or 'sum'")
    keep = jnp.ones(codes.shape[0], bool) if where is None else where

    def run(codes, mean, keep):
        logits, own, other = similarity_logits(codes, mean, keep, temperature=temperature, axis_name=axis_name)
        if negatives == "mean":
            logits = logits - jnp.where(own, 0.0, jnp.log(jnp.maximum(jnp.sum(other, axis=1, keepdims=True), 1)))
        # The own column stands in every sum, so that it is finite.
        total = masked_logsumexp(logits, own | other)
        return jnp.where(other, jnp.exp(jnp.where(other, logits - total[:, None], 0.0)), 0.0).astype(codes.dtype)

    return rows_mixed(run)(codes, mean, keep)


def batch_size_sensitivity(
    evaluate: Callable[[int, int], float], *, sizes: Sequence[int] = (4, 16, 64, 256), seeds: Sequence[int] = range(3)
) -> dict[str, Any]:
    """Returns how much a figure of merit depends on the batch size of training; host work.

    Args:
        evaluate: `evaluate(size, seed)` trains with that batch size and returns the figure (accuracy, R^2) of a light
            probe; called once for each pair, sizes outermost. What it raises goes through; NaN stays NaN.
        sizes: batch sizes, >= 1, at least two different ones.
        seeds: any number of seeds >= 1.

    Returns:
        A dict: `values` float64 [sizes, seeds]; `mean` and `std` (0 for one seed) float64 [sizes]; `slope` float64
        [seeds], of the figure by log2 of the size, least squares; `spread` float64 [seeds], largest minus smallest.

    Raises:
        ValueError: there are fewer than two different sizes, a size below 1, or no seed.

    Example:
        >>> found = batch_size_sensitivity(lambda size, seed: 0.5 + 0.01 * np.log2(size), sizes=(4, 16), seeds=(0,))
        >>> found["slope"].round(4).tolist(), found["spread"].round(4).tolist()
        ([0.01], [0.02])

    Source:
        Livne, arXiv 2509.21511: the comparison over batch sizes; its summary is reconstructed.
    """
    sizes, seeds = list(sizes), list(seeds)
    if len(set(sizes)) < 2 or min(sizes) < 1:
        raise ValueError(f"sizes={sizes} must hold at least two different sizes, each at least 1")
    if not seeds:
        raise ValueError("seeds must hold at least one seed, got none")
    values = np.array([[float(evaluate(size, seed)) for seed in seeds] for size in sizes], np.float64)
    power = np.log2(np.array(sizes, np.float64))
    away = (power - power.mean())[:, None]
    slope = (away * (values - values.mean(axis=0, keepdims=True))).sum(axis=0) / (away**2).sum()
    std = values.std(axis=1, ddof=1) if len(seeds) > 1 else np.zeros(len(sizes))
    spread = values.max(axis=0) - values.min(axis=0)
    return {"values": values, "mean": values.mean(axis=1), "std": std, "slope": slope, "spread": spread}
