"""The Cauchy-Schwarz bottleneck predicts better than squared error, on clean and on attacked inputs.

The paper's six regression sets with scikit-learn's diabetes data (442 patients, ten standardised features). Root mean
squared error on the test set, averaged over gradient sign attacks of size 0, 0.1, 0.2 and 0.3, with the network of the
official code at half its width. Each objective chooses among four settings by the same error on the validation set:
CS-IB its weight and the kernel width of x, squared error its weight decay.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxlab.claims.common import train
from jaxlab.claims.harness import Outcome
from jaxlab.information import cs_ib_loss, cs_ib_network, cs_mutual_information, fgsm

BATCH, RATE, ATTACKS = 128, 1e-3, (0.0, 0.1, 0.2, 0.3)
# Whether it is CS-IB, its weight, the kernel width of x (that of the paper, and times the root of the number of
# features), and the weight decay: one program serves both arms.
SETTINGS = {
    "CS-IB": [(1.0, beta, width, 0.0) for width in (1.0, 10**0.5) for beta in (0.01, 0.1)],
    "squared error": [(0.0, 0.0, 1.0, decay) for decay in (0.0, 0.03, 0.3, 3.0)],
}


def diabetes(seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns train, validation and test (262, 90, 90 rows drawn by the seed), standardised by the training rows."""
    try:
        from sklearn.datasets import load_diabetes
    except ImportError as error:
        raise ValueError("claims need the extra `train`: pip install 'jaxlab[train]'") from error
    x, y = load_diabetes(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(y))
    parts = order[:262], order[262:352], order[352:]
    scale = lambda v: ((v - v[parts[0]].mean(0)) / v[parts[0]].std(0)).astype(np.float32)
    x, y = scale(x), scale(y)
    return [(x[i], y[i]) for i in parts]


def claim(*, seeds: Sequence[int], smoke: bool = False) -> Outcome:
    """Returns minus the root mean squared error over clean and attacked test inputs."""
    steps, width = (60, 16) if smoke else (400, 64)
    splits = [diabetes(seed) for seed in seeds]
    train_set = tuple(np.stack([s[0][j] for s in splits]) for j in range(2))
    held = tuple(np.stack([np.stack([s[i][j] for i in (1, 2)]) for s in splits]) for j in range(2))
    keys = jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32))

    net = cs_ib_network(hidden=width, code=width)

    def errors(params, data):
        """Returns the root mean squared error under each attack."""
        x, y = data
        square = lambda x: jnp.mean(jnp.square(net.apply(params, x)[1] - y))
        return jax.vmap(lambda eps: jnp.sqrt(square(fgsm(square, x, eps=eps))))(jnp.asarray(ATTACKS))

    def loss(params, batch, setting):
        ours, beta, sigma, _ = setting
        t, h = net.apply(params, batch["x"])
        square = jnp.mean(jnp.square(h - batch["y"]))
        return ours * cs_ib_loss(batch["x"], batch["y"], h, t, beta=beta, sigma_x=sigma) + (1 - ours) * square

    def one(setting, key, train_set, held):
        key_init, key_train = jax.random.split(key)
        optimizer = optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(setting[3]), optax.scale(-RATE))
        params, _ = train(
            lambda p, b, k: loss(p, b, setting),
            net.init(key_init, 10),
            dict(zip("xy", train_set, strict=True)),
            optimizer=optimizer,
            steps=steps,
            batch=BATCH,
            key=key_train,
        )
        t, _ = net.apply(params, held[0][1])
        kept = cs_mutual_information(held[0][1], t, normalized=True)
        return jax.vmap(errors, in_axes=(None, 0))(params, held), kept

    run = jax.jit(jax.vmap(jax.vmap(one, in_axes=(None, 0, 0, 0)), in_axes=(0, None, None, None)))
    chosen = {name: settings[:1] if smoke else settings for name, settings in SETTINGS.items()}
    everything = jnp.asarray([setting for settings in chosen.values() for setting in settings])
    found, kept = (np.asarray(v) for v in run(everything, keys, train_set, held))
    on_val, on_test = np.moveaxis(found, 2, 0)  # each [setting, seed, attack]
    arms, secondary = {}, {"setting": {}, "error by size of the attack": {}, "I(x; t)": {}}
    first = 0
    for name, settings in chosen.items():
        best = first + int(on_val[first : first + len(settings)].mean(axis=(1, 2)).argmin())
        arms[name] = (-on_test[best].mean(axis=1)).tolist()
        secondary["setting"][name] = settings[best - first]
        secondary["error by size of the attack"][name] = on_test[best].mean(axis=0).tolist()
        secondary["I(x; t)"][name] = kept[best].tolist()
        floor = (-on_test[first].mean(axis=1)).tolist()  # squared error comes last, without decay first
        first += len(settings)
    if not smoke:
        secondary["estimate of I for Gaussians"] = gaussians(keys)
    # Always predicting the mean has an error of about 1 on clean inputs, whatever the attack.
    clean = {name: errors[0] for name, errors in secondary["error by size of the attack"].items()}
    learnt = {name: error < (1.2 if smoke else 1.0) for name, error in clean.items()}
    floor = None if smoke else floor
    return Outcome(arms=arms, floor=floor, learnt=learnt, secondary=secondary, data="scikit-learn diabetes")


def gaussians(keys: jax.Array, rho: float = 0.8, count: int = 128) -> dict[str, float]:
    """Returns bias and deviation of the estimate from samples of correlated Gaussians, whose information is known."""

    @jax.jit
    @jax.vmap
    def estimate(key):
        x, noise = jax.random.normal(key, (2, count))
        return cs_mutual_information(x, rho * x + (1 - rho**2) ** 0.5 * noise)

    values = np.asarray(estimate(keys))
    # The mean of a kernel between two draws of N(0, S) is det(I + 2 S)^(-1/2) for width 1, and so on.
    cov = np.array([[1, rho], [rho, 1]])
    joint, cross = np.linalg.det(np.eye(2) + 2 * cov) ** -0.5, np.linalg.det(np.eye(2) + cov / 2) ** -0.5 / 2
    truth = np.log(joint) - np.log(3) - 2 * np.log(cross)
    return {"truth": truth, "bias": values.mean() - truth, "deviation": values.std(ddof=1)}
