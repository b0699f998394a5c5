"""Re-embedding instances by regional attention before the pooling lifts weak features.

The paper's slides are out of reach: here a bag is a grid of 12 x 12 handwritten digits, seen through a random
projection to six numbers with noise (features that an offline network made badly). Every bag has four nines at random
places; a positive bag has nine more that form a square somewhere. Area under the ROC curve of test bags. Attention
pooling with and without R2T before it, both on the same projection of 32 features, the same steps, and four learning
rates each to choose from on the validation bags.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxlab import mil
from jaxlab.claims.common import digits, train
from jaxlab.claims.harness import Outcome
from jaxlab.claims.mil.bags import bag_loss, score
from jaxlab.ops.layers import mlp
from jaxlab.types import Layer

SIDE, FEATURES, WIDTH = 12, 6, 32
RATES = (3e-4, 1e-3, 3e-3, 1e-2)
BLOCK = mil.r2t(regions=4, heads=4, taps=5, representatives=3, cross_regions=4, cross_heads=4)


def grids(seed: int, sizes: Sequence[int]) -> list[dict[str, np.ndarray]]:
    """Returns train, validation and test bags `x` [B, 144, 6] and `y` [B], from disjoint images."""
    rng = np.random.default_rng([seed, 161])
    projection = rng.normal(size=(64, FEATURES)) / 8
    made = []
    for images, number in zip(digits(seed), sizes, strict=True):
        nines, others = (images["x"][keep] for keep in (images["y"] == 9, images["y"] != 9))
        y = np.arange(number) % 2
        nine = np.zeros((number, SIDE, SIDE), bool)
        for bag in range(number):
            nine[bag].flat[rng.choice(SIDE * SIDE, 4, replace=False)] = True
            if y[bag]:
                row, column = rng.integers(0, SIDE - 2, 2)
                nine[bag, row : row + 3, column : column + 3] = True
        nine = nine.reshape(number, -1)
        shape = nine.shape
        pixels = np.where(
            nine[..., None],
            nines[rng.integers(0, len(nines), shape)],
            others[rng.integers(0, len(others), shape)],
        )
        x = pixels @ projection + 0.1 * rng.normal(size=(*shape, FEATURES))
        made.append({"x": x.astype(np.float32), "y": y.astype(np.int32)})
    return made


def re_embedded(model: Layer) -> Layer:
    """Returns the bag model with R2T before it."""

    def init(key, size):
        key_block, key_model = jax.random.split(key)
        return {"block": BLOCK.init(key_block, size), "model": model.init(key_model, size)}

    def apply(params, x, *, where=None, segment_ids=None, num_segments=None, key=None, train=False):
        layout = {"where": where, "segment_ids": segment_ids, "num_segments": num_segments}
        return model.apply(params["model"], BLOCK.apply(params["block"], x, **layout, key=key, train=train), **layout)

    return Layer(init, apply)


def claim(*, seeds: Sequence[int], smoke: bool = False) -> Outcome:
    """Returns the AUC of test bags with R2T and without."""
    steps, sizes = (40, (40, 10, 60)) if smoke else (500, (150, 100, 300))
    rates = RATES[2:3] if smoke else RATES
    drawn = [grids(seed, sizes) for seed in seeds]
    train_set, val, test = ({n: jnp.stack([d[i][n] for d in drawn]) for n in ("x", "y")} for i in range(3))
    keys = jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32))
    encoder, pool = mlp([WIDTH]), mil.abmil(2, hidden=WIDTH, activation=jax.nn.relu)
    nets = {"R2T": mil.with_encoder(encoder, re_embedded(pool)), "ABMIL": mil.with_encoder(encoder, pool)}
    arms, chosen, learnt = {}, {}, {}
    for name, net in nets.items():

        def one(rate, key, bags, val, test, net=net):
            key_init, key_train = jax.random.split(key)
            setting = {"optimizer": optax.adam(rate), "steps": steps, "batch": 8, "key": key_train}
            params, losses = train(bag_loss(net), net.init(key_init, FEATURES), bags, **setting)
            auc = [mil.bag_auc(score(net.apply(params, split["x"])), split["y"]) for split in (val, test)]
            return *auc, jnp.mean(losses[-10:]) < jnp.mean(losses[:10])

        over_seeds = jax.vmap(one, in_axes=(None, 0, 0, 0, 0))
        run = jax.jit(jax.vmap(over_seeds, in_axes=(0, None, None, None, None)))
        on_val, on_test, fell = (np.asarray(v) for v in run(jnp.asarray(rates), keys, train_set, val, test))
        best = int(on_val.mean(axis=1).argmax())
        arms[name], chosen[name] = on_test[best].tolist(), rates[best]
        learnt[name] = bool(fell[best].all() if smoke else on_test[best].mean() > 0.6)
    return Outcome(
        arms=arms,
        learnt=learnt,
        secondary={"learning rate": chosen},
        data="grids of scikit-learn digits through a random projection",
    )
