"""Counter-current learning is no worse than feedback alignment, and no layer waits for an error from above.

The paper trains multilayer perceptrons and convolutional networks on MNIST to CIFAR-100; here a perceptron of 64, 128,
128, 128 and 10 units learns handwritten digits with SGD and clipping to norm 1, as in the paper's code. Probability of
the right class, which is finer than accuracy (secondary). Backpropagation and a network whose last layer alone learns
are measured beside. Every arm chooses one of two learning rates on the validation set.

The saving: of the products that a step does one after the other, three up, one of logits and three down for alignment
and for backpropagation; going up and down at once leaves four of seven.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxlab.claims.common import accuracy, digits, train
from jaxlab.claims.harness import Outcome
from jaxlab.mutual import counter_current_alignment, counter_current_loss, counter_current_net, counter_current_sgd

HIDDEN, CLASSES, BATCH = (128, 128, 128), 10, 64
RATES = (0.3, 1.0)
# How gradients go, and the share of the levels' losses.
ARMS = {
    "counter-current": ("local", 1.0),
    "feedback alignment": ("alignment", 0.0),
    "backpropagation": ("backprop", 0.0),
    "last layer alone": ("local", 0.0),
}


def claim(*, seeds: Sequence[int], smoke: bool = False) -> Outcome:
    """Returns the probability that each arm gives to the right class of a test image."""
    hidden, steps = ((32, 32, 32), 150) if smoke else (HIDDEN, 500)
    rates = jnp.array(RATES[1:] if smoke else RATES)
    splits = [digits(seed) for seed in seeds]
    train_set, val, test = ({n: np.stack([s[i][n] for s in splits]) for n in ("x", "y")} for i in range(3))
    keys = jax.vmap(lambda seed: jax.random.split(jax.random.key(seed), 2))(jnp.asarray(seeds, jnp.uint32))

    def fit(gradient, share, rate, keys, data, val, test):
        """Trains and returns what validation and test set give: probability, accuracy, and agreement of each level."""
        net = counter_current_net(hidden, CLASSES, gradient=gradient)
        run = lambda params, split: net.apply(params, split["x"], jnp.eye(CLASSES))

        def loss(params, batch, key):
            del key
            levels = counter_current_loss(run(params, batch), batch["y"])[1]
            return share * jnp.sum(levels[:-1]) + levels[-1]

        def judge(params, split):
            outputs = run(params, split)
            sure = jnp.take_along_axis(jax.nn.softmax(outputs["logits"]), split["y"][:, None], axis=1)
            pairs = zip(outputs["activations"][1:-1], outputs["signals"][1:-1], strict=True)
            agree = jnp.stack([counter_current_alignment(a, c, split["y"]) for a, c in pairs])
            return jnp.mean(sure), accuracy(outputs["logits"], split["y"]), agree

        start = net.init(keys[0], 64)
        options = {"optimizer": counter_current_sgd(rate), "steps": steps, "batch": BATCH, "key": keys[1]}
        params, _ = train(loss, start, data, **options)
        return judge(params, val), judge(params, test), judge(start, test)

    programs, arms, secondary = {}, {}, {"accuracy": {}, "learning rate": {}, "agreement of the two networks": {}}
    for name, (gradient, share) in list(ARMS.items())[: 2 if smoke else None]:
        if gradient not in programs:
            over_seeds = jax.vmap(lambda *args, g=gradient: fit(g, *args), in_axes=(None, None, 0, 0, 0, 0))
            programs[gradient] = jax.jit(jax.vmap(over_seeds, in_axes=(None, 0, None, None, None, None)))
        found = jax.tree.map(np.asarray, programs[gradient](share, rates, keys, train_set, val, test))
        (on_val, _, _), (sure, right, agree), (_, _, before) = found
        best = int(np.argmax(on_val.mean(axis=1)))
        arms[name] = sure[best].tolist()
        secondary["accuracy"][name] = right[best].tolist()
        secondary["learning rate"][name] = float(rates[best])
        levels = {"before": before[best].mean(axis=0).tolist(), "after": agree[best].mean(axis=0).tolist()}
        secondary["agreement of the two networks"][name] = levels
    depth = len(hidden) + 1
    return Outcome(
        arms=arms,
        learnt={name: float(np.mean(values)) > 0.15 for name, values in arms.items()},
        saving=1 - depth / (2 * depth - 1),
        secondary=secondary,
        data="scikit-learn digits",
    )
