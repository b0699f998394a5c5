"""What cMIM learns depends less on the batch size than what InfoNCE learns, neither with augmentation.

The paper's images with handwritten digits, batches of 8, 32 and 128 for the same 10 epochs. InfoNCE tells the draw of a
code from the mean codes of the batch, by the sum over negatives and without a decoder; cMIM takes the mean over them
and reconstructs. A linear probe reads the class from the mean codes; the figure is minus the spread (best minus worst)
of its accuracy over the three batch sizes. Each arm has one configuration for all sizes, chosen among four (two
learning rates, two temperatures) by the mean accuracy on the validation digits over the sizes.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxlab.claims.common import accuracy, digits, train
from jaxlab.claims.harness import Outcome
from jaxlab.information import batch_size_sensitivity, cmim_contrastive_loss, cmim_loss, draw_codes, ridge_probe
from jaxlab.ops.layers import mlp

CODES, WIDTH = 16, 128
ENCODER, DECODER = mlp([WIDTH, 2 * CODES]), mlp([WIDTH, 64])
SIZES, EPOCHS, ROWS = (8, 32, 128), 10, 1077
SETTINGS = [(rate, temperature) for rate in (1e-3, 3e-3) for temperature in (0.1, 0.5)]
# Weights of the reconstruction, of the mean form and of the sum form: one program serves all arms.
ARMS = {"cMIM": (1.0, 1.0, 0.0), "InfoNCE": (0.0, 0.0, 1.0), "MIM": (1.0, 0.0, 0.0)}


def claim(*, seeds: Sequence[int], smoke: bool = False) -> Outcome:
    """Returns minus the spread over batch sizes of the accuracy of a linear probe on test digits."""
    sizes, epochs, settings = (SIZES[1:], 1, SETTINGS[2:3]) if smoke else (SIZES, EPOCHS, SETTINGS)
    splits = [digits(seed) for seed in seeds]
    rows = (300, None, None) if smoke else (None, None, None)
    train_set, val, test = ({n: np.stack([s[i][n][: rows[i]] for s in splits]) for n in ("x", "y")} for i in range(3))
    keys = jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32))

    def encode(params, x):
        return jnp.split(ENCODER.apply(params["encoder"], x), 2, axis=-1)

    def loss(params, batch, key, setting):
        _, temperature, generative, mean_form, sum_form = setting
        mean, log_std = encode(params, batch["x"])
        z = draw_codes(mean, log_std, key=key)
        logits = DECODER.apply(params["decoder"], z)
        told = -jnp.sum(optax.sigmoid_binary_cross_entropy(logits, batch["x"]), axis=-1)
        ours = cmim_loss(told, z, mean, log_std, weight=mean_form, temperature=temperature)
        return generative * ours + sum_form * cmim_contrastive_loss(z, mean, temperature=temperature, negatives="sum")

    def one(setting, key, train_set, val, test, size):
        key_encoder, key_decoder, key_train = jax.random.split(key, 3)
        params = {"encoder": ENCODER.init(key_encoder, 64), "decoder": DECODER.init(key_decoder, CODES)}
        params, _ = train(
            lambda p, b, k: loss(p, b, k, setting),
            params,
            train_set,
            optimizer=optax.adam(setting[0]),
            steps=epochs * ROWS // size,
            batch=size,
            key=key_train,
        )
        codes = [encode(params, split["x"])[0] for split in (train_set, val, test)]
        scores = ridge_probe(codes[0], jax.nn.one_hot(train_set["y"], 10), jnp.concatenate(codes[1:]))
        told = zip(jnp.split(scores, 2), (val, test), strict=True)
        return jnp.stack([accuracy(s, split["y"]) for s, split in told])

    everything = jnp.asarray([(*setting, *weights) for weights in ARMS.values() for setting in settings])
    found = {}
    for size in sizes:
        over_seeds = jax.vmap(functools.partial(one, size=size), in_axes=(None, 0, 0, 0, 0))
        run = jax.jit(jax.vmap(over_seeds, in_axes=(0, None, None, None, None)))
        values = np.asarray(run(everything, keys, train_set, val, test))
        found[size] = values.reshape(len(ARMS), len(settings), len(seeds), 2)  # the last axis: validation, test

    arms, learnt, secondary = (
        {},
        {},
        {n: {} for n in ("setting", "accuracy by batch size", "slope by log2 of the size")},
    )
    for arm, name in enumerate(ARMS):
        best = int(np.mean([found[size][arm, ..., 0].mean(axis=1) for size in sizes], axis=0).argmax())

        def reached(size, seed, arm=arm, best=best):
            return found[size][arm, best, seed, 1]

        told = batch_size_sensitivity(reached, sizes=sizes, seeds=range(len(seeds)))
        arms[name] = (-told["spread"]).tolist()
        learnt[name] = bool(told["mean"].min() > 0.4)
        secondary["setting"][name] = settings[best]
        secondary["accuracy by batch size"][name] = dict(zip(map(str, sizes), told["mean"].tolist(), strict=True))
        secondary["slope by log2 of the size"][name] = told["slope"].tolist()
    return Outcome(arms=arms, learnt=learnt, secondary=secondary, data="scikit-learn digits, without labels")
