"""Deep Model Assembling (Deep Incubation, 2022, arXiv 2212.04129).

A deep network is trained in pieces that fit together. A shallow meta network, one block for each of K stages, is
trained first; then every deep module learns on its own in the place of its meta module, between the others, which stand
still and so define the same interfaces for all; at last the modules are put together and fine-tuned.

    meta     m_K o .. o m_1, trained end to end
    hybrid   H_i = m_K o .. o m_{i+1} o M_i o m_{i-1} o .. o m_1,   L_i = CE(H_i(x), y), gradient to M_i alone
    target   M_K o .. o M_1, fine-tuned

The stem belongs to the first module and the head to the last. Module imitation, to which the paper compares, fits the
output of m_i instead: L_i = mean |M_i(h) - m_i(h)|^2 with h the meta network's input to stage i.

Reconstructed: one transformation updates all modules, so that one which looks at the norm of all gradients (clipping)
would couple them; wrap it with `optax.partition` then. In imitation the head is the meta network's.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from jaxlab.ops.collectives import global_mean, value_and_grad
from jaxlab.ops.masked import compute_dtype, safe_divide, zero_where_false
from jaxlab.types import Layer, Learner, LearnerState, PyTree


def stage_network(block: Layer, stem: Layer, head: Layer, *, width: int, num_stages: int, depth: int) -> Layer:
    """Returns stem, K stages of `depth` equal blocks each, and head; with depth 1 the meta network, else the target.

    Args:
        block: `init(key, width)`, `apply(params, h)` with h and result of one shape.
        stem: from an example to h.
        head: from h to logits.
        width: what blocks and head are initialised with.
        num_stages: K >= 1.
        depth: blocks a stage, >= 1.

    Returns:
        A `Layer`: `init(key, *dims)` with the stem's dims gives `stem`, `stages` (every leaf with leading axes
        [K, depth]) and `head`; `apply(params, x)` gives logits.

    Raises:
        ValueError: a number is below 1.

    Example:
        >>> from jaxlab.types import Layer
        >>> scale = Layer(lambda key, size: {"w": jnp.ones(size)}, lambda params, h: h * params["w"])
        >>> net = stage_network(scale, scale, scale, width=4, num_stages=3, depth=2)
        >>> params = net.init(jax.random.key(0), 4)
        >>> params["stages"]["w"].shape, net.apply(params, jnp.ones((1, 4))).shape
        ((3, 2, 4), (1, 4))

    Source:
        Ni et al., arXiv 2212.04129, section 3.
    """
    if min(width, num_stages, depth) < 1:
        raise ValueError(f"width={width}, num_stages={num_stages} and depth={depth} must be at least 1")

    def init(key, *dims):
        key_stem, key_head, key_stages = jax.random.split(key, 3)
        keys = jax.random.split(key_stages, (num_stages, depth))
        stages = jax.vmap(jax.vmap(lambda k: block.init(k, width)))(keys)
        return {"stem": stem.init(key_stem, *dims), "stages": stages, "head": head.init(key_head, width)}

    def apply(params, x):
        h = stem.apply(params["stem"], x)
        # All blocks in a row: stages are only a way to group them.
        blocks = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), params["stages"])
        return head.apply(params["head"], _stage(block, blocks, h))

    return Layer(init, apply)


def deep_incubation(
    block: Layer,
    stem: Layer,
    head: Layer,
    meta: PyTree,
    optimizer: optax.GradientTransformation,
    *,
    width: int,
    depth: int,
    objective: str = "incubation",
    axis_name: str | None = None,
) -> Learner:
    """Returns a learner that trains all modules of a deep network side by side, each within the meta network.

    `sum_i L_i`, of which each depends on one module alone; see the module's docstring.

    Args:
        block: see `stage_network`.
        stem: see `stage_network`.
        head: see `stage_network`.
        meta: trained parameters of a `stage_network` with depth 1; they stay as they are.
        optimizer: of the modules; elementwise ones (AdamW) keep them apart.
        width: what blocks and head are initialised with.
        depth: blocks of each module.
        objective: "incubation" or "imitation".
        axis_name: mapped axis over which the examples are spread.

    Returns:
        A `Learner` with a `LearnerState`, whose `params` are those of the target, `stage_network(..., depth=depth)`,
        ready to be fine-tuned. `init(key, batch)`; `batch`: `x [N, ...]`, `y int [N]` (-1 = unlabelled), optional
        `where [N]`. Metrics: `loss [K]`, of each module. `predict` gives `logits` of the assembled network.

    Raises:
        ValueError: `depth` is below 1 or `objective` is unknown.

    Example:
        >>> from jaxlab.types import Layer
        >>> scale = Layer(lambda key, size: {"w": jnp.ones(size)}, lambda params, h: h * params["w"])
        >>> parts, batch = (scale, scale, scale), {"x": jnp.ones((3, 4)), "y": jnp.array([0, 1, 1])}
        >>> meta = stage_network(*parts, width=4, num_stages=3, depth=1).init(jax.random.key(0), 4)
        >>> learner = deep_incubation(*parts, meta, optax.adam(1e-3), width=4, depth=2)
        >>> state = learner.init(jax.random.key(1), batch)
        >>> jax.jit(learner.update)(state, batch, jax.random.key(2))[1]["loss"].shape
        (3,)

    Source:
        Ni et al., arXiv 2212.04129, section 3.2.
    """
    if objective not in ("incubation", "imitation"):
        raise ValueError(f"objective={objective!r} must be 'incubation' or 'imitation'")
    num_stages = jax.tree.leaves(meta["stages"])[0].shape[0]
    target = stage_network(block, stem, head, width=width, num_stages=num_stages, depth=depth)
    meta = jax.lax.stop_gradient(meta)

    def init(key, batch):
        x = batch["x"]
        params = target.init(key, x.shape[1] if x.ndim == 2 else jax.ShapeDtypeStruct(x.shape[1:], x.dtype))
        if objective == "imitation":
            params = {**params, "head": jax.tree.map(jnp.copy, meta["head"])}
        return LearnerState(params, {}, optimizer.init(params), jnp.zeros((), jnp.int32))

    def losses(params, x, y, where):
        labelled = where & (y >= 0)
        inputs = [stem.apply(meta["stem"], x)]  # of every stage of the meta network, and its last output
        for i in range(num_stages):
            inputs.append(_stage(block, _of(meta, i), inputs[-1]))
        result = []
        for i in range(num_stages):
            h = stem.apply(params["stem"], x) if i == 0 else inputs[i]
            h = _stage(block, _of(params, i), h)
            if objective == "imitation":
                apart = jnp.square((h - inputs[i + 1]).astype(compute_dtype(h)))
                terms = jnp.mean(apart.reshape(len(x), -1), axis=1)
                result.append(global_mean(terms, where, axis_name=axis_name))
                continue
            for j in range(i + 1, num_stages):
                h = _stage(block, _of(meta, j), h)
            z = head.apply(params["head"] if i == num_stages - 1 else meta["head"], h)
            z = zero_where_false(z, where).astype(compute_dtype(z))
            terms = optax.softmax_cross_entropy_with_integer_labels(z, jnp.maximum(y, 0))
            result.append(global_mean(terms, labelled, axis_name=axis_name))
        return jnp.stack(result)

    def update(state, batch, key):
        del key
        y, where = batch["y"], batch.get("where")
        where = jnp.ones(y.shape, bool) if where is None else where
        x = zero_where_false(batch["x"], where)

        def total(params):
            each = losses(params, x, y, where)
            return jnp.sum(each), each

        (_, each), grads = value_and_grad(total, axis_name=axis_name, has_aux=True)(state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return LearnerState(params, {}, opt_state, state.step + 1), {"loss": each}

    def predict(state, batch):
        return {"logits": target.apply(state.params, batch["x"])}

    return Learner(init, update, predict)


def interface_gap(block: Layer, stem: Layer, params: PyTree, meta: PyTree, x: Array) -> Array:
    """Returns how far each module's output is from its meta module's, on the meta network's inputs.

    `mean |M_i(h) - m_i(h)| / mean |m_i(h)|` with Euclidean lengths of examples.

    Args:
        block: see `stage_network`.
        stem: see `stage_network`.
        params: parameters of the target.
        meta: parameters of the meta network.
        x: [N, ...], examples.

    Returns:
        [K] in the accumulation dtype; 0 = the same interface.

    Raises:
        ValueError: target and meta network differ in stages.

    Example:
        >>> from jaxlab.types import Layer
        >>> scale = Layer(lambda key, size: {"w": jnp.ones(size)}, lambda params, h: h * params["w"])
        >>> params = stage_network(scale, scale, scale, width=4, num_stages=3, depth=1).init(jax.random.key(0), 4)
        >>> interface_gap(scale, scale, params, params, jnp.ones((2, 4))).tolist()
        [0.0, 0.0, 0.0]

    Source:
        A diagnostic of this library; the paper shows compatibility by the accuracy before fine-tuning.
    """
    sizes = [jax.tree.leaves(p["stages"])[0].shape[0] for p in (params, meta)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"params has {sizes[0]} stages, expected {sizes[1]}, as meta")
    own, h, gaps = stem.apply(params["stem"], x), stem.apply(meta["stem"], x), []
    for i in range(sizes[0]):
        own = _stage(block, _of(params, i), own if i == 0 else h)
        h = _stage(block, _of(meta, i), h)
        gaps.append(safe_divide(_length(own - h), _length(h)))
    return jnp.stack(gaps)


def _length(h: Array) -> Array:
    """Returns the mean length of the examples, with gradient 0 where one is zero."""
    square = jnp.sum(jnp.square(h.reshape(h.shape[0], -1).astype(compute_dtype(h))), axis=1)
    return jnp.mean(jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0))


def _of(params: PyTree, i: int) -> PyTree:
    return jax.tree.map(lambda a: a[i], params["stages"])


def _stage(block: Layer, blocks: PyTree, h: Array) -> Any:
    """Applies a stack of blocks, leaves [depth, ...], one after the other."""
    return jax.lax.scan(lambda h, p: (block.apply(p, h), None), h, blocks)[0]
