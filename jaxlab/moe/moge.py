"""Pangu Pro MoE: Mixture of Grouped Experts for Efficient Sparsity (MoGE, 2025, arXiv 2505.21411).

The E experts stand in M equal groups, one a device, and every token takes exactly k / M experts in EACH group: every
device does the same number of products for any input, by construction. No capacity, nothing dropped, no straggler.

    p   = softmax(x w) over ALL E experts (no bias, float32)
    g_e = p_e s_e    if p_e is among the k / M largest of its group, otherwise 0    (not divided by their sum)
    y   = sum_e g_e f_e(x) + shared(x)

s, one scale for each expert, starts at 1. Within a group experts still need a mild balance loss, E / k sum_e f_e P_e,
which is `load_balancing_loss` of the plan. For small devices the released inference code keeps only the experts of
each group that most tokens of the batch want ("voted"), so that fewer weights are read.

Pangu Pro MoE 72B: E = 64, k = 8, M = 8, 4 shared experts, width 1344, model size 5120.

Reconstructed: the imbalance score (max - min load over mean tokens), the masks. Expert ids are group times group size
plus the place in the group; one release computes them with a stride that is right only for E = k^2.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

from jaxlab.kernels.top_k_routing import plan_from_top_k, top_k_routing
from jaxlab.moe.dispatch import Dispatch
from jaxlab.moe.plans import plan_from_ids
from jaxlab.ops.collectives import all_sum, match_varying
from jaxlab.ops.masked import compute_dtype, safe_divide, zero_where_false
from jaxlab.ops.sharding import rows_mixed
from jaxlab.types import Layer, RoutingPlan


def moge_router(
    num_experts: int = 64,
    k: int = 8,
    *,
    groups: int = 8,
    expert_scale: bool = True,
    num_voted: int | None = None,
    implementation: str = "auto",
) -> Layer:
    """Returns a router that takes k / groups experts in each of the groups, with `g_e = softmax(x w)_e s_e`.

    Args:
        num_experts: E, a multiple of `groups`.
        k: experts per token, a multiple of `groups`.
        groups: M, of neighbouring experts.
        expert_scale: whether there is a learnt scale for each expert, 1 at first.
        num_voted: in evaluation only these many experts of each group, those that most tokens put first, are used
            (5 of 8 on Ascend 300I Duo); None = all.
        implementation: as in `kernels.top_k_routing`.

    Returns:
        A `Layer`: `init(key, d)`, `apply(params, x [T, d], where=None, train=False)` gives a `RoutingPlan` of A = T k
        assignments, T k / groups of them in each group; `plan.scores` are the probabilities.

    Raises:
        ValueError: an option is out of range; in `apply`, a shape does not fit.

    Example:
        >>> router = moge_router(8, 4, groups=4)
        >>> plan = jax.jit(lambda key: router.apply(router.init(key, 16), jnp.ones((5, 16))))(jax.random.key(0))
        >>> [sum(plan.counts[i : i + 2].tolist()) for i in (0, 2, 4, 6)]
        [5, 5, 5, 5]

    Source:
        Tang et al., arXiv 2505.21411, section 2; released inference code (scale, votes).
    """
    if groups < 1 or num_experts % groups or k % groups or not groups <= k <= num_experts:
        raise ValueError(
            f"groups={groups} must divide k={k} and num_experts={num_experts}, and k lie between groups and num_experts"
        )
    size = num_experts // groups
    if num_voted is not None and not k // groups <= num_voted <= size:
        raise ValueError(f"num_voted={num_voted} must be between k / groups={k // groups} and the group size {size}")

    def init(key, size):
        params = {"w": jax.random.normal(key, (size, num_experts)) * 0.02}
        return {**params, "scale": jnp.ones(num_experts)} if expert_scale else params

    def apply(params, x, *, where=None, train=False):
        if x.ndim != 2:
            raise ValueError(f"x must be [tokens, features], got shape {x.shape}")
        x = zero_where_false(x, where)
        x = x.astype(compute_dtype(x))
        logits = x @ params["w"].astype(x.dtype)
        bias = None
        if num_voted is not None and not train:
            voted = voted_experts(jax.nn.softmax(logits), groups=groups, num_voted=num_voted, where=where)
            bias = jnp.where(voted, 0.0, -2.0)  # probabilities differ by at most 1
        chosen = top_k_routing(
            logits, k, bias=bias, groups=groups, per_group=True, where=where, implementation=implementation
        )
        if expert_scale:
            scale = jnp.take(params["scale"].astype(x.dtype), jnp.minimum(chosen.ids, num_experts - 1))
            chosen = dataclasses.replace(chosen, weights=chosen.weights * scale)
        return plan_from_top_k(chosen, logits)

    return Layer(init, apply)


def voted_experts(scores: Array, *, groups: int, num_voted: int, where: Array | None = None) -> Array:
    """Returns the experts of each group that most tokens put first in their group.

    Args:
        scores: float [T, E]; ties of a token and of the votes go to the lower id.
        groups: M, divides E.
        num_voted: experts kept in each group, 1 to E / M.
        where: bool [T], tokens that vote.

    Returns:
        bool [E], with `num_voted` True in each group; no gradient.

    Raises:
        ValueError: a shape does not fit or an option is out of range.

    Example:
        >>> scores = jnp.array([[0.1, 0.2, 0.9, 0.3], [0.5, 0.2, 0.1, 0.0]])
        >>> jax.jit(lambda s: voted_experts(s, groups=2, num_voted=1))(scores).tolist()
        [True, False, True, False]

    Source:
        Released inference code of Pangu Pro MoE, arXiv 2505.21411.
    """
    if scores.ndim != 2 or groups < 1 or scores.shape[1] % groups:
        raise ValueError(f"scores must be [T, E] with E a multiple of groups={groups}, got shape {scores.shape}")
    if not 1 <= num_voted <= scores.shape[1] // groups:
        raise ValueError(f"num_voted={num_voted} must be between 1 and the group size {scores.shape[1] // groups}")
    if where is not None and where.shape != scores.shape[:1]:
        raise ValueError(f"where has shape {where.shape}, expected {scores.shape[:1]}")
    keep = jnp.ones(scores.shape[0], bool) if where is None else where
    scores = zero_where_false(jax.lax.stop_gradient(scores), keep)
    return rows_mixed(_vote)(scores, keep, groups=groups, num_voted=num_voted)


def imbalance_score(
    plan: RoutingPlan, *, num_devices: int, where: Array | None = None, axis_name: str | None = None
) -> Array:
    """Returns `(max - min) / T` of the numbers of assignments on each device: 0 for MoGE, whatever comes in.

    Args:
        plan: a routing plan whose E experts lie on the devices in blocks.
        num_devices: divides E.
        where: bool [T], tokens that exist.
        axis_name: mapped axis over which the tokens are spread.

    Returns:
        float32 []; 0 without tokens.

    Raises:
        ValueError: `num_devices` does not divide E.

    Example:
        >>> from jaxlab.moe import plan_from_weights
        >>> score = jax.jit(lambda w: imbalance_score(plan_from_weights(w), num_devices=2))
        >>> float(score(jnp.array([[1.0, 1.0], [1.0, 0.0]])))
        0.5

    Source:
        Tang et al., arXiv 2505.21411, section 2.1. Reconstructed from the text.
    """
    if num_devices < 1 or plan.num_experts % num_devices:
        raise ValueError(f"num_devices={num_devices} must divide num_experts={plan.num_experts}")
    counts = all_sum(jax.lax.stop_gradient(plan.counts), axis_name).reshape(num_devices, -1).sum(1)
    tokens = plan.scores.shape[0] if where is None else jnp.sum(where)
    tokens = all_sum(jnp.asarray(tokens, jnp.float32), axis_name)
    return safe_divide((jnp.max(counts) - jnp.min(counts)).astype(jnp.float32), tokens)


def group_dispatch() -> Dispatch:
    """Returns the dispatch of `moe_layer` that has one group of experts on each device of the layer's `axis_name`.

    The axis has M devices, as many as the router has `groups`. T k / M rows go to each device for any input, so that
    both exchanges have equal, unpadded splits.

    Returns:
        A `Dispatch`.

    Raises:
        ValueError: when called, there is no `axis_name`, or the assignments do not divide among the devices.

    Example:
        >>> from jaxlab import moe
        >>> layer = moe.moe_layer(moe.moge_router(4, 2, groups=2), moe.swiglu_experts(4, 8),
        ...                       dispatch=moe.group_dispatch(), axis_name="expert")
        >>> def on_two_devices(key, x):
        ...     params = layer.init(key, 6)
        ...     params["experts"] = jax.tree.map(lambda w: w.reshape(2, 2, *w.shape[1:]), params["experts"])
        ...     halves = {"router": None, "experts": 0}
        ...     return jax.vmap(layer.apply, in_axes=(halves, 0), axis_name="expert")(params, x)[0]
        >>> jax.eval_shape(on_two_devices, jax.random.key(0), jnp.ones((2, 3, 6))).shape
        (2, 3, 6)

    Source:
        Tang et al., arXiv 2505.21411, section 2.2.
    """

    def dispatch(experts, params, x, plan, *, axis_name=None):
        if axis_name is None:
            raise ValueError("axis_name is needed: group_dispatch spreads the groups over a mapped axis")
        devices = jax.lax.axis_size(axis_name)
        assignments, local = plan.token.shape[0], plan.num_experts // devices
        if assignments % devices or plan.num_experts % devices:
            raise ValueError(
                f"{assignments} assignments and {plan.num_experts} experts must divide among {devices} devices"
            )
        # Sorted by expert is sorted by group. Tokens that do not exist leave room at the end of every block.
        rows = assignments // devices
        per_group = plan.counts.reshape(devices, local).sum(1)
        place = (jnp.cumsum(per_group) - per_group)[:, None] + jnp.arange(rows)[None, :]
        real = jnp.arange(rows)[None, :] < per_group[:, None]
        place = jnp.minimum(place, assignments - 1)
        token = plan.token[place]
        ids = jnp.where(real, plan.expert[place] - jnp.arange(devices)[:, None] * local, -1)
        sent = jnp.where(real[:, :, None], x[token], jnp.zeros((), x.dtype))
        exchange = lambda a: jax.lax.all_to_all(a, axis_name, split_axis=0, concat_axis=0)
        arrived, ids = exchange(sent), exchange(ids).reshape(-1, 1)
        flat = arrived.reshape(-1, x.shape[1])
        known = jax.nn.one_hot(ids[:, 0], local, dtype=compute_dtype(x))
        here = plan_from_ids(ids, jnp.ones(ids.shape, known.dtype), known, known)
        y = exchange(experts.apply(params, flat, here).reshape(arrived.shape))
        weight = jnp.where(real, plan.weight[place], 0.0)
        total = match_varying(jnp.zeros(x.shape, weight.dtype), y)[0]
        return total.at[token].add(weight[:, :, None] * y.astype(weight.dtype)).astype(x.dtype), plan

    return dispatch


def _vote(scores, keep, *, groups, num_voted):
    tokens, experts = scores.shape
    size = experts // groups
    first = jnp.argmax(scores.reshape(tokens, groups, size), axis=2)
    votes = jnp.sum((first[:, :, None] == jnp.arange(size)[None, None, :]) & keep[:, None, None], axis=0)
    rank = jnp.argsort(jnp.argsort(-votes, axis=1, stable=True), axis=1, stable=True)
    return (rank < num_voted).reshape(experts)
