"""The contrastive term makes the codes of a mutual information machine better for linear readers.

The paper's images with handwritten digits: an auto-encoder of 16 codes and pixels as Bernoulli variables. A linear
probe reads the class from the mean codes. cMIM and MIM each choose among four settings by the validation digits: MIM
four learning rates, cMIM two of them and two temperatures. A VAE of the same sizes, nearest neighbours, the
reconstruction and the probe of the decoder's hidden layer are secondary.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxlab.claims.common import accuracy, digits, train
from jaxlab.claims.harness import Outcome
from jaxlab.information import cmim_loss, draw_codes, gaussian_log_density, informative_embedding, ridge_probe
from jaxlab.ops.layers import dense, mlp
from jaxlab.ops.neighbours import weighted_knn

BATCH, CODES, WIDTH = 64, 16, 128
ENCODER, DECODER, OUTPUT = mlp([WIDTH, 2 * CODES]), mlp([WIDTH]), dense(64)
# Learning rate, temperature, weight of the contrastive term, and whether it is a VAE: one program serves all arms.
SETTINGS = {
    "cMIM": [(rate, t, 1.0, 0.0) for rate in (1e-3, 3e-3) for t in (0.1, 0.5)],
    "MIM": [(rate, 1.0, 0.0, 0.0) for rate in (3e-4, 1e-3, 3e-3, 1e-2)],
    "VAE": [(rate, 1.0, 0.0, 1.0) for rate in (3e-4, 1e-3, 3e-3, 1e-2)],
}


def init(key: jax.Array) -> dict[str, dict]:
    """Returns the parameters of encoder and decoder."""
    keys = jax.random.split(key, 3)
    hidden = DECODER.init(keys[1], CODES)
    return {"encoder": ENCODER.init(keys[0], 64), "decoder": hidden, "output": OUTPUT.init(keys[2], WIDTH)}


def encode(params: dict, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns mean and log deviation of the codes, each [N, 16]."""
    mean, log_std = jnp.split(ENCODER.apply(params["encoder"], x), 2, axis=-1)
    return mean, log_std


def hidden(params: dict, codes: jax.Array) -> jax.Array:
    """Returns the decoder's hidden layer."""
    return jax.nn.relu(DECODER.apply(params["decoder"], codes))


def log_likelihood(params: dict, codes: jax.Array, x: jax.Array) -> jax.Array:
    """Returns the log likelihood of the pixels [N]."""
    logits = OUTPUT.apply(params["output"], hidden(params, codes))
    return -jnp.sum(optax.sigmoid_binary_cross_entropy(logits, x), axis=-1)


def claim(*, seeds: Sequence[int], smoke: bool = False) -> Outcome:
    """Returns the accuracy of linear probes of the mean codes of test digits."""
    steps = 40 if smoke else 400
    splits = [digits(seed) for seed in seeds]
    rows = (300, None, None) if smoke else (None, None, None)
    train_set, val, test = ({n: np.stack([s[i][n][: rows[i]] for s in splits]) for n in ("x", "y")} for i in range(3))
    keys = jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32))

    def loss(params, batch, key, setting):
        _, temperature, weight, vae = setting
        mean, log_std = encode(params, batch["x"])
        z = draw_codes(mean, log_std, key=key)
        told = log_likelihood(params, z, batch["x"])
        log_q = gaussian_log_density(z, mean, jnp.maximum(log_std, -6.0))
        kept = jnp.mean(log_q - gaussian_log_density(z) - told)
        ours = cmim_loss(told, z, mean, log_std, weight=weight, temperature=temperature)
        return vae * kept + (1 - vae) * ours

    def one(setting, key, train_set, val, test):
        key_init, key_train = jax.random.split(key)
        params, _ = train(
            lambda p, b, k: loss(p, b, k, setting),
            init(key_init),
            train_set,
            optimizer=optax.adam(setting[0]),
            steps=steps,
            batch=BATCH,
            key=key_train,
        )
        held = jnp.concatenate([val["x"], test["x"]])
        codes = [encode(params, x)[0] for x in (train_set["x"], held)]
        inside = [informative_embedding(lambda z: hidden(params, z), z) for z in codes]
        targets, count = jax.nn.one_hot(train_set["y"], 10), len(val["y"])
        linear, deep = ridge_probe(codes[0], targets, codes[1]), ridge_probe(inside[0], targets, inside[1])
        near = weighted_knn(codes[1][count:], codes[0], train_set["y"], num_classes=10, k=5)
        told = -jnp.mean(log_likelihood(params, codes[1][count:], test["x"]))
        on_test = [accuracy(scores, test["y"]) for scores in (linear[count:], near, deep[count:])]
        return jnp.stack([accuracy(linear[:count], val["y"]), *on_test, told])

    run = jax.jit(jax.vmap(jax.vmap(one, in_axes=(None, 0, 0, 0, 0)), in_axes=(0, None, None, None, None)))
    chosen = {name: settings[1:2] if smoke else settings for name, settings in SETTINGS.items()}
    everything = jnp.asarray([setting for settings in chosen.values() for setting in settings])
    found = np.asarray(run(everything, keys, train_set, val, test))
    arms, secondary = {}, {name: {} for name in ("setting", "neighbours", "hidden layer", "minus log likelihood")}
    first = 0
    for name, settings in chosen.items():
        mine = found[first : first + len(settings)]
        first += len(settings)
        best = int(mine[..., 0].mean(axis=1).argmax())
        arms[name] = mine[best, :, 1].tolist()
        secondary["setting"][name] = settings[best]
        for i, what in enumerate(("neighbours", "hidden layer", "minus log likelihood")):
            secondary[what][name] = mine[best, :, 2 + i].tolist()
    learnt = {name: min(values) > 0.4 for name, values in arms.items()}
    return Outcome(arms=arms, learnt=learnt, secondary=secondary, data="scikit-learn digits, without labels")
