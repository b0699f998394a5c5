"""Unveiling Super Experts in Mixture-of-Experts Large Language Models (2025, arXiv 2507.23279).

A few experts have outputs of their last product (down_proj) that are far larger than all others'. They make the massive
activations of the residual stream, on which attention sinks rest; a model without them breaks, while one without as
many random experts hardly notices. Finding them takes one pass over a few unlabelled tokens.

    a_le   = max over tokens and channels of |down_proj output of expert e in layer l| (0 if nothing came)
    super  = a_le > 99.5th percentile of a  and  a_le > max a / 10,   over the first 75% of the layers
    prune  = the expert adds nothing, while the router and the weights of the others stay as they are
    sink   = share of heads in which the queries from position 0 on give it more than 0.3 on average

Reconstructed: the sink score (Gu et al., arXiv 2410.10781), masks. Massive activations: Sun et al., arXiv 2402.17762.
Later layers are left out because large outputs there cancel the massive activations instead of making them.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

from jaxlab.ops.collectives import match_varying
from jaxlab.ops.masked import compute_dtype, masked_mean, safe_divide
from jaxlab.ops.sharding import rows_mixed
from jaxlab.types import RoutingPlan


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class OutputProfile:
    """The largest outputs of each expert.

    Attributes:
        maximum: float32 [E], largest absolute value; 0 for an expert that saw no token.
        channel: int32 [E], the channel that it stood in; -1 for an expert that saw no token.
    """

    maximum: Array
    channel: Array


def super_expert_mask(
    maxima: Array,
    *,
    include_layers: float = 0.75,
    quantile: float = 99.5,
    times: float = 10.0,
    floor: bool = False,
    where: Array | None = None,
) -> Array:
    """Returns which experts are super experts: above a percentile of all maxima and above a tenth of the largest.

    Args:
        maxima: float [L, E], `OutputProfile.maximum` of every mixture layer; experts without tokens count with their 0.
        include_layers: share of the layers, from the first on, that is looked at.
        quantile: percentile in [0, 100], with linear interpolation.
        times: > 0, how far below the largest maximum a super expert may lie.
        floor: whether `max // times` is the limit, as in the official code, instead of `max / times`.
        where: bool [L, E], experts that exist.

    Returns:
        bool [L, E], no gradient; all False where nothing exists.

    Raises:
        ValueError: a shape does not fit or an option is out of range.

    Example:
        >>> run = jax.jit(lambda m: super_expert_mask(m.at[1, 5].set(300.0).at[3, 0].set(900.0)))
        >>> found = run(jnp.ones((4, 64))).tolist()
        >>> sum(map(sum, found)), found[1].index(True)
        (1, 5)

    Source:
        Su et al., arXiv 2507.23279, section 3; code ZunhaiSu/Super-Experts-Profilling.
    """
    if maxima.ndim != 2:
        raise ValueError(f"maxima must be [layers, experts], got shape {maxima.shape}")
    if where is not None and where.shape != maxima.shape:
        raise ValueError(f"where has shape {where.shape}, expected {maxima.shape}")
    if not 0 < include_layers <= 1 or not 0 <= quantile <= 100 or not times > 0:
        raise ValueError(
            f"include_layers={include_layers} must be in (0, 1], quantile={quantile} in [0, 100], times={times} above 0"
        )
    window = jnp.arange(maxima.shape[0])[:, None] < round(include_layers * maxima.shape[0])
    keep = jnp.broadcast_to(window, maxima.shape) if where is None else window & where
    values = jax.lax.stop_gradient(maxima).astype(compute_dtype(maxima))
    return rows_mixed(_mask)(values, keep, quantile=quantile, times=times, floor=floor)


def profile_outputs(outputs: Array, expert: Array, num_experts: int) -> OutputProfile:
    """Returns the largest absolute output of each expert, and its channel.

    Args:
        outputs: float [A, d], what each assignment's expert gave before its weight (or any other activation of it).
        expert: int [A], the expert of each assignment; whatever is not in 0 .. E - 1 is left out, as unused rows of a
            plan are.
        num_experts: E.

    Returns:
        An `OutputProfile`; of equal maxima the channel is the lowest. No gradient.

    Raises:
        ValueError: a shape does not fit.

    Example:
        >>> run = jax.jit(lambda outputs, expert: profile_outputs(outputs, expert, 3))
        >>> profile = run(jnp.array([[1.0, -3.0], [2.0, 0.0]]), jnp.array([1, 1]))
        >>> profile.maximum.tolist(), profile.channel.tolist()
        ([0.0, 3.0, 0.0], [-1, 1, -1])

    Source:
        Su et al., arXiv 2507.23279, section 3 (shared experts are profiled as a further column).
    """
    if outputs.ndim != 2 or expert.shape != outputs.shape[:1]:
        raise ValueError(f"outputs and expert must be [A, d] and [A], got {outputs.shape} and {expert.shape}")
    if num_experts < 1:
        raise ValueError(f"num_experts={num_experts} must be at least 1")
    size = jnp.abs(jax.lax.stop_gradient(outputs).astype(jnp.float32))
    return rows_mixed(_profile)(*match_varying(size, expert), num_experts=num_experts)


def merge_profiles(first: OutputProfile, second: OutputProfile) -> OutputProfile:
    """Returns the profile of two batches together, so that any number of tokens can be profiled batch by batch.

    Args:
        first: of one batch.
        second: of another batch and the same experts.

    Returns:
        The `OutputProfile` of both; on equal maxima the first one's channel.

    Example:
        >>> a, b = (OutputProfile(jnp.array([v]), jnp.array([0])) for v in (0.5, 2.0))
        >>> jax.jit(merge_profiles)(a, b).maximum.tolist()
        [2.0]
    """
    keep = (first.maximum > second.maximum) | ((first.maximum == second.maximum) & (first.channel >= 0))
    return jax.tree.map(lambda a, b: jnp.where(keep, a, b), first, second)


def rank_super_experts(maxima: Array, mask: Array, *, count: int) -> tuple[Array, Array]:
    """Returns the super experts from the largest maximum on.

    Args:
        maxima: float [L, E].
        mask: bool [L, E], of `super_expert_mask`.
        count: room, 1 to L E; what is more is cut.

    Returns:
        `(indices, values)`: int32 [count, 2] of layer and expert, -1 in empty rows; their maxima [count], 0 there.

    Raises:
        ValueError: a shape does not fit or `count` is out of range.

    Example:
        >>> maxima = jnp.array([[3.0, 1.0], [5.0, 4.0]])
        >>> jax.jit(lambda m: rank_super_experts(m, m > 3, count=3))(maxima)[0].tolist()
        [[1, 0], [1, 1], [-1, -1]]
    """
    if maxima.ndim != 2 or mask.shape != maxima.shape:
        raise ValueError(f"maxima and mask must both be [layers, experts], got {maxima.shape} and {mask.shape}")
    if not 1 <= count <= maxima.size:
        raise ValueError(f"count={count} must be between 1 and the {maxima.size} experts")
    flat = jnp.where(mask, jax.lax.stop_gradient(maxima), -jnp.inf).reshape(-1)
    values, place = rows_mixed(lambda flat: tuple(jax.lax.top_k(flat, count)))(flat)
    found = values > -jnp.inf
    pair = jnp.stack([place // maxima.shape[1], place % maxima.shape[1]], axis=1)
    return jnp.where(found[:, None], pair, -1).astype(jnp.int32), jnp.where(found, values, 0).astype(maxima.dtype)


def prune_experts(plan: RoutingPlan, mask: Array) -> RoutingPlan:
    """Returns the plan in which some experts add nothing; the router's choice and the other weights are as before.

    Args:
        plan: a routing plan.
        mask: bool [E], True = pruned.

    Returns:
        The plan with weight 0 for assignments to those experts.

    Raises:
        ValueError: a shape does not fit.

    Example:
        >>> from jaxlab.moe import plan_from_weights
        >>> run = jax.jit(lambda w, mask: prune_experts(plan_from_weights(w), mask).weight)
        >>> run(jnp.array([[0.25, 0.75]]), jnp.array([True, False])).tolist()
        [0.0, 0.75]
    """
    if mask.shape != plan.counts.shape:
        raise ValueError(f"mask has shape {mask.shape}, expected {plan.counts.shape}")
    gone = mask[jnp.minimum(plan.expert, plan.num_experts - 1)]
    return dataclasses.replace(plan, weight=jnp.where(gone, jnp.zeros((), plan.weight.dtype), plan.weight))


def massive_activations(x: Array, *, least: float = 100.0, times: float = 1000.0) -> Array:
    """Returns which entries of a hidden state are massive: above 100, and above 1000 times the median of all of it.

    Args:
        x: float [..., T, d], hidden states; each [T, d] has its own median of absolute values.
        least: what a massive activation is at least larger than.
        times: and how many medians.

    Returns:
        bool, shape of `x`.

    Raises:
        ValueError: `x` has fewer than two dimensions.

    Example:
        >>> jax.jit(massive_activations)(jnp.array([[1.0, -2000.0, 1.5]])).tolist()
        [[False, True, False]]

    Source:
        Sun et al., Massive Activations in Large Language Models, arXiv 2402.17762, section 2.
    """
    if x.ndim < 2:
        raise ValueError(f"x must be [..., tokens, features], got shape {x.shape}")
    size = jnp.abs(x.astype(compute_dtype(x)))
    return (size > least) & (size > times * jnp.median(size, axis=(-2, -1), keepdims=True))


def attention_sink_score(attention: Array, *, where: Array | None = None) -> Array:
    """Returns how much attention each key gets on average from the queries at its position and after it.

    `score_j = mean over i >= j of attention[i, j]`.

    Args:
        attention: float [..., T, T], probabilities of keys (last axis) for each query of a causal model.
        where: bool [T], positions that exist.

    Returns:
        [..., T] in the dtype of `attention`; 0 at positions that do not exist.

    Raises:
        ValueError: a shape does not fit.

    Example:
        >>> jax.jit(attention_sink_score)(jnp.eye(2)).tolist()
        [0.5, 1.0]

    Source:
        Gu et al., When Attention Sink Emerges in Language Models, arXiv 2410.10781, section 2.
    """
    if attention.ndim < 2 or attention.shape[-1] != attention.shape[-2]:
        raise ValueError(f"attention must be [..., T, T], got shape {attention.shape}")
    length = attention.shape[-1]
    if where is not None and where.shape != (length,):
        raise ValueError(f"where has shape {where.shape}, expected ({length},)")
    later = jnp.tril(jnp.ones((length, length), bool))
    keep = later if where is None else later & where[:, None] & where[None, :]
    keep = jnp.broadcast_to(keep.reshape((1,) * (attention.ndim - 2) + keep.shape), attention.shape)
    return masked_mean(attention, keep, axis=-2).astype(attention.dtype)


def sink_rate(attention: Array, *, eps: float = 0.3, where: Array | None = None) -> Array:
    """Returns the share of heads whose first position is an attention sink.

    Args:
        attention: float [..., T, T], as in `attention_sink_score`; all leading axes are heads (and layers, sequences).
        eps: score above which a key is a sink.
        where: bool [T], positions that exist.

    Returns:
        float32 [] without gradient.

    Example:
        >>> float(jax.jit(sink_rate)(jnp.eye(5)[None]))
        0.0

    Source:
        Gu et al., arXiv 2410.10781 (eps = 0.3).
    """
    score = attention_sink_score(jax.lax.stop_gradient(attention), where=where)[..., 0]
    return jnp.mean((score > eps).astype(jnp.float32))


def fisher_kurtosis(x: Array, *, where: Array | None = None, axis: int = -1) -> Array:
    """Returns the excess kurtosis `m_4 / m_2^2 - 3` along an axis: large where few values stand out.

    Args:
        x: float [...], such as maxima of experts.
        where: bool, shape of `x`, entries that exist.
        axis: which is reduced.

    Returns:
        The kurtosis in the dtype of `x`; 0 where all values are equal or none exists.

    Example:
        >>> float(jax.jit(fisher_kurtosis)(jnp.array([-1.0, 1.0])))
        -2.0

    Source:
        Su et al., arXiv 2507.23279, code (with `times the maximum` it is the score that is reported).
    """
    dtype = x.dtype
    keep = jnp.ones(x.shape, bool) if where is None else where
    x = jnp.where(keep, x, jnp.zeros((), x.dtype)).astype(compute_dtype(x))
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(x), axis=axis, keepdims=True))
    x = safe_divide(x, jnp.broadcast_to(largest, x.shape))  # so that fourth powers stay finite
    centred = jnp.where(keep, x - jnp.expand_dims(masked_mean(x, keep, axis=axis), axis), 0.0)
    second, fourth = (masked_mean(centred**power, keep, axis=axis) for power in (2, 4))
    spread = second > 1e-12
    return jnp.where(spread, safe_divide(fourth, jnp.where(spread, second, 1.0) ** 2) - 3, 0.0).astype(dtype)


def _mask(values, keep, *, quantile, times, floor):
    ordered = jnp.sort(jnp.where(keep, values, jnp.inf).reshape(-1))
    number = jnp.sum(keep)
    position = (quantile / 100) * jnp.maximum(number - 1, 0).astype(values.dtype)
    below = jnp.floor(position).astype(jnp.int32)
    above = jnp.minimum(below + 1, jnp.maximum(number - 1, 0))
    low, high = ordered[below], ordered[above]
    percentile = jnp.where(high > low, low + (high - low) * (position - below.astype(values.dtype)), low)
    largest = jnp.max(jnp.where(keep, values, 0.0))
    limit = jnp.floor(largest / times) if floor else largest / times
    return keep & (values > percentile) & (values > limit)


def _profile(size, expert, *, num_experts):
    real = (expert >= 0) & (expert < num_experts)
    target = jnp.where(real, expert, num_experts)
    # Per channel first, then over channels: the memory is that of [E, d], not of the assignments times E.
    low = match_varying(jnp.full((num_experts, size.shape[1]), -1.0, size.dtype), size)[0]
    by_channel = low.at[target].max(size, mode="drop")
    maximum = jnp.max(by_channel, axis=1)
    seen = maximum >= 0
    return OutputProfile(
        maximum=jnp.where(seen, maximum, 0.0),
        channel=jnp.where(seen, jnp.argmax(by_channel, axis=1), -1).astype(jnp.int32),
    )
