"""Balance losses and load metrics of a routing plan; none of them builds a [T, E, C] one-hot."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from jaxlab.ops.collectives import all_sum, global_mean
from jaxlab.ops.masked import safe_divide
from jaxlab.types import RoutingPlan


def expert_load(plan: RoutingPlan, *, axis_name: str | None = None) -> Array:
    """Returns the share of assignments of each expert times E: 1 is ideal, 0 a dead expert.

    Args:
        plan: a routing plan.
        axis_name: mesh axis over which the tokens are spread.

    Returns:
        float32 [E]; all 0 for a plan without assignments.
    """
    counts = all_sum(jax.lax.stop_gradient(plan.counts).astype(jnp.float32), axis_name)
    return safe_divide(counts * plan.num_experts, jnp.sum(counts, keepdims=True))


def load_balancing_loss(plan: RoutingPlan, *, where: Array | None = None, axis_name: str | None = None) -> Array:
    """Returns the load-balancing loss `E * sum_e f_e P_e` of Switch Transformers.

    f_e is the share of assignments that expert e receives (a constant), P_e the mean router probability of e; the
    loss is 1 when both are uniform. With `axis_name` both are taken over the global batch.

    Args:
        plan: a routing plan with `scores` float [T, E] that are probabilities.
        where: bool [T], real tokens; padded ones must not be counted in the plan either.
        axis_name: mesh axis over which the tokens are spread.

    Returns:
        float32 scalar; 0 without tokens.

    Example:
        >>> from jaxlab.moe import top_k_router
        >>> router = top_k_router(4, 1)
        >>> plan = router.apply({"w": jnp.zeros((2, 4))}, jnp.ones((3, 2)))
        >>> round(float(load_balancing_loss(plan)), 4)
        1.0

    Source:
        Fedus, Zoph, Shazeer, Switch Transformers, arXiv 2101.03961, eq. 4 (divided by k for k > 1).
    """
    keep = jnp.ones(plan.scores.shape[0], bool) if where is None else where
    total = all_sum(jnp.sum(jnp.where(keep[:, None], plan.scores, 0.0), axis=0), axis_name)
    count = all_sum(jnp.sum(keep, dtype=jnp.float32), axis_name)
    mean_probability = safe_divide(total, count[None])
    return jnp.sum(expert_load(plan, axis_name=axis_name) * mean_probability)


def router_z_loss(plan: RoutingPlan, *, where: Array | None = None, axis_name: str | None = None) -> Array:
    """Returns the mean over tokens of `logsumexp(logits)^2`, which keeps router logits small.

    Args:
        plan: a routing plan with `logits` float [T, E].
        where: bool [T], real tokens.
        axis_name: mesh axis over which the tokens are spread.

    Returns:
        float32 scalar; 0 without tokens.

    Source:
        Zoph et al., ST-MoE, arXiv 2202.08906, eq. 5.
    """
    keep = jnp.ones(plan.logits.shape[0], bool) if where is None else where
    logits = jnp.where(keep[:, None], plan.logits, 0.0)
    return global_mean(jax.nn.logsumexp(logits, axis=-1) ** 2, keep, axis_name=axis_name)
