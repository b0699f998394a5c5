"""Features learnt by SwAV from everything treat groups more evenly than supervised ones from the usual data.

The paper compares a billion uncurated images with ImageNet; the proxy: handwritten digits from three regions of
different style, the majority as they are, a quarter written slanting, a sixth in faint ink on noisy paper. Supervised
training has the labels of the majority's digits only, as a curated set would; SwAV sees all regions without labels,
with two large and two small crops. Both are followed by the same linear probe on the frozen features of the majority's
labels. Accuracy of the worst region on test digits. Each arm chooses from four configurations by the worst region on
validation digits: supervised among four learning rates, SwAV among two rates and two temperatures.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxlab.claims.common import digits, train
from jaxlab.claims.harness import Outcome
from jaxlab.contrastive import group_gaps, swav_loss
from jaxlab.ops.layers import mlp

NET, HEAD, CLASSES = mlp([128, 64]), mlp([64, 32]), mlp([10])
PROTOTYPES = 60
CONFIGURATIONS = {
    "SwAV": [(rate, temperature) for rate in (1e-3, 3e-3) for temperature in (0.1, 0.2)],
    "supervised": [(rate, 0.0) for rate in (3e-4, 1e-3, 3e-3, 1e-2)],
}


def regions(seed: int, split: dict[str, np.ndarray], number: int) -> dict[str, np.ndarray]:
    """Returns the digits with their region: 0 as they are, 1 slanting, 2 faint and noisy."""
    rng = np.random.default_rng([seed, 190, number])
    region = rng.choice(3, size=len(split["y"]), p=(0.58, 0.25, 0.17)).astype(np.int32)
    images = split["x"].reshape(-1, 8, 8)
    rows = (np.arange(8) - 3.5) * 0.5
    shifts = np.round(rows).astype(int)
    slanted = np.stack([np.roll(images[:, i], -shift, axis=1) for i, shift in enumerate(shifts)], axis=1)
    faint = 0.5 * images + 0.15 * np.abs(rng.normal(size=images.shape))
    x = np.where((region == 0)[:, None, None], images, np.where((region == 1)[:, None, None], slanted, faint))
    return {"x": x.reshape(-1, 64).astype(np.float32), "y": split["y"], "region": region}


def crops(key: jax.Array, x: jax.Array) -> jax.Array:
    """Returns crops [4, N, 64]: two large ones shifted by up to a pixel, two windows of 5 by 5; noise on all."""
    key_shift, key_window, key_noise = jax.random.split(key, 3)
    shift = jax.random.randint(key_shift, (2, len(x), 2), 0, 3)
    padded = jnp.pad(x.reshape(-1, 8, 8), ((0, 0), (1, 1), (1, 1)))
    cut = jax.vmap(lambda image, s: jax.lax.dynamic_slice(image, (s[0], s[1]), (8, 8)).reshape(64))
    large = jax.vmap(lambda s: cut(padded, s))(shift)
    corner = jax.random.randint(key_window, (2, len(x), 2), 0, 4)
    distance = jnp.arange(8)[None, None, None, :] - corner[..., None]
    inside = (distance >= 0) & (distance < 5)
    window = (inside[:, :, 0, :, None] & inside[:, :, 1, None, :]).reshape(2, -1, 64)
    views = jnp.concatenate([large, x[None] * window])
    return views + 0.1 * jax.random.normal(key_noise, views.shape)


def probe(features: jax.Array, y: jax.Array, where: jax.Array):
    """Returns a linear classifier: ridge regression on one-hot labels from standardised features."""
    weight = where.astype(jnp.float32)[:, None]
    mean = jnp.sum(features * weight, axis=0, keepdims=True) / jnp.sum(weight)
    spread = jnp.sqrt(jnp.sum(jnp.square(features - mean) * weight, axis=0, keepdims=True) / jnp.sum(weight)) + 1e-3
    inputs = lambda z: jnp.concatenate([(z - mean) / spread, jnp.ones((len(z), 1))], axis=1)
    rows = inputs(features) * weight
    normal = lambda matrix: rows.T @ (rows @ matrix) + 1e-2 * jnp.sum(weight) * matrix
    matrix, _ = jax.scipy.sparse.linalg.cg(normal, rows.T @ jax.nn.one_hot(y, 10), maxiter=100)
    return lambda z: inputs(z) @ matrix


def claim(*, seeds: Sequence[int], smoke: bool = False) -> Outcome:
    """Returns the accuracy of the worst region on the test set."""
    steps, batch, choices = (20, 48, slice(1, 2)) if smoke else (150, 128, slice(None))
    splits = [[regions(seed, split, i) for i, split in enumerate(digits(seed))] for seed in seeds]
    train_set, val, test = ({n: jnp.stack([s[i][n] for s in splits]) for n in ("x", "y", "region")} for i in range(3))
    keys = jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32))

    def one(rates, temperatures, key, train_set, val, test):
        key_net, key_head, key_prototypes, key_train = jax.random.split(key, 4)
        major = train_set["region"] == 0
        net = NET.init(key_net, 64)
        starts = {
            "SwAV": {
                "net": net,
                "head": HEAD.init(key_head, 64),
                "prototypes": jax.random.normal(key_prototypes, (PROTOTYPES, 32)),
            },
            "supervised": {"net": net, "head": CLASSES.init(key_head, 64)},
        }

        def self_supervised(params, batch, key):
            embed = lambda x: HEAD.apply(params["head"], jax.nn.relu(NET.apply(params["net"], x)))
            return swav_loss(
                jax.vmap(embed)(crops(key, batch["x"])), params["prototypes"], temperature=temperatures["SwAV"]
            )

        def supervised(params, batch, key):
            views = crops(key, batch["x"])
            logits = jax.vmap(lambda x: CLASSES.apply(params["head"], jax.nn.relu(NET.apply(params["net"], x))))(views)
            labels = jnp.broadcast_to(batch["y"][None], logits.shape[:2])
            return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))

        # The curated set: the majority's rows again and again, so that both arms have batches of one size.
        rows = jnp.argsort(jnp.logical_not(major))[jnp.arange(len(major)) % jnp.sum(major)]
        curated = {n: v[rows] for n, v in train_set.items()}
        results = {}
        for arm, loss, data in (("SwAV", self_supervised, train_set), ("supervised", supervised, curated)):
            params, _ = train(
                loss, starts[arm], data, optimizer=optax.adam(rates[arm]), steps=steps, batch=batch, key=key_train
            )
            features = lambda x, params=params: jax.nn.relu(NET.apply(params["net"], x))
            classify = probe(features(train_set["x"]), train_set["y"], major)
            results[arm] = [
                group_gaps(
                    (jnp.argmax(classify(features(s["x"])), axis=1) == s["y"]).astype(jnp.float32),
                    s["region"],
                    num_groups=3,
                )
                for s in (val, test)
            ]
        return results

    rates, temperatures = (
        {arm: jnp.array([c[i] for c in configurations[choices]]) for arm, configurations in CONFIGURATIONS.items()}
        for i in range(2)
    )
    over_seeds = jax.vmap(one, in_axes=(None, None, 0, 0, 0, 0))
    run = jax.jit(jax.vmap(over_seeds, in_axes=(0, 0, None, None, None, None)))
    results = jax.tree.map(np.asarray, run(rates, temperatures, keys, train_set, val, test))
    arms, learnt, secondary = {}, {}, {}
    for arm, (on_val, on_test) in results.items():
        best = int(on_val["worst"].mean(axis=1).argmax())
        arms[arm] = on_test["worst"][best].tolist()
        learnt[arm] = bool(on_test["mean"][best, :, 0].min() > 0.4)
        secondary[arm] = {
            "rate and temperature": CONFIGURATIONS[arm][choices][best],
            "accuracy of each region": on_test["mean"][best].mean(axis=0).tolist(),
            "gap": on_test["gap"][best].tolist(),
            "worst region at each": on_test["worst"].mean(axis=1).tolist(),
        }
    return Outcome(arms=arms, learnt=learnt, secondary=secondary, data="scikit-learn digits in three styles")
