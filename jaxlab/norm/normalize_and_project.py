"""Normalization and effective learning rates in reinforcement learning (NaP, 2024, arXiv 2407.01800).

A layer with a normalisation behind it computes the same at every length of its matrix W, but the longer W, the less a
step turns it. Lengths grow in training, so the effective learning rate decays, unasked. NaP normalises before every
nonlinearity and, after the optimiser's step, gives each hidden matrix the length back that it began with.

    normalise:  h = act(norm(W x)),   no bias in front of a norm;   project:  W <- W ||W_0|| / ||W||   (Frobenius)
    for f(cW) = f(W):  grad f(cW) = grad f(W) / c,  so the direction of W moves as at length ||W_0|| with the rate
    lr (||W_0|| / ||W||)^p,   p = 2 for plain gradients, p = 1 for steps of a length of their own (Adam)
    gain s and offset m of a norm in front of a positively homogeneous act:  (s, m) <- (s, m) sqrt(d / (|s|^2 + |m|^2))

The output layer is not projected: its length matters. The optimiser's moments are left as they are.

Reconstructed: a matrix that starts at 0 has no length to keep and stays free; the length of the pull of gain and offset
towards (1, 0) where the activation is not homogeneous, for which the paper has words only. A public implementation
projects the output layer as well, and gain and offset onto sqrt(2): both contradict the argument above.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from jaxlab.norm.layer_norm import layer_norm, rms_norm
from jaxlab.ops.collectives import all_sum
from jaxlab.ops.layers import dense
from jaxlab.ops.masked import compute_dtype, masked_sum, safe_divide, safe_normalize
from jaxlab.types import Layer

Exclude = Sequence[str] | Callable[[tuple[str, ...], Array], bool]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NormState:
    """What `normalize_and_project` and `scale_by_norm_growth` remember.

    Attributes:
        norms: the parameters' tree with each projected leaf's initial norm, a scalar, and None for the others.
        step: int32 [], updates so far.
    """

    norms: Any
    step: Array


def normalize_and_project(
    *,
    exclude: Exclude,
    interval: int = 1,
    scale_offset: tuple[str, str] | None = None,
    pull: float | None = None,
) -> optax.GradientTransformation:
    """Returns the transformation after which every hidden matrix has the norm it was initialised with.

    `W + update = (W + u) ||W_0|| / ||W + u||`; put it last, as in `optax.chain(optax.adam(1e-4), ...)`.

    Args:
        exclude: what is not projected though it has two or more axes: names on the way to a leaf (`("out",)`), or a
            function `(path, leaf) -> bool`. The output layer belongs here, and embeddings without a norm behind them;
            `()` projects every matrix. A convolution's kernel is one matrix.
        interval: project at every so many steps (1 and 1000 do equally well in the paper).
        scale_offset: names of a norm's gain and offset, such as `("gain", "bias")`: every dict that holds both under
            these names is brought to the joint norm sqrt(d). Right for ReLU and other positively homogeneous
            activations. None leaves them alone, as for norms that have none (the paper's choice in RL).
        pull: for other activations: gain and offset go back by this share of the way to (1, 0) instead.

    Returns:
        An `optax.GradientTransformation` whose `update` needs `params`.

    Raises:
        ValueError: an option is out of range; in `init`, a name in `exclude` or `scale_offset` that no leaf has, or
            nothing to project; in `update`, no `params`.

    Example:
        >>> params = {"hidden": jnp.array([[3.0, 4.0]]), "out": jnp.ones((1, 2))}
        >>> tx = optax.chain(optax.sgd(1.0), normalize_and_project(exclude=("out",)))
        >>> grads = {"hidden": jnp.array([[3.0, -8.0]]), "out": jnp.ones((1, 2))}
        >>> updates, _ = tx.update(grads, tx.init(params), params)
        >>> jax.tree.map(lambda a: a.round(3).tolist(), optax.apply_updates(params, updates))
        {'hidden': [[0.0, 5.0]], 'out': [[0.0, 0.0]]}

    Source:
        Lyle et al., arXiv 2407.01800, section 4. `pull` is decoupled from the learning rate: reconstructed.
    """
    if interval < 1:
        raise ValueError(f"interval={interval} must be at least 1")
    if pull is not None and (scale_offset is None or not 0 <= pull <= 1):
        raise ValueError(f"pull={pull} must be between 0 and 1, and needs scale_offset, got {scale_offset}")

    def init(params):
        if scale_offset is not None and not _norm_layers(params, scale_offset):
            raise ValueError(f"scale_offset={scale_offset}: no dict of params holds both names")
        return NormState(record_norms(params, exclude=exclude), jnp.zeros((), jnp.int32))

    def update(updates, state, params=None):
        if params is None:
            raise ValueError("params=None: the projection needs the parameters, tx.update(updates, state, params)")
        step = state.step + 1
        moved = jax.tree.map(lambda p, u: (p + u).astype(p.dtype), params, updates)
        target = project(moved, state.norms)
        if scale_offset is not None:
            target = _map_norm_layers(target, scale_offset, lambda s, m: _settle(s, m, pull))
        due = step % interval == 0

        def corrected(update, before, free, projected):
            # A free leaf came back as the same array: its update passes untouched, without a rounding of its own.
            return update if projected is free else jnp.where(due, (projected - before).astype(update.dtype), update)

        return jax.tree.map(corrected, updates, params, moved, target), NormState(state.norms, step)

    return optax.GradientTransformation(init, update)


def scale_by_norm_growth(*, exclude: Exclude, power: float = 2.0) -> optax.GradientTransformation:
    """Returns the transformation that undoes the decay of the effective learning rate without any projection.

    `u <- u (||W|| / ||W_0||)^power` for each hidden matrix. Behind plain gradient descent and with power 2, the network
    computes at every step what it would with `normalize_and_project`.

    Args:
        exclude: as in `normalize_and_project`.
        power: 2 for plain gradients, 1 for optimisers whose steps do not shrink with the gradient (Adam).

    Returns:
        An `optax.GradientTransformation` whose `update` needs `params`.

    Raises:
        ValueError: as `normalize_and_project`.

    Example:
        >>> tx = scale_by_norm_growth(exclude=(), power=2)
        >>> state = tx.init({"w": jnp.eye(2)})
        >>> tx.update({"w": jnp.ones((2, 2))}, state, {"w": 3 * jnp.eye(2)})[0]["w"][0].round(3).tolist()
        [9.0, 9.0]

    Source:
        Lyle et al., arXiv 2407.01800, section 3.
    """

    def init(params):
        return NormState(record_norms(params, exclude=exclude), jnp.zeros((), jnp.int32))

    def update(updates, state, params=None):
        if params is None:
            raise ValueError("params=None: norms need the parameters, tx.update(updates, state, params)")

        def scaled(start, u, p):
            return u if start is None else (u * _growth(p, start) ** power).astype(u.dtype)

        updates = jax.tree.map(scaled, state.norms, updates, params, is_leaf=_is_none)
        return updates, NormState(state.norms, state.step + 1)

    return optax.GradientTransformation(init, update)


def record_norms(params: Any, *, exclude: Exclude) -> Any:
    """Returns the Frobenius norm of every leaf to project, and None for the others, in the structure of `params`.

    Args:
        params: pytree of float arrays. Leaves with fewer than two axes are never projected.
        exclude: as in `normalize_and_project`.

    Returns:
        Scalars in the accumulation dtype.

    Raises:
        ValueError: a name in `exclude` that no leaf has, or no leaf to project.

    Example:
        >>> record_norms({"w": jnp.array([[3.0, 4.0]]), "b": jnp.ones(2)}, exclude=())["w"].tolist()
        5.0
    """
    paths = [_names(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    if not callable(exclude):
        exclude = (exclude,) if isinstance(exclude, str) else tuple(exclude)
        absent = [name for name in exclude if not any(name in path for path in paths)]
        if absent:
            raise ValueError(f"exclude={exclude}: no leaf of params lies under {absent}")
        free = lambda path, leaf: any(name in path for name in exclude)
    else:
        free = exclude

    def norm(path, leaf):
        return None if leaf.ndim < 2 or free(_names(path), leaf) else _norm(leaf)

    norms = jax.tree_util.tree_map_with_path(norm, params)
    if not jax.tree.leaves(norms):
        raise ValueError(f"exclude={exclude} leaves nothing to project among leaves of shapes "
                         f"{[leaf.shape for leaf in jax.tree.leaves(params)]}")  # fmt: skip
    return norms


def project(params: Any, norms: Any) -> Any:
    """Returns the parameters with the recorded norms: `W ||W_0|| / ||W||`.

    Args:
        params: pytree of float arrays.
        norms: of `record_norms`. Leaves with None or 0 there come back as they are; a zero matrix stays zero.

    Example:
        >>> norms = record_norms({"w": jnp.array([[3.0, 4.0]])}, exclude=())
        >>> project({"w": jnp.array([[0.0, 7.0]])}, norms)["w"].tolist()
        [[0.0, 5.0]]
    """

    def one(start, leaf):
        if start is None:
            return leaf
        rescaled = (_unit(leaf) * start).astype(leaf.dtype)
        return jnp.where(start > 0, rescaled, leaf)

    return jax.tree.map(one, norms, params, is_leaf=_is_none)


def project_scale_offset(scale: Array, offset: Array) -> tuple[Array, Array]:
    """Returns gain and offset of a norm of d features with the joint norm sqrt(d), that of gain 1 and offset 0.

    With a positively homogeneous activation behind them, their common length only scales what the next layer sees.

    Args:
        scale: float [d].
        offset: float [d]. Where both are zero, they stay zero.

    Raises:
        ValueError: the shapes differ.

    Example:
        >>> scale, offset = project_scale_offset(jnp.array([2.0, 2.0, 2.0, 2.0]), jnp.zeros(4))
        >>> scale.tolist()
        [1.0, 1.0, 1.0, 1.0]

    Source:
        Lyle et al., arXiv 2407.01800, section 4.
    """
    if scale.shape != offset.shape:
        raise ValueError(f"scale {scale.shape} and offset {offset.shape} must have one shape")
    joint = _unit(jnp.stack([scale.astype(compute_dtype(scale)), offset.astype(compute_dtype(offset))]))
    joint = joint * scale.size**0.5
    return joint[0].astype(scale.dtype), joint[1].astype(offset.dtype)


def effective_learning_rate(learning_rate: float | Array, params: Any, norms: Any, *, power: float = 2.0) -> Any:
    """Returns the rate at which the direction of each hidden matrix moves: `lr (||W_0|| / ||W||)^power`.

    Args:
        learning_rate: of the optimiser.
        params: pytree of float arrays.
        norms: of `record_norms`.
        power: 2 for plain gradients, 1 for Adam and its like.

    Returns:
        The structure of `norms`, scalars in the accumulation dtype; 0 for a matrix that was or is zero.

    Example:
        >>> norms = record_norms({"w": jnp.eye(2)}, exclude=())
        >>> round(float(effective_learning_rate(0.1, {"w": 2 * jnp.eye(2)}, norms)["w"]), 6)
        0.025

    Source:
        Lyle et al., arXiv 2407.01800, section 3.
    """

    def one(start, leaf):
        return None if start is None else learning_rate * safe_divide(start, _norm(leaf)) ** power

    return jax.tree.map(one, norms, params, is_leaf=_is_none)


def normalized_mlp(
    sizes: Sequence[int],
    *,
    norm: str = "layer",
    affine: bool = False,
    activation: Callable[[Array], Array] = jax.nn.relu,
    eps: float = 1e-6,
) -> Layer:
    """Returns dense layers with a norm before every activation: `h = act(norm(W x))`, and a free output layer `out`.

    Args:
        sizes: output sizes, of the hidden layers and of `out`.
        norm: "layer" or "rms".
        affine: whether the norms have gain and offset (`norm_i`: `gain`, `bias`).
        activation: after each norm.
        eps: of the norms.

    Returns:
        A `Layer`: `params = init(key, inputs)` with `dense_0`, ..., `out`; `y = apply(params, x, hidden=False)`, with
        `hidden=True` `(y, list of the activations)`.

    Raises:
        ValueError: `norm` is neither of the two, or there is no hidden layer.

    Example:
        >>> net = normalized_mlp([8, 8, 3])
        >>> params = net.init(jax.random.key(0), 4)
        >>> sorted(params), net.apply(params, jnp.ones((5, 4))).shape
        (['dense_0', 'dense_1', 'out'], (5, 3))

    Source:
        Lyle et al., arXiv 2407.01800, section 4. The initialisation is that of `ops.layers.mlp`.
    """
    if norm not in ("layer", "rms"):
        raise ValueError(f"norm={norm!r} must be 'layer' or 'rms'")
    sizes = tuple(sizes)
    if len(sizes) < 2:
        raise ValueError(f"sizes={sizes} must hold a hidden size and that of the output")
    names = [f"dense_{i}" for i in range(len(sizes) - 1)] + ["out"]
    layers = [dense(size, bias=name == "out", scale=2.0) for name, size in zip(names, sizes, strict=True)]

    def init(key, inputs):
        keys = jax.random.split(key, len(sizes))
        params = {
            n: layer.init(k, i) for n, layer, k, i in zip(names, layers, keys, (inputs, *sizes[:-1]), strict=True)
        }
        if affine:
            offset = {"bias": True} if norm == "layer" else {}
            for i, size in enumerate(sizes[:-1]):
                params[f"norm_{i}"] = {"gain": jnp.ones(size), **{name: jnp.zeros(size) for name in offset}}
        return params

    def apply(params, x, *, hidden=False):
        activations = []
        for i, name in enumerate(names[:-1]):
            values = params[f"norm_{i}"] if affine else {}
            normed = (layer_norm if norm == "layer" else rms_norm)(layers[i].apply(params[name], x), eps=eps, **values)
            x = activation(normed)
            activations.append(x)
        y = layers[-1].apply(params["out"], x)
        return (y, activations) if hidden else y

    return Layer(init, apply)


def dormant_fraction(
    activations: Array, *, tau: float = 0.025, where: Array | None = None, axis_name: str | None = None
) -> Array:
    """Returns the share of units that hardly ever fire: a sign of lost plasticity.

    Unit i is dormant if `mean_x |h_i(x)| <= tau mean_j mean_x |h_j(x)|`.

    Args:
        activations: float [..., H] of one layer.
        tau: >= 0; 0 counts units that are exactly dead.
        where: bool [...], real examples.
        axis_name: mapped axis over which the examples are spread.

    Returns:
        Scalar in the accumulation dtype, without gradient. A layer that is zero everywhere is dormant, 1; without
        examples 0.

    Raises:
        ValueError: `tau` is negative or `where` does not fit.

    Example:
        >>> dormant_fraction(jnp.array([[1.0, 0.0], [3.0, 0.0]])).tolist()
        0.5

    Source:
        Sokar et al., The Dormant Neuron Phenomenon in Deep Reinforcement Learning, arXiv 2302.12902, definition 3.1.
    """
    if tau < 0:
        raise ValueError(f"tau={tau} must not be negative")
    if where is not None and where.shape != activations.shape[:-1]:
        raise ValueError(f"where has shape {where.shape}, expected {activations.shape[:-1]}, the leading dims")
    size = jax.lax.stop_gradient(jnp.abs(activations))
    keep = jnp.ones(activations.shape[:-1], bool) if where is None else where
    total = all_sum(masked_sum(size, keep, axis=tuple(range(activations.ndim - 1))), axis_name)
    count = all_sum(jnp.sum(keep), axis_name)
    share = jnp.mean((total <= tau * jnp.mean(total)).astype(total.dtype))
    return jnp.where(count > 0, share, jnp.zeros_like(share))


def _is_none(x: Any) -> bool:
    return x is None


def _names(path) -> tuple[str, ...]:
    return tuple(jax.tree_util.keystr((part,), simple=True) for part in path)


def _unit(x: Array) -> Array:
    """Returns the array with Frobenius norm 1, in the dtype of accumulation."""
    return safe_normalize(x.astype(compute_dtype(x)), axis=tuple(range(x.ndim)), eps=0.0)


def _norm(x: Array) -> Array:
    """Returns the Frobenius norm, without squares that could overflow."""
    return jnp.sum(_unit(x) * x.astype(compute_dtype(x)))


def _growth(x: Array, start: Array) -> Array:
    return jnp.where(start > 0, safe_divide(_norm(x), start), 1.0)


def _settle(scale: Array, offset: Array, pull: float | None) -> tuple[Array, Array]:
    if pull is None:
        return project_scale_offset(scale, offset)
    return scale + pull * (1 - scale), offset - pull * offset


def _norm_layers(tree: Any, names: tuple[str, str]) -> bool:
    """Tells whether some dict of the tree holds both names."""
    if not isinstance(tree, dict):
        return False
    return all(name in tree for name in names) or any(_norm_layers(value, names) for value in tree.values())


def _map_norm_layers(tree: Any, names: tuple[str, str], function: Callable[..., tuple[Array, Array]]) -> Any:
    if not isinstance(tree, dict):
        return tree
    new = {name: _map_norm_layers(value, names, function) for name, value in tree.items()}
    if all(name in tree for name in names):
        new.update(zip(names, function(*(tree[name] for name in names)), strict=True))
    return new
