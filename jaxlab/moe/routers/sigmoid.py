"""The router of DeepSeek-V3, balanced by a bias that moves once per optimiser step instead of by a loss."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

from jaxlab.kernels.top_k_routing import plan_from_top_k, top_k_routing
from jaxlab.moe.routers._linear import clean_tokens, linear, linear_init
from jaxlab.ops.collectives import all_sum
from jaxlab.types import StatefulLayer


def sigmoid_router(
    num_experts: int,
    k: int = 8,
    *,
    groups: int | None = None,
    groups_kept: int | None = None,
    renormalize: bool = True,
    scale: float = 1.0,
    implementation: str = "auto",
) -> StatefulLayer:
    """Returns the router of DeepSeek-V3: sigmoid scores, balanced by a bias instead of a loss.

    `p = sigmoid(x w)`; the k largest `p + bias` are chosen, their weights are `scale * p / sum of the chosen p`. The
    bias has no gradient: `update_bias` moves it once per optimiser step.

    Args:
        num_experts: E.
        k: experts per token, 1 to E.
        groups: number of equal groups of neighbouring experts; needs `groups_kept`.
        groups_kept: choose only within the groups whose two best `p + bias` have the largest sum.
        renormalize: whether the chosen p are divided by their sum.
        scale: factor of the weights (DeepSeek-V3: 2.5, with 256 experts, k = 8 and 4 of 8 groups).
        implementation: as in `kernels.top_k_routing`.

    Returns:
        A `StatefulLayer`: `params, state = init(key, d)` with the state `{bias: float32 [E]}`, 0 at first;
        `apply(params, state, x [T, d], where=None)` gives a `RoutingPlan` of A = T k assignments and the same state.

    Raises:
        ValueError: k or a group option is out of range.

    Example:
        >>> router = sigmoid_router(4, 2)
        >>> plan, state = jax.jit(lambda key: router.apply(*router.init(key, 8), jnp.ones((3, 8))))(jax.random.key(0))
        >>> state = jax.jit(update_bias)(state, plan.counts)
        >>> sorted(round(b, 4) for b in state["bias"].tolist())
        [-0.001, -0.001, 0.001, 0.001]

    Source:
        DeepSeek-V3, arXiv 2412.19437, section 2.1.2; Wang et al., Auxiliary-Loss-Free Load Balancing, arXiv 2408.15664.
    """
    if not 1 <= k <= num_experts:
        raise ValueError(f"k={k} must be between 1 and num_experts={num_experts}")

    def init(key, size):
        return linear_init(num_experts)(key, size), {"bias": jnp.zeros(num_experts)}

    def apply(params, state, x, *, where=None):
        logits = linear(params, clean_tokens(x, where))
        chosen = top_k_routing(
            logits,
            k,
            bias=state["bias"],
            groups=groups,
            groups_kept=groups_kept,
            renormalize=renormalize,
            score_function="sigmoid",
            where=where,
            implementation=implementation,
        )
        return plan_from_top_k(dataclasses.replace(chosen, weights=scale * chosen.weights), logits), state

    return StatefulLayer(init, apply)


def update_bias(state: dict, counts: Array, *, rate: float = 1e-3, axis_name: str | None = None) -> dict:
    """Returns the state of `sigmoid_router` after one optimiser step: busy experts down, idle ones up, mean 0.

    `bias <- b - mean(b)` with `b = bias + rate * sign(mean(counts) - counts)`. Subtracting the mean changes no choice
    and keeps the bias from drifting.

    Args:
        state: of `sigmoid_router`.
        counts: int [E], `plan.counts` of the step (summed over micro-batches).
        rate: of the change (DeepSeek-V3: 1e-3, and 0 at the end of training).
        axis_name: mapped axis over which the tokens are spread.

    Returns:
        The new state.

    Example:
        >>> jax.jit(lambda c: update_bias({"bias": jnp.zeros(2)}, c, rate=0.5))(jnp.array([3, 1]))["bias"].tolist()
        [-0.5, 0.5]

    Source:
        Wang et al., arXiv 2408.15664, algorithm 1. Reconstructed: the mean.
    """
    bias = state["bias"]
    load = all_sum(jax.lax.stop_gradient(counts).astype(bias.dtype), axis_name)
    moved = bias + rate * jnp.sign(jnp.mean(load, keepdims=True) - load)
    return {**state, "bias": moved - jnp.mean(moved, keepdims=True)}
