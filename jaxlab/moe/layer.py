"""One entry for every mixture of experts: a router, a set of experts and a dispatch between them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from jaxlab.kernels.expert_ffn import expert_ffn
from jaxlab.ops.masked import zero_where_false
from jaxlab.types import Array, Layer, RoutingPlan, StatefulLayer, as_stateful

Dispatch = Callable[["Experts", Any, Array, RoutingPlan], Array]


class Experts(NamedTuple):
    """E experts as one set of stacked parameters.

    Attributes:
        num_experts: E.
        init: `params = init(key, d)`, every leaf with a leading axis E.
        apply: `y [T, d] = apply(params, x [T, d], plan)`, the weighted sum over a plan's assignments.
    """

    num_experts: int
    init: Callable[..., Any]
    apply: Callable[..., Array]


def swiglu_experts(num_experts: int, hidden: int, *, implementation: str = "auto") -> Experts:
    """Returns experts `f_e(x) = (silu(x gate_e) * (x up_e)) down_e`.

    Args:
        num_experts: E.
        hidden: width of the hidden layer of one expert.
        implementation: as in `kernels.expert_ffn`.
    """

    def init(key, size):
        key_gate, key_up, key_down = jax.random.split(key, 3)
        return {
            "gate": jax.random.normal(key_gate, (num_experts, size, hidden)) * size**-0.5,
            "up": jax.random.normal(key_up, (num_experts, size, hidden)) * size**-0.5,
            "down": jax.random.normal(key_down, (num_experts, hidden, size)) * hidden**-0.5,
        }

    def apply(params, x, plan):
        return expert_ffn(x, params, plan, activation="swiglu", implementation=implementation)

    return Experts(num_experts, init, apply)


def dropless() -> Dispatch:
    """Returns the dispatch that computes every assignment of the plan and drops none."""
    return lambda experts, params, x, plan: experts.apply(params, x, plan)


def moe_layer(
    router: Layer | StatefulLayer, experts: Experts, *, dispatch: Dispatch | None = None, shared: Layer | None = None
) -> Layer | StatefulLayer:
    """Returns a mixture-of-experts layer: the router makes a plan, the dispatch carries it out.

    Args:
        router: `Layer` or `StatefulLayer` whose `apply` gives a `RoutingPlan`.
        experts: what the plan's assignments go to.
        dispatch: how they get there; default `dropless()`.
        shared: layer d -> d that sees every token and is added (shared experts).

    Returns:
        A `Layer`: `init(key, d)`, `apply(params, x [T, d], key=None, train=False, ...)` gives `(y [T, d], plan)`; with
        a stateful router a `StatefulLayer`: `init` gives parameters and state, `apply(params, state, x, ...)` gives
        `((y, plan), state)`. Further keywords (`where`, `ids`) go to the router.

    Example:
        >>> from jaxlab import moe
        >>> layer = moe.moe_layer(moe.top_k_router(4, 2), moe.swiglu_experts(4, hidden=8))
        >>> y, plan = layer.apply(layer.init(jax.random.key(0), 6), jax.numpy.ones((5, 6)))
        >>> y.shape
        (5, 6)
    """
    dispatch = dropless() if dispatch is None else dispatch
    routing = as_stateful(router)

    def init_both(key, size):
        key_router, key_experts = jax.random.split(key)
        router_params, state = routing.init(key_router, size)
        params = {"router": router_params, "experts": experts.init(key_experts, size)}
        if shared is not None:
            params["shared"] = shared.init(jax.random.fold_in(key_experts, 1), size)
        return params, state

    def apply_both(params, state, x, *, key=None, train=False, **inputs):
        plan, state = routing.apply(params["router"], state, x, key=key, train=train, **inputs)
        if plan.num_experts != experts.num_experts:
            raise ValueError(f"router has {plan.num_experts} experts, but experts has {experts.num_experts}")
        y = dispatch(experts, params["experts"], x, plan)
        if shared is not None:
            # A masked token that holds NaN must not reach the gradient of the shared weights.
            y = y + shared.apply(params["shared"], zero_where_false(x, inputs.get("where")))
        return (y, plan), state

    if isinstance(router, StatefulLayer):
        return StatefulLayer(init_both, apply_both)

    def init(key, size):
        return init_both(key, size)[0]

    def apply(params, x, *, key=None, train=False, **inputs):
        return apply_both(params, {}, x, key=key, train=train, **inputs)[0]

    return Layer(init, apply)
