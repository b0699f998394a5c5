"""Dispatch: how the assignments of a plan reach their experts. The router does not know which one is used.

`dropless` computes every assignment with the grouped kernel. `capacity` gives every expert a buffer of fixed size, as
GShard, Switch Transformers and V-MoE do, and drops what does not fit. Both serve the slot plans of Soft MoE, and both
spread the experts over a mapped axis. Nothing of size tokens x experts x capacity is ever made.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from jaxlab.moe.exchange import EXCHANGES, exchanged, local_experts
from jaxlab.moe.plans import SlotPlan
from jaxlab.ops.collectives import all_sum, match_varying
from jaxlab.ops.masked import compute_dtype, safe_divide
from jaxlab.ops.sharding import rows_mixed
from jaxlab.types import RoutingPlan

# `y, plan = dispatch(experts, params, x, plan, axis_name=None)`: the layer's output, and the plan as it was served.
Dispatch = Callable[..., tuple[Array, RoutingPlan | SlotPlan]]


def dropless(exchange: str = "auto", *, room: float | None = 1.25) -> Dispatch:
    """Returns the dispatch that computes every assignment of the plan and drops none.

    Args:
        exchange: how tokens and experts meet if the layer has an `axis_name`, whose n devices hold E / n experts each:

            - "all_to_all": tokens go to their experts and back in blocks of equal size, in as many rounds as the
              fullest block needs (one, if the router is balanced to within `room`; the others are not run);
            - "gather": every device sees all tokens and the results are added up (k not far below n);
            - "ring": the experts' parameters go round and tokens stay (many tokens for small experts);
            - "ragged": tokens go in blocks of their true sizes (`jax.lax.ragged_all_to_all`; TPU and GPU only);
            - "auto": whichever of the first three sends the fewest bytes (`exchange_bytes`).
        room: size of a block over its mean for "all_to_all", above 0; None = one round, in which everything fits.

    Returns:
        A `Dispatch`.

    Raises:
        ValueError: an option is out of range; when called, the experts do not divide among the devices.

    Example:
        >>> from jaxlab import moe
        >>> layer = moe.moe_layer(moe.top_k_router(4, 2), moe.swiglu_experts(4, 8), dispatch=dropless())
        >>> y, plan = jax.eval_shape(lambda key: layer.apply(layer.init(key, 6), jnp.ones((5, 6))), jax.random.key(0))
        >>> y.shape, plan.token.shape
        ((5, 6), (10,))
    """
    if exchange not in ("auto", *EXCHANGES):
        raise ValueError(f"exchange={exchange!r} must be one of 'auto', {', '.join(map(repr, EXCHANGES))}")
    if room is not None and not room > 0:
        raise ValueError(f"room={room} must be positive")

    def dispatch(experts, params, x, plan, *, axis_name=None):
        local_experts(params, experts.num_experts, axis_name)
        if isinstance(plan, SlotPlan):
            return _serve_slots(experts, params, x, plan, axis_name), plan
        if axis_name is None:
            return experts.apply(params, x, plan), plan
        return exchanged(experts, params, x, plan, axis_name=axis_name, exchange=exchange, room=room), plan

    return dispatch


def capacity(capacity_factor: float = 1.25, *, batch_priority: bool = False) -> Dispatch:
    """Returns the dispatch with a buffer of `C = ceil(capacity_factor A / E)` rows for each expert.

    Shapes and cost do not depend on the routing. What finds its expert full is dropped, as `limit_capacity` says. With
    an `axis_name` every device fills the buffers from its own tokens, and they are exchanged by `all_to_all`.

    Args:
        capacity_factor: > 0 (Switch Transformers 1.25, GShard 2, V-MoE 1.05).
        batch_priority: whether sure tokens come first, as in V-MoE; otherwise those with the lower row.

    Returns:
        A `Dispatch`; `drop_rate` of the layer's plan reports what was dropped.

    Raises:
        ValueError: `capacity_factor` is not positive; when called, the experts have no function `each`.

    Example:
        >>> from jaxlab import moe
        >>> layer = moe.moe_layer(moe.top_k_router(4, 1), moe.swiglu_experts(4, 8), dispatch=capacity(1.0))
        >>> y, plan = jax.jit(lambda key: layer.apply(layer.init(key, 6), jnp.ones((8, 6))))(jax.random.key(0))
        >>> int(plan.dropped)  # equal tokens want one expert, whose buffer holds two
        6

    Source:
        Lepikhin et al., GShard, arXiv 2006.16668; Fedus et al., arXiv 2101.03961; Riquelme et al., V-MoE, arXiv
        2106.05974.
    """
    if not capacity_factor > 0:
        raise ValueError(f"capacity_factor={capacity_factor} must be positive")

    def dispatch(experts, params, x, plan, *, axis_name=None):
        local_experts(params, experts.num_experts, axis_name)
        if isinstance(plan, SlotPlan):
            return _serve_slots(experts, params, x, plan, axis_name), plan
        size = _capacity(plan, capacity_factor)
        token, weight, filled, kept = rows_mixed(_buffers)(*_rows_of(plan), size=size, batch_priority=batch_priority)
        buffer = rows_mixed(_fill)(*match_varying(x, token, filled))
        out = _over_experts(experts, params, buffer, axis_name)
        return rows_mixed(_combine)(*match_varying(out, token, weight, x)), _served(plan, kept)

    return dispatch


def limit_capacity(plan: RoutingPlan, capacity_factor: float = 1.25, *, batch_priority: bool = False) -> RoutingPlan:
    """Returns the plan in which no expert has more than `C = ceil(capacity_factor A / E)` assignments that count.

    Places go first to the assignment with the largest weight of every token, then to the second, and so on; among
    equals to the lower row, or with `batch_priority` to the token whose largest weight is larger. What finds its expert
    full keeps its row with weight 0 (the others are not divided again) and is added to `dropped`; `counts` still say
    what the router wanted, which is what balance losses and biases must see.

    Args:
        plan: of T tokens, A assignments (rows that are not used take no place) and E experts.
        capacity_factor: > 0.
        batch_priority: whether sure tokens come first (V-MoE's batch prioritised routing).

    Returns:
        A plan of the same class; C is at least 1 and at most T.

    Raises:
        ValueError: `capacity_factor` is not positive.

    Example:
        >>> from jaxlab.moe import plan_from_weights
        >>> plan = plan_from_weights(jnp.array([[0.5, 0.0], [0.75, 0.0], [0.0, 1.0]]), max_active=1)
        >>> for first in (False, True):
        ...     jax.jit(lambda plan: limit_capacity(plan, 0.5, batch_priority=first))(plan).weight.tolist()
        [0.5, 0.0, 1.0]
        [0.0, 0.75, 1.0]

    Source:
        Riquelme et al., V-MoE, arXiv 2106.05974, section 4 and appendix C (the maximal weight as the score).
    """
    if not capacity_factor > 0:
        raise ValueError(f"capacity_factor={capacity_factor} must be positive")
    size = _capacity(plan, capacity_factor)
    kept = rows_mixed(_buffers)(*_rows_of(plan), size=size, batch_priority=batch_priority)[-1]
    return _served(plan, kept)


def drop_rate(plan: RoutingPlan, *, axis_name: str | None = None) -> Array:
    """Returns the share of the assignments that were wanted and cut, by the router or by the dispatch.

    Args:
        plan: a routing plan, as the layer returns it.
        axis_name: mapped axis over which the tokens are spread.

    Returns:
        float32 [], without gradient; 0 for a plan without assignments.

    Example:
        >>> from jaxlab.moe import plan_from_weights
        >>> rate = jax.jit(lambda w: drop_rate(plan_from_weights(w, max_active=2)))
        >>> round(float(rate(jnp.array([[0.5, 0.25, 0.25, 0.0]]))), 4)
        0.3333
    """
    computed = jnp.sum(jax.lax.stop_gradient(plan.weight) > 0, dtype=jnp.float32)
    computed, dropped = all_sum((computed, plan.dropped.astype(jnp.float32)), axis_name)
    return safe_divide(dropped, computed + dropped)


def _capacity(plan: RoutingPlan, capacity_factor: float) -> int:
    wanted = math.ceil(plan.token.shape[0] * capacity_factor / plan.num_experts)
    return max(1, min(wanted, plan.scores.shape[0]))


def _rows_of(plan: RoutingPlan):
    return match_varying(plan.token, plan.expert, plan.weight, plan.counts, plan.scores[:, 0])


def _buffers(token, expert, weight, counts, like, *, size, batch_priority):
    """Returns token and weight of every place [E, C], which places are filled, and which rows have one [A]."""
    rows, experts = token.shape[0], counts.shape[0]
    row = jnp.arange(rows)
    values = jax.lax.stop_gradient(weight)
    # The rank of an assignment among those of its token, largest weight first.
    order = jnp.lexsort((expert, -values, token))
    sorted_token = token[order]
    first = jnp.concatenate([jnp.ones(1, bool), sorted_token[1:] != sorted_token[:-1]])
    begin = jax.lax.cummax(jnp.where(first, row, 0))
    rank = jnp.zeros_like(token).at[order].set((row - begin).astype(token.dtype))
    keys = [token, rank, expert]
    if batch_priority:
        largest = jnp.zeros_like(like, dtype=values.dtype).at[token].max(values)
        keys.insert(1, -largest[token])
    order = jnp.lexsort(tuple(keys))
    start = jnp.cumsum(counts) - counts
    sorted_expert = expert[order]
    place = row - start[jnp.minimum(sorted_expert, experts - 1)]
    fits = (sorted_expert < experts) & (place < size)
    target = jnp.where(fits, sorted_expert * size + place, experts * size)
    empty = match_varying(jnp.full(experts * size, rows, token.dtype), token)[0]
    source = empty.at[target].set(order.astype(token.dtype), mode="drop").reshape(experts, size)
    kept = jnp.zeros_like(token, dtype=bool).at[order].set(fits)
    filled, source = source < rows, jnp.minimum(source, rows - 1)
    return token[source], jnp.where(filled, weight[source], jnp.zeros((), weight.dtype)), filled, kept


def _served(plan: RoutingPlan, kept: Array) -> RoutingPlan:
    used = plan.expert < plan.num_experts
    weight = jnp.where(kept, plan.weight, jnp.zeros((), plan.weight.dtype))
    cut = jnp.sum(used & ~kept, dtype=plan.dropped.dtype)
    return dataclasses.replace(plan, weight=weight, dropped=plan.dropped + cut)


def _fill(x, token, filled):
    return jnp.where(filled[:, :, None], x[token], jnp.zeros((), x.dtype))


def _combine(out, token, weight, x):
    dtype = compute_dtype(x)
    zeros = match_varying(jnp.zeros(x.shape, dtype), x)[0]
    return zeros.at[token].add(weight[:, :, None].astype(dtype) * out.astype(dtype)).astype(x.dtype)


def _serve_slots(experts, params, x, plan, axis_name):
    """Every slot is a mean of tokens, every token's output a mean of slots."""
    product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    dtype = compute_dtype(x)
    x_kept = jnp.where(plan.where[:, None], x, jnp.zeros((), x.dtype)).astype(dtype)
    slots = rows_mixed(lambda a, b: product("tes,td->esd", a, b))(plan.dispatch.astype(dtype), x_kept)
    out = _over_experts(experts, params, slots.astype(x.dtype), axis_name).astype(dtype)
    return rows_mixed(lambda a, b: product("tes,esd->td", a, b))(plan.combine.astype(dtype), out).astype(x.dtype)


def _over_experts(experts, params, buffer, axis_name):
    """Returns each expert's result on its rows of the buffer [E, C, d], wherever its parameters are."""
    if experts.each is None:
        raise ValueError("experts.each is None: buffers of rows need experts that say what one of them does")
    if axis_name is None:
        each = lambda params, buffer: jax.vmap(experts.each)(params, buffer)
        return rows_mixed(each)(*match_varying(params, buffer))
    devices = jax.lax.axis_size(axis_name)
    number, size, features = buffer.shape
    exchange = lambda a: jax.lax.all_to_all(a, axis_name, split_axis=0, concat_axis=0)
    arrived = exchange(buffer.reshape(devices, number // devices, size, features))
    rows = jnp.moveaxis(arrived, 0, 1).reshape(number // devices, devices * size, features)
    out = jax.vmap(experts.each)(*match_varying(params, rows))
    back = jnp.moveaxis(out.reshape(number // devices, devices, size, features), 1, 0)
    return exchange(back).reshape(number, size, features)
