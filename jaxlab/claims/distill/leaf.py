"""Pruning the tokens that only the student looks at makes it look where its teacher does.

The paper distils language models on mathematics and code; here prompts of six tokens hold two that together decide one
of four classes, one that points to the right class 95 times in 100, and filler. The teacher learnt from prompts where
that token points anywhere, a small student from the confounded ones. From the same student both arms go on for as many
steps, with plain distillation or with half the weight on prompts whose confounding token is deleted (used where the
teacher is still right), each at the better of two learning rates on confounded validation prompts. In the test prompts
the token points to a wrong class.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxlab.claims.common import train
from jaxlab.claims.harness import Outcome
from jaxlab.distill import (
    confounding_mask,
    leaf_loss,
    mask_runs,
    prune_tokens,
    token_distillation_loss,
    token_gradient_norms,
)
from jaxlab.ops.layers import dense, mlp

CLASSES, LENGTH, PAD, WIDTH, BATCH, COUNT = 4, 6, 16, 16, 64, 2000
EACH = dense(WIDTH, scale=2.0)
TEACHER, STUDENT = mlp([128, CLASSES]), mlp([16, CLASSES])
RATES = (1e-3, 3e-3)


def prompts(rng: np.random.Generator, share: float | None, count: int = COUNT) -> dict[str, np.ndarray]:
    """Returns shuffled prompts; the third token points to the class with the given share, None = anywhere."""
    a, b = rng.integers(0, CLASSES, (2, count))
    y = (a + b) % CLASSES
    other = (y + rng.integers(1, CLASSES, count)) % CLASSES
    hint = rng.integers(0, CLASSES, count) if share is None else np.where(rng.random(count) < share, y, other)
    filler = rng.integers(3 * CLASSES, PAD, (count, LENGTH - 3))
    tokens = np.concatenate([np.stack([a, CLASSES + b, 2 * CLASSES + hint], axis=1), filler], axis=1)
    return {"x": rng.permuted(tokens, axis=1).astype(np.int32), "y": y.astype(np.int32)}


def initial(net, key):
    """Returns the parameters: embeddings, a layer for each token, and the network over their sum."""
    keys = jax.random.split(key, 3)
    return {
        "tokens": jax.random.normal(keys[0], (PAD + 1, WIDTH)),
        "each": EACH.init(keys[1], WIDTH),
        "net": net.init(keys[2], WIDTH),
    }


def read(net, params, embeddings, real):
    """Returns the logits [N, C] of embedded prompts; the layer before the sum tells the tokens' gradients apart."""
    hidden = jax.nn.relu(EACH.apply(params["each"], embeddings))
    return net.apply(params["net"], jnp.sum(jnp.where(real[..., None], hidden, 0.0), axis=1))


def logits(net, params, x):
    """Returns the logits [N, C] of prompts [N, L]."""
    return read(net, params, params["tokens"][x], x != PAD)


def claim(*, seeds: Sequence[int], smoke: bool = False) -> Outcome:
    """Returns the student's probability of the right class where the hint is wrong."""
    steps = 150 if smoke else 600
    rates = RATES[1:] if smoke else RATES
    data = [[prompts(rng, share) for share in (None, 0.95, 0.95, 0.0)] for rng in map(np.random.default_rng, seeds)]
    clean, confounded, val, test = ({n: np.stack([d[i][n] for d in data]) for n in ("x", "y")} for i in range(4))
    keys = jax.vmap(lambda seed: jax.random.split(jax.random.key(seed), 5))(jnp.asarray(seeds, jnp.uint32))

    def supervised(net, key, data, count, rate):
        def loss(params, batch, key):
            del key
            z = logits(net, params, batch["x"])
            return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(z, batch["y"]))

        start, optimizer = initial(net, key), optax.adam(rate)
        return train(loss, start, data, optimizer=optimizer, steps=count, batch=BATCH, key=key)[0]

    def find(teacher, student, data):
        """Returns the prompts without the first confounding run, and whether the teacher is still right."""
        real = jnp.ones(data["x"].shape, bool)

        def norms(net, params):
            def loss(embeddings):
                z = read(net, params, embeddings, real)
                return jnp.sum(optax.softmax_cross_entropy_with_integer_labels(z, data["y"]))

            return token_gradient_norms(loss, params["tokens"][data["x"]], where=real)

        found = confounding_mask(norms(STUDENT, student), norms(TEACHER, teacher), where=real)
        pruned, _ = prune_tokens(data["x"], mask_runs(found) == 0, pad=PAD)
        hints = (data["x"] >= 2 * CLASSES) & (data["x"] < 3 * CLASSES)
        right = jnp.argmax(logits(TEACHER, teacher, pruned), axis=-1) == data["y"]
        return pruned, right, jnp.sum(found & hints) / jnp.maximum(jnp.sum(found), 1)

    def go_on(teacher, student, data, key, rate, leaf):
        def loss(params, batch, key):
            del key
            pairs = [[logits(net, p, batch[n])[:, None] for net, p in ((STUDENT, params), (TEACHER, teacher))]
                     for n in ("x", "pruned")]  # fmt: skip
            every, used = jnp.ones((BATCH, 1), bool), batch["used"][:, None]
            plain = token_distillation_loss(*pairs[0], where=every, shift=False)
            focused = leaf_loss(*pairs[0], *pairs[1], where=every, pruned_where=used, shift=False)
            return jnp.where(leaf, focused, plain)

        return train(loss, student, data, optimizer=optax.adam(rate), steps=steps, batch=BATCH, key=key)[0]

    def judged(params, split):
        z = logits(STUDENT, params, split["x"])
        own = jnp.take_along_axis(jax.nn.softmax(z), split["y"][:, None], axis=1)
        return jnp.mean(own), jnp.mean((jnp.argmax(z, -1) == split["y"]).astype(jnp.float32))

    def over_seeds(f, axes):
        return jax.jit(jax.vmap(f, in_axes=axes))

    teacher = over_seeds(lambda key, data: supervised(TEACHER, key, data, 600, 1e-2), 0)(keys[:, 0], clean)
    student = over_seeds(lambda key, data: supervised(STUDENT, key, data, 150, 3e-3), 0)(keys[:, 1], confounded)
    pruned, used, hit = over_seeds(find, 0)(teacher, student, confounded)
    streams = {**confounded, "pruned": pruned, "used": used}
    fit, judged = over_seeds(go_on, (0, 0, 0, 0, None, None)), over_seeds(judged, 0)
    arms, chosen, accuracies = {}, {}, {}
    for name, leaf in {"LeaF": True, "distillation": False}.items():
        found = [fit(teacher, student, streams, keys[:, 2], rate, leaf) for rate in rates]
        best = int(np.argmax([judged(params, val)[0].mean() for params in found]))
        own, right = judged(found[best], test)
        arms[name], chosen[name] = np.asarray(own).tolist(), rates[best]
        accuracies[name] = {"flipped": np.asarray(right).tolist(), "confounded": judged(found[best], val)[1].tolist()}
    return Outcome(
        arms=arms,
        learnt={name: min(values["confounded"]) > 0.6 for name, values in accuracies.items()},
        secondary={
            "accuracy": accuracies,
            "learning rate": chosen,
            "share of the hint among deleted tokens": np.asarray(hit).tolist(),
            "student before": {"flipped": np.asarray(judged(student, test)[0]).tolist()},
        },
        data="synthetic prompts with a confounding token",
    )
