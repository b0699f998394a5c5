"""One compiled step of K peers against a Python loop over the compiled step of one.

Both do the same: forward and backward pass of K networks, cross entropy and the mutual term from the predictions of
all, and AdamW. The loop's peers learn from the predictions of the step before, so that it has no second forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxlab import mutual
from jaxlab.bench.runner import Contest
from jaxlab.types import as_stateful


def peers(quick: bool) -> Iterator[Contest]:
    """A multilayer perceptron and a vision transformer of the size that small images need, with 2, 4 and 8 peers."""
    from jaxlab import nn
    from jaxlab.ops.layers import mlp

    batch, side = (8, 4) if quick else (128, 8)
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.uniform(size=(batch, side, side, 1)), jnp.float32)
    labels = jnp.asarray(rng.integers(0, 10, batch), jnp.int32)
    networks = {
        "mlp": (mlp([32, 10] if quick else [256, 256, 10]), images.reshape(batch, -1)),
        "vit": (nn.vit(10, width=8 if quick else 64, depth=1 if quick else 2, heads=2 if quick else 4), images),
    }
    for name, (net, x) in networks.items():
        for count in (2,) if quick else (2, 4, 8):
            yield _contest(name, net, {"x": x, "y": labels}, count)


def _contest(name, net, batch, count) -> Contest:
    optimizer, objective = optax.adamw(1e-3), mutual.mutual_objective()
    learner = mutual.peers(net, optimizer, num_peers=count, mutual=objective)
    key = jax.random.key(0)
    state = jax.jit(learner.init)(key, batch)
    forward = as_stateful(net)
    where = jnp.ones(batch["y"].shape, bool)

    @jax.jit
    def one(params, net_state, opt_state, everyone, teach, batch):
        def loss(params):
            outputs, memory = forward.apply(params, net_state, batch["x"], key=key, train=True)
            outputs = outputs if isinstance(outputs, dict) else {"logits": outputs}
            own = optax.softmax_cross_entropy_with_integer_labels(outputs["logits"], batch["y"])
            term = objective(outputs, {"logits": everyone}, teach, {**batch, "where": where})
            return jnp.mean(own) + term, (outputs["logits"], memory)

        (_, (logits, memory)), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), memory, opt_state, logits

    def loop(rows, everyone, teach, batch):
        return [one(*row, everyone, teach[i], batch) for i, row in enumerate(rows)]

    rows = [
        jax.tree.map(lambda leaf, i=i: leaf[i], (state.params, state.net_state, state.opt_state)) for i in range(count)
    ]
    everyone = jax.jit(lambda s, b: learner.predict(s, b)["logits"])(state, batch)
    teach = [jnp.arange(count) != i for i in range(count)]
    return Contest(
        case=f"{name} peers",
        params={"K": count, "batch": len(batch["y"]), "pass": "step"},
        ours=lambda state, batch: learner.update(state, batch, key),
        args=(state, batch),
        peer=("a loop over one peer's step", lambda: loop(rows, everyone, teach, batch)),
        foreign=True,
        part=(one, (*rows[0], everyone, teach[0], batch)),
    )


BENCHES: dict[str, Callable[[bool], Iterator[Contest]]] = {"peers": peers}
