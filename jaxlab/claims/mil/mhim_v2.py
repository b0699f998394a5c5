"""Masking by class-aware score, with a random part recycled into tokens, beats attention pooling alone.

The task and the budget of the first version's claim: bags of 40 noisy handwritten digits, positive if three to eight of
them are nines; area under the ROC curve of test bags; four configurations each, chosen on the validation bags; 600
steps in all, of which MHIM spends half on the plain model that becomes its teacher and lends its encoder.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxlab import mil
from jaxlab.claims.common import train
from jaxlab.claims.harness import Outcome
from jaxlab.claims.mil.bags import bag_loss, fit, score, stacked_bags

BATCH, PIXELS = 8, 64
ENCODER = mil.instance_encoder(32, activation=jax.nn.gelu)
MODEL = mil.abmil(2, hidden=32, activation=jax.nn.relu)
NET = mil.with_encoder(ENCODER, MODEL)
CONFIGURATIONS = {
    "MHIM v2": [(rate, keep) for rate in (1e-3, 3e-3) for keep in (0.8, 0.2)],
    "ABMIL": [(rate, None) for rate in (3e-4, 1e-3, 3e-3, 1e-2)],
}


def claim(*, seeds: Sequence[int], smoke: bool = False) -> Outcome:
    """Returns the AUC of test bags with MHIM v2 and with attention pooling."""
    steps, options = 600, {"num_bags": (100, 200, 400), "noise": 0.3}
    if smoke:
        steps, options = 120, {"num_bags": (40, 20, 100), "noise": 0.05, "size": 12}
    train_set, val, test = stacked_bags(seeds, **options)
    keys = jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32))

    def plain(rate, key, bags, steps):
        key_init, key_train = jax.random.split(key)
        data = {name: bags[name] for name in ("x", "y")}
        setting = {"optimizer": optax.adam(rate), "steps": steps, "batch": BATCH, "key": key_train}
        return train(bag_loss(NET), NET.init(key_init, PIXELS), data, **setting)[0]

    def mined(rate, key, bags, keep):
        key_teacher, key_init, key_train = jax.random.split(key, 3)
        teacher = plain(rate, key_teacher, bags, steps // 2)
        student = {"encoder": teacher["encoder"], "model": NET.init(key_init, PIXELS)["model"]}
        recycling = mil.global_recycling(5, heads=4, head_size=8)
        learner = mil.mhim_v2(
            ENCODER, MODEL, optax.adam(rate), ratio_high=0.05, keep_ratio=keep, recycling=recycling, decay=0.999
        )
        state = learner.init(key_init, bags, params=student, teacher=teacher)
        state = fit(learner, state, bags, steps=steps - steps // 2, batch=BATCH, key=key_train)
        return {name: state.params[name] for name in ("encoder", "model")}

    def results(params, bags):
        outputs = NET.apply(params, bags["x"])
        inside = jnp.where(bags["y"][:, None] == 1, bags["instance_labels"], -1)
        attended = mil.bag_auc(outputs["attention"].reshape(-1), inside.reshape(-1))
        return mil.bag_auc(score(outputs), bags["y"]), attended

    arms, chosen, learnt, instance = {}, {}, {}, {}
    for name, configurations in CONFIGURATIONS.items():
        tried = []
        for keep in sorted({keep for _, keep in configurations}, key=str, reverse=True):
            rates = [rate for rate, other in configurations if other == keep]
            rates = rates[-1:] if smoke else rates

            def one(rate, key, bags, val, test, name=name, keep=keep):
                params = plain(rate, key, bags, steps) if name == "ABMIL" else mined(rate, key, bags, keep)
                return results(params, val)[0], *results(params, test)

            over_seeds = jax.vmap(one, in_axes=(None, 0, 0, 0, 0))
            run = jax.jit(jax.vmap(over_seeds, in_axes=(0, None, None, None, None)))
            values = [np.asarray(v) for v in run(jnp.asarray(rates), keys, train_set, val, test)]
            tried += [(v.mean(), (rate, keep), t, i) for rate, v, t, i in zip(rates, *values, strict=True)]
            if smoke:
                break
        _, chosen[name], on_test, attended = max(tried, key=lambda row: row[0])
        arms[name], instance[name] = on_test.tolist(), attended.tolist()
        learnt[name] = bool(on_test.min() > 0.6)
    return Outcome(
        arms=arms,
        learnt=learnt,
        secondary={"rate and keep ratio": chosen, "AUC of the attention inside positive bags": instance},
        data="bags of 40 noisy scikit-learn digits",
    )
