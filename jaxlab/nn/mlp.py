"""A multi-layer perceptron with batch normalisation and dropout, in Flax NNX."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import jax
from flax import nnx

from jaxlab.nn.bridges import from_nnx
from jaxlab.types import StatefulLayer


def mlp(
    sizes: Sequence[int],
    *,
    activation: Callable[[jax.Array], jax.Array] = jax.nn.relu,
    batch_norm: bool = False,
    dropout: float = 0.0,
) -> StatefulLayer:
    """Returns dense layers of the given output sizes, with normalisation, activation and dropout between them.

    `ops.layers.mlp` is the same without memory: a plain `Layer`.

    Args:
        sizes: output sizes, the last one without activation.
        activation: elementwise.
        batch_norm: whether each hidden layer is batch-normalised before the activation (momentum 0.9).
        dropout: rate after each activation, in training.

    Returns:
        A `StatefulLayer`: `init(key, size)`, `apply(params, state, x [..., size], key=None, train=False)`.

    Raises:
        ValueError: `sizes` is empty or `dropout` is not in [0, 1).

    Example:
        >>> net = mlp([8, 3], batch_norm=True)
        >>> params, state = net.init(jax.random.key(0), 2)
        >>> net.apply(params, state, jax.numpy.ones((4, 2)))[0].shape
        (4, 3)
    """
    if not sizes:
        raise ValueError("sizes must name at least one layer, got none")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout={dropout} must be in [0, 1)")

    def make(rngs, size):
        return _MLP((size, *sizes), activation, batch_norm, dropout, rngs)

    return from_nnx(make, dims_of=lambda x: (x.shape[-1],))


class _MLP(nnx.Module):
    def __init__(self, sizes, activation, batch_norm, dropout, rngs):
        he = nnx.initializers.he_normal()
        pairs = list(itertools.pairwise(sizes))
        self.dense = nnx.List([nnx.Linear(a, b, kernel_init=he, rngs=rngs) for a, b in pairs])
        hidden = sizes[1:-1]
        self.norms = nnx.List([nnx.BatchNorm(n, momentum=0.9, rngs=rngs) for n in hidden] if batch_norm else [])
        self.drops = nnx.List([nnx.Dropout(dropout, rngs=rngs) for _ in hidden] if dropout else [])
        self.activation = activation

    def __call__(self, x):
        for i, layer in enumerate(self.dense):
            x = layer(x)
            if i + 1 < len(self.dense):
                x = self.norms[i](x) if self.norms else x
                x = self.activation(x)
                x = self.drops[i](x) if self.drops else x
        return x
