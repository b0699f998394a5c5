"""Bad numbers: a step whose loss or state is not finite changes nothing, is counted, and too many end the run."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxlab.engine.checkpoint import leaf_paths


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Guarded:
    """What the loop carries: the learner's state and how it got on.

    Attributes:
        learner: state of the learner, always finite where it once was.
        skipped: int32 [], steps that were skipped in the whole run.
        in_row: int32 [], steps that were skipped since the last good one.
    """

    learner: Any
    skipped: jax.Array
    in_row: jax.Array


def start(learner: Any) -> Guarded:
    """Returns the carry of a fresh learner."""
    return Guarded(learner, jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))


def checked(learner: Any, metrics: dict[str, Any]) -> dict[str, Any]:
    """Returns the floating leaves that have to stay finite, by name: the loss first, then the state."""
    named = {name: metrics[name] for name in ("loss",) if name in metrics}
    leaves = {**named, **leaf_paths(learner)}
    return {name: leaf for name, leaf in leaves.items() if jnp.issubdtype(leaf.dtype, jnp.inexact)}


def guarded(update: Callable[..., tuple[Any, dict]], *, limit: int) -> Callable[..., tuple[Guarded, dict]]:
    """Returns `update` over the carry; its metrics also hold `bad`, int32 [3].

    The number of the step's first bad leaf (-1 if none is), and the carry's new `in_row` and `skipped`.

    A gradient that is not finite is seen in what it does to the state. A leaf counts as bad where it is not finite and
    was before; a state that starts with an infinity is left in peace. After `limit` bad steps in a row nothing changes
    any more, however late the host looks: that is where the run ends. 0 never ends it.
    """

    def step(carry: Guarded, batch: Any, key: jax.Array) -> tuple[Guarded, dict]:
        new, metrics = update(carry.learner, batch, key)
        before = leaf_paths(carry.learner)
        flags = [
            jnp.any(~jnp.isfinite(leaf) & (jnp.isfinite(before[name]) if name in before else True))
            for name, leaf in checked(new, metrics).items()
        ]
        flags = jnp.stack(flags)
        bad, over = jnp.any(flags), (carry.in_row >= limit) & (limit > 0)
        learner = jax.tree.map(lambda old, now: jnp.where(bad | over, old, now), carry.learner, new)
        skipped = carry.skipped + (bad & ~over)
        in_row = jnp.where(over, carry.in_row, jnp.where(bad, carry.in_row + 1, 0))
        first = jnp.where(bad & ~over, jnp.argmax(flags), -1).astype(jnp.int32)
        return Guarded(learner, skipped, in_row), {**metrics, "bad": jnp.stack([first, in_row, skipped])}

    return step


def train_step(learner: Any, *, seed: int, limit: int, mesh: Mesh | None = None) -> Callable[..., tuple[Guarded, dict]]:
    """Returns `carry, metrics = step(carry, batch, number)`; its key is that of the seed and the number.

    With a mesh the step is traced under it, so that the kernels know that the compiler will spread them.
    """
    update = guarded(learner.update, limit=limit)

    def step(carry: Guarded, batch: Any, number: jax.Array) -> tuple[Guarded, dict]:
        with contextlib.nullcontext() if mesh is None else jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return update(carry, batch, jax.random.fold_in(jax.random.key(seed), number + 1))

    return step
