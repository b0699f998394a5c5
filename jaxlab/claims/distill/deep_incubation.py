"""Modules that were incubated within a shallow network make a better deep one than training from end to end.

The paper trains vision transformers on ImageNet; here a plain network (tanh, no residuals) of 4 stages x 6 blocks, of a
kind that is hard to train at this depth, learns handwritten digits. Both arms spend 14400 layer-steps: 600 steps end to
end, or 300 of the meta network, 200 of all modules (9 layers each) and 250 of fine-tuning. Each chooses one of two
learning rates on the validation set. Probability of the right class, which is finer than accuracy (secondary).
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxlab.claims.common import accuracy, digits, train
from jaxlab.claims.harness import Outcome
from jaxlab.distill import deep_incubation, interface_gap, stage_network
from jaxlab.ops.layers import dense
from jaxlab.types import Layer

WIDTH, STAGES, BATCH = 48, 4, 64
RATES = (1e-3, 3e-3)
PARTS = (Layer(dense(WIDTH).init, lambda p, h: jnp.tanh(dense(WIDTH).apply(p, h))), dense(WIDTH), dense(10))


def claim(*, seeds: Sequence[int], smoke: bool = False) -> Outcome:
    """Returns the probability that the deep network gives to the right class of a test image."""
    depth, alone, first, second, third = (2, 100, 50, 50, 50) if smoke else (6, 600, 300, 200, 250)
    rates = RATES[1:] if smoke else RATES
    splits = [digits(seed) for seed in seeds]
    train_set, val, test = ({n: jnp.stack([s[i][n] for s in splits]) for n in ("x", "y")} for i in range(3))
    keys = jax.vmap(lambda seed: jax.random.split(jax.random.key(seed), 4))(jnp.asarray(seeds, jnp.uint32))
    meta_net = stage_network(*PARTS, width=WIDTH, num_stages=STAGES, depth=1)
    net = stage_network(*PARTS, width=WIDTH, num_stages=STAGES, depth=depth)

    def fit(net, params, data, key, rate, steps):
        def loss(params, batch, key):
            del key
            z = net.apply(params, batch["x"])
            return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(z, batch["y"]))

        return train(loss, params, data, optimizer=optax.adam(rate), steps=steps, batch=BATCH, key=key)[0]

    def end_to_end(rate, key, data):
        return fit(net, net.init(key[0], 64), data, key[3], rate, alone)

    def assembled(rate, key, data):
        """Returns the deep network before and after fine-tuning, and how far its interfaces moved."""
        meta = fit(meta_net, meta_net.init(key[0], 64), data, key[1], rate, first)
        learner = deep_incubation(*PARTS, meta, optax.adam(rate), width=WIDTH, depth=depth)

        def step(state, key):
            rows = jnp.floor(len(data["y"]) * jax.random.uniform(key, (BATCH,))).astype(int)
            return learner.update(state, {n: v[rows] for n, v in data.items()}, None)[0], None

        state, _ = jax.lax.scan(step, learner.init(key[2], data), jax.random.split(key[2], second))
        gap = interface_gap(PARTS[0], PARTS[1], state.params, meta, data["x"])
        return fit(net, state.params, data, key[3], rate, third), state.params, gap

    def over_seeds(f):
        return jax.jit(jax.vmap(f, in_axes=(None, 0, 0)))

    def judge(params, split):
        z = net.apply(params, split["x"])
        sure = jnp.take_along_axis(jax.nn.softmax(z), split["y"][:, None], axis=1)
        return jnp.mean(sure), accuracy(z, split["y"])

    judge = jax.jit(jax.vmap(judge))
    arms, chosen, accuracies, secondary = {}, {}, {}, {}
    for name, f in {"assembled": assembled, "end to end": end_to_end}.items():
        run = over_seeds(f)
        found = [run(rate, keys, train_set) for rate in rates]
        nets = [result[0] if name == "assembled" else result for result in found]
        best = int(np.argmax([judge(params, val)[0].mean() for params in nets]))
        sure, right = judge(nets[best], test)
        arms[name], chosen[name] = np.asarray(sure).tolist(), rates[best]
        accuracies[name] = np.asarray(right).tolist()
        if name == "assembled":
            _, before, gap = found[best]
            secondary["accuracy before fine-tuning"] = np.asarray(judge(before, test)[1]).tolist()
            secondary["interface gap of each stage"] = np.asarray(gap).mean(axis=0).tolist()
    return Outcome(
        arms=arms,
        learnt={name: min(values) > 0.2 for name, values in arms.items()},
        secondary={**secondary, "accuracy": accuracies, "learning rate": chosen},
        data="scikit-learn digits",
    )
