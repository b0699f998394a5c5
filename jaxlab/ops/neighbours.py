"""Classification by the nearest rows of a memory bank."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from jaxlab.ops.masked import compute_dtype, masked_softmax, safe_normalize, zero_where_false
from jaxlab.ops.sharding import rows_mixed


def weighted_knn(
    query: Array,
    bank: Array,
    labels: Array,
    *,
    num_classes: int,
    k: int = 20,
    temperature: float = 0.07,
    where: Array | None = None,
) -> Array:
    """Returns class probabilities by a vote of the k most similar rows of the bank.

    `p(c | q) ~ sum over the k nearest i with label c of exp(cos(q, bank_i) / temperature)`, normalised to sum 1.

    Args:
        query: float [N, D].
        bank: float [M, D].
        labels: int [M], of the bank; rows labelled -1 do not vote.
        num_classes: C.
        k: number of neighbours; where the bank has fewer rows that vote, all of them do.
        temperature: > 0; 0.07 is what evaluations of self-supervised networks use.
        where: bool [M], real rows of the bank.

    Returns:
        float [N, C] in the dtype of `query`; all 0 where no row votes.

    Raises:
        ValueError: shapes do not fit; `k`, `num_classes` or `temperature` is out of range.

    Example:
        >>> import jax.numpy as jnp
        >>> bank = jnp.array([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
        >>> weighted_knn(bank[:1], bank, jnp.array([0, 0, 1]), num_classes=2, k=2).tolist()
        [[1.0, 0.0]]

    Source:
        Wu et al., arXiv 1805.01978 (the vote); k and temperature as in the evaluation of GroCo, arXiv 2301.02009.
    """
    if query.ndim != 2 or bank.ndim != 2 or query.shape[1] != bank.shape[1]:
        raise ValueError(f"query and bank must be [N, D] and [M, D], got {query.shape} and {bank.shape}")
    if labels.shape != bank.shape[:1]:
        raise ValueError(f"labels has shape {labels.shape}, expected {bank.shape[:1]}, a label for each row of bank")
    if where is not None and where.shape != labels.shape:
        raise ValueError(f"where has shape {where.shape}, expected {labels.shape}, as labels")
    if k < 1 or num_classes < 1:
        raise ValueError(f"k={k} and num_classes={num_classes} must be at least 1")
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be positive")
    labels = jnp.asarray(labels)
    votes = labels >= 0 if where is None else (labels >= 0) & where
    return rows_mixed(_vote)(query, bank, labels, votes, classes=num_classes, k=k, temperature=temperature)


def _vote(query, bank, labels, votes, *, classes, k, temperature):
    dtype = compute_dtype(query, bank)
    unit_query = safe_normalize(query.astype(dtype))
    unit_bank = safe_normalize(zero_where_false(bank, votes).astype(dtype))
    similarity = jnp.matmul(unit_query, unit_bank.T, precision=jax.lax.Precision.HIGHEST)
    # Cosines are at least -1, so that a row without a vote comes last.
    ranked = jnp.where(votes[None, :], similarity, jnp.full((), -2.0, dtype))
    top, index = jax.lax.top_k(ranked, min(k, bank.shape[0]))
    weights = masked_softmax(top / temperature, votes[index])
    one_hot = jax.nn.one_hot(labels[index], classes, dtype=dtype)
    return jnp.einsum("nk,nkc->nc", weights, one_hot).astype(query.dtype)
