"""What claims share: real digits drawn by seed, and a training loop that is one program."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array


def digits(seed: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Returns train, validation and test (60 : 20 : 20, drawn by the seed, balanced by class) of scikit-learn's digits.

    Each is a dict of `x` float32 [N, 64] in [0, 1] and `y` int32 [N].
    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise ValueError("claims need the extra `train`: pip install 'jaxlab[train]'") from error
    x, y = load_digits(return_X_y=True)
    x, y = (x / 16).astype(np.float32), y.astype(np.int32)
    rest, test = train_test_split(np.arange(len(y)), test_size=360, random_state=seed, stratify=y)
    train, val = train_test_split(rest, test_size=360, random_state=seed, stratify=y[rest])
    return tuple({"x": x[i], "y": y[i]} for i in (train, val, test))


def accuracy(logits: Array, labels: Array) -> Array:
    """Returns the share of rows whose largest logit is the label's."""
    return jnp.mean((jnp.argmax(logits, axis=-1) == labels).astype(jnp.float32))


def train(
    loss: Callable[..., Array],
    params: Any,
    data: dict[str, Array],
    *,
    optimizer: optax.GradientTransformation,
    steps: int,
    batch: int,
    key: Array,
) -> tuple[Any, Array]:
    """Returns the trained parameters and the loss of every step, as one `lax.scan`.

    Args:
        loss: `loss(params, batch, key)`, a scalar.
        params: where training starts.
        data: arrays with the same leading axis; a batch is drawn from them with replacement at each step.
        optimizer: any optax transformation.
        steps: number of steps.
        batch: examples per step.
        key: decides batches and what `loss` draws.
    """
    data = jax.tree.map(jnp.asarray, data)
    size = len(next(iter(data.values())))

    def step(carry, key):
        params, opt_state = carry
        key_batch, key_loss = jax.random.split(key)
        rows = jax.random.randint(key_batch, (batch,), 0, size)
        value, grads = jax.value_and_grad(loss)(params, {n: v[rows] for n, v in data.items()}, key_loss)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), value

    (params, _), losses = jax.lax.scan(step, (params, optimizer.init(params)), jax.random.split(key, steps))
    return params, losses
