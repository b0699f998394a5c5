"""One entry for every mixture of experts: a router, a set of experts and a dispatch between them."""

from __future__ import annotations

import jax

from jaxlab.moe.dispatch import Dispatch, dropless
from jaxlab.moe.experts import Experts
from jaxlab.ops.masked import zero_where_false
from jaxlab.types import Layer, StatefulLayer, as_stateful


def moe_layer(
    router: Layer | StatefulLayer,
    experts: Experts,
    *,
    dispatch: Dispatch | None = None,
    shared: Layer | None = None,
    axis_name: str | None = None,
) -> Layer | StatefulLayer:
    """Returns a mixture-of-experts layer: the router makes a plan, the dispatch carries it out.

    With `axis_name` the layer is for use inside a map over that axis, of n devices: tokens are spread over them, so are
    the experts (each device holds E / n of them, in order), while the router and the shared experts are on all. `init`
    gives all E experts; the map's specification spreads them.

    Args:
        router: `Layer` or `StatefulLayer` whose `apply` gives a `RoutingPlan` or a `SlotPlan`.
        experts: what the plan's assignments go to.
        dispatch: how they get there; default `dropless()`.
        shared: layer d -> d that sees every token and is added (shared experts).
        axis_name: mapped axis over which experts and tokens are spread (expert parallelism).

    Returns:
        A `Layer`: `init(key, d)`, `apply(params, x [T, d], key=None, train=False, ...)` gives `(y [T, d], plan)`; with
        a stateful router a `StatefulLayer`: `init` gives parameters and state, `apply(params, state, x, ...)` gives
        `((y, plan), state)`. Further keywords (`where`, `ids`) go to the router. The plan is the router's, with weight
        0 for what the dispatch dropped.

    Example:
        >>> from jaxlab import moe
        >>> layer = moe.moe_layer(moe.top_k_router(4, 2), moe.swiglu_experts(4, hidden=8))
        >>> run = jax.jit(lambda key, x: layer.apply(layer.init(key, 6), x))
        >>> y, plan = run(jax.random.key(0), jax.numpy.ones((5, 6)))
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
        y, plan = dispatch(experts, params["experts"], x, plan, axis_name=axis_name)
        if shared is not None:
            # A masked token that holds NaN must not reach the gradient of the shared weights.
            y = y + shared.apply(params["shared"], zero_where_false(x, inputs.get("where")))
        return (y, plan), state

    if isinstance(router, StatefulLayer):
        return StatefulLayer(init_both, apply_both)

    def apply(params, x, *, key=None, train=False, **inputs):
        return apply_both(params, {}, x, key=key, train=train, **inputs)[0]

    return Layer(lambda key, size: init_both(key, size)[0], apply)
