"""The router in which experts choose tokens."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from jaxlab.moe.routers._linear import clean_tokens, linear, linear_init
from jaxlab.ops.sharding import rows_mixed
from jaxlab.types import Layer, RoutingPlan


def expert_choice_router(num_experts: int, capacity_factor: float = 2.0) -> Layer:
    """Returns a router in which experts choose: each takes the `T * capacity_factor / E` tokens that like it most.

    `p = softmax(x w)` over experts; expert e takes the tokens with the largest `p[:, e]`, with these weights. Load is
    equal by construction; a token may go to many experts or to none. Choosing looks at all tokens of this shard, later
    ones included, so that it is no router for causal language models.

    Args:
        num_experts: E.
        capacity_factor: > 0, mean number of experts of a token.

    Returns:
        A `Layer`: `init(key, d)`, `apply(params, x [T, d], where=None)` gives a `RoutingPlan` of A = E c assignments, c
        = T * capacity_factor / E rounded to the nearest, 1 to T. `plan.dropped` counts the tokens that no expert took.

    Raises:
        ValueError: an option is out of range.

    Example:
        >>> router = expert_choice_router(2, 1.0)
        >>> plan = jax.jit(lambda key: router.apply(router.init(key, 8), jnp.ones((6, 8))))(jax.random.key(0))
        >>> plan.counts.tolist()
        [3, 3]

    Source:
        Zhou et al., Mixture-of-Experts with Expert Choice Routing, arXiv 2202.09368, section 3.2.
    """
    if num_experts < 1 or not capacity_factor > 0:
        raise ValueError(f"num_experts={num_experts} and capacity_factor={capacity_factor} must be positive")

    def apply(params, x, *, where=None):
        logits = linear(params, clean_tokens(x, where))
        keep = jnp.ones(x.shape[0], bool) if where is None else where
        capacity = max(1, min(x.shape[0], round(x.shape[0] * capacity_factor / num_experts)))
        return rows_mixed(_expert_choice)(logits, keep, capacity=capacity)

    return Layer(linear_init(num_experts), apply)


def _expert_choice(logits: Array, keep: Array, *, capacity: int) -> RoutingPlan:
    experts = logits.shape[1]
    probs = jnp.where(keep[:, None], jax.nn.softmax(logits, axis=1), jnp.zeros((), logits.dtype))
    wanted = jnp.where(keep[:, None], jax.lax.stop_gradient(probs), -1.0)
    _, token = jax.lax.top_k(wanted.T, capacity)
    real = keep[token]
    expert = jnp.where(real, jnp.arange(experts)[:, None], experts).reshape(-1).astype(jnp.int32)
    token = token.reshape(-1).astype(jnp.int32)
    weight = jnp.where(real.reshape(-1), probs[token, jnp.minimum(expert, experts - 1)], 0.0)
    order = jnp.lexsort((token, expert))
    served = jnp.zeros_like(keep).at[token].max(expert < experts)
    return RoutingPlan(
        token=token[order],
        expert=expert[order],
        weight=weight[order],
        counts=jnp.sum(real, axis=1, dtype=jnp.int32),
        scores=probs,
        logits=logits,
        dropped=jnp.sum(keep & ~served, dtype=jnp.int32),
    )
