"""Whether a mixture is well: load, dead experts, entropy, overlap and drops of a plan as one pytree."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

from jaxlab.moe.balance import expert_load
from jaxlab.moe.dispatch import drop_rate
from jaxlab.ops.collectives import all_sum, global_mean
from jaxlab.ops.masked import safe_divide
from jaxlab.types import RoutingPlan


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RouterHealth:
    """What `router_health` measures; float32, without gradient.

    Attributes:
        load: [E], assignments of each expert over the ideal of equal shares; 1 is ideal.
        dead_experts: [], number of experts without any assignment.
        max_violation: [], largest load minus 1 (MaxVio of Wang et al., arXiv 2408.15664); 0 is ideal, E - 1 collapse.
        load_entropy: [], entropy of the shares over log E: 1 is balance, 0 collapse.
        token_entropy: [], mean over tokens of the entropy of their scores over log E: 1 is an indifferent router.
        overlap: [], mean cosine of two different experts' columns of scores: 1 if all are wanted by the same tokens.
        drop_rate: [], share of the wanted assignments that were cut.
    """

    load: Array
    dead_experts: Array
    max_violation: Array
    load_entropy: Array
    token_entropy: Array
    overlap: Array
    drop_rate: Array


def router_health(plan: RoutingPlan, *, where: Array | None = None, axis_name: str | None = None) -> RouterHealth:
    """Returns the health of a routing plan: one pytree of small arrays, to be logged as it is.

    Args:
        plan: a routing plan with `scores` >= 0, as the layer returns it.
        where: bool [T], tokens that exist.
        axis_name: mapped axis over which the tokens are spread.

    Returns:
        A `RouterHealth`; without tokens, load and overlap are 0 and every expert is dead.

    Example:
        >>> from jaxlab.moe import plan_from_weights
        >>> health_of = jax.jit(lambda w: router_health(plan_from_weights(w)))
        >>> health = health_of(jnp.array([[1.0, 0.0, 0.0], [0.5, 0.0, 0.5]]))
        >>> health.load.tolist(), float(health.dead_experts), float(health.max_violation)
        ([2.0, 0.0, 1.0], 1.0, 1.0)
    """
    experts = plan.num_experts
    scores = jax.lax.stop_gradient(plan.scores).astype(jnp.float32)
    keep = jnp.ones(scores.shape[0], bool) if where is None else where
    scores = jnp.where(keep[:, None], scores, 0.0)
    load = expert_load(plan, axis_name=axis_name)
    certain = jnp.log(jnp.float32(max(experts, 2)))
    probs = safe_divide(scores, jnp.broadcast_to(jnp.sum(scores, axis=1, keepdims=True), scores.shape))
    square = jnp.sqrt(all_sum(jnp.sum(scores * scores, axis=0), axis_name))
    product = all_sum(jnp.matmul(scores.T, scores, precision=jax.lax.Precision.HIGHEST), axis_name)
    cosine = safe_divide(product, square[:, None] * square[None, :])
    pairs = experts * (experts - 1)
    return RouterHealth(
        load=load,
        dead_experts=jnp.sum(load == 0, dtype=jnp.float32),
        max_violation=jnp.where(jnp.any(load > 0), jnp.max(load) - 1, 0.0),
        load_entropy=_entropy(load / experts, 0) / certain,
        token_entropy=global_mean(_entropy(probs, 1), keep, axis_name=axis_name) / certain,
        overlap=(jnp.sum(cosine) - jnp.trace(cosine)) / max(pairs, 1),
        drop_rate=drop_rate(plan, axis_name=axis_name),
    )


def _entropy(p, axis):
    return -jnp.sum(p * jnp.log(jnp.where(p > 0, p, 1.0)), axis=axis)
