"""Class relations help to discover classes that nobody labelled.

The paper discovers 50 classes of CIFAR-100 with the help of 50 labelled ones; here digits 5 to 9 are discovered with
labelled digits 0 to 4 by a small network, from two shifted and noisy views. A network is first trained on the labelled
digits, and then continues with swapped prediction alone (UNO) or with 0.1 of the class relation loss, each at the
better of two learning rates by the validation images. Accuracy on the unlabelled training images, as the field reports
it, under the best assignment of the five clusters to the five digits.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxlab.claims.common import digits
from jaxlab.claims.harness import Outcome
from jaxlab.distill import class_relation_loss, discovery_targets, normalize_prototypes, swapped_prediction_loss
from jaxlab.ops.assignment import linear_assignment
from jaxlab.ops.layers import mlp
from jaxlab.ops.masked import safe_normalize

KNOWN, NEW, BATCH, TAU = 5, 5, 128, 0.1
ENCODER, PROJECTOR = mlp([128, 64]), mlp([64, 32])
RATES = (1e-3, 3e-3)
ARMS = {"class relations": 0.1, "swapped prediction": 0.0}


def discovered(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Returns the accuracy under the best one-to-one assignment of clusters to classes."""
    table = np.zeros((NEW, NEW), np.float32)
    np.add.at(table, (predicted, labels - KNOWN), 1)
    return float(table[np.arange(NEW), np.asarray(linear_assignment(table, maximize=True))].sum() / len(labels))


def initial(key):
    """Returns the parameters of the encoder, the projector, and the prototypes of both heads."""
    keys = jax.random.split(key, 3)
    prototypes = jax.random.normal(keys[2], (64 * KNOWN + 32 * NEW,))
    return {
        "encoder": ENCODER.init(keys[0], 64),
        "projector": PROJECTOR.init(keys[1], 64),
        "known": prototypes[: 64 * KNOWN].reshape(64, KNOWN),
        "new": prototypes[64 * KNOWN :].reshape(32, NEW),
    }


def heads(params, x):
    """Returns the cosines to the prototypes of the known classes and of the new ones."""
    features = ENCODER.apply(params["encoder"], x)
    projected = PROJECTOR.apply(params["projector"], jax.nn.relu(features))
    return safe_normalize(features) @ params["known"], safe_normalize(projected) @ params["new"]


def view(key, x):
    """Returns the images moved by up to a pixel, with a little noise."""
    key_shift, key_noise = jax.random.split(key)
    padded = jnp.pad(x.reshape(-1, 8, 8), ((0, 0), (1, 1), (1, 1)))
    starts = jnp.floor(3 * jax.random.uniform(key_shift, (len(x), 2))).astype(int)
    moved = jax.vmap(lambda image, s: jax.lax.dynamic_slice(image, (s[0], s[1]), (8, 8)))(padded, starts)
    return moved.reshape(x.shape) + 0.1 * jax.random.normal(key_noise, x.shape)


def claim(*, seeds: Sequence[int], smoke: bool = False) -> Outcome:
    """Returns the accuracy on the unlabelled training digits."""
    steps = 40 if smoke else 600
    rates = RATES[:1] if smoke else RATES
    splits = [digits(seed) for seed in seeds]
    train_set, val, _ = ({n: np.stack([s[i][n] for s in splits]) for n in ("x", "y")} for i in range(3))
    keys = jax.vmap(lambda seed: jax.random.split(jax.random.key(seed), 3))(jnp.asarray(seeds, jnp.uint32))

    def fit(params, frozen, data, key, rate, alpha, discover):
        """Trains on the known digits alone (`discover` 0), or on everything."""
        optimizer = optax.adam(rate)

        def loss(params, rows, key):
            x, y = data["x"][rows], data["y"][rows]
            old = y < KNOWN
            views = jnp.stack([view(k, x) for k in jax.random.split(key)])
            known, new = jax.vmap(lambda x: heads(params, x))(views)
            told, _ = jax.vmap(lambda x: heads(frozen, x))(views)
            logits = jnp.concatenate([known, new], axis=-1)
            labels = jnp.where(old, y, -1)
            targets = jax.vmap(lambda z: discovery_targets(z, labels, num_known=KNOWN))(new)
            swap = swapped_prediction_loss(logits, targets, tau=TAU)
            keep = jax.vmap(lambda z, o: class_relation_loss(z, o, where=jnp.logical_not(old)))(logits, told)
            each = optax.softmax_cross_entropy_with_integer_labels(known / TAU, jnp.stack([jnp.maximum(labels, 0)] * 2))
            supervised = jnp.sum(jnp.where(old[None], each, 0.0)) / (2 * jnp.maximum(jnp.sum(old), 1))
            return jnp.where(discover, swap + alpha * jnp.mean(keep), supervised)

        def step(carry, key):
            params, opt_state = carry
            params = {**params, **{n: normalize_prototypes(params[n]) for n in ("known", "new")}}
            key_rows, key_loss = jax.random.split(key)
            rows = jnp.floor(len(data["y"]) * jax.random.uniform(key_rows, (BATCH,))).astype(int)
            updates, opt_state = optimizer.update(jax.grad(loss)(params, rows, key_loss), opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), None

        (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), jax.random.split(key, steps))
        return {**params, **{n: normalize_prototypes(params[n]) for n in ("known", "new")}}

    def accuracies(params, split):
        _, new = jax.jit(jax.vmap(heads))(params, split["x"])
        predicted = np.asarray(new).argmax(-1)
        return [discovered(p[y >= KNOWN], y[y >= KNOWN]) for p, y in zip(predicted, split["y"], strict=True)]

    fit = jax.jit(jax.vmap(fit, in_axes=(0, 0, 0, 0, None, None, None)))
    start = jax.jit(jax.vmap(initial))(keys[:, 0])
    frozen = fit(start, start, train_set, keys[:, 1], 1e-3, 0.0, False)

    def drift(params):
        """Returns how far the relations of the new training digits moved: KL, mean over the seeds."""
        logs = []
        for p in (frozen, params):
            known, _ = jax.vmap(heads)(p, train_set["x"])
            logs.append(jax.nn.log_softmax(known / TAU / 4))
        apart = jnp.sum(jnp.exp(logs[0]) * (logs[0] - logs[1]), axis=-1)
        return float(jnp.mean(apart[train_set["y"] >= KNOWN]))

    arms, secondary = {}, {"learning rate": {}, "drift of the relations": {}}
    for name, alpha in ARMS.items():
        results = []
        for rate in rates:
            params = fit(frozen, frozen, train_set, keys[:, 2], rate, alpha, True)
            results.append((np.mean(accuracies(params, val)), rate, accuracies(params, train_set), params))
        _, secondary["learning rate"][name], arms[name], params = max(results, key=lambda r: r[0])
        secondary["drift of the relations"][name] = drift(params)
    return Outcome(
        arms=arms,
        learnt={name: float(np.mean(values)) > 0.4 for name, values in arms.items()},
        secondary=secondary,
        data="scikit-learn digits: 0 to 4 with labels, 5 to 9 without",
    )
