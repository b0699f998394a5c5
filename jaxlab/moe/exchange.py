"""Expert parallelism without drops: how tokens and experts that lie on different devices meet.

On each of the n devices of a mapped axis: T of the tokens, E / n of the experts (in order), A assignments of the local
tokens, sorted by expert and with that by device. Inside the map every collective is JAX's own, whose transpose gives
the gradients; the contract of `ops.collectives` holds.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxlab.ops.collectives import gather_rows, match_varying
from jaxlab.ops.masked import compute_dtype
from jaxlab.types import RoutingPlan

EXCHANGES = ("all_to_all", "gather", "ring", "ragged")


def exchange_bytes(
    params: Any, x: Any, *, num_experts: int, k: int, devices: int, room: float | None = 1.25
) -> dict[str, tuple[int, int]]:
    """Returns the bytes that one device sends in the forward pass of a layer, and how many of them are padding.

    Args:
        params: the experts' parameters on one device: arrays or `jax.ShapeDtypeStruct`s with a leading axis E / n.
        x: [T, d] tokens of one device, likewise.
        num_experts: E.
        k: assignments of each token, so that the plan has A = T k.
        devices: n.
        room: as in `dropless`.

    Returns:
        A dict of "all_to_all" (its first round), "gather", "ring" and "ragged", each `(bytes, padding)`. Padding is
        what a balanced router would not need to send.

    Raises:
        ValueError: `devices` does not divide `num_experts`, or `k` is out of range.

    Example:
        >>> x = jax.ShapeDtypeStruct((64, 16), jnp.float32)
        >>> experts = {"up": jax.ShapeDtypeStruct((1, 16, 32), jnp.float32)}
        >>> exchange_bytes(experts, x, num_experts=4, k=2, devices=4)["all_to_all"]
        (15360, 3072)
    """
    if devices < 1 or num_experts % devices:
        raise ValueError(f"devices={devices} must divide num_experts={num_experts}")
    if not 1 <= k <= num_experts:
        raise ValueError(f"k={k} must be between 1 and num_experts={num_experts}")
    (tokens, size), dtype = x.shape, jnp.dtype(x.dtype)
    others, row = devices - 1, size * dtype.itemsize
    block = _block(tokens * k, tokens, num_experts // devices, devices, room)
    needed = 2 * others * tokens * k * row // devices
    wide = size * compute_dtype(x).itemsize  # partial results are added in the dtype of accumulation
    experts = sum(math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(params))
    sent = 2 * others * block * row
    return {
        "all_to_all": (sent, max(0, sent - needed)),
        "gather": (others * tokens * (row + wide), 0),
        "ring": (others * experts, 0),
        "ragged": (needed, 0),
    }


def local_experts(params: Any, num_experts: int, axis_name: str | None) -> int:
    """Returns how many experts each device holds, after checking that the parameters are those."""
    devices = 1 if axis_name is None else jax.lax.axis_size(axis_name)
    if num_experts % devices:
        raise ValueError(f"num_experts={num_experts} must be a multiple of the {devices} devices of {axis_name!r}")
    for leaf in jax.tree.leaves(params):
        if leaf.ndim < 1 or leaf.shape[0] != num_experts // devices:
            raise ValueError(
                f"parameters of experts have shape {leaf.shape}, expected a leading axis of {num_experts // devices}"
            )
    return num_experts // devices


def exchanged(
    experts: Any, params: Any, x: Array, plan: RoutingPlan, *, axis_name: str, exchange: str, room: float | None
) -> Array:
    """Returns the layer's output [T, d] for the tokens of this device; see `dropless`."""
    devices = jax.lax.axis_size(axis_name)
    x, plan = match_varying(x, plan)  # parameters may vary over further axes, over which the experts add up
    if exchange == "auto":
        mean = max(1, min(plan.num_experts, round(plan.token.shape[0] / max(1, x.shape[0]))))
        cost = exchange_bytes(params, x, num_experts=plan.num_experts, k=mean, devices=devices, room=room)
        exchange = min(("all_to_all", "gather", "ring"), key=lambda name: cost[name][0])
    if 0 in (x.shape[0], plan.token.shape[0]):
        return jnp.zeros_like(x)
    if exchange == "gather":
        return _gather(experts, params, x, plan, axis_name)
    if exchange == "ring":
        # What goes round is not kept between forward and backward: the backward sends it round again.
        return jax.checkpoint(lambda *args: _ring(experts, *args, axis_name))(params, x, plan)
    if exchange == "ragged":
        return _ragged(experts, params, x, plan, axis_name)
    return _all_to_all(experts, params, x, plan, axis_name, room)


def _block(assignments: int, tokens: int, local: int, devices: int, room: float | None) -> int:
    """Returns the rows that go from one device to another in one round."""
    most = min(assignments, tokens * local)
    return most if room is None else max(1, min(most, math.ceil(room * assignments / devices)))


def _all_to_all(experts, params, x, plan, axis_name, room):
    devices, tokens, dtype = jax.lax.axis_size(axis_name), x.shape[0], compute_dtype(x)
    assignments, local = plan.token.shape[0], plan.num_experts // devices
    block = _block(assignments, tokens, local, devices, room)
    exchange = lambda a: jax.lax.all_to_all(a, axis_name, split_axis=0, concat_axis=0)
    leaving = plan.counts.reshape(devices, local)
    sizes = jnp.sum(leaving, axis=1)
    starts = jnp.cumsum(sizes) - sizes
    ends = jnp.cumsum(exchange(leaving), axis=1)  # of each sender's rows for each expert here

    def once(number, params, x, weight, y):
        place = number * block + jnp.arange(block)
        real = place[None, :] < sizes[:, None]
        row = jnp.minimum(starts[:, None] + place[None, :], assignments - 1)
        token = plan.token[row]
        arrived = exchange(jnp.where(real[:, :, None], x[token], jnp.zeros((), x.dtype)))
        ids = jnp.sum(place[None, :, None] >= ends[:, None, :], axis=2)
        out = _by_row(experts, params, arrived.reshape(-1, x.shape[1]), ids.reshape(-1), local)
        back = exchange(out.reshape(arrived.shape)).astype(dtype)
        gate = jnp.where(real, weight[row].astype(dtype), jnp.zeros((), dtype))
        return y.at[token].add(gate[:, :, None] * back)

    y = once(0, params, x, plan.weight, match_varying(jnp.zeros(x.shape, dtype), x)[0])
    rounds = -(-min(assignments, tokens * local) // block)
    if rounds > 1:
        # Blocks larger than planned for are rare: their rounds are run only if some device of the axis needs them, and
        # keep nothing for the backward pass.
        needed = jax.lax.pmax((jnp.max(sizes) + block - 1) // block, axis_name)
        more = jax.checkpoint(once)

        def step(y, number):
            skip = lambda *args: args[-1]
            return jax.lax.cond(number < needed, more, skip, number, params, x, plan.weight, y), None

        y, _ = jax.lax.scan(step, y, jnp.arange(1, rounds))
    return y.astype(x.dtype)


def _gather(experts, params, x, plan, axis_name):
    devices, tokens = jax.lax.axis_size(axis_name), x.shape[0]
    local = plan.num_experts // devices
    token, expert, weight = (jax.lax.all_gather(a, axis_name) for a in (plan.token, plan.expert, plan.weight))
    own = expert - jax.lax.axis_index(axis_name) * local
    here = (own >= 0) & (own < local)
    token = token + tokens * jnp.arange(devices, dtype=token.dtype)[:, None]
    subplan = _plan_of_rows(
        token.reshape(-1),
        jnp.where(here, own, local).reshape(-1),
        jnp.where(here, weight, jnp.zeros((), weight.dtype)).reshape(-1),
        devices * tokens,
        local,
    )
    y = experts.apply(params, gather_rows(x, axis_name), subplan).astype(compute_dtype(x))
    return jax.lax.psum_scatter(y, axis_name, scatter_dimension=0, tiled=True).astype(x.dtype)


def _ring(experts, params, x, plan, axis_name):
    devices, dtype = jax.lax.axis_size(axis_name), compute_dtype(x)
    assignments, local = plan.token.shape[0], plan.num_experts // devices
    index = jax.lax.axis_index(axis_name)
    counts = plan.counts.reshape(devices, local)
    sizes = jnp.sum(counts, axis=1)
    starts = jnp.cumsum(sizes) - sizes

    def own_part(held, distance):
        owner = (index + distance) % devices
        row = jnp.minimum(starts[owner] + jnp.arange(assignments), assignments - 1)
        real = jnp.arange(assignments) < sizes[owner]
        subplan = RoutingPlan(
            token=plan.token[row],
            expert=jnp.where(real, plan.expert[row] - owner * local, local).astype(plan.expert.dtype),
            weight=jnp.where(real, plan.weight[row], jnp.zeros((), plan.weight.dtype)),
            counts=counts[owner],
            scores=plan.scores[:, :local],
            logits=plan.logits[:, :local],
            dropped=plan.dropped,
        )
        return experts.apply(held, x, subplan).astype(dtype)

    def step(carry, distance):
        y, held = carry
        towards = [(i, (i - 1) % devices) for i in range(devices)]
        held = jax.tree.map(lambda leaf: jax.lax.ppermute(leaf, axis_name, towards), held)
        return (y + own_part(held, distance), held), None

    (y, _), _ = jax.lax.scan(step, (own_part(params, 0), params), jnp.arange(1, devices))
    return y.astype(x.dtype)


def _ragged(experts, params, x, plan, axis_name):
    devices, tokens, dtype = jax.lax.axis_size(axis_name), x.shape[0], compute_dtype(x)
    assignments, local = plan.token.shape[0], plan.num_experts // devices
    index = jax.lax.axis_index(axis_name)
    everyone = jax.lax.all_gather(plan.counts.reshape(devices, local), axis_name)  # [sender, receiver, expert]
    sizes = jnp.sum(everyone, axis=2)
    before = jnp.cumsum(sizes, axis=0) - sizes  # where a sender's rows begin at a receiver
    leaving, arriving = sizes[index], sizes[:, index]
    starts = jnp.cumsum(leaving) - leaving
    most = devices * min(assignments, tokens * local)
    space = lambda rows: match_varying(jnp.zeros((rows, x.shape[1]), x.dtype), x)[0]
    arrived = jax.lax.ragged_all_to_all(
        x[plan.token], space(most), starts, leaving, before[index], arriving, axis_name=axis_name
    )
    # Row r came from the sender whose rows enclose it, for the expert whose rows of that sender enclose it.
    ends = jnp.cumsum(everyone[:, index].reshape(-1))
    ids = jnp.searchsorted(ends, jnp.arange(most), side="right", method="compare_all")
    ids = jnp.where(ids < devices * local, ids % local, local)
    out = _by_row(experts, params, arrived, ids, local)
    # Each sender's rows go back to where they stood.
    origin = jnp.cumsum(sizes, axis=1) - sizes
    back = jax.lax.ragged_all_to_all(
        out, space(assignments), before[:, index], arriving, origin[:, index], leaving, axis_name=axis_name
    )
    y = match_varying(jnp.zeros(x.shape, dtype), x)[0]
    return y.at[plan.token].add(plan.weight[:, None].astype(dtype) * back.astype(dtype)).astype(x.dtype)


def _by_row(experts, params, x, ids, local):
    """Returns `f_ids(x)` row by row; rows of id `local` are no one's and give 0."""
    ones = jnp.where(ids < local, jnp.ones((), compute_dtype(x)), 0.0)
    rows = x.shape[0]
    return experts.apply(params, x, _plan_of_rows(jnp.arange(rows), ids, ones, rows, local))


def _plan_of_rows(token, expert, weight, tokens, local):
    order = jnp.argsort(expert, stable=True)
    expert = expert.astype(jnp.int32)
    counts = match_varying(jnp.zeros(local, jnp.int32), expert)[0].at[expert].add(1, mode="drop")
    empty = match_varying(jnp.zeros((tokens, local), weight.dtype), weight)[0]
    return RoutingPlan(
        token=token.astype(jnp.int32)[order],
        expert=expert[order],
        weight=weight[order],
        counts=counts,
        scores=empty,
        logits=empty,
        dropped=jnp.zeros_like(counts[0]),
    )
