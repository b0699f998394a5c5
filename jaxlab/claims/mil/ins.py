"""Partial labels, prototypes and a contrastive loss find instances better than labels inherited from the bag.

The paper's CIFAR-10 bags at small size: bags of 50 noisy handwritten digits, of which five in a positive bag are nines.
Area under the ROC curve of single test instances, nines against the rest. All arms see the same network of 64 units and
the same number of steps, and choose among four configurations by the bags of the validation set (the largest instance
score against the bag's label): INS and the classifier on inherited labels among learning rates and weight decays,
attention pooling (whose attention is the instance's score) among four learning rates.
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
from jaxlab.claims.mil.bags import bag_loss, stacked_bags
from jaxlab.ops.layers import mlp

PIXELS, WIDTH, BATCH = 64, 64, 64
ENCODER, HEAD = mil.instance_encoder(WIDTH, dropout=0.0), mlp([2])
NET = mil.with_encoder(ENCODER, mil.abmil(2, hidden=32))
PAIRS = [(rate, decay) for rate in (0.01, 0.03) for decay in (1e-3, 1e-2)]
CONFIGURATIONS = {
    "INS": PAIRS,
    "inherited labels": PAIRS,
    "ABMIL": [(rate, 0.0) for rate in (3e-4, 1e-3, 3e-3, 1e-2)],
}


def strong_view(key: jax.Array, x: jax.Array) -> jax.Array:
    """Returns images [N, 64] with a fifth of the pixels off and some noise."""
    key_drop, key_noise = jax.random.split(key)
    return x * jax.random.bernoulli(key_drop, 0.8, x.shape) + 0.1 * jax.random.normal(key_noise, x.shape)


def claim(*, seeds: Sequence[int], smoke: bool = False) -> Outcome:
    """Returns the AUC of test instances of INS, of inherited labels and, unless it is a smoke run, of attention."""
    steps, options = 1500, {"num_bags": (40, 100, 100), "size": 50, "positives": (5, 5), "noise": 0.3}
    if smoke:
        steps, options = 100, {"num_bags": (20, 10, 20), "size": 20, "positives": (5, 5), "noise": 0.05}
    train_set, val, test = stacked_bags(seeds, **options)
    keys = jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32))

    def instances(bags):
        x = bags["x"].reshape(-1, PIXELS)
        return x, jnp.repeat(bags["y"], bags["x"].shape[1]), bags["instance_labels"].reshape(-1)

    def sgd(rate, decay):
        return optax.chain(optax.add_decayed_weights(decay), optax.sgd(rate, momentum=0.9))

    def run_ins(rate, decay, key, bags):
        x, y, _ = instances(bags)
        total = x.shape[0]
        learner = mil.ins(
            ENCODER,
            sgd(rate, decay),
            num_instances=total,
            warmup_steps=steps // 5,
            total_steps=steps,
            inherit_steps=steps // 50,
            bag_steps=steps // 3,
            queue_size=512,
            features=32,
            key_decay=0.99,
        )

        def batch_of(key):
            key_rows, key_strong, key_bags = jax.random.split(key, 3)
            rows = jax.random.randint(key_rows, (BATCH,), 0, total)
            some = jax.random.randint(key_bags, (2,), 0, bags["y"].shape[0])
            whole = {"x": bags["x"][some], "y": bags["y"][some]}
            strong = strong_view(key_strong, x[rows])
            return {"x": x[rows], "x_strong": strong, "y": y[rows], "index": rows, "bags": whole}

        def step(state, key):
            key_batch, key_update = jax.random.split(key)
            return learner.update(state, batch_of(key_batch), key_update)[0], None

        key_init, key_steps = jax.random.split(key)
        state = learner.init(key_init, batch_of(key_init))
        state = jax.lax.scan(step, state, jax.random.split(key_steps, steps))[0]
        return lambda x: learner.predict(state, {"x": x})["probs"][:, 1]

    def run_inherited(rate, decay, key, bags):
        x, y, _ = instances(bags)
        key_net, key_head, key_train = jax.random.split(key, 3)
        logits = lambda p, x: HEAD.apply(p["head"], ENCODER.apply(p["encoder"], x))

        def loss(params, batch, key):
            del key
            return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits(params, batch["x"]), batch["y"]))

        start = {"encoder": ENCODER.init(key_net, PIXELS), "head": HEAD.init(key_head, WIDTH)}
        setting = {"optimizer": sgd(rate, decay), "steps": steps, "batch": BATCH, "key": key_train}
        params, _ = train(loss, start, {"x": x, "y": y}, **setting)
        return lambda x: jax.nn.softmax(logits(params, x))[:, 1]

    def run_attention(rate, decay, key, bags):
        del decay
        key_init, key_train = jax.random.split(key)
        setting = {"optimizer": optax.adam(rate), "steps": steps, "batch": 2, "key": key_train}
        params, _ = train(bag_loss(NET), NET.init(key_init, PIXELS), {n: bags[n] for n in ("x", "y")}, **setting)
        return params

    def scores(name, rate, decay, key, bags, val, test):
        if name == "ABMIL":
            params = run_attention(rate, decay, key, bags)
            on_val, on_test = (NET.apply(params, split["x"]) for split in (val, test))
            margin = lambda out: out["logits"][:, 1] - out["logits"][:, 0]
            instance = on_test["attention"].reshape(-1)
            bag_val, bag_test = margin(on_val), margin(on_test)
        else:
            probability = (run_ins if name == "INS" else run_inherited)(rate, decay, key, bags)
            each = {n: probability(instances(split)[0]) for n, split in (("val", val), ("test", test))}
            instance = each["test"]
            bag_val, bag_test = (
                jnp.max(each[n].reshape(split["y"].shape[0], -1), axis=1) for n, split in (("val", val), ("test", test))
            )
        labels = instances(test)[2]
        return mil.bag_auc(bag_val, val["y"]), mil.bag_auc(instance, labels), mil.bag_auc(bag_test, test["y"])

    arms, chosen, learnt, bag_auc = {}, {}, {}, {}
    for name, configurations in CONFIGURATIONS.items():
        if smoke and name == "ABMIL":
            continue
        configurations = configurations[-1:] if smoke else configurations
        over_seeds = jax.vmap(
            lambda rate, decay, *rest, name=name: scores(name, rate, decay, *rest), in_axes=(None, None, 0, 0, 0, 0)
        )
        run = jax.jit(jax.vmap(over_seeds, in_axes=(0, 0, None, None, None, None)))
        rates, decays = (jnp.asarray(v) for v in zip(*configurations, strict=True))
        on_val, instance, bag = (np.asarray(v) for v in run(rates, decays, keys, train_set, val, test))
        best = int(on_val.mean(axis=1).argmax())
        arms[name], bag_auc[name], chosen[name] = instance[best].tolist(), bag[best].tolist(), configurations[best]
        # Attention may point away from what it learns from, so that arm is judged by its bags.
        learnt[name] = bool((bag if name == "ABMIL" else instance)[best].mean() > 0.6)
    return Outcome(
        arms=arms,
        learnt=learnt,
        secondary={"AUC of bags": bag_auc, "rate and weight decay": chosen},
        data="bags of 50 noisy scikit-learn digits, five nines in a positive bag",
    )
