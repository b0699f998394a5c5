"""Contrastive Learning and Mixture of Experts Enables Precise Vector Embeddings (2024, arXiv 2401.15713).

One sentence encoder for N fields: every feed-forward network of a pretrained encoder is copied to N experts, and all
tokens of a text go to the expert of its known field. Everything else is shared. Trained by multiple-negatives ranking
on pairs of abstracts that are cited together, it does as well as N encoders fine-tuned apart.

    enforced:       y_t = f_r(x_t),  r the field of the text of token t
    learnt, one:    r = argmax of the mean over the text of x_t W; the router learns from its own loss only
    learnt, k:      y_t = sum of p_e f_e(x_t) over the k largest p = softmax(mean of x_t W), not divided by their sum
    router loss:    cross entropy of (mean over layers of those logits) and the field
    ranking:        cross entropy of 20 cos(a_i, b_j) over j, target i: `contrastive.info_nce_loss`
    evaluation:     the largest F1 of "related if the cosine is at least t" over all thresholds t

`enforced_router` and `sentence_router` are routers of `moe_layer`, `upcycle` makes its experts; by token there is
`top_k_router`. Mutual information of field and expert as a loss: `mutual_information_loss`.

Reconstructed: masks; pairs as all that are cited together. The official router loss of mutual information adds up
detached histories, so that nothing learns from it; ranking there lacks its scale and its matrix of similarities.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxlab.moe.plans import plan_from_ids
from jaxlab.moe.routers import hash_router
from jaxlab.ops.collectives import global_mean, match_varying
from jaxlab.ops.masked import compute_dtype, safe_divide, zero_where_false
from jaxlab.ops.sharding import rows_mixed
from jaxlab.types import Layer


def enforced_router(num_experts: int) -> Layer:
    """Returns the router that sends every token to the expert of its known field, with weight 1.

    Args:
        num_experts: E, one for each field.

    Returns:
        A `Layer` without parameters: `init(key, d)` gives `{}`; `apply(params, x [T, d], ids=int [T], where=None)`
        gives a `RoutingPlan` of A = T assignments. Tokens whose field is not in 0 .. E - 1 get none.

    Raises:
        ValueError: `num_experts` is less than 1.

    Example:
        >>> router = enforced_router(3)
        >>> jax.jit(router.apply)({}, jnp.ones((4, 2)), ids=jnp.array([2, 2, 0, -1])).counts.tolist()
        [1, 0, 2]

    Source:
        Hallee et al., arXiv 2401.15713, section 2.4; code Gleghorn-Lab/Mixture-of-Experts-Sentence-Similarity.
    """
    if num_experts < 1:
        raise ValueError(f"num_experts={num_experts} must be at least 1")
    return hash_router(np.arange(num_experts, dtype=np.int32), num_experts)


def sentence_router(num_experts: int, k: int | None = None, *, num_segments: int) -> Layer:
    """Returns a learnt router that decides once for each text, by the mean of its tokens' logits.

    Args:
        num_experts: E.
        k: experts of a text, with their probabilities as weights; None = the best one, with weight 1, which gives the
            router no gradient: add `specified_expert_loss` of the plan's logits.
        num_segments: largest number of texts in a call.

    Returns:
        A `Layer`: `init(key, d)`, `apply(params, x [T, d], segment_ids=int [T], where=None)` gives a `RoutingPlan` of A
        = T k assignments; `scores` and `logits` [T, E] of a token are those of its text. Tokens of segment -1 are
        padding.

    Raises:
        ValueError: an option is out of range; in `apply`, a shape does not fit.

    Example:
        >>> router = sentence_router(2, num_segments=2)
        >>> x = jnp.array([[3.0], [-1.0], [-1.0]])
        >>> jax.jit(router.apply)({"w": jnp.array([[1.0, 0.0]])}, x, segment_ids=jnp.array([0, 0, 1])).counts.tolist()
        [2, 1]

    Source:
        Code Gleghorn-Lab/Mixture-of-Experts-Sentence-Similarity (sentence-level switch and top-k).
    """
    chosen = 1 if k is None else k
    if not 1 <= chosen <= num_experts:
        raise ValueError(f"k={k} must be between 1 and num_experts={num_experts}")
    if num_segments < 1:
        raise ValueError(f"num_segments={num_segments} must be at least 1")

    def init(key, size):
        return {"w": jax.random.normal(key, (size, num_experts)) * 0.02}

    def apply(params, x, *, segment_ids, where=None):
        if x.ndim != 2 or segment_ids.shape != x.shape[:1]:
            raise ValueError(f"x and segment_ids must be [T, d] and [T], got {x.shape} and {segment_ids.shape}")
        keep = (segment_ids >= 0) & (segment_ids < num_segments)
        keep = keep if where is None else keep & where
        x = zero_where_false(x, keep)
        x = x.astype(compute_dtype(x))
        logits = rows_mixed(_by_segment)(
            *match_varying(x @ params["w"].astype(x.dtype), segment_ids, keep), num_segments=num_segments
        )
        probs = jax.nn.softmax(logits, axis=1)
        _, ids = jax.lax.top_k(logits, chosen)
        weights = jnp.ones(ids.shape, x.dtype) if k is None else jnp.take_along_axis(probs, ids, axis=1)
        return plan_from_ids(ids, weights, probs, logits, where=keep)

    return Layer(init, apply)


def specified_expert_loss(
    logits: Array, labels: Array, *, where: Array | None = None, axis_name: str | None = None
) -> Array:
    """Returns the cross entropy of the mean router logits over the layers and the known field.

    Args:
        logits: float [L, N, E], of L layers and N texts (or their tokens).
        labels: int [N], the fields; -1 = unknown.
        where: bool [N], texts that exist.
        axis_name: mapped axis over which the texts are spread.

    Returns:
        Scalar in the dtype of accumulation; 0 without known fields.

    Raises:
        ValueError: shapes do not fit.

    Example:
        >>> round(float(jax.jit(specified_expert_loss)(jnp.zeros((2, 3, 4)), jnp.array([0, 1, -1]))), 4)
        1.3863

    Source:
        Code Gleghorn-Lab/Mixture-of-Experts-Sentence-Similarity (before its weight).
    """
    if logits.ndim != 3 or labels.shape != logits.shape[1:2]:
        raise ValueError(f"logits and labels must be [L, N, E] and [N], got {logits.shape} and {labels.shape}")
    experts = logits.shape[2]
    keep = (labels >= 0) & (labels < experts)
    keep = keep if where is None else keep & where
    logits = jnp.where(keep[None, :, None], logits, jnp.zeros((), logits.dtype)).astype(compute_dtype(logits))
    log_probs = jax.nn.log_softmax(jnp.mean(logits, axis=0), axis=1)
    own = jnp.take_along_axis(log_probs, jnp.where(keep, labels, 0)[:, None], axis=1)[:, 0]
    return global_mean(-own, keep, axis_name=axis_name)


def f1_max(scores: Array, labels: Array, *, where: Array | None = None) -> tuple[Array, Array]:
    """Returns the largest F1 of "positive if the score is at least t" over all thresholds t, and that t.

    Args:
        scores: float [N], such as cosines of pairs.
        labels: int or bool [N], 1 = positive (related), 0 = not.
        where: bool [N], pairs that exist.

    Returns:
        `(f1, threshold)`, both [] in the dtype of `scores`, without gradient. Of several best thresholds the highest; 0
        and +infinity without positives.

    Raises:
        ValueError: shapes do not fit.

    Example:
        >>> f1, threshold = jax.jit(f1_max)(jnp.array([0.9, 0.8, 0.3, 0.1]), jnp.array([1, 0, 1, 0]))
        >>> round(float(f1), 4), round(float(threshold), 4)
        (0.8, 0.3)

    Source:
        Hallee et al., arXiv 2401.15713, section 2.6 (F1max).
    """
    if scores.ndim != 1 or labels.shape != scores.shape:
        raise ValueError(f"scores and labels must be [N], got {scores.shape} and {labels.shape}")
    keep = jnp.ones(scores.shape, bool) if where is None else where
    f1, threshold = rows_mixed(_f1_max)(jax.lax.stop_gradient(scores), labels, keep)
    return f1.astype(scores.dtype), threshold.astype(scores.dtype)


def cocitation_pairs(citations: Sequence[Sequence[int]], *, min_count: int = 1) -> np.ndarray:
    """Returns all pairs of papers that are cited together (host): the positives of the ranking loss.

    Args:
        citations: of every citing paper, the ids of those it cites.
        min_count: how many papers must cite both.

    Returns:
        int64 [P, 2], sorted, the lower id first, each pair once.

    Raises:
        ValueError: `min_count` is less than 1.

    Example:
        >>> cocitation_pairs([[1, 4, 2], [2, 1], [3]], min_count=2).tolist()
        [[1, 2]]

    Source:
        Hallee et al., arXiv 2401.15713, section 2.1.
    """
    if min_count < 1:
        raise ValueError(f"min_count={min_count} must be at least 1")
    pairs = [np.empty((0, 2), np.int64)]
    for cited in citations:
        ids = np.unique(np.asarray(cited, np.int64))
        first, second = np.triu_indices(len(ids), 1)
        pairs.append(np.stack([ids[first], ids[second]], axis=1))
    unique, counts = np.unique(np.concatenate(pairs), axis=0, return_counts=True)
    return unique[counts >= min_count]


def _by_segment(logits, segment_ids, keep, *, num_segments):
    target = jnp.where(keep, segment_ids, num_segments)
    zeros = match_varying(jnp.zeros((num_segments, logits.shape[1]), logits.dtype), logits)[0]
    total = zeros.at[target].add(logits, mode="drop")
    count = zeros[:, 0].at[target].add(1.0, mode="drop")
    mean = safe_divide(total, jnp.broadcast_to(count[:, None], total.shape))
    return jnp.where(keep[:, None], mean[jnp.where(keep, segment_ids, 0)], jnp.zeros((), logits.dtype))


def _f1_max(scores, labels, keep):
    dtype = compute_dtype(scores)
    # Pairs that do not exist come last, where they add nothing to either count.
    order = jnp.lexsort((-jnp.where(keep, scores, 0).astype(dtype), ~keep))
    sorted_scores, kept = scores[order].astype(dtype), keep[order]
    positive = kept & (labels[order] > 0)
    found, taken = jnp.cumsum(positive, dtype=dtype), jnp.cumsum(kept, dtype=dtype)
    f1 = safe_divide(2 * found, jnp.broadcast_to(taken + found[-1:], taken.shape))
    # A threshold takes all equal scores or none.
    last = jnp.concatenate([(sorted_scores[1:] != sorted_scores[:-1]) | ~kept[1:], jnp.ones(1, bool)])
    f1 = jnp.where(last & kept, f1, 0.0)
    best = jnp.argmax(f1)
    return f1[best], jnp.where(f1[best] > 0, sorted_scores[best], jnp.inf)
