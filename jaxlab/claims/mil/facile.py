"""An encoder trained on labels of sets serves single images better than one trained on those labels copied to each.

The paper's natural-image protocol at small size: sets of four handwritten digits carry the commonest of three groups of
digits (0 to 2, 3 to 5, 6 to 9) as their coarse label. Then ten digits are told apart from five examples each, by
nearest class mean on frozen features of held-out images. Both arms train the same network for the same number of steps
on the same sets, and choose among four learning rates by the same few-shot accuracy on the validation images.
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
from jaxlab.ops.layers import mlp

PIXELS, BATCH = 64, 32
GROUPS = [0, 0, 0, 1, 1, 1, 2, 2, 2, 2]
ENCODER, MODEL = mlp([128, 32]), mil.deepsets(3)
RATES = (3e-4, 1e-3, 3e-3, 1e-2)


def claim(*, seeds: Sequence[int], smoke: bool = False) -> Outcome:
    """Returns the few-shot accuracy on test images after training on set labels, and on copied labels."""
    steps, num_sets, episodes = (60, 100, 10) if smoke else (1000, 1500, 300)
    rates = RATES[1:2] if smoke else RATES
    splits = [digits(seed) for seed in seeds]
    train_set, val, test = ({n: jnp.stack([s[i][n] for s in splits]) for n in ("x", "y")} for i in range(3))
    keys = jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32))

    def accuracy(features, labels, key):
        task = {"num_classes": 10, "ways": 10, "shots": 5, "queries": 15, "episodes": episodes}
        return mil.evaluate_few_shot(key, features, labels, **task)[0]

    def one(rate, key, images, val, test, *, copied):
        key_sets, key_encoder, key_model, key_train, key_val, key_test = jax.random.split(key, 6)
        index, coarse = mil.make_sets(key_sets, images["y"], GROUPS, num_sets=num_sets, set_size=4)

        def loss(params, batch, key):
            del key
            x, y = images["x"][batch["index"]], batch["y"]
            if copied:  # every image is a set of its own, with the label of the set that it came in
                x, y = x.reshape(-1, 1, PIXELS), jnp.repeat(y, 4)
            return mil.facile_loss(params, {"x": x, "y": y}, encoder=ENCODER, model=MODEL)

        start = {"encoder": ENCODER.init(key_encoder, PIXELS), "model": MODEL.init(key_model, 32)}
        setting = {"optimizer": optax.adam(rate), "steps": steps, "batch": BATCH, "key": key_train}
        params, _ = train(loss, start, {"index": index, "y": coarse}, **setting)
        embed = lambda x: ENCODER.apply(params["encoder"], x)
        return accuracy(embed(val["x"]), val["y"], key_val), accuracy(embed(test["x"]), test["y"], key_test)

    arms, chosen, learnt = {}, {}, {}
    for name, copied in {"FACILE": False, "copied labels": True}.items():
        over_seeds = jax.vmap(
            lambda rate, *rest, copied=copied: one(rate, *rest, copied=copied), in_axes=(None, 0, 0, 0, 0)
        )
        run = jax.jit(jax.vmap(over_seeds, in_axes=(0, None, None, None, None)))
        on_val, on_test = (np.asarray(v) for v in run(jnp.asarray(rates), keys, train_set, val, test))
        best = int(on_val.mean(axis=1).argmax())
        arms[name], chosen[name] = on_test[best].tolist(), rates[best]
        learnt[name] = bool(on_test[best].min() > 0.3)
    raw = jax.jit(jax.vmap(lambda split, key: accuracy(split["x"], split["y"], key)))(test, keys)
    return Outcome(
        arms=arms,
        learnt=learnt,
        secondary={"learning rate": chosen, "raw pixels": np.asarray(raw)},
        data="scikit-learn digits in sets of four",
    )
