"""A distilled student with 4 bits a weight is as good as one in full precision, at a fraction of its size.

The paper compresses convolutional and recurrent networks; here a perceptron of 32 hidden units learns handwritten
digits from one of 2 x 256. Both arms distil with the same loss and choose among the same two learning rates on the
validation set; the quantised one computes at 16 levels throughout. The saving counts Huffman's code and the scales.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxlab.claims.common import accuracy, digits, train
from jaxlab.claims.harness import Outcome
from jaxlab.distill import compressed_bits, quantized_distillation, uniform_quantize
from jaxlab.ops.layers import mlp

TEACHER, STUDENT, BATCH = mlp([256, 256, 10]), mlp([32, 10]), 64
RATES = (0.03, 0.1)
# Levels of a network in training; so many that rounding is below float32's own stands for full precision.
ARMS = {"4 bits": 16, "full precision": 2**22, "2 bits": 4}


def claim(*, seeds: Sequence[int], smoke: bool = False) -> Outcome:
    """Returns the test accuracy of the quantised student and of the unquantised one."""
    steps = 100 if smoke else 1500
    rates = RATES[1:] if smoke else RATES
    arms = {name: levels for name, levels in ARMS.items() if not smoke or name != "2 bits"}
    splits = [digits(seed) for seed in seeds]
    train_set, val, test = ({n: jnp.stack([s[i][n] for s in splits]) for n in ("x", "y")} for i in range(3))
    keys = jax.vmap(lambda seed: jax.random.split(jax.random.key(seed), 4))(jnp.asarray(seeds, jnp.uint32))

    def supervised(net):
        def loss(params, batch, key):
            del key
            return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(net.apply(params, batch["x"]), batch["y"]))

        return loss

    def teach(key, data):
        params = TEACHER.init(key, 64)
        options = {"optimizer": optax.adam(1e-3), "steps": 300, "batch": BATCH, "key": key}
        return train(supervised(TEACHER), params, data, **options)[0]

    def sgd(rate):
        return optax.sgd(rate, momentum=0.9, nesterov=True)

    def run(learner, state, data, key, count):
        def step(state, key):
            rows = jnp.floor(len(data["y"]) * jax.random.uniform(key, (BATCH,))).astype(int)
            return learner.update(state, {n: v[rows] for n, v in data.items()}, None)[0], None

        return jax.lax.scan(step, state, jax.random.split(key, count))[0]

    def student(levels, rate, key, data):
        learner = quantized_distillation(STUDENT, sgd(rate), levels=levels)
        return run(learner, learner.init(key[1], data), data, key[2], steps).params

    def alone(rate, key, data):
        params = STUDENT.init(key[1], 64)
        return train(supervised(STUDENT), params, data, optimizer=sgd(rate), steps=steps, batch=BATCH, key=key[2])[0]

    @jax.jit
    @jax.vmap
    def right(params, split):
        return accuracy(STUDENT.apply(params, split["x"]), split["y"])

    def rounded(params, levels):
        return jax.vmap(lambda p: jax.tree.map(lambda w: uniform_quantize(w, levels=levels), p))(params)

    teacher = jax.jit(jax.vmap(teach))(keys[:, 0], train_set)
    logits = jax.jit(jax.vmap(TEACHER.apply))(teacher, train_set["x"])
    data = {**train_set, "teacher_logits": logits}
    results, chosen, trained = {}, {}, {}
    for name, levels in arms.items():
        over_seeds = jax.jit(jax.vmap(lambda r, k, d, n=levels: student(n, r, k, d), in_axes=(None, 0, 0)))
        found = []
        for rate in rates:
            params = over_seeds(rate, keys, data)
            at = rounded(params, levels)
            found.append((float(right(at, val).mean()), rate, np.asarray(right(at, test)), params))
        _, chosen[name], on_test, trained[name] = max(found, key=lambda r: r[0])
        results[name] = on_test.tolist()
    over_seeds = jax.jit(jax.vmap(alone, in_axes=(None, 0, 0)))
    found = [over_seeds(rate, keys, train_set) for rate in rates]
    floor = max(found, key=lambda params: float(right(params, val).mean()))
    one = jax.tree.map(lambda a: np.asarray(a[0]), trained["4 bits"])
    size = sum(leaf.size for leaf in jax.tree.leaves(one)) * 32
    full = trained["full precision"]
    secondary = {
        "learning rate": chosen,
        "full precision rounded afterwards": {
            f"{bits} bits": np.asarray(right(rounded(full, 2**bits), test)).tolist() for bits in (2, 4)
        },
    }
    if not smoke:
        secondary["2 bits"] = results["2 bits"]
    return Outcome(
        arms={name: results[name] for name in ("4 bits", "full precision")},
        floor=np.asarray(right(floor, test)).tolist(),
        learnt={name: min(values) > 0.5 for name, values in results.items() if name != "2 bits"},
        saving=1 - compressed_bits(one, levels=16) / size,
        secondary=secondary,
        data="scikit-learn digits",
    )
