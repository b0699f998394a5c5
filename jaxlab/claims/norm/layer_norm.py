"""Layer normalisation speeds up the training of recurrent networks.

The paper's tasks are sentence and image models of days; here a vanilla recurrent network of 64 units reads the rows of
a handwritten digit, one at a time, and is tested after a short, fixed number of steps. With and without normalisation
the learning rate is chosen from the same values on the validation set.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxlab.claims.common import accuracy, digits, train
from jaxlab.claims.harness import Outcome
from jaxlab.norm import ln_rnn_cell
from jaxlab.ops.layers import dense

HIDDEN, BATCH = 64, 32
RATES = (1e-3, 3e-3, 1e-2, 3e-2)


def plain_rnn_cell(hidden: int):
    """Returns the same cell, initialised alike, with a bias where the normalisation was: `(init, apply)`."""

    def init(key, inputs):
        return ln_rnn_cell(hidden).init(key, inputs)

    def apply(params, x, h):
        return jnp.tanh(h @ params["w_h"] + x @ params["w_x"] + params["norm"]["bias"][None])

    return init, apply


def claim(*, seeds: Sequence[int], smoke: bool = False) -> Outcome:
    """Returns the test accuracy after 120 steps of batch 32, with and without layer normalisation."""
    steps, rates = (60, RATES[2:3]) if smoke else (120, RATES)
    splits = [digits(seed) for seed in seeds]
    train_set, val, test = ({n: jnp.stack([s[i][n] for s in splits]) for n in ("x", "y")} for i in range(3))
    keys = jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32))
    head = dense(10)
    arms, chosen, learnt = {}, {}, {}
    for name, (init, cell) in {"layer norm": ln_rnn_cell(HIDDEN), "no normalisation": plain_rnn_cell(HIDDEN)}.items():

        def logits(params, x, cell=cell):
            rows = jnp.moveaxis(x.reshape(x.shape[0], 8, 8), 1, 0)
            h, _ = jax.lax.scan(lambda h, row: (cell(params["cell"], row, h), None), jnp.zeros((len(x), HIDDEN)), rows)
            return head.apply(params["head"], h)

        def loss(params, batch, key, logits=logits):
            del key
            z = logits(params, batch["x"])
            return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(z, batch["y"]))

        def one(rate, key, train_set, val, test, init=init, logits=logits, loss=loss):
            key_cell, key_head, key_train = jax.random.split(key, 3)
            params = {"cell": init(key_cell, 8), "head": head.init(key_head, HIDDEN)}
            params, _ = train(
                loss, params, train_set, optimizer=optax.adam(rate), steps=steps, batch=BATCH, key=key_train
            )
            return accuracy(logits(params, val["x"]), val["y"]), accuracy(logits(params, test["x"]), test["y"])

        over_seeds = jax.vmap(one, in_axes=(None, 0, 0, 0, 0))
        run = jax.jit(jax.vmap(over_seeds, in_axes=(0, None, None, None, None)))
        on_val, on_test = (np.asarray(a) for a in run(jnp.asarray(rates), keys, train_set, val, test))
        best = int(on_val.mean(axis=1).argmax())
        arms[name], chosen[name] = on_test[best].tolist(), rates[best]
        learnt[name] = bool(on_test[best].min() > 0.3)
    return Outcome(
        arms=arms, learnt=learnt, secondary={"learning rate": chosen}, data="scikit-learn digits, rows as 8 time steps"
    )
