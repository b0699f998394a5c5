"""From Generator to Embedder (SaHa, 2025, arXiv 2508.00955).

The title goes on: Harnessing Innate Abilities of Multimodal LLMs via Building Zero-Shot Discriminative Embedding Model.

Self-aware hard negative sampling: batches in which the model itself finds every pair hard for the others. Candidates
retrieved for a query are hard; those whose OWN query resembles the query are probably right answers to it, and left
out.

    for each query q not yet in a cluster, in order:
        walk down the `pool` candidates nearest to q without its positive; the owner of each is the query that has it as
        its positive and is not yet used (the most similar to q of several), until `first` are found
        cluster = q and the k owners least similar to q, with their positives; all of them are used now
    then once more over queries left out, where owners may have been used in the first round, and `first` is doubled
    first = k pool_factor, pool = 2 first
    loss  = mean over pairs of -log exp(cos(q, c) / t) / sum over the candidates of the batch of exp(cos(q, c') / t)

So a batch of clusters costs no forward passes beyond those of its pairs. The prompt that turns a generator into an
embedder has two levels: a system message that asks for one word, and the task's instruction with the content.

Reconstructed: that two pairs with the same candidate are no negatives of each other (`index`; the code lets them be),
masks, and the wording of the prompt, which the caller may replace.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxlab.contrastive._pairs import checked_where, own_columns, unit_rows
from jaxlab.ops.collectives import axis_index, gather_rows
from jaxlab.ops.masked import compute_dtype, masked_logsumexp, safe_divide, safe_normalize
from jaxlab.ops.reduction import reduce_terms
from jaxlab.ops.sharding import rows_mixed

ONE_WORD = "Given an image, a text or both, summarise what they mean in one word."


def saha_clusters(
    query: np.ndarray,
    candidates: np.ndarray,
    positive: np.ndarray,
    *,
    k: int = 7,
    pool_factor: int = 5,
    by_query: bool = True,
    labelled: np.ndarray | None = None,
    reuse: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns clusters of pairs that are hard for each other without being right answers to each other (host).

    Args:
        query: float [N, D], embeddings of the queries by the model that is to be trained; need not be normalised.
        candidates: float [M, D], embeddings of the candidates.
        positive: int [N], candidate that answers each query; several queries may share one.
        k: negatives of a cluster.
        pool_factor: k times this many owners are collected, from twice as many candidates.
        by_query: whether to keep the owners least similar to the query; False keeps the first retrieved (with
            `pool_factor=1`, plain hard negatives).
        labelled: bool [N], queries that keep the first retrieved all the same, because their positive is a class label
            (the code's list of classification sets).
        reuse: whether to go over the queries that the first round left out.

    Returns:
        `clusters` int32 [C, k + 1], numbers of queries, the anchor first; -1 where too few owners were found. `where`
        bool [C, k + 1]. A query stands at most once in a cluster, and in the first round in one cluster only. A query
        for which no owner is left has no cluster.

    Raises:
        ValueError: shapes do not fit, or an option is out of range.

    Example:
        >>> angle = np.array([0.0, 0.05, 0.3, 0.4])  # the first two queries ask the same
        >>> x = np.stack([np.cos(angle), np.sin(angle)], axis=1)
        >>> saha_clusters(x, x, np.arange(4), k=1, pool_factor=2)[0].tolist()
        [[0, 2], [1, 3]]

    Source:
        Ju, Lee, arXiv 2508.00955; code yeongjoonJu/Gen2Embed (k = 7 and pool_factor = 5; its commands use 15 and 3).
    """
    query, candidates, positive = np.asarray(query), np.asarray(candidates), np.asarray(positive)
    if query.ndim != 2 or candidates.ndim != 2 or query.shape[1] != candidates.shape[1]:
        raise ValueError(f"query and candidates must be [N, D] and [M, D], got {query.shape} and {candidates.shape}")
    if positive.shape != query.shape[:1]:
        raise ValueError(f"positive has shape {positive.shape}, expected {query.shape[:1]}, a candidate for each query")
    if positive.size and (positive.min() < 0 or positive.max() >= len(candidates)):
        raise ValueError(
            f"positive must number the {len(candidates)} candidates, got {positive.min()}..{positive.max()}"
        )
    if labelled is not None and np.shape(labelled) != positive.shape:
        raise ValueError(f"labelled has shape {np.shape(labelled)}, expected {positive.shape}")
    if k < 1 or pool_factor < 1:
        raise ValueError(f"k={k} and pool_factor={pool_factor} must be at least 1")
    keep_order = np.zeros(len(query), bool) if labelled is None else np.asarray(labelled, bool)
    query, candidates = _unit(query), _unit(candidates)
    owners: list[list[int]] = [[] for _ in candidates]
    for number, candidate in enumerate(positive):
        owners[candidate].append(number)

    first = k * pool_factor
    used = np.zeros(len(query), bool)
    clusters = []

    def go_over(taken: np.ndarray, most: int) -> None:
        for q in range(len(query)):
            if used[q]:
                continue
            found = _owners_near(q, query, candidates, positive, owners, taken, pool=2 * first, most=most)
            if not found:
                continue
            if by_query and not keep_order[q]:
                found.sort(key=lambda other: float(query[q] @ query[other]))
            chosen = found[:k]
            used[[q, *chosen]] = True
            taken[chosen] = True
            clusters.append([q, *chosen] + [-1] * (k - len(chosen)))

    go_over(used, first)
    if reuse:
        go_over(np.zeros(len(query), bool), 2 * first)
    result = np.array(clusters, np.int32).reshape(-1, k + 1)
    return result, result >= 0


def cluster_info_nce_loss(
    query: Array,
    candidates: Array,
    *,
    index: Array | None = None,
    cross_cluster: bool = True,
    temperature: float | Array = 0.02,
    where: Array | None = None,
    axis_name: str | None = None,
    reduction: str = "mean",
) -> Array:
    """Returns the InfoNCE loss of each query against the candidates of its cluster, or of all clusters.

    Args:
        query: float [C, K, D], of clusters of K pairs; need not be normalised.
        candidates: float [C, K, D], the positive of each query.
        index: int [C, K], which candidate each one is: equal ones are no negatives of each other. None = all differ.
        cross_cluster: whether the candidates of the other clusters (on all shards) are negatives as well.
        temperature: t > 0.
        where: bool [C, K], real pairs.
        axis_name: mapped axis over which the clusters are spread.
        reduction: "mean" over pairs (of all shards) or "none", `[C, K]`.

    Returns:
        Scalar in the accumulation dtype (float32 for bfloat16 input), or `[C, K]` in the dtype of `query`. A pair
        without negatives has loss 0; no pair gives 0.

    Raises:
        ValueError: shapes do not fit, or an option is out of range.

    Example:
        >>> pairs = jnp.eye(4).reshape(2, 2, 4)
        >>> both = lambda x: [cluster_info_nce_loss(x, x, cross_cluster=c, temperature=1.0) for c in (False, True)]
        >>> [round(loss.item(), 3) for loss in jax.jit(both)(pairs)]
        [0.313, 0.744]

    Source:
        Ju, Lee, arXiv 2508.00955 (t = 0.02).
    """
    if query.ndim != 3 or query.shape != candidates.shape:
        raise ValueError(
            f"query and candidates must have one shape [C, K, D], got {query.shape} and {candidates.shape}"
        )
    shape = query.shape[:2]
    for name, array in (("where", where), ("index", index)):
        if array is not None and array.shape != shape:
            raise ValueError(f"{name} has shape {array.shape}, expected {shape}, one for each pair")
    rows = shape[0] * shape[1]
    flat = None if where is None else where.reshape(rows)
    keep = checked_where(flat, rows, temperature)
    number = None if index is None else index.reshape(rows)
    terms = rows_mixed(_cluster_terms)(
        query.reshape(rows, -1),
        candidates.reshape(rows, -1),
        keep,
        number,
        size=shape[1],
        cross=cross_cluster,
        temperature=temperature,
        axis_name=axis_name,
    )
    terms, keep = terms.reshape(shape), keep.reshape(shape)
    return reduce_terms(terms, keep, reduction=reduction, axis_name=axis_name, dtype=query.dtype)


def last_token_pool(hidden: Array, *, where: Array | None = None, normalize: bool = True) -> Array:
    """Returns the state of the last real token of each text, at length 1.

    Args:
        hidden: float [B, T, D], states of a language model's last layer.
        where: bool [B, T], real tokens; padding may stand on either side.
        normalize: whether to bring the result to length 1.

    Returns:
        float [B, D] in the dtype of `hidden`; 0 for a text without tokens.

    Raises:
        ValueError: shapes do not fit.

    Example:
        >>> hidden = jnp.array([[[1.0, 0.0], [0.0, 2.0], [9.0, 9.0]]])
        >>> pool = jax.jit(lambda hidden, where: last_token_pool(hidden, where=where))
        >>> pool(hidden, jnp.array([[True, True, False]])).tolist()
        [[0.0, 1.0]]

    Source:
        Ju, Lee, arXiv 2508.00955.
    """
    if hidden.ndim != 3 or (where is not None and where.shape != hidden.shape[:2]):
        shape = None if where is None else where.shape
        raise ValueError(f"hidden and where must be [B, T, D] and [B, T], got {hidden.shape} and {shape}")
    keep = jnp.ones(hidden.shape[:2], bool) if where is None else where
    last = jnp.max(jnp.where(keep, jnp.arange(hidden.shape[1])[None, :], -1), axis=1)
    chosen = keep & (jnp.arange(hidden.shape[1])[None, :] == last[:, None])
    state = jnp.sum(jnp.where(chosen[:, :, None], hidden.astype(compute_dtype(hidden)), 0.0), axis=1)
    return (safe_normalize(state) if normalize else state).astype(hidden.dtype)


def hierarchical_prompt(content: str, *, instruction: str, system: str = ONE_WORD) -> list[dict[str, str]]:
    """Returns the messages whose last token's state is the embedding: what embedding means, above what the task is.

    Args:
        content: what is to be embedded, with the model's marks for images.
        instruction: of the task, for this side of it.
        system: of all tasks.

    Returns:
        A system and a user message, for the model's own chat template.

    Example:
        >>> [message["role"] for message in hierarchical_prompt("a red cube", instruction="Find the picture.")]
        ['system', 'user']

    Source:
        Ju, Lee, arXiv 2508.00955 (the wording is reconstructed).
    """
    return [{"role": "system", "content": system}, {"role": "user", "content": f"{instruction}\n{content}"}]


def false_negative_rate(clusters: Array, labels: Array) -> Array:
    """Returns how often two different pairs of one cluster have the same label.

    Args:
        clusters: int [C, K], numbers of queries; -1 = none.
        labels: int [N], of the queries; -1 is unlabelled and takes no part.

    Returns:
        float32 []; 0 without pairs.

    Raises:
        ValueError: shapes do not fit.

    Example:
        >>> float(jax.jit(false_negative_rate)(jnp.array([[0, 1], [2, 3]]), jnp.array([5, 5, 5, 6])))
        0.5
    """
    if clusters.ndim != 2 or labels.ndim != 1:
        raise ValueError(f"clusters and labels must be [C, K] and [N], got {clusters.shape} and {labels.shape}")
    clusters = jnp.asarray(clusters)
    label = jnp.where(clusters >= 0, jnp.asarray(labels)[jnp.maximum(clusters, 0)], -1)
    real = label >= 0
    off = jnp.logical_not(jnp.eye(clusters.shape[1], dtype=bool))[None]
    pair = real[:, :, None] & real[:, None, :] & off
    same = pair & (label[:, :, None] == label[:, None, :])
    return safe_divide(jnp.sum(same, dtype=jnp.float32), jnp.sum(pair, dtype=jnp.float32))


def _unit(x):
    x = x.astype(np.float64 if x.dtype == np.float64 else np.float32)
    length = np.linalg.norm(x, axis=1, keepdims=True)
    return x / np.where(length > 0, length, 1)


def _owners_near(q, query, candidates, positive, owners, taken, *, pool, most):
    """Returns the owners, at most `most`, of the `pool` candidates nearest to query q, nearest first."""
    near = np.argsort(-(candidates @ query[q]), kind="stable")[:pool]
    found = []
    for candidate in near[near != positive[q]]:
        free = [other for other in owners[candidate] if not taken[other]]
        if free:
            found.append(free[int(np.argmax(query[free] @ query[q]))])
        if len(found) >= most:
            break
    return found


def _cluster_terms(query, candidates, keep, number, *, size, cross, temperature, axis_name):
    rows = query.shape[0]
    query, candidates = unit_rows(query, keep), unit_rows(candidates, keep)
    others, exist = gather_rows(candidates, axis_name), gather_rows(keep, axis_name)
    logits = jnp.matmul(query, others.T, precision=jax.lax.Precision.HIGHEST) / temperature
    own = own_columns(rows, others.shape[0], axis_name)
    negative = jnp.broadcast_to(exist[None, :], own.shape)
    if not cross:
        cluster = (axis_index(axis_name) * rows + jnp.arange(rows)) // size
        negative = negative & (cluster[:, None] == (jnp.arange(others.shape[0]) // size)[None, :])
    if number is not None:
        negative = negative & (number[:, None] != gather_rows(number, axis_name)[None, :])
    # The own candidate always stands in the sum, so that masked rows, too, have a finite logarithm.
    return masked_logsumexp(logits, own | negative) - jnp.sum(jnp.where(own, logits, 0.0), axis=1)
