"""Routers that balance a batch in training: by optimal transport, or by exact assignment (BASE layers)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from jaxlab.kernels.top_k_routing import plan_from_top_k, top_k_routing
from jaxlab.moe.plans import plan_from_ids
from jaxlab.moe.routers._linear import clean_tokens, linear, linear_init
from jaxlab.ops.assignment import linear_assignment
from jaxlab.ops.masked import safe_divide
from jaxlab.ops.sharding import rows_mixed
from jaxlab.ops.transport import sinkhorn
from jaxlab.types import Layer


def sinkhorn_router(
    num_experts: int, k: int = 1, *, epsilon: float = 1.0, iterations: int = 20, renormalize: bool = False
) -> Layer:
    """Returns a router that balances the choice of a batch by optimal transport in training (S-BASE).

    In training the k largest entries of `sinkhorn(-logits, epsilon)` over tokens and experts are chosen, in evaluation
    the k largest logits; the weights are `softmax(logits)` of the chosen either way. Transport has no gradient, and
    balances the tokens of this shard.

    Args:
        num_experts: E.
        k: experts per token, 1 to E.
        epsilon: > 0, weight of the entropy; towards 0 the balance of the choice becomes exact.
        iterations: of Sinkhorn.
        renormalize: whether the k weights of a token sum to 1.

    Returns:
        A `Layer`: `init(key, d)`, `apply(params, x [T, d], where=None, train=False)` gives a `RoutingPlan` of A = T k.

    Raises:
        ValueError: an option is out of range.

    Example:
        >>> route = jax.jit(sinkhorn_router(2, epsilon=0.1, iterations=5).apply)
        >>> route({"w": jnp.array([[1.0, 0.0]])}, jnp.array([[1.0], [-2.0], [3.0]])).counts.tolist()
        [2, 1]

    Source:
        Clark et al., Unified Scaling Laws for Routed Language Models, arXiv 2202.01169, appendix B. epsilon = 1 is the
        plain normalisation of exp(logits).
    """
    if not 1 <= k <= num_experts:
        raise ValueError(f"k={k} must be between 1 and num_experts={num_experts}")

    def apply(params, x, *, where=None, train=False):
        logits = linear(params, clean_tokens(x, where))
        plain = top_k_routing(logits, k, renormalize=renormalize, where=where)
        if not train:
            return plan_from_top_k(plain, logits)
        cost = -jax.lax.stop_gradient(logits)
        # The transport of a token that is certain of an expert is 0 in all others: its logits break the tie.
        balanced = jnp.log(jnp.maximum(sinkhorn(cost, epsilon=epsilon, iterations=iterations, where=where), 1e-30))
        ids = top_k_routing(balanced - 1e-6 * cost, k, score_function="none", where=where).ids
        weights = jnp.take_along_axis(plain.probs, jnp.minimum(ids, num_experts - 1), axis=1)
        if renormalize:
            weights = safe_divide(weights, jnp.broadcast_to(jnp.sum(weights, axis=1, keepdims=True), weights.shape))
        return plan_from_ids(ids, weights, plain.probs, logits, where=where)

    return Layer(linear_init(num_experts), apply)


def base_router(num_experts: int) -> Layer:
    """Returns the router of BASE layers: in training tokens are assigned to experts in equal shares, exactly.

    Training: the assignment of T tokens to E experts of ceil(T / E) places with the largest sum of logits (O(T^3): for
    up to some hundred tokens a shard). Evaluation: each token's best expert. The weight is the sigmoid of the logit.

    Args:
        num_experts: E.

    Returns:
        A `Layer`: `init(key, d)`, `apply(params, x [T, d], where=None, train=False)` gives a `RoutingPlan` of A = T.

    Raises:
        ValueError: `num_experts` is less than 1.

    Example:
        >>> router = base_router(2)
        >>> params = {"w": jnp.array([[1.0, 0.0]])}
        >>> x = jnp.array([[1.0], [2.0], [3.0], [4.0]])
        >>> [p.counts.tolist() for p in jax.jit(lambda x: [router.apply(params, x, train=t) for t in (False, True)])(x)]
        [[4, 0], [2, 2]]

    Source:
        Lewis et al., BASE Layers, arXiv 2103.16716, section 3.
    """
    if num_experts < 1:
        raise ValueError(f"num_experts={num_experts} must be at least 1")

    def apply(params, x, *, where=None, train=False):
        logits = linear(params, clean_tokens(x, where))
        scores = jax.nn.sigmoid(logits)
        if train:
            places = -(-x.shape[0] // num_experts)
            keep = jnp.ones(x.shape[0], bool) if where is None else where
            ids = rows_mixed(_balanced)(jax.lax.stop_gradient(logits), keep, places=places)
        else:
            ids = jnp.argmax(logits, axis=1)[:, None]
        weights = jnp.take_along_axis(scores, jnp.maximum(ids, 0), axis=1)
        return plan_from_ids(ids, weights, scores, logits, where=where)

    return Layer(linear_init(num_experts), apply)


def _balanced(logits: Array, keep: Array, *, places: int) -> Array:
    columns = linear_assignment(jnp.repeat(logits, places, axis=1), maximize=True, where=keep)
    return jnp.where(columns >= 0, columns // places, -1)[:, None]
