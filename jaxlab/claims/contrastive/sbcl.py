"""On long-tailed data, subclasses of the large classes improve the encoder of supervised contrastive learning.

The paper trains ResNets on long-tailed CIFAR and ImageNet; here a small encoder with a projector learns from
handwritten digits of which class 0 keeps about a hundred and class 9 about five. Stage two is a linear classifier on
the frozen encoder in which all classes weigh alike (ridge regression). Accuracy on a test set that is balanced. Both
losses see the same noisy and masked views and choose among the same two learning rates and two temperatures on a
balanced validation set; subclasses and class temperatures are renewed in every round of training but the first.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.scipy.linalg import cho_factor, cho_solve

from jaxlab.claims.common import digits
from jaxlab.claims.contrastive.mmcr import views
from jaxlab.claims.harness import Outcome
from jaxlab.contrastive import (
    assign_subclasses,
    class_temperatures,
    long_tail_indices,
    sbcl_loss,
    subclass_counts,
)
from jaxlab.ops.layers import mlp

CLASSES, LARGEST = 10, 112
ENCODER, PROJECTOR = mlp([128, 64]), mlp([64, 32])
ARMS = ("SBCL", "SupCon")
RATES, TEMPERATURES = (1e-3, 3e-3), (0.1, 0.2)


def claim(*, seeds: Sequence[int], smoke: bool = False) -> Outcome:
    """Returns the accuracy of a class-balanced linear classifier on the encoder's output."""
    rounds, steps, batch = (3, 8, 32) if smoke else (12, 40, 64)
    splits, tails, sizes = [digits(seed) for seed in seeds], [], []
    for seed, (train_set, _, _) in zip(seeds, splits, strict=True):
        rows = long_tail_indices(jax.random.key(seed), train_set["y"], factor=0.05)
        sizes.append(len(rows))
        fill = 400 - len(rows)  # classes may differ by one row from seed to seed: the rest is padding
        tails.append(
            {
                "x": np.pad(train_set["x"][rows], ((0, fill), (0, 0))),
                "y": np.pad(train_set["y"][rows], (0, fill), constant_values=-1),
            }
        )
    data = {
        "train": {n: jnp.stack([t[n] for t in tails]) for n in ("x", "y")},
        "size": jnp.asarray(sizes),
        **{
            name: {n: jnp.stack([s[i][n] for s in splits]) for n in ("x", "y")} for i, name in ((1, "val"), (2, "test"))
        },
    }
    keys = jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32))

    def one(arm, rate, temperature, key, data):
        x, y = data["train"]["x"], data["train"]["y"]
        optimizer = optax.adam(rate)
        class_counts = jnp.sum(y[:, None] == jnp.arange(CLASSES)[None, :], axis=0)
        counts = subclass_counts(class_counts)

        def embed(params, x):
            return PROJECTOR.apply(params["projector"], jax.nn.relu(ENCODER.apply(params["encoder"], x)))

        def one_round(carry, inputs):
            key, number = inputs
            key_groups, key_steps = jax.random.split(key)
            z = embed(carry[0], x)
            options = {"max_subclasses": LARGEST // 10, "max_size": LARGEST}
            groups = assign_subclasses(key_groups, z, y, counts, **options)
            warmth = class_temperatures(z, y, counts, temperature=temperature)
            # One subclass a class, with nothing on the second level, is the supervised contrastive loss.
            plain = (arm == 1) | (number == 0)
            groups, beta = jnp.where(plain, y, groups), jnp.where(plain, 0.0, 0.25)

            def step(carry, key):
                params, opt_state = carry
                key_rows, key_views = jax.random.split(key)
                rows = jax.random.randint(key_rows, (batch,), 0, data["size"])

                def loss(params):
                    z = embed(params, views(key_views, x[rows], 2))
                    return sbcl_loss(z, y[rows], groups[rows], warmth, temperature=temperature, beta=beta)

                value, grads = jax.value_and_grad(loss)(params)
                updates, opt_state = optimizer.update(grads, opt_state, params)
                return (optax.apply_updates(params, updates), opt_state), value

            return jax.lax.scan(step, carry, jax.random.split(key_steps, steps))

        key_encoder, key_projector, key_rounds = jax.random.split(key, 3)
        params = {"encoder": ENCODER.init(key_encoder, 64), "projector": PROJECTOR.init(key_projector, 64)}
        inputs = jax.random.split(key_rounds, rounds), jnp.arange(rounds)
        (params, _), losses = jax.lax.scan(one_round, (params, optimizer.init(params)), inputs)

        features = lambda x: jax.nn.relu(ENCODER.apply(params["encoder"], x))
        real = y >= 0
        weight = jnp.where(real, 1 / class_counts[jnp.maximum(y, 0)], 0.0)[:, None] / CLASSES
        bank = features(x)
        mean = jnp.sum(weight * bank, axis=0, keepdims=True)
        centred = bank - mean
        gram = (weight * centred).T @ centred
        ridge = 1e-3 * jnp.trace(gram) / len(gram) * jnp.eye(len(gram))
        targets = jax.nn.one_hot(y, CLASSES) - 1 / CLASSES
        linear = cho_solve(cho_factor(gram + ridge), (weight * centred).T @ targets)

        def recall(split):
            right = jnp.argmax((features(split["x"]) - mean) @ linear, axis=1) == split["y"]
            member = jax.nn.one_hot(split["y"], CLASSES)
            return jnp.sum(member * right[:, None], axis=0) / jnp.sum(member, axis=0)

        # The first round is the same for both arms, and its loss has another scale in SBCL.
        fell = losses[-1, -(steps // 2) :].mean() < losses[1, : steps // 2].mean()
        return recall(data["val"]), recall(data["test"]), fell

    @jax.jit
    def run(arms, rates, temperatures, keys, data):
        over_seeds = jax.vmap(one, in_axes=(None, None, None, 0, 0))
        return jax.vmap(over_seeds, in_axes=(0, 0, 0, None, None))(arms, rates, temperatures, keys, data)

    grid = [(rate, t) for rate in RATES for t in TEMPERATURES][-1 if smoke else 0 :]
    columns = zip(*((i, *g) for i in range(len(ARMS)) for g in grid), strict=True)
    results = run(*(jnp.asarray(c) for c in columns), keys, data)
    on_val, on_test, fell = (np.asarray(r).reshape(len(ARMS), len(grid), len(seeds), *r.shape[2:]) for r in results)
    arms, learnt, secondary = {}, {}, {}
    for i, name in enumerate(ARMS):
        best = int(on_val[i].mean(axis=(1, 2)).argmax())
        recall = on_test[i, best]
        arms[name] = recall.mean(axis=1).tolist()
        learnt[name] = bool(fell[i, best].all() and recall.mean(axis=1).min() > 0.5)
        secondary[name] = {
            "rate and temperature": grid[best],
            "classes 0 to 2": recall[:, :3].mean(axis=1).tolist(),
            "classes 7 to 9": recall[:, 7:].mean(axis=1).tolist(),
        }
    return Outcome(
        arms=arms, learnt=learnt, secondary=secondary, data="scikit-learn digits, from about 107 to 5 a class"
    )
