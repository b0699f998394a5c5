"""PowerNorm makes a better language model than layer normalisation, and than batch normalisation.

The paper trains transformers on translation and on two text corpora for hours; here one of two layers and 32 features
predicts the characters of Python's own language reference for 400 steps. All norms choose their learning rate from the
same values on the validation text. Layer normalisation is the baseline; batch normalisation is shown beside it, with
the distance of the batches' statistics from the running ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from pydoc_data.topics import topics

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxlab.claims.harness import Outcome
from jaxlab.norm import absorb_nu, batch_norm, batch_statistic_distance, layer_norm, power_norm
from jaxlab.ops.layers import dense, mlp
from jaxlab.types import Layer, as_stateful

SIZE, HEADS, LAYERS, TIME, BATCH, CHARACTERS, BLOCK = 32, 4, 2, 32, 16, 96, 2000
RATES = (3e-3, 1e-2)


def text(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns train, validation and test (60 : 20 : 20 of 100 blocks, by seed), int32 [B, 2000]."""
    joined = " ".join(topics[name] for name in sorted(topics)).encode("ascii", "replace")
    codes = np.clip(np.frombuffer(joined, np.uint8).astype(np.int32) - 32, 0, CHARACTERS - 1)  # a newline is a blank
    blocks = codes[: 100 * BLOCK].reshape(100, BLOCK)[np.random.default_rng(seed).permutation(100)]
    return blocks[:60], blocks[60:80], blocks[80:]


def layer_norm_layer() -> Layer:
    """Returns layer normalisation with gain and bias as a `Layer`."""

    def init(key, size):
        del key
        return {"gain": jnp.ones(size), "bias": jnp.zeros(size)}

    return Layer(init, lambda params, x: layer_norm(x, params["gain"], params["bias"]))


def language_model(norm):
    """Returns `init(key)` and `apply(params, state, x, train)` of a causal transformer, normed before each part."""
    norm, ffn, project = as_stateful(norm), mlp([4 * SIZE, SIZE]), dense(SIZE)

    def init(key):
        key_embed, key_time, key_layers, key_norm, key_out = jax.random.split(key, 5)

        def layer(key):
            keys = jax.random.split(key, 7)
            parts = {name: project.init(k, SIZE) for name, k in zip("qkvo", keys, strict=False)}
            (first, state), (second, _) = (norm.init(k, SIZE) for k in keys[5:])
            params = {**parts, "ffn": ffn.init(keys[4], SIZE), "norm_0": first, "norm_1": second}
            return params, {"norm_0": state, "norm_1": state}

        layers, states = jax.vmap(layer)(jax.random.split(key_layers, LAYERS))
        last, last_state = norm.init(key_norm, SIZE)
        params = {
            "embed": jax.random.normal(key_embed, (CHARACTERS, SIZE)) * 0.5,
            "time": jax.random.normal(key_time, (TIME, SIZE)) * 0.5,
            "layers": layers,
            "norm": last,
            "out": dense(CHARACTERS).init(key_out, SIZE),
        }
        return params, {"layers": states, "norm": last_state}

    def attend(params, x):
        q, k, v = (project.apply(params[n], x).reshape(*x.shape[:2], HEADS, -1) for n in "qkv")
        scores = jnp.einsum("bthd,bshd->bhts", q, k) * (SIZE // HEADS) ** -0.5
        past = jnp.tril(jnp.ones(scores.shape[-2:], bool))[None, None]
        mixed = jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(jnp.where(past, scores, -1e9)), v)
        return project.apply(params["o"], mixed.reshape(x.shape))

    def apply(params, state, x, train):
        x = params["embed"][x] + params["time"][None]

        def layer(x, carried):
            params, state = carried
            normed, first = norm.apply(params["norm_0"], state["norm_0"], x, train=train)
            x = x + attend(params, normed)
            normed, second = norm.apply(params["norm_1"], state["norm_1"], x, train=train)
            return x + ffn.apply(params["ffn"], normed), {"norm_0": first, "norm_1": second}

        x, states = jax.lax.scan(layer, x, (params["layers"], state["layers"]))
        x, last = norm.apply(params["norm"], state["norm"], x, train=train)
        return dense(CHARACTERS).apply(params["out"], x), {"layers": states, "norm": last}

    return init, apply


def claim(*, seeds: Sequence[int], smoke: bool = False) -> Outcome:
    """Returns the negative mean loss a character on the test text."""
    steps, stride, rates = (25, 30, RATES[1:]) if smoke else (400, 4, RATES)
    splits = [jnp.asarray(np.stack(part)) for part in zip(*map(text, seeds), strict=True)]
    keys = jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32))
    arms, learnt, secondary = {}, {}, {}
    norms = {
        "PowerNorm": power_norm(warmup_steps=steps // 10, groups=HEADS),
        "layer norm": layer_norm_layer(),
        "batch norm": batch_norm(),
    }
    for name, norm in norms.items():
        if smoke and name == "batch norm":
            continue
        init, apply = language_model(norm)

        def loss(both, x, train, apply=apply):
            logits, state = apply(*both, x[:, :-1], train)
            return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, x[:, 1:])), state

        def one(rate, key, train, val, test, init=init, loss=loss):
            key_init, key_rows = jax.random.split(key)
            optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))
            params, state = init(key_init)
            place = jax.random.randint(key_rows, (steps, BATCH), 0, len(train) * (BLOCK - TIME))

            def step(carry, place):
                params, state, opt_state = carry
                block, start = place // (BLOCK - TIME), place % (BLOCK - TIME)
                x = train[block[:, None], start[:, None] + jnp.arange(TIME + 1)[None]]
                (_, new), grads = jax.value_and_grad(loss, has_aux=True)((params, state), x, True)
                updates, opt_state = optimizer.update(grads[0], opt_state, params)
                return (optax.apply_updates(params, updates), absorb_nu(new, grads[1]), opt_state), _moved(state, new)

            (params, state, _), moved = jax.lax.scan(step, (params, state, optimizer.init(params)), place)
            whole = BLOCK // (TIME + 1) * (TIME + 1)
            windows = jnp.stack([val, test])[:, :, :whole].reshape(2, -1, TIME + 1)[:, ::stride]
            on_val, on_test = -jax.lax.map(lambda x: loss((params, state), x, False)[0], windows)
            return on_val, on_test, moved

        over_seeds = jax.vmap(one, in_axes=(None, 0, 0, 0, 0))
        run = jax.jit(jax.vmap(over_seeds, in_axes=(0, None, None, None, None)))
        on_val, on_test, moved = (np.asarray(a) for a in run(jnp.asarray(rates), keys, *splits))
        best = int(np.nan_to_num(on_val.mean(axis=1), nan=-np.inf).argmax())
        secondary[name] = {"learning rate": rates[best]}
        if name != "layer norm":
            last = moved[best, :, steps // 2 :].mean(axis=(0, 1))
            secondary[name]["distance of the statistics"] = last.round(5).tolist()
        arms[name] = on_test[best].tolist()
        learnt[name] = bool(on_test[best].min() > -0.9 * np.log(CHARACTERS))
    return Outcome(arms=arms, learnt=learnt, secondary=secondary, data="Python's language reference, by character")


def _moved(before, after):
    """Returns the distances of this batch's statistics from the running ones in the last norm."""
    names = [n for n in ("phi", "mean", "var") if n in before["norm"]]
    if not names:
        return jnp.zeros(1)
    # A moving average goes a tenth of the way to the batch's value.
    moved = [(before["norm"][n], before["norm"][n] + 10 * (after["norm"][n] - before["norm"][n])) for n in names]
    return jnp.stack([batch_statistic_distance(batch, running) for running, batch in moved])
