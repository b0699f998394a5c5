"""Instance normalisation in the shallow stage helps a network on images of an appearance that it never saw.

The paper trains ResNet-50 on one city's or game's streets and tests on another's; here a residual network of two stages
learns clean handwritten digits as grey images of three channels and is tested on the test digits with a contrast,
brightness, gamma, blur and gain of each colour of their own. Both networks choose their learning rate from the same
values on clean validation digits, as nobody has seen the other domain.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxlab.claims.common import accuracy, digits
from jaxlab.claims.harness import Outcome
from jaxlab.norm import feature_divergence, ibn_net

RATES, BATCH = (1e-3, 3e-3), 64


def coloured(x: np.ndarray) -> np.ndarray:
    """Returns the digits [N, 64] as grey images [N, 8, 8, 3]."""
    return np.repeat(x.reshape(-1, 8, 8, 1), 3, axis=-1)


def of_another_appearance(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Returns the images with gamma, blur, contrast, brightness and colour gains drawn for each of them."""
    draw = lambda low, high, size: rng.uniform(low, high, (len(images), 1, 1, size))
    x = images ** np.exp(draw(-0.7, 0.7, 1))
    blurred = sum(np.roll(x, shift, axis) for axis in (1, 2) for shift in (-1, 1)) / 4
    x = x + draw(0.0, 0.5, 1) * (blurred - x)
    return (draw(-0.3, 0.5, 1) + draw(0.4, 1.4, 1) * x * draw(0.5, 1.5, 3)).astype(np.float32)


def claim(*, seeds: Sequence[int], smoke: bool = False) -> Outcome:
    """Returns the accuracy on test digits of another appearance after training on clean ones."""
    steps, width, rates = (40, 4, RATES[1:]) if smoke else (250, 8, RATES)
    variants = {"IBN-a": "a", "batch norm": "none"}
    arms, learnt, secondary = {}, {}, {}
    for name, variant in variants.items():
        net = ibn_net(num_classes=10, variant=variant, layers=(1, 1), width=width, bottleneck=False, large_stem=False)

        def loss(params, state, x, y, net=net):
            logits, state = net.apply(params, state, x, train=True)
            return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, y)), state

        @jax.jit
        def one(rate, key, x, y, val, test, shifted, net=net, loss=loss):
            key_init, key_rows = jax.random.split(key)
            params, state = net.init(key_init, 3)
            optimizer = optax.adam(rate)

            def step(carry, rows):
                params, state, opt_state = carry
                grads, state = jax.grad(loss, has_aux=True)(params, state, x[rows], y[rows])
                updates, opt_state = optimizer.update(grads, opt_state, params)
                return (optax.apply_updates(params, updates), state, opt_state), None

            rows = jax.random.randint(key_rows, (steps, BATCH), 0, len(x))
            (params, state, _), _ = jax.lax.scan(step, (params, state, optimizer.init(params)), rows)
            # All three sets in one call: the network is the same for each image once it is trained.
            images = jnp.concatenate([val[0], test[0], shifted])
            (logits, stages), _ = net.apply(params, state, images, stages=True)
            parts = jnp.split(logits, [len(val[0]), len(val[0]) + len(test[0])])
            clean, other = jnp.split(stages[0][len(val[0]) :], 2)
            labels = (val[1], test[1], test[1])
            results = [accuracy(part, label) for part, label in zip(parts, labels, strict=True)]
            return (*results, feature_divergence(clean, other))

        results = np.zeros((4, len(rates), len(seeds)))
        for j, seed in enumerate(seeds):
            train, val, test = digits(seed)
            shifted = of_another_appearance(coloured(test["x"]), np.random.default_rng(seed))
            sets = [(coloured(part["x"]), part["y"]) for part in (val, test)]
            for i, rate in enumerate(rates):
                outcome = one(rate, jax.random.key(seed), coloured(train["x"]), train["y"], *sets, shifted)
                results[:, i, j] = [float(v) for v in outcome]
        best = int(results[0].mean(axis=1).argmax())
        _, clean, other, divergence = results[:, best]
        arms[name], learnt[name] = other.tolist(), bool(clean.min() > 0.3)
        secondary[name] = {
            "learning rate": rates[best],
            "accuracy on clean test digits": clean.tolist(),
            "divergence of the first stage between the two": divergence.tolist(),
        }
    return Outcome(arms=arms, learnt=learnt, secondary=secondary, data="scikit-learn digits, clean and altered")
