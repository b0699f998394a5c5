"""Layer Normalization (2016, arXiv 1607.06450).

Normalise the summed inputs of one layer over the features of a single example instead of over the batch, with a gain
and a bias for each feature: no dependence on the batch, so it serves recurrent networks and batches of one.

    xhat  = (x - mean(x)) / sqrt(mean((x - mean(x))^2) + eps),    y = gain * xhat + bias
    dx    = (dxhat - mean(dxhat) - xhat * mean(dxhat * xhat)) / sqrt(var + eps),    dxhat = gain * dy

All means are over the normalised axes. Statistics are taken in float32 at least, in two passes (E[x^2] - E[x]^2
cancels). In recurrent networks each matrix product has statistics of its own at every time step.

Reconstructed: eps stands inside the root, and a constant input gives the bias even with eps = 0 (the paper has no eps);
masked features. `rms_norm`, `batch_norm` and `weight_norm` are what the paper's table of invariances compares with.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array

from jaxlab.ops.collectives import all_sum, match_varying
from jaxlab.ops.masked import compute_dtype, masked_sum, safe_divide, safe_normalize, zero_where_false
from jaxlab.types import Layer, StatefulLayer


def layer_norm(
    x: Array,
    gain: Array | None = None,
    bias: Array | None = None,
    *,
    axis: int | Sequence[int] = -1,
    eps: float = 1e-5,
    where: Array | None = None,
) -> Array:
    """Returns `gain * (x - mean) / sqrt(var + eps) + bias`, with mean and biased variance over `axis` of each example.

    The gradient is the closed form of the module's docstring: it keeps the normalised values and one scalar for each
    example, and recomputes nothing. Forward-mode differentiation (`jax.jvp`) of it is not defined.

    Args:
        x: float [..., H, ...].
        gain: float, shape of the normalised axes (`[H]`); None = 1.
        bias: like `gain`; None = 0.
        axis: the normalised axis or axes.
        eps: >= 0, inside the root. With 0 a constant input gives the bias.
        where: bool, shape of the normalised axes or of `x`, features that exist; the others are 0 in the result.

    Returns:
        Shape and dtype of `x`.

    Raises:
        ValueError: `axis` is not an axis of `x`, shapes do not fit, or `eps` is negative.

    Example:
        >>> layer_norm(jnp.array([[1.0, 3.0], [10.0, 30.0]]), eps=0.0).tolist()
        [[-1.0, 1.0], [-1.0, 1.0]]

    Source:
        Ba, Kiros, Hinton, arXiv 1607.06450, eq. 3. eps = 1e-5 is a common choice; the paper has none.
    """
    axes = _checked(x, axis, eps)
    where = _features(where, x, axes, "where", full=True)
    gain, bias = _features(gain, x, axes, "gain"), _features(bias, x, axes, "bias")
    return _affine(_standardise(*match_varying((x, where)), axes, float(eps), True), gain, bias, where, x.dtype)


def rms_norm(
    x: Array,
    gain: Array | None = None,
    *,
    axis: int | Sequence[int] = -1,
    eps: float = 1e-6,
    where: Array | None = None,
) -> Array:
    """Returns `gain * x / sqrt(mean(x^2) + eps)`: layer normalisation without centring.

    Args:
        x: float [..., H, ...].
        gain: float, shape of the normalised axes (`[H]`); None = 1.
        axis: the normalised axis or axes.
        eps: >= 0, inside the root. With 0 the zero vector stays zero.
        where: bool, shape of the normalised axes or of `x`, features that exist; the others are 0 in the result.

    Returns:
        Shape and dtype of `x`.

    Raises:
        ValueError: `axis` is not an axis of `x`, shapes do not fit, or `eps` is negative.

    Example:
        >>> rms_norm(jnp.array([3.0, 3.0]), eps=0.0).tolist()
        [1.0, 1.0]

    Source:
        Zhang, Sennrich, Root Mean Square Layer Normalization, arXiv 1910.07467, eq. 4.
    """
    axes = _checked(x, axis, eps)
    where, gain = _features(where, x, axes, "where", full=True), _features(gain, x, axes, "gain")
    return _affine(_standardise(*match_varying((x, where)), axes, float(eps), False), gain, None, where, x.dtype)


def batch_norm(*, momentum: float = 0.9, eps: float = 1e-5, axis_name: str | None = None) -> StatefulLayer:
    """Returns batch normalisation over all axes but the last, with gain, bias and running statistics.

    Training: `y = gain * (x - mean) / sqrt(var + eps) + bias` with the batch's mean and biased variance, and
    `running <- momentum * running + (1 - momentum) * batch`. Otherwise the running statistics are used.

    Args:
        momentum: in [0, 1], of the running statistics.
        eps: >= 0, inside the root.
        axis_name: mapped axis over which the examples are spread: statistics of all shards.

    Returns:
        A `StatefulLayer`: `params, state = init(key, size)`; `y, state = apply(params, state, x, where=None,
        train=False)` with x float `[..., size]` and `where` bool `[...]`, its leading dims. Masked examples count
        nowhere and come out as 0. A training batch without examples uses and keeps the running statistics.

    Raises:
        ValueError: `momentum` or `eps` is out of range; in `apply`, a shape does not fit.

    Example:
        >>> layer = batch_norm()
        >>> params, state = layer.init(jax.random.key(0), 1)
        >>> y, state = layer.apply(params, state, jnp.array([[1.0], [3.0]]), train=True)
        >>> y.round(2).tolist(), round(float(state["mean"][0]), 3)
        ([[-1.0], [1.0]], 0.2)

    Source:
        Ioffe, Szegedy, arXiv 1502.03167, algorithms 1 and 2. Reconstructed: the running variance is the biased one, as
        in Flax, and the mask.
    """
    if not 0 <= momentum <= 1:
        raise ValueError(f"momentum={momentum} must be between 0 and 1")
    if eps < 0:
        raise ValueError(f"eps={eps} must not be negative")

    def init(key, size):
        del key
        params = {"gain": jnp.ones(size), "bias": jnp.zeros(size)}
        return params, {"mean": jnp.zeros(size), "var": jnp.ones(size)}

    def apply(params, state, x, *, where=None, train=False):
        if x.ndim < 2 or params["gain"].shape != x.shape[-1:]:
            raise ValueError(f"x has shape {x.shape}, expected [..., {params['gain'].shape[0]}] with leading axes")
        wide = zero_where_false(x, where).astype(compute_dtype(x))
        axes, row = tuple(range(x.ndim - 1)), (1,) * (x.ndim - 1) + x.shape[-1:]
        mean, var = (state[name].astype(wide.dtype) for name in ("mean", "var"))
        if train:
            keep = jnp.ones(x.shape[:-1], bool) if where is None else where
            count = all_sum(jnp.sum(keep, dtype=wide.dtype), axis_name)
            batch_mean = safe_divide(all_sum(masked_sum(wide, keep, axis=axes), axis_name), count)
            square = jnp.square(wide - batch_mean.reshape(row))
            batch_var = safe_divide(all_sum(masked_sum(square, keep, axis=axes), axis_name), count)
            mean, var = jnp.where(count > 0, batch_mean, mean), jnp.where(count > 0, batch_var, var)
            new = {"mean": mean, "var": var}
            new = jax.tree.map(lambda old, now: momentum * old + (1 - momentum) * now.astype(old.dtype), state, new)
            state = jax.lax.stop_gradient(new)
        y = (wide - mean.reshape(row)) * _inverse_root(var, eps).reshape(row)
        y = y * params["gain"].astype(y.dtype).reshape(row) + params["bias"].astype(y.dtype).reshape(row)
        return zero_where_false(y, where).astype(x.dtype), state

    return StatefulLayer(init, apply)


def weight_norm(v: Array, gain: Array, *, axis: int = 0) -> Array:
    """Returns the weights `gain * v / ||v||`, with the norm over the inputs of each output.

    Args:
        v: float [..., inputs, ..., outputs, ...], directions; a zero vector stays zero.
        gain: float, the shape of `v` without `axis`.
        axis: the inputs.

    Returns:
        Shape and dtype of `v`.

    Raises:
        ValueError: `axis` is not an axis of `v`, or `gain` does not fit.

    Example:
        >>> weight_norm(jnp.array([[3.0], [4.0]]), jnp.array([10.0])).round(2).tolist()
        [[6.0], [8.0]]

    Source:
        Salimans, Kingma, Weight Normalization, arXiv 1602.07868, eq. 2.
    """
    axis = _checked(v, axis, 0.0)[0]
    expected = v.shape[:axis] + v.shape[axis + 1 :]
    if gain.shape != expected:
        raise ValueError(f"gain has shape {gain.shape}, expected {expected}, the shape of v without axis {axis}")
    dtype = compute_dtype(v)
    return (safe_normalize(v.astype(dtype), axis=axis, eps=0.0) * jnp.expand_dims(gain, axis)).astype(v.dtype)


def ln_rnn_cell(hidden: int, *, eps: float = 1e-5) -> Layer:
    """Returns a recurrent cell: `h' = tanh(LN(W_h h + W_x x; gain, bias))`.

    Args:
        hidden: size H of the state.
        eps: of the normalisation.

    Returns:
        A `Layer`: `params = init(key, inputs)`; `h = apply(params, x, h)`, x float `[..., inputs]`, h `[..., H]`.

    Raises:
        ValueError: `hidden` is below 1; in `apply`, a state of another size.

    Example:
        >>> cell = ln_rnn_cell(4)
        >>> params = cell.init(jax.random.key(0), 3)
        >>> steps = jnp.ones((5, 2, 3))  # time, examples, inputs
        >>> h, _ = jax.lax.scan(lambda h, x: (cell.apply(params, x, h), None), jnp.zeros((2, 4)), steps)
        >>> h.shape
        (2, 4)

    Source:
        Ba, Kiros, Hinton, arXiv 1607.06450, eq. 4.
    """
    _check_hidden(hidden)

    def init(key, inputs):
        return {**_matrices(key, inputs, hidden, 1), "norm": _gain_bias(hidden)}

    def apply(params, x, h):
        _check_state(h, hidden)
        return jnp.tanh(_norm(_dot(h, params["w_h"]) + _dot(x, params["w_x"]), params["norm"], eps)).astype(h.dtype)

    return Layer(init, apply)


def ln_lstm_cell(hidden: int, *, eps: float = 1e-5) -> Layer:
    """Returns a long short-term memory with layer normalisation of both products and of the cell.

    `[f, i, o, u] = LN(W_h h) + LN(W_x x) + b`, `c' = sig(f) c + sig(i) tanh(u)`, `h' = sig(o) tanh(LN(c'))`.

    Args:
        hidden: size H of the state.
        eps: of the normalisations.

    Returns:
        A `Layer`: `params = init(key, inputs)`; `h, c = apply(params, x, (h, c))`, x `[..., inputs]`, h, c `[..., H]`.

    Raises:
        ValueError: `hidden` is below 1; in `apply`, a state of another size.

    Example:
        >>> cell = ln_lstm_cell(4)
        >>> params = cell.init(jax.random.key(0), 3)
        >>> h, c = cell.apply(params, jnp.ones((2, 3)), (jnp.zeros((2, 4)), jnp.zeros((2, 4))))
        >>> h.shape, c.shape
        ((2, 4), (2, 4))

    Source:
        Ba, Kiros, Hinton, arXiv 1607.06450, eqs. 20 to 22 (supplement). Statistics are over all 4 H sums of a product.
    """
    _check_hidden(hidden)

    def init(key, inputs):
        norms = {f"norm_{name}": _gain_bias(size) for name, size in (("h", 4 * hidden), ("x", 4 * hidden))}
        params = {**_matrices(key, inputs, hidden, 4), **norms, "norm_c": _gain_bias(hidden)}
        return {**params, "b": jnp.zeros(4 * hidden)}

    def apply(params, x, state):
        h, c = state
        _check_state(h, hidden)
        _check_state(c, hidden)
        sums = _norm(_dot(h, params["w_h"]), params["norm_h"], eps)
        sums = sums + _norm(_dot(x, params["w_x"]), params["norm_x"], eps)
        sums = sums + params["b"].astype(sums.dtype).reshape((1,) * (sums.ndim - 1) + (-1,))
        forget, enter, output, update = jnp.split(sums, 4, axis=-1)
        new = jax.nn.sigmoid(forget) * c.astype(sums.dtype) + jax.nn.sigmoid(enter) * jnp.tanh(update)
        shown = jax.nn.sigmoid(output) * jnp.tanh(_norm(new, params["norm_c"], eps))
        return shown.astype(h.dtype), new.astype(c.dtype)

    return Layer(init, apply)


def ln_gru_cell(hidden: int, *, eps: float = 1e-5) -> Layer:
    """Returns a gated recurrent unit with layer normalisation of every product.

    `[z, r] = LN(W_h h) + LN(W_x x)`, `u = tanh(LN(W x) + sig(r) LN(U h))`, `h' = (1 - sig(z)) h + sig(z) u`.

    Args:
        hidden: size H of the state.
        eps: of the normalisations.

    Returns:
        A `Layer`: `params = init(key, inputs)`; `h = apply(params, x, h)`, x float `[..., inputs]`, h `[..., H]`.

    Raises:
        ValueError: `hidden` is below 1; in `apply`, a state of another size.

    Example:
        >>> cell = ln_gru_cell(4)
        >>> cell.apply(cell.init(jax.random.key(0), 3), jnp.ones((2, 3)), jnp.zeros((2, 4))).shape
        (2, 4)

    Source:
        Ba, Kiros, Hinton, arXiv 1607.06450, eqs. 27 to 29 (supplement).
    """
    _check_hidden(hidden)

    def init(key, inputs):
        params = _matrices(key, inputs, hidden, 3)  # z, r, and the candidate, which has statistics of its own
        norms = {f"norm_{name}_gates": _gain_bias(2 * hidden) for name in "hx"}
        return {**params, **norms, **{f"norm_{name}_update": _gain_bias(hidden) for name in "hx"}}

    def apply(params, x, h):
        _check_state(h, hidden)
        parts = {}
        for name, sums in (("h", _dot(h, params["w_h"])), ("x", _dot(x, params["w_x"]))):
            gates, update = jnp.split(sums, [2 * hidden], axis=-1)
            gates = _norm(gates, params[f"norm_{name}_gates"], eps)
            parts[name] = gates, _norm(update, params[f"norm_{name}_update"], eps)
        z, r = jnp.split(jax.nn.sigmoid(parts["h"][0] + parts["x"][0]), 2, axis=-1)
        new = jnp.tanh(parts["x"][1] + r * parts["h"][1])
        return ((1 - z) * h.astype(new.dtype) + z * new).astype(h.dtype)

    return Layer(init, apply)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _standardise(x: Array, where: Array | None, axes: tuple[int, ...], eps: float, centre: bool) -> Array:
    return _standardise_forward(x, where, axes, eps, centre)[0]


def _standardise_forward(x, where, axes, eps, centre):
    wide = x.astype(compute_dtype(x))
    wide = wide if where is None else jnp.where(where, wide, 0.0)
    if centre:
        wide = wide - _mean(wide, where, axes)
        wide = wide if where is None else jnp.where(where, wide, 0.0)
    scale = _inverse_root(_mean(wide * wide, where, axes), eps)
    unit = wide * scale
    # The empty array carries the dtype of x to the backward pass, which must answer in it.
    return unit, (unit, scale, where, jnp.zeros((0,), x.dtype))


def _standardise_backward(axes, eps, centre, residuals, cotangent):
    del eps
    unit, scale, where, like = residuals
    cotangent = cotangent if where is None else jnp.where(where, cotangent, 0.0)
    pull = cotangent - unit * _mean(cotangent * unit, where, axes)
    if centre:
        pull = pull - _mean(cotangent, where, axes)
    pull = pull * scale
    pull = pull if where is None else jnp.where(where, pull, 0.0)
    return pull.astype(like.dtype), None


_standardise.defvjp(_standardise_forward, _standardise_backward)


def _mean(x: Array, where: Array | None, axes: tuple[int, ...]) -> Array:
    if where is None:
        return jnp.mean(x, axis=axes, keepdims=True)
    count = jnp.sum(jnp.broadcast_to(where, x.shape), axis=axes, keepdims=True, dtype=x.dtype)
    return jnp.sum(x, axis=axes, keepdims=True) / jnp.maximum(count, 1)


def _inverse_root(var: Array, eps: float) -> Array:
    flat = var + eps == 0
    return jnp.where(flat, 0.0, jax.lax.rsqrt(jnp.where(flat, 1.0, var + eps)))


def _affine(unit: Array, gain: Array | None, bias: Array | None, where: Array | None, dtype) -> Array:
    y = unit if gain is None else unit * gain.astype(unit.dtype)
    y = y if bias is None else y + bias.astype(y.dtype)
    return (y if where is None else jnp.where(where, y, 0.0)).astype(dtype)


def _checked(x: Array, axis: int | Sequence[int], eps: float) -> tuple[int, ...]:
    axes = tuple(axis) if isinstance(axis, Sequence) else (operator.index(axis),)
    if not axes or any(not -x.ndim <= a < x.ndim for a in axes) or len({a % x.ndim for a in axes}) != len(axes):
        raise ValueError(f"axis={axis} must name distinct axes of an array of shape {x.shape}")
    if eps < 0:
        raise ValueError(f"eps={eps} must not be negative")
    return tuple(sorted(a % x.ndim for a in axes))


def _features(value: Array | None, x: Array, axes: tuple[int, ...], name: str, *, full: bool = False) -> Array | None:
    """Brings an array with one entry for each feature to the rank of `x`."""
    if value is None or (full and value.shape == x.shape):
        return value
    expected = tuple(x.shape[a] for a in axes)
    if value.shape != expected:
        raise ValueError(f"{name} has shape {value.shape}, expected {expected}, the normalised axes of x")
    return jnp.reshape(value, [x.shape[a] if a in axes else 1 for a in range(x.ndim)])


def _check_hidden(hidden: int) -> None:
    if hidden < 1:
        raise ValueError(f"hidden={hidden} must be at least 1")


def _check_state(state: Array, hidden: int) -> None:
    if state.shape[-1:] != (hidden,):
        raise ValueError(f"the state has shape {state.shape}, expected [..., hidden={hidden}]")


def _matrices(key: Array, inputs: int, hidden: int, parts: int) -> dict[str, Array]:
    """Orthogonal recurrent matrices and inputs of unit variance (the paper is silent for its cells)."""
    key_h, key_x = jax.random.split(key)
    orthogonal = jax.nn.initializers.orthogonal()
    w_h = jnp.concatenate([orthogonal(k, (hidden, hidden)) for k in jax.random.split(key_h, parts)], axis=1)
    return {"w_h": w_h, "w_x": jax.random.normal(key_x, (inputs, parts * hidden)) * inputs**-0.5}


def _gain_bias(size: int) -> dict[str, Array]:
    return {"gain": jnp.ones(size), "bias": jnp.zeros(size)}


def _norm(x: Array, params: dict[str, Array], eps: float) -> Array:
    return layer_norm(x, params["gain"], params["bias"], eps=eps)


def _dot(x: Array, w: Array) -> Array:
    return jnp.matmul(x, w.astype(x.dtype), preferred_element_type=compute_dtype(x))
