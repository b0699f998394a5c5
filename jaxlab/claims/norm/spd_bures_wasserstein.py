"""Batch normalisation under the Bures-Wasserstein metric serves ill-conditioned covariances better.

The paper classifies skeletons and EEG by their covariances; here an SPD network tells handwritten digits apart by the
covariance of their eight columns over their eight rows, which is singular but for the 1e-4 on its diagonal. The
baseline normalises the matrix logarithms of the same layer's input (mean, variance and a learnt symmetric bias: the
log-Euclidean metric). Both choose their learning rate from the same values on validation digits; float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxlab.claims.common import accuracy, digits
from jaxlab.claims.harness import Outcome
from jaxlab.norm import bimap, reeig, riemannian_sgd, spd_batch_norm, spd_log
from jaxlab.ops.layers import dense
from jaxlab.types import StatefulLayer

RATES, BATCH, SIZE, FEATURES = (0.3, 1.0), 32, 8, 6


def covariances(x: np.ndarray) -> np.ndarray:
    """Returns the covariances [N, 8, 8] of the columns over the rows, scaled to trace 8, with 1e-4 on the diagonal."""
    images = x.reshape(-1, SIZE, SIZE).astype(np.float64)
    centred = images - images.mean(axis=1, keepdims=True)
    c = np.swapaxes(centred, 1, 2) @ centred / (SIZE - 1)
    return c * (SIZE / np.trace(c, axis1=1, axis2=2))[:, None, None] + 1e-4 * np.eye(SIZE)


def bures_wasserstein() -> StatefulLayer:
    """Returns the paper's layer followed by LogEig."""
    layer = spd_batch_norm()

    def apply(params, state, x, *, train=False):
        y, state = layer.apply(params, state, x, train=train)
        return spd_log(y), state

    return StatefulLayer(layer.init, apply)


def log_euclidean(*, momentum: float = 0.9, eps: float = 1e-5) -> StatefulLayer:
    """Returns log-Euclidean batch normalisation followed by LogEig: that of the logarithms, with a symmetric bias."""

    def init(key, n):
        del key
        return {"bias": jnp.zeros((n, n)), "scale": jnp.ones(())}, {"mean": jnp.zeros((n, n)), "var": jnp.ones(())}

    def apply(params, state, x, *, train=False):
        logs = spd_log(x)
        mean, var = state["mean"], state["var"]
        if train:
            mean = jax.lax.stop_gradient(jnp.mean(logs, axis=0))
            var = jax.lax.stop_gradient(jnp.mean(jnp.sum((logs - mean[None]) ** 2, axis=(1, 2))))
            new = {"mean": mean, "var": var}
            state = {name: momentum * state[name] + (1 - momentum) * new[name] for name in new}
        unit = jax.lax.rsqrt(var + eps) * (logs - mean[None])
        return params["scale"] * unit + (params["bias"] + params["bias"].T)[None] / 2, state

    return StatefulLayer(init, apply)


def claim(*, seeds: Sequence[int], smoke: bool = False) -> Outcome:
    """Returns the test accuracy of BiMap, ReEig, the normalisation, LogEig and a linear layer."""
    steps, rates = (100, RATES[:1]) if smoke else (150, RATES)
    splits = [[{"x": covariances(part["x"]), "y": part["y"]} for part in digits(seed)] for seed in seeds]
    with jax.enable_x64(True):
        train_set, val, test = ({n: jnp.stack([s[i][n] for s in splits]) for n in ("x", "y")} for i in range(3))
        keys = jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32))
        first, head = bimap(FEATURES), dense(10)
        arms, chosen, learnt = {}, {}, {}
        for name, norm in {
            "Bures-Wasserstein": bures_wasserstein(),
            "log-Euclidean batch norm": log_euclidean(),
        }.items():

            def logits(params, state, x, train, norm=norm):
                y = reeig(first.apply(params["bimap"], x), threshold=1e-5)
                y, state = norm.apply(params["norm"], state, y, train=train)
                return head.apply(params["head"], y.reshape(len(x), -1)), state

            def loss(params, state, x, y, logits=logits):
                z, state = logits(params, state, x, True)
                return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(z, y)), state

            def one(rate, key, train_set, val, test, norm=norm, logits=logits, loss=loss):
                key_bimap, key_head, key_rows = jax.random.split(key, 3)
                normed, state = norm.init(key_head, FEATURES)
                weights = head.init(key_head, FEATURES * FEATURES)
                params = {"bimap": first.init(key_bimap, SIZE), "norm": normed, "head": weights}
                params, state = jax.tree.map(jnp.float64, (params, state))
                # A rate that is traced: the transformation is built for rate 1 and scaled gradients go in.
                tx = riemannian_sgd(1.0)

                def step(carry, rows):
                    params, state = carry
                    batch = train_set["x"][rows], train_set["y"][rows]
                    grads, state = jax.grad(loss, has_aux=True)(params, state, *batch)
                    updates, _ = tx.update(jax.tree.map(lambda g: rate * g, grads), tx.init(params), params)
                    return (optax.apply_updates(params, updates), state), None

                rows = jax.random.randint(key_rows, (steps, BATCH), 0, len(train_set["x"]))
                (params, state), _ = jax.lax.scan(step, (params, state), rows)
                both = logits(params, state, jnp.concatenate([val["x"], test["x"]]), False)[0]
                return accuracy(both[: len(val["x"])], val["y"]), accuracy(both[len(val["x"]) :], test["y"])

            over_seeds = jax.vmap(one, in_axes=(None, 0, 0, 0, 0))
            run = jax.jit(jax.vmap(over_seeds, in_axes=(0, None, None, None, None)))
            on_val, on_test = (np.asarray(a) for a in run(jnp.asarray(rates), keys, train_set, val, test))
            best = int(on_val.mean(axis=1).argmax())
            arms[name], chosen[name] = on_test[best].tolist(), rates[best]
            learnt[name] = bool(on_test[best].min() > 0.2)
    condition = [float(np.median(np.linalg.cond(s[0]["x"]))) for s in splits]
    return Outcome(
        arms=arms,
        learnt=learnt,
        secondary={"learning rate": chosen, "median condition number": condition},
        data="column covariances of scikit-learn digits",
    )
