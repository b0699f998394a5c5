"""UniME-V2: MLLM-as-a-Judge for Universal Multimodal Embedding Learning (2025, arXiv 2510.13515).

A strong model judges how well each retrieved candidate answers a query. Its scores choose hard negatives that are not
false ones, and are the soft targets that the similarities of the embeddings have to match.

    s(q, c)  = p(yes) / (p(yes) + p(no))                                        the judge's score of a candidate
    hard     = candidates with s(q, c) <= s(q, c+) - beta, by falling s in turns of 5: 0, 5, 10, .., 1, 6, ..
    P, Q     = softmax(s / t), softmax(cos(q, c) / t)                           over c+ and the negatives
    loss     = mean over queries of (KL(P || Q) + KL(Q || P)) / 2,   KL(P || Q) = sum P (log P - log(Q + eps))

The judge is out of reach here: it is an array of scores. Candidates come from a search with an existing embedding
(`prefix_search`; the paper takes the 50 nearest). The paper speaks of the Jensen-Shannon divergence, the code computes
this symmetric one; `divergence="jensen_shannon"` gives the former. t is 0.01 on both sides, so that only scores within
a few hundredths of the best have weight.

Reconstructed: beta and the stride (from memory of the paper); the order within the cycle, and that a query with fewer
survivors repeats them; masks. The rerankers' losses follow the answers that the released training data ask for.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from jaxlab.contrastive._pairs import checked_where
from jaxlab.ops.masked import compute_dtype, masked_logsumexp, safe_normalize, zero_where_false
from jaxlab.ops.reduction import reduce_terms
from jaxlab.ops.sharding import rows_mixed


def judge_alignment_loss(
    query: Array,
    candidates: Array,
    scores: Array,
    *,
    temperature: float | Array = 0.01,
    where: Array | None = None,
    kv_where: Array | None = None,
    divergence: str = "symmetric_kl",
    eps: float = 1e-8,
    axis_name: str | None = None,
    reduction: str = "mean",
) -> Array:
    """Returns how far the similarities of each query to its candidates are from the judge's scores, as distributions.

    `mean_b (KL(P_b || Q_b) + KL(Q_b || P_b)) / 2`, P = softmax(scores / t) and Q = softmax(cosines / t).

    Args:
        query: float [B, D]; need not be normalised.
        candidates: float [B, C, D], of each query: the positive and its hard negatives, in any order.
        scores: float [B, C], the judge's, in [0, 1]; constants.
        temperature: t > 0, of both distributions.
        where: bool [B], real queries.
        kv_where: bool [B, C], real candidates.
        divergence: "symmetric_kl" or "jensen_shannon" (against the mean of P and Q; at most log 2).
        eps: >= 0, added to the second distribution of each KL (not to the mean of "jensen_shannon").
        axis_name: mapped axis over which the queries are spread, for the mean.
        reduction: "mean" (over all shards) or "none", `[B]`.

    Returns:
        Scalar in the accumulation dtype (float32 for bfloat16 input), or `[B]` in the dtype of `query`; 0 (up to eps)
        where cosines and scores differ by a constant of the row. A query without candidates is no term.

    Raises:
        ValueError: shapes do not fit, or an option is out of range.

    Example:
        >>> query, candidates = jnp.eye(2)[:1], jnp.eye(2)[None]
        >>> loss = jax.jit(lambda scores: judge_alignment_loss(query, candidates, scores, temperature=1.0))
        >>> [round(loss(jnp.array([scores])).item(), 4) for scores in ([1.0, 0.0], [0.0, 1.0])]
        [0.0, 0.4621]

    Source:
        Gu et al., arXiv 2510.13515; code GaryGuTC/UniME-v2 (t = 0.01 in distributed training, eps = 1e-8).
    """
    if query.ndim != 2 or candidates.ndim != 3 or candidates.shape[::2] != query.shape:
        raise ValueError(f"query and candidates must be [B, D] and [B, C, D], got {query.shape} and {candidates.shape}")
    if scores.shape != candidates.shape[:2]:
        raise ValueError(f"scores has shape {scores.shape}, expected {candidates.shape[:2]}, one for each candidate")
    if kv_where is not None and kv_where.shape != scores.shape:
        raise ValueError(f"kv_where has shape {kv_where.shape}, expected {scores.shape}, as scores")
    if divergence not in ("symmetric_kl", "jensen_shannon"):
        raise ValueError(f"divergence={divergence!r} must be 'symmetric_kl' or 'jensen_shannon'")
    if eps < 0:
        raise ValueError(f"eps={eps} must not be negative")
    keep = checked_where(where, query.shape[0], temperature)
    exist = jnp.ones(scores.shape, bool) if kv_where is None else kv_where
    exist = exist & keep[:, None]
    run = rows_mixed(_alignment_terms)
    scores = jax.lax.stop_gradient(scores)
    options = {"temperature": temperature, "mixture": divergence == "jensen_shannon", "eps": eps}
    terms = run(query, candidates, scores, exist, **options)
    some = jnp.any(exist, axis=1)
    return reduce_terms(terms, some, reduction=reduction, axis_name=axis_name, dtype=query.dtype)


def mine_hard_negatives(
    scores: Array,
    positive_scores: Array,
    *,
    num_negatives: int = 8,
    beta: float = 0.01,
    stride: int = 5,
    where: Array | None = None,
    key: Array | None = None,
) -> tuple[Array, Array]:
    """Returns each query's hard negatives among its retrieved candidates: judged worse than the positive, but diverse.

    Candidates that the judge scores above `positive_scores - beta` are taken for false negatives. The others are
    ordered by falling score (ties as retrieved) and visited in the order 0, stride, 2 stride, .., 1, stride + 1, ..;
    a query with fewer than `num_negatives` of them goes round again.

    Args:
        scores: float [Q, K], the judge's, of the retrieved candidates without the positive.
        positive_scores: float [Q], the judge's, of each query's positive.
        num_negatives: n, how many to choose.
        beta: how much lower than the positive's a negative's score has to be.
        stride: >= 1; 1 takes the n hardest.
        where: bool [Q, K], real candidates.
        key: draws the negatives of a query that has no survivor from all its candidates; None leaves it without.

    Returns:
        `index` int32 [Q, n] into the K candidates, -1 where there is none; `found` bool [Q, n].

    Raises:
        ValueError: shapes do not fit, or an option is out of range.

    Example:
        >>> scores = jnp.array([[0.995, 0.2, 0.8, 0.6]])
        >>> mine = jax.jit(lambda s, positive: mine_hard_negatives(s, positive, num_negatives=4, stride=2))
        >>> mine(scores, jnp.array([1.0]))[0].tolist()
        [[2, 1, 3, 2]]

    Source:
        Gu et al., arXiv 2510.13515 (n = 8 in the released configuration).
    """
    if scores.ndim != 2 or positive_scores.shape != scores.shape[:1]:
        raise ValueError(
            f"scores and positive_scores must be [Q, K] and [Q], got {scores.shape} and {positive_scores.shape}"
        )
    if where is not None and where.shape != scores.shape:
        raise ValueError(f"where has shape {where.shape}, expected {scores.shape}, as scores")
    if num_negatives < 1 or stride < 1:
        raise ValueError(f"num_negatives={num_negatives} and stride={stride} must be at least 1")
    if scores.shape[1] < 1:
        raise ValueError("scores must have at least one candidate, got K=0")
    exist = jnp.ones(scores.shape, bool) if where is None else where
    return rows_mixed(_mine)(scores, positive_scores, exist, key, count=num_negatives, beta=beta, stride=stride)


def judge_scores(yes_logits: Array, no_logits: Array) -> Array:
    """Returns the judge's score `p(yes) / (p(yes) + p(no))` from the logits of its two answers.

    Args:
        yes_logits: float, any shape, logit of the token that says that the candidate fits.
        no_logits: float, the same shape, logit of the token that says that it does not.

    Returns:
        float in [0, 1], shape and dtype of the logits.

    Raises:
        ValueError: the shapes differ.

    Example:
        >>> judge_scores(jnp.array([2.0, 5.0]), jnp.array([2.0, -100.0])).tolist()
        [0.5, 1.0]

    Source:
        Gu et al., arXiv 2510.13515, section on the judge.
    """
    if yes_logits.shape != no_logits.shape:
        raise ValueError(f"yes_logits and no_logits must have one shape, got {yes_logits.shape} and {no_logits.shape}")
    dtype = jnp.result_type(yes_logits, no_logits)
    wide = compute_dtype(yes_logits, no_logits)
    return jax.nn.sigmoid(yes_logits.astype(wide) - no_logits.astype(wide)).astype(dtype)


def pairwise_rerank_loss(
    positive_logits: Array,
    negative_logits: Array,
    *,
    where: Array | None = None,
    axis_name: str | None = None,
    reduction: str = "mean",
) -> Array:
    """Returns the reranker's loss of answering yes to the positive and no to the hardest negative.

    `mean_b (log(1 + exp(-d_b+)) + log(1 + exp(d_b-))) / 2`, d the logit of yes minus that of no.

    Args:
        positive_logits: float [B, 2], logits of yes and no for each query's positive.
        negative_logits: float [B, 2], logits of yes and no for its hardest negative.
        where: bool [B], real queries.
        axis_name: mapped axis over which the queries are spread, for the mean.
        reduction: "mean" (over all shards) or "none", `[B]`.

    Returns:
        Scalar in the accumulation dtype, or `[B]` in the dtype of the logits; no query gives 0.

    Raises:
        ValueError: shapes do not fit.

    Example:
        >>> round(jax.jit(pairwise_rerank_loss)(jnp.zeros((1, 2)), jnp.zeros((1, 2))).item(), 4)  # log 2
        0.6931

    Source:
        Gu et al., arXiv 2510.13515 (reconstructed: the logits of other tokens take no part).
    """
    if positive_logits.ndim != 2 or positive_logits.shape[1] != 2 or negative_logits.shape != positive_logits.shape:
        raise ValueError(
            "positive_logits and negative_logits must be [B, 2], "
            f"got {positive_logits.shape} and {negative_logits.shape}"
        )
    keep = checked_where(where, positive_logits.shape[0])
    dtype = compute_dtype(positive_logits, negative_logits)
    first = zero_where_false(positive_logits, keep).astype(dtype)
    second = zero_where_false(negative_logits, keep).astype(dtype)
    yes, no = jax.nn.softplus(first[:, 1] - first[:, 0]), jax.nn.softplus(second[:, 0] - second[:, 1])
    terms = (yes + no) / 2
    return reduce_terms(terms, keep, reduction=reduction, axis_name=axis_name, dtype=positive_logits.dtype)


def listwise_rerank_loss(
    logits: Array,
    labels: Array,
    *,
    where: Array | None = None,
    kv_where: Array | None = None,
    axis_name: str | None = None,
    reduction: str = "mean",
) -> Array:
    """Returns the reranker's loss of naming the positive's place in a list of candidates.

    `mean_b [log sum_l exp(logits_bl) - logits_b,labels_b]`; with `cosines / temperature` as logits it is InfoNCE with
    candidates of each query's own.

    Args:
        logits: float [B, L], of the tokens that name the L places.
        labels: int [B], place of the positive, which the data draw at random; -1 is no term.
        where: bool [B], real queries.
        kv_where: bool [B, L], places that are filled.
        axis_name: mapped axis over which the queries are spread, for the mean.
        reduction: "mean" (over all shards) or "none", `[B]`.

    Returns:
        Scalar in the accumulation dtype, or `[B]` in the dtype of `logits`. A query whose positive is not among the
        filled places is no term; none gives 0.

    Raises:
        ValueError: shapes do not fit.

    Example:
        >>> round(jax.jit(listwise_rerank_loss)(jnp.zeros((1, 4)), jnp.array([2])).item(), 4)  # log 4
        1.3863

    Source:
        Gu et al., arXiv 2510.13515: the reranker minimises the sum of this loss and `pairwise_rerank_loss`, and ranks
        by `argmax(logits)`.
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(f"logits and labels must be [B, L] and [B], got {logits.shape} and {labels.shape}")
    if kv_where is not None and kv_where.shape != logits.shape:
        raise ValueError(f"kv_where has shape {kv_where.shape}, expected {logits.shape}, as logits")
    keep = checked_where(where, logits.shape[0])
    exist = jnp.ones(logits.shape, bool) if kv_where is None else kv_where
    exist = exist & keep[:, None]
    chosen = (jnp.arange(logits.shape[1])[None, :] == labels[:, None]) & exist
    wide = jnp.where(exist, logits.astype(compute_dtype(logits)), 0.0)
    some = jnp.any(chosen, axis=1)
    # An empty row would have the logarithm of 0; it is no term.
    log_sum = masked_logsumexp(wide, exist | jnp.logical_not(some)[:, None])
    terms = log_sum - jnp.sum(jnp.where(chosen, wide, 0.0), axis=1)
    return reduce_terms(terms, some, reduction=reduction, axis_name=axis_name, dtype=logits.dtype)


def _alignment_terms(query, candidates, scores, exist, *, temperature, mixture, eps):
    dtype = compute_dtype(query, candidates, scores)
    query = safe_normalize(zero_where_false(query, jnp.any(exist, axis=1)).astype(dtype))
    candidates = safe_normalize(zero_where_false(candidates, exist).astype(dtype))
    cosine = jnp.einsum("bd,bcd->bc", query, candidates, precision=jax.lax.Precision.HIGHEST)
    log_p, log_q = _log_softmax(scores.astype(dtype) / temperature, exist), _log_softmax(cosine / temperature, exist)
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    # Where the second distribution underflows without eps, its logarithm is that of the smallest normal number.
    log = lambda x: jnp.log(jnp.maximum(x, jnp.finfo(dtype).tiny))
    against_p, against_q = (log((p + q) / 2),) * 2 if mixture else (log(q + eps), log(p + eps))
    inside = p * (log_p - against_p) + q * (log_q - against_q)
    return jnp.sum(jnp.where(exist, inside, 0.0), axis=1) / 2


def _log_softmax(x, exist):
    """Returns log probabilities of what exists, 0 elsewhere."""
    x = jnp.where(exist, x, 0.0)
    log_sum = masked_logsumexp(x, exist)[:, None]
    return jnp.where(exist, x - jnp.where(jnp.isfinite(log_sum), log_sum, 0.0), 0.0)


def _mine(scores, positive_scores, exist, key, *, count, beta, stride):
    number = scores.shape[1]
    dtype = compute_dtype(scores)
    wide = jnp.where(exist, scores.astype(dtype), 0.0)
    hard = exist & (wide <= (positive_scores.astype(dtype) - beta)[:, None])
    if key is not None:
        # A query without survivors gets all its candidates, in an order drawn at random.
        drawn = jax.random.uniform(key, wide.shape, dtype)
        none = jnp.logical_not(jnp.any(hard, axis=1))[:, None]
        hard, wide = jnp.where(none, exist, hard), jnp.where(none, drawn, wide)
    falling = jnp.argsort(jnp.where(hard, -wide, jnp.inf), axis=1)
    total = jnp.sum(hard, axis=1)[:, None]
    # Of the first `total` places: first those divisible by the stride, then those with remainder 1, and so on.
    place = jnp.arange(number)[None, :]
    turn = jnp.where(place < total, (place % stride) * number + place // stride, number * stride + place)
    visited = jnp.take_along_axis(falling, jnp.argsort(turn, axis=1), axis=1)
    step = jnp.arange(count)[None, :] % jnp.maximum(total, 1)
    found = jnp.broadcast_to(total > 0, step.shape)
    return jnp.where(found, jnp.take_along_axis(visited, step, axis=1), -1).astype(jnp.int32), found
