"""K networks in one program: where each peer lives, its keys, and what its outputs are.

Every leaf of a learner's state has a leading axis of LOCAL peers: all K without an axis name, K / axis size of them on
each shard of a mapped axis. Only predictions cross the axis.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxlab.ops.collectives import axis_index, axis_size, gather_rows


def peer_ids(num_peers: int, *, axis_name: str | None = None) -> Array:
    """Returns the numbers of the peers that live here.

    Args:
        num_peers: K, over all shards.
        axis_name: mapped axis over which the peers are spread; None = all here.

    Returns:
        int32 [K / axis size].

    Raises:
        ValueError: `num_peers` is below 1 or not divisible by the axis size.

    Example:
        >>> peer_ids(3).tolist()
        [0, 1, 2]
        >>> jax.vmap(lambda _: peer_ids(4, axis_name="peer"), axis_name="peer")(jnp.zeros(2)).tolist()
        [[0, 1], [2, 3]]
    """
    if num_peers < 1:
        raise ValueError(f"num_peers={num_peers} must be at least 1")
    shards = axis_size(axis_name)
    if num_peers % shards:
        raise ValueError(f"num_peers={num_peers} must be divisible by the size {shards} of axis {axis_name!r}")
    local = num_peers // shards
    return axis_index(axis_name) * local + jnp.arange(local)


def peer_keys(key: Array, ids: Array) -> Array:
    """Returns a key of its own for each peer, the same wherever the peer lives.

    Args:
        key: typed key of the step.
        ids: int [local peers], see `peer_ids`.

    Returns:
        Typed keys [local peers].

    Example:
        >>> keys = peer_keys(jax.random.key(0), jnp.array([1, 2]))
        >>> bool(keys[0] == jax.random.fold_in(jax.random.key(0), 1))
        True
    """
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(ids)


def example_dims(x: Array) -> Any:
    """Returns what a network's `init` wants for a batch: the number of features, or the shape of one example.

    Args:
        x: [N, ...].

    Example:
        >>> example_dims(jnp.ones((4, 2))), example_dims(jnp.ones((4, 8, 8, 1))).shape
        (2, (8, 8, 1))
    """
    return x.shape[1] if x.ndim == 2 else jax.ShapeDtypeStruct(x.shape[1:], x.dtype)


def as_outputs(outputs: Array | dict[str, Any]) -> dict[str, Any]:
    """Returns a network's outputs as a dict; an array is its `logits`.

    Args:
        outputs: what a network's `apply` gives.

    Example:
        >>> list(as_outputs(jnp.ones((4, 3))))
        ['logits']
    """
    return outputs if isinstance(outputs, dict) else {"logits": outputs}


def ensemble_probs(logits: Array, *, axis_name: str | None = None) -> Array:
    """Returns the mean over all peers of their predictions.

    Args:
        logits: float [local peers, N, C].
        axis_name: mapped axis over which the peers are spread.

    Returns:
        float32 [N, C].

    Example:
        >>> ensemble_probs(jnp.array([[[0.0, 0.0]], [[100.0, 0.0]]])).tolist()
        [[0.75, 0.25]]
    """
    return jnp.mean(jax.nn.softmax(gather_rows(logits, axis_name).astype(jnp.float32)), axis=0)
