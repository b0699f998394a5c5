"""A weight between bag loss and instance loss predicts better than either loss alone.

As in the paper's simulations: x ~ N(0, I) in 50 dimensions, linear responses with noise, known only as means of random
bags of five; here 80 bags to fit, 40 to choose with and 2000 single responses to test on. The method chooses its weight
from nine values between the two losses; the baseline chooses between the two losses themselves, which are the ends of
the same range. Choices are made by the bag loss of the validation bags.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxlab import mil
from jaxlab.claims.harness import Outcome

FEATURES, SIZE, NOISE = 50, 5, 1.0
RHO = np.linspace(0.0, 1.0, 9)
BAGS = {"train": 80, "val": 40}


def claim(*, seeds: Sequence[int], smoke: bool = False) -> Outcome:
    """Returns the R^2 of single test responses for the chosen weight and for the better of its two ends."""
    tests = 200 if smoke else 2000

    def one(key):
        keys = iter(jax.random.split(key, 7))
        theta = jax.random.normal(next(keys), (FEATURES,)) / FEATURES**0.5

        def draw(number):
            x = jax.random.normal(next(keys), (number, FEATURES))
            return x, x @ theta + NOISE * jax.random.normal(next(keys), (number,))

        sets = {}
        for name, bags in BAGS.items():
            x, y = draw(bags * SIZE)
            ids = jnp.arange(bags * SIZE) // SIZE  # the rows are random already
            sets[name] = (x, mil.mean_pool(y[:, None], segment_ids=ids, num_segments=bags)[:, 0], ids)
        x, y = draw(tests)

        def of(rho):
            bags, response, ids = sets["train"]
            layout = {"segment_ids": ids, "num_segments": BAGS["train"]}
            weights = mil.linear_interpolated_estimator(bags, response, rho=rho, **layout)
            bags, response, ids = sets["val"]
            validation = mil.bag_loss(bags @ weights, response, segment_ids=ids, num_segments=BAGS["val"])
            return validation, 1 - jnp.mean(jnp.square(x @ weights - y)) / jnp.var(y)

        return jax.vmap(of)(jnp.asarray(RHO, jnp.float32))

    keys = jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32))
    validation, r2 = (np.asarray(a) for a in jax.jit(jax.vmap(one))(keys))
    best = validation.argmin(axis=1)
    ends = np.where(validation[:, -1] < validation[:, 0], len(RHO) - 1, 0)
    rows = np.arange(len(r2))
    arms = {"interpolated": r2[rows, best].tolist(), "better of the two losses": r2[rows, ends].tolist()}
    return Outcome(
        arms=arms,
        learnt={name: bool(np.mean(values) > 0.0) for name, values in arms.items()},
        secondary={"rho": RHO[best], "bag loss": r2[:, 0], "instance loss": r2[:, -1], "mean R2 by rho": r2.mean(0)},
        data="linear Gaussian responses in 50 dimensions, drawn by the seed",
    )
