"""What the claims of this family share: bags of noisy handwritten digits, and learners and plain training over them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxlab.claims.common import digits
from jaxlab.types import Layer, Learner

POSITIVE = 9


def digit_bags(
    seed: int, *, num_bags: Sequence[int], size: int = 40, positives: tuple[int, int] = (3, 8), noise: float = 0.5
) -> tuple[dict[str, np.ndarray], ...]:
    """Returns train, validation and test bags, whose images come from the three disjoint splits of the seed.

    Half of the bags are positive: between the two numbers of `positives` (both included) of their images show a nine;
    no image of a negative bag does. Each pixel gets Gaussian noise, so that many nines are hard to tell.

    Each is a dict of `x` float32 [B, size, 64], `y` int32 [B] and `instance_labels` int32 [B, size].
    """
    rng = np.random.default_rng([seed, 9])
    splits = []
    for images, bags in zip(digits(seed), num_bags, strict=True):
        nines, others = (images["x"][keep] for keep in (images["y"] == POSITIVE, images["y"] != POSITIVE))
        y = np.arange(bags) % 2
        count = np.where(y == 1, rng.integers(positives[0], positives[1] + 1, bags), 0)
        labels = (np.arange(size)[None, :] < count[:, None]).astype(np.int32)
        labels = rng.permuted(labels, axis=1)
        x = np.where(
            labels[..., None] == 1,
            nines[rng.integers(0, len(nines), labels.shape)],
            others[rng.integers(0, len(others), labels.shape)],
        )
        x = (x + noise * rng.normal(size=x.shape)).astype(np.float32)
        splits.append({"x": x, "y": y.astype(np.int32), "instance_labels": labels})
    return tuple(splits)


def stacked_bags(seeds: Sequence[int], **options) -> tuple[dict[str, jax.Array], ...]:
    """Returns the three splits of all seeds with a leading axis of seeds."""
    drawn = [digit_bags(seed, **options) for seed in seeds]
    return tuple({n: jnp.stack([d[i][n] for d in drawn]) for n in drawn[0][i]} for i in range(3))


def fit(learner: Learner, state, bags: dict[str, jax.Array], *, steps: int, batch: int, key: jax.Array):
    """Returns the state after so many updates on batches drawn with replacement."""

    def step(state, key):
        key_rows, key_update = jax.random.split(key)
        rows = jax.random.randint(key_rows, (batch,), 0, bags["y"].shape[0])
        state, _ = learner.update(state, {"x": bags["x"][rows], "y": bags["y"][rows]}, key_update)
        return state, None

    return jax.lax.scan(step, state, jax.random.split(key, steps))[0]


def bag_loss(model: Layer) -> Callable:
    """Returns `loss(params, batch, key)`, the cross-entropy of a bag model in training, for `claims.common.train`."""

    def loss(params, batch, key):
        logits = model.apply(params, batch["x"], key=key, train=True)["logits"]
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]))

    return loss


def score(outputs: dict[str, jax.Array]) -> jax.Array:
    """Returns the score of the positive class, float [B]."""
    return outputs["logits"][:, 1] - outputs["logits"][:, 0]
