"""The shapes that everything public has: layers, learners, and the plan that joins routers and experts."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

Array = jax.Array
PyTree = Any


class Layer(NamedTuple):
    """A network without memory: `params = init(key, *dims)`, `y = apply(params, x, ..., key=None, train=False)`.

    `dims` are feature sizes or `jax.ShapeDtypeStruct`s. `key` and `train` are keyword-only and exist only where they
    change something. `params` is a nested dict of floating-point arrays.

    Example:
        >>> import jax
        >>> scale = Layer(lambda key, size: {"w": jax.numpy.ones(size)}, lambda params, x: params["w"] * x)
        >>> scale.apply(scale.init(jax.random.key(0), 3), jax.numpy.arange(3.0)).tolist()
        [0.0, 1.0, 2.0]
    """

    init: Callable[..., PyTree]
    apply: Callable[..., Any]


class StatefulLayer(NamedTuple):
    """A network with memory, which goes in and comes out.

    `params, state = init(key, *dims)`, `y, state = apply(params, state, x, ..., key=None, train=False)`.
    """

    init: Callable[..., tuple[PyTree, PyTree]]
    apply: Callable[..., tuple[Any, PyTree]]


class Learner(NamedTuple):
    """A way to train one or several networks.

    `state = init(key, batch)`, `state, metrics = update(state, batch, key)`, `outputs = predict(state, batch)`.
    """

    init: Callable[..., Any]
    update: Callable[..., tuple[Any, dict[str, Array]]]
    predict: Callable[..., Any]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LearnerState:
    """What a learner carries from one step to the next.

    Attributes:
        params: trained arrays.
        net_state: what the networks remember between steps (`{}` without memory).
        opt_state: state of the optax transformation.
        step: int32 [], optimiser steps taken.
    """

    params: PyTree
    net_state: PyTree
    opt_state: PyTree
    step: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RoutingPlan:
    """Which token goes to which expert: a flat list of A assignments, sorted stably by expert.

    Attributes:
        token: int32 [A], row of the token; unused rows stand at the end.
        expert: int32 [A], id of the expert, ascending; `num_experts` on unused rows.
        weight: float32 [A], combination weight; exactly 0 on unused rows.
        counts: int32 [E], assignments of each expert, so that expert e owns the rows
            `counts[:e].sum() : counts[:e + 1].sum()`.
        scores: float32 [T, E], what the balance losses read (probabilities or gate values).
        logits: float32 [T, E], raw router outputs, for the z-loss.
        dropped: int32 [], assignments that were wanted and cut.
    """

    token: Array
    expert: Array
    weight: Array
    counts: Array
    scores: Array
    logits: Array
    dropped: Array

    @property
    def num_experts(self) -> int:
        """Number of experts E."""
        return self.counts.shape[-1]


def accepted(function: Callable[..., Any], **keywords: Any) -> dict[str, Any]:
    """Returns those of `keywords` that `function` names, so that a layer need only declare what changes it."""
    parameters = inspect.signature(function).parameters
    return {name: value for name, value in keywords.items() if name in parameters}


def as_stateful(net: Layer | StatefulLayer | Callable[..., Any]) -> StatefulLayer:
    """Brings a network into the one form that every method uses.

    Args:
        net: a `Layer`, a `StatefulLayer`, or a bare `apply_fn(params, x)`, whose parameters come from the caller:
            its `init` raises.

    Returns:
        A `StatefulLayer` whose `apply` always accepts `key=` and `train=` and passes on what the network declares.

    Raises:
        TypeError: `net` is none of the three.

    Example:
        >>> net = as_stateful(lambda params, x: params["w"] * x)
        >>> net.apply({"w": 2.0}, {}, 3.0, key=None, train=False)
        (6.0, {})
    """
    if isinstance(net, StatefulLayer):

        def apply_stateful(params, state, *args, key=None, train=False, **keywords):
            return net.apply(params, state, *args, **accepted(net.apply, key=key, train=train), **keywords)

        return StatefulLayer(net.init, apply_stateful)
    call = net.apply if isinstance(net, Layer) else net
    if not callable(call):
        raise TypeError(f"net must be a Layer, a StatefulLayer or a function (params, x), got {type(net).__name__}")

    def init(key, *dims):
        if not isinstance(net, Layer):
            raise ValueError("net is a bare apply function, which has no init: pass params= to the learner's init")
        return net.init(key, *dims), {}

    def apply(params, state, *args, key=None, train=False, **keywords):
        return call(params, *args, **accepted(call, key=key, train=train), **keywords), state

    return StatefulLayer(init, apply)
