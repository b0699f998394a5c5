"""The game between modalities gives a better classifier than joint training, also than that with heads of their own.

The paper's audio and video with the halves of handwritten digits: the left half is clean, the right half carries noise
of deviation 0.5, anew at every look. Each half has a network; their shares of the logits are added. Accuracy on the
test digits, each seen with five draws of the noise. Every arm chooses among four settings by the validation digits:
four learning rates, or for MCR two of them and two weights of the game.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxlab.claims.common import accuracy, digits, train
from jaxlab.claims.harness import Outcome
from jaxlab.information import mcr_loss, modality_contributions
from jaxlab.ops.layers import dense, mlp

BATCH, CLASSES, WIDTH, NOISE = 32, 10, 32, 0.5
ENCODER, HEAD = mlp([64, WIDTH]), dense(CLASSES)
# Learning rate, and the weights of the game, of the contrastive term and of the heads: one program serves all arms.
SETTINGS = {
    "MCR": [(rate, weight, 1.0, 1.0) for rate in (1e-3, 3e-3) for weight in (0.1, 1.0)],
    "joint with unimodal heads": [(rate, 0.0, 0.0, 1.0) for rate in (3e-4, 1e-3, 3e-3, 1e-2)],
    "joint": [(rate, 0.0, 0.0, 0.0) for rate in (3e-4, 1e-3, 3e-3, 1e-2)],
}


def halves(key: jax.Array, x: jax.Array) -> list[jax.Array]:
    """Returns the left half and the noisy right half of the digits, each [N, 32]."""
    image = x.reshape(-1, 8, 2, 4)
    left, right = image[:, :, 0].reshape(-1, 32), image[:, :, 1].reshape(-1, 32)
    return [left, right + NOISE * jax.random.normal(key, right.shape)]


def network(key: jax.Array) -> list[dict[str, dict]]:
    """Returns for each modality an encoder, its share of the fusion and its own head."""

    def one(key):
        keys = jax.random.split(key, 3)
        made = {"encoder": ENCODER.init(keys[0], 32)}
        return {**made, "fusion": HEAD.init(keys[1], WIDTH), "head": HEAD.init(keys[2], WIDTH)}

    return [one(k) for k in jax.random.split(key)]


def claim(*, seeds: Sequence[int], smoke: bool = False) -> Outcome:
    """Returns the accuracy of the fused prediction on test digits."""
    steps, looks, orders = (60, 2, 1) if smoke else (400, 5, 6)
    splits = [digits(seed) for seed in seeds]
    rows = (300, None, None) if smoke else (None, None, None)
    train_set, val, test = ({n: np.stack([s[i][n][: rows[i]] for s in splits]) for n in ("x", "y")} for i in range(3))
    keys = jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32))

    def shares(params, views):
        """Returns latents, shares of the logits and logits of the heads, for each modality."""
        z = [jax.nn.relu(ENCODER.apply(p["encoder"], x)) for p, x in zip(params, views, strict=True)]
        parts, heads = ([HEAD.apply(p[name], v) for p, v in zip(params, z, strict=True)] for name in ("fusion", "head"))
        return z, parts, heads

    def seen(params, split, key):
        """Returns the accuracy of the fused and of the noisy modality's own prediction."""

        def look(key):
            _, parts, heads = shares(params, halves(key, split["x"]))
            return jnp.stack([accuracy(sum(parts), split["y"]), accuracy(heads[1], split["y"])])

        return jnp.mean(jax.vmap(look)(jax.random.split(key, looks)), axis=0)

    def loss(params, batch, key, setting):
        key_noise, key_game = jax.random.split(key)
        z, parts, heads = shares(params, halves(key_noise, batch["x"]))
        _, game, contrast, head = setting
        weights = {"game_weight": game, "contrastive_weight": contrast, "unimodal_weight": head}
        options = {"unimodal_logits": heads, "latents": z, "num_permutations": orders}
        return mcr_loss(parts, batch["y"], key=key_game, **weights, **options)

    def one(setting, key, train_set, val, test):
        key_init, key_train, key_val, key_test, key_game = jax.random.split(key, 5)
        params, _ = train(
            lambda p, b, k: loss(p, b, k, setting),
            network(key_init),
            train_set,
            optimizer=optax.adam(setting[0]),
            steps=steps,
            batch=BATCH,
            key=key_train,
        )
        _, parts, _ = shares(params, halves(key_test, test["x"]))
        told = modality_contributions(parts, key=key_game, num_permutations=orders)
        looked = jax.vmap(lambda x, y, key: seen(params, {"x": x, "y": y}, key))
        both = (jnp.stack([val[n], test[n]]) for n in ("x", "y"))
        return looked(*both, jnp.stack([key_val, key_test])), told

    run = jax.jit(jax.vmap(jax.vmap(one, in_axes=(None, 0, 0, 0, 0)), in_axes=(0, None, None, None, None)))
    chosen = {name: settings[2:3] if smoke else settings for name, settings in SETTINGS.items()}
    everything = jnp.asarray([setting for settings in chosen.values() for setting in settings])
    found, told = (np.asarray(v) for v in run(everything, keys, train_set, val, test))
    arms, secondary = {}, {"setting": {}, "accuracy of the noisy half alone": {}, "contributions": {}}
    first = 0
    for name, settings in chosen.items():
        mine = slice(first, first + len(settings))
        best = first + int(found[mine, :, 0, 0].mean(axis=1).argmax())
        first = mine.stop
        arms[name] = found[best, :, 1, 0].tolist()
        secondary["setting"][name] = settings[best - mine.start]
        secondary["accuracy of the noisy half alone"][name] = found[best, :, 1, 1].tolist()
        secondary["contributions"][name] = told[best].mean(axis=0).tolist()
    learnt = {name: min(values) > 0.4 for name, values in arms.items()}
    floor = None if smoke else arms["joint"]
    return Outcome(arms=arms, floor=floor, learnt=learnt, secondary=secondary, data="halves of scikit-learn digits")
