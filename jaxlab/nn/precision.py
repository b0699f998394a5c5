"""Computing in a smaller dtype than the parameters are kept in."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxlab.types import Layer, StatefulLayer, as_stateful


def with_compute_dtype(net: Layer | StatefulLayer, dtype: str | jnp.dtype) -> StatefulLayer:
    """Returns the network computing in `dtype`, while parameters, gradients, state and outputs keep theirs.

    Args:
        net: any network.
        dtype: of the computation, such as `bfloat16`.

    Returns:
        A `StatefulLayer`: `apply` casts floating parameters and inputs to `dtype`, and floating outputs and the new
        state back: outputs to the dtype of the parameters, the state to its own.

    Raises:
        ValueError: `dtype` is not floating.

    Example:
        >>> from jaxlab.ops.layers import dense
        >>> net = with_compute_dtype(dense(2), "bfloat16")
        >>> params, state = net.init(jax.random.key(0), 3)
        >>> params["w"].dtype.name, net.apply(params, state, jnp.ones((4, 3)))[0].dtype.name
        ('float32', 'float32')
    """
    dtype = jnp.dtype(dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"dtype={dtype.name} must be a floating dtype")
    inner = as_stateful(net)

    def cast(tree, to):
        return jax.tree.map(lambda a: a.astype(to) if jnp.issubdtype(a.dtype, jnp.floating) else a, tree)

    def apply(params, state, *args, key=None, train=False, **keywords):
        floats = [a.dtype for a in jax.tree.leaves(params) if jnp.issubdtype(a.dtype, jnp.floating)]
        out, new = inner.apply(cast(params, dtype), state, *cast(args, dtype), key=key, train=train, **keywords)
        return cast(out, jnp.result_type(*floats) if floats else dtype), jax.tree.map(
            lambda a, old: a.astype(old.dtype), new, state
        )

    return StatefulLayer(inner.init, apply)
