"""Relations between tokens teach a denoiser of videos where things come from and go to.

The paper finetunes CogVideoX towards VideoMAEv2; here a small denoiser is trained on videos of a bouncing ball whose
frames are shuffled, so that it knows looks and not motion, and is then finetuned on whole videos: with the diffusion
loss alone, with relations (weight 0.5, as in the paper), or token by token (REPA, weight 0.5). The teacher's tokens
tell how near the ball is now, was a frame ago and will be in a frame. A ridge regression then reads the past and the
future from the denoiser's features of noisy test videos, token by token.
Every arm chooses its learning rate among the same two on the validation videos.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxlab.claims.common import train
from jaxlab.claims.harness import Outcome
from jaxlab.distill import feature_loss, token_relation_loss
from jaxlab.ops.layers import dense

FRAMES, GRID, WIDTH, BATCH = 6, 4, 32, 16
TOKENS = FRAMES * GRID * GRID
RATES = (1e-3, 3e-3)
ARMS = {"diffusion and relations": (0.5, 0.0), "diffusion only": (0.0, 0.0), "token by token": (0.0, 0.5)}


def videos(rng: np.random.Generator, count: int) -> dict[str, np.ndarray]:
    """Returns videos [N, tokens, 4] of a ball in a room of 8 x 8 pixels, and teacher tokens [N, F, S, 4]."""
    place, velocity = rng.uniform(1, 6, (count, 2)), rng.uniform(-1.2, 1.2, (count, 2))
    # Unfold the room: a ball that bounces is a straight line in a room mirrored at its walls.
    straight = place[:, None] + velocity[:, None] * np.arange(-1, FRAMES + 1)[None, :, None]
    folded = np.mod(straight, 14)
    path = np.where(folded > 7, 14 - folded, folded)
    pixel = np.arange(8)
    bump = np.exp(-((pixel - path[:, 1:-1, :, None]) ** 2) / 2)  # [N, F, 2, 8]
    frames = bump[:, :, 0, :, None] * bump[:, :, 1, None, :]
    patches = frames.reshape(count, FRAMES, GRID, 2, GRID, 2).transpose(0, 1, 2, 4, 3, 5)
    middle = 2 * np.arange(GRID) + 0.5
    rows, columns = np.meshgrid(middle, middle, indexing="ij")
    near = (rows - path[..., 0, None, None]) ** 2 + (columns - path[..., 1, None, None]) ** 2
    near = np.exp(-near / 4)
    teacher = np.stack([near[:, 1:-1], 1 - near[:, 1:-1], near[:, :-2], near[:, 2:]], axis=-1)
    return {
        "x": patches.reshape(count, TOKENS, 4).astype(np.float32),
        "teacher": teacher.reshape(count, FRAMES, GRID * GRID, 4).astype(np.float32),
    }


LAYERS = {
    "embed": (dense(WIDTH, scale=2.0), 5),
    "mix": (dense(TOKENS), TOKENS),
    "think": (dense(WIDTH, scale=2.0), WIDTH),
    "remix": (dense(TOKENS), TOKENS),
    "out": (dense(4), WIDTH),
    "project": (dense(WIDTH, scale=2.0), WIDTH),
    "align": (dense(4), WIDTH),
}


def features(params, noisy, level):
    """Returns the denoiser's middle [N, tokens, WIDTH]: channels, then tokens, are mixed in turn."""
    level = jnp.broadcast_to(level[:, None, None], (*noisy.shape[:2], 1))
    apply = lambda name, x: LAYERS[name][0].apply(params[name], x)
    x = jax.nn.relu(apply("embed", jnp.concatenate([noisy, level], axis=-1)))
    x = x + jax.nn.relu(jnp.swapaxes(apply("mix", jnp.swapaxes(x, 1, 2)), 1, 2))
    return x + jax.nn.relu(apply("think", x))


def denoise(params, middle):
    """Returns the clean patches [N, tokens, 4]."""
    mixed = jnp.swapaxes(LAYERS["remix"][0].apply(params["remix"], jnp.swapaxes(middle, 1, 2)), 1, 2)
    return LAYERS["out"][0].apply(params["out"], middle + jax.nn.relu(mixed))


def noised(key, x, level):
    """Returns the videos between themselves (level 0) and noise (level 1)."""
    level = level[:, None, None]
    return (1 - level) * x + level * jax.random.normal(key, x.shape)


def claim(*, seeds: Sequence[int], smoke: bool = False) -> Outcome:
    """Returns R squared of the velocity on the test videos."""
    count, steps = (256, 40) if smoke else (512, 400)
    rates = RATES[:1] if smoke else RATES
    data = [[videos(rng, count) for _ in range(3)] for rng in (np.random.default_rng(seed) for seed in seeds)]
    train_set, val, test = ({n: np.stack([d[i][n] for d in data]) for n in data[0][0]} for i in range(3))
    keys = jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32))

    def diffusion(params, x, key):
        key_level, key_noise = jax.random.split(key)
        level = jax.random.uniform(key_level, x.shape[:1])
        middle = features(params, noised(key_noise, x, level), level)
        return jnp.mean(jnp.square(denoise(params, middle) - x)), middle

    def loss(params, batch, key, relation, token, shuffled):
        key, key_order = jax.random.split(key)
        frames = batch["x"].reshape(BATCH, FRAMES, -1)
        order = jnp.argsort(jax.random.uniform(key_order, (BATCH, FRAMES)), axis=1)
        mixed = jnp.take_along_axis(frames, order[..., None], axis=1).reshape(batch["x"].shape)
        value, middle = diffusion(params, jnp.where(shuffled, mixed, batch["x"]), key)
        hidden = jax.nn.relu(LAYERS["project"][0].apply(params["project"], middle))
        aligned = LAYERS["align"][0].apply(params["align"], hidden).reshape(BATCH, FRAMES, GRID * GRID, 4)
        value = value + relation * token_relation_loss(aligned, batch["teacher"])
        return value + token * feature_loss(aligned, batch["teacher"], kind="cosine")

    def fit(params, data, key, rate, relation, token, shuffled):
        return train(
            lambda p, b, k: loss(p, b, k, relation, token, shuffled),
            params,
            data,
            optimizer=optax.adam(rate),
            steps=steps,
            batch=BATCH,
            key=key,
        )[0]

    def initial(key):
        return {n: layer.init(jax.random.fold_in(key, i), size) for i, (n, (layer, size)) in enumerate(LAYERS.items())}

    def probe(params, key, bank, split):
        def read(key, split):
            level = jnp.full(count, 0.3)
            middle = features(params, noised(key, split["x"], level), level)
            return jnp.concatenate([middle.reshape(-1, WIDTH), jnp.ones((count * TOKENS, 1))], axis=1)

        key_bank, key_split, key_loss = jax.random.split(key, 3)
        a, b = read(key_bank, bank), read(key_split, split)
        known, wanted = (s["teacher"][..., 2:].reshape(-1, 2) for s in (bank, split))
        weights = jnp.linalg.solve(a.T @ a + 1e-1 * jnp.eye(a.shape[1]), a.T @ known)
        rest = jnp.sum(jnp.square(b @ weights - wanted))
        total = jnp.sum(jnp.square(wanted - jnp.mean(wanted, axis=0)[None]))
        return 1 - rest / total, diffusion(params, split["x"], key_loss)[0]

    fit = jax.jit(jax.vmap(fit, in_axes=(0, 0, 0, None, None, None, None)))
    probe = jax.jit(jax.vmap(probe))
    split_keys = jax.vmap(lambda key: jax.random.split(key, 4))(keys)
    streams = {n: train_set[n] for n in ("x", "teacher")}
    start = fit(jax.vmap(initial)(split_keys[:, 0]), streams, split_keys[:, 1], 1e-3, 0.0, 0.0, True)
    arms, secondary = {}, {"learning rate": {}, "diffusion loss": {}}
    for name, (relation, token) in ARMS.items():
        results = []
        for rate in rates:
            params = fit(start, streams, split_keys[:, 2], rate, relation, token, False)
            (on_val, _), (on_test, lost) = (probe(params, split_keys[:, 3], train_set, s) for s in (val, test))
            results.append((float(on_val.mean()), rate, np.asarray(on_test), np.asarray(lost)))
        _, rate, on_test, lost = max(results, key=lambda r: r[0])
        arms[name], secondary["learning rate"][name] = on_test.tolist(), rate
        secondary["diffusion loss"][name] = lost.tolist()
    before = probe(start, split_keys[:, 3], train_set, test)
    secondary["before finetuning"] = {"R squared": before[0].tolist(), "diffusion loss": before[1].tolist()}
    return Outcome(
        arms=arms,
        learnt={name: float(np.mean(values)) > 0.1 for name, values in arms.items()},
        secondary=secondary,
        data="synthetic videos of a bouncing ball",
    )
