"""Networks of other libraries in one line: Flax NNX through `from_nnx`, and our layers inside NNX through `to_nnx`.

Flax Linen and Equinox need no bridge:

    Layer(lambda key, d: module.init(key, jnp.zeros((1, d))), module.apply)                    # Linen
    arrays, static = equinox.partition(model, equinox.is_inexact_array)                         # Equinox
    net = lambda params, x: jax.vmap(equinox.combine(params, static))(x)
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxlab.types import Layer, StatefulLayer, accepted


def from_nnx(make: Callable[..., nnx.Module], *, dims_of: Callable[[Any], tuple] | None = None) -> StatefulLayer:
    """Returns a Flax NNX module as a `StatefulLayer` over plain nested dicts.

    Variables of kind `Param` become the parameters, every other kind (`BatchStat`, caches) the state. Random streams
    (dropout) start from `key` on each call; a module whose `__call__` names `key` or `train` receives them. The graph
    of the module is built once for training (`module.train()`) and once for evaluation (`module.eval()`), not per call.

    Args:
        make: `make(rngs)` builds the module; with `dims_of`, `make(rngs, *dims)`.
        dims_of: what `init` is given as `dims`, read from an input `x`; None for a module that knows its own sizes,
            whose `init` then ignores `dims`.

    Returns:
        A `StatefulLayer`. `apply` needs a key in training if the module draws random numbers.

    Raises:
        ValueError: `train=True` without the key that the module needs.

    Example:
        >>> net = from_nnx(lambda rngs: nnx.Linear(3, 2, rngs=rngs))
        >>> params, state = net.init(jax.random.key(0))
        >>> net.apply(params, state, jnp.ones((4, 3)))[0].shape
        (4, 2)
    """

    @functools.lru_cache(maxsize=16)
    def built(dims: tuple):
        module = nnx.eval_shape(lambda: make(nnx.Rngs(0), *dims))
        graphs = {}
        for train in (True, False):
            module.train() if train else module.eval()
            graphs[train], params, rngs, rest = nnx.split(module, nnx.Param, nnx.RngState, ...)
        return graphs, params, rngs, rest

    def init(key, *dims):
        module = make(nnx.Rngs(key), *(dims if dims_of else ()))
        _, params, _, rest = nnx.split(module, nnx.Param, nnx.RngState, ...)
        return nnx.to_pure_dict(params), nnx.to_pure_dict(rest)

    def apply(params, state, x, *args, key=None, train=False, **keywords):
        graphs, params_like, rngs_like, rest_like = built(dims_of(x) if dims_of else ())
        streams = jax.tree.leaves(rngs_like)
        if streams and train and key is None:
            raise ValueError("key is needed: this network draws random numbers in training")
        root = jax.random.key(0) if key is None else key
        values = [
            jax.random.fold_in(root, i) if jnp.issubdtype(s.dtype, jax.dtypes.prng_key) else jnp.zeros(s.shape, s.dtype)
            for i, s in enumerate(streams)
        ]
        rngs = jax.tree.unflatten(jax.tree.structure(rngs_like), values)
        module = nnx.merge(graphs[train], _filled(params_like, params), rngs, _filled(rest_like, state))
        y = module(x, *args, **accepted(module.__call__, key=key, train=train), **keywords)
        return y, nnx.to_pure_dict(nnx.split(module, nnx.Param, nnx.RngState, ...)[3])

    return StatefulLayer(init, apply)


def to_nnx(layer: Layer, *dims: Any, rngs: nnx.Rngs) -> nnx.Module:
    """Returns one of our layers as a Flax NNX module, whose parameters are `nnx.Param`s under their own names.

    Args:
        layer: a `Layer` without memory.
        *dims: what its `init` takes after the key.
        rngs: the stream `params` seeds it; `dropout`, if there is one, gives the key of each call in training that
            names none.

    Returns:
        A module: `module(x, ..., key=None, train=False)`.

    Example:
        >>> from jaxlab import moe
        >>> layer = moe.moe_layer(moe.top_k_router(4, 2), moe.swiglu_experts(4, hidden=8))
        >>> module = to_nnx(layer, 6, rngs=nnx.Rngs(0))
        >>> module(jnp.ones((5, 6)))[0].shape
        (5, 6)
    """
    return _OfLayer(layer, dims, rngs)


class _OfLayer(nnx.Module):
    def __init__(self, layer: Layer, dims: tuple, rngs: nnx.Rngs):
        self.call = layer.apply
        self.params = nnx.data(jax.tree.map(nnx.Param, layer.init(rngs.params(), *dims)))
        self.rngs = nnx.data(rngs if "dropout" in rngs else None)

    def __call__(self, x, *args, key=None, train: bool = False, **keywords):
        params = jax.tree.map(lambda p: p[...], self.params, is_leaf=lambda p: isinstance(p, nnx.Param))
        if train and key is None and self.rngs is not None:
            key = self.rngs.dropout()
        return self.call(params, x, *args, **accepted(self.call, key=key, train=train), **keywords)


def _filled(like: Any, values: Any) -> Any:
    state = jax.tree.map(lambda leaf: leaf, like)
    nnx.replace_by_pure_dict(state, values)
    return state
