"""Feed-forward experts over a routing plan: gather, two products, weighted combination, nothing dropped."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import Array

from jaxlab.kernels._expert_kernels import backward, forward
from jaxlab.kernels._grouped_pallas import FORMS
from jaxlab.kernels._select import by_platform, choose
from jaxlab.kernels._tiles import cascade, dot, pack, unpack
from jaxlab.ops.collectives import match_varying
from jaxlab.ops.masked import compute_dtype
from jaxlab.ops.sharding import rows_mixed
from jaxlab.types import RoutingPlan

_TILES = (512, 128, 64, 32)  # rows of one product, largest first; what is left of an expert goes to the next size

_ACTIVATIONS = {
    "swiglu": lambda gate, up: jax.nn.silu(gate) * up,
    "gelu": lambda up: jax.nn.gelu(up, approximate=False),
    "relu": jax.nn.relu,
}


def expert_ffn(
    x: Array,
    weights: Mapping[str, Array],
    plan: RoutingPlan,
    *,
    activation: str = "swiglu",
    implementation: str = "auto",
) -> Array:
    """Returns `y[t] = sum of plan.weight * f_e(x[t])` over the assignments (t, e) of the plan.

    `f_e(x) = act(x up_e) down_e`, and `f_e(x) = (silu(x gate_e) * (x up_e)) down_e` for "swiglu". Products are taken in
    the dtype of `x` and accumulate in float32. Differentiable by `x`, `weights` and `plan.weight`; the backward
    recomputes the hidden layer, so that only the arguments are kept. Tokens without an assignment give exactly 0 in
    value and gradient, whatever stands in their row of `x`.

    Args:
        x: [T, d], floating.
        weights: dict of `up` [E, d, f], `down` [E, f, d] and, for "swiglu", `gate` [E, d, f]; floating.
        plan: `RoutingPlan` of A assignments over E experts.
        activation: "swiglu", "gelu" (exact) or "relu".
        implementation: "reference" (every expert on every token), "xla" (only what the plan asks for), "pallas"
            (kernels for TPU and GPU) or "auto" (the kernels on their platforms, elsewhere "xla").

    Returns:
        [T, d] in the dtype of `x`.

    Raises:
        ValueError: a name is unknown, or weights, x and plan do not fit together.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxlab.kernels import plan_from_top_k, top_k_routing
        >>> logits = jnp.array([[2.0, 0.0], [0.0, 2.0]])
        >>> plan = plan_from_top_k(top_k_routing(logits, 1, renormalize=True), logits)
        >>> weights = {"up": jnp.array([[[1.0]], [[10.0]]]), "down": jnp.ones((2, 1, 1))}
        >>> expert_ffn(jnp.ones((2, 1)), weights, plan, activation="relu").ravel().tolist()
        [1.0, 10.0]
    """
    chosen = choose("expert_ffn", implementation, ("reference", "xla", "pallas"))
    _check(x, weights, plan, activation)
    args = match_varying(x, dict(weights), plan.token, plan.expert, plan.weight, plan.counts)
    if 0 in (x.shape[0], plan.token.shape[0]):
        return jnp.zeros_like(args[0])
    if chosen == "reference":
        return rows_mixed(functools.partial(_reference, activation=activation))(*args)
    return rows_mixed(functools.partial(_sorted, activation=activation, tiles=_TILES, chosen=chosen))(*args)


def _check(x, weights, plan, activation) -> None:
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation={activation!r} must be one of {', '.join(map(repr, _ACTIVATIONS))}")
    names = {*_inputs(activation), "down"}
    if set(weights) != names:
        raise ValueError(f"weights of {activation!r} must be {sorted(names)}, got {sorted(weights)}")
    if x.ndim != 2:
        raise ValueError(f"x must be [tokens, features], got shape {x.shape}")
    experts, size = plan.counts.shape[-1], x.shape[1]
    hidden = weights["up"].shape[-1]
    for name, w in weights.items():
        expected = (experts, hidden, size) if name == "down" else (experts, size, hidden)
        if w.shape != expected:
            raise ValueError(f"weights[{name!r}] has shape {w.shape}, expected {expected}")
    if not plan.token.shape == plan.expert.shape == plan.weight.shape or plan.token.ndim != 1:
        raise ValueError(
            f"plan.token, plan.expert and plan.weight must be [A], got {plan.token.shape}, {plan.expert.shape} and "
            f"{plan.weight.shape}"
        )


def _inputs(activation: str) -> tuple[str, ...]:
    return ("gate", "up") if activation == "swiglu" else ("up",)


@functools.partial(jax.jit, static_argnames=("activation",))
def _reference(x, weights, token, expert, weight, counts, *, activation):
    """Every expert on every token, combined by a dense matrix [T, E]."""
    dtype, experts = compute_dtype(x), counts.shape[0]
    empty = match_varying(jnp.zeros((x.shape[0], experts), dtype), x)[0]
    combine = empty.at[token, expert].add(weight.astype(dtype), mode="drop")
    used = (empty.at[token, expert].add(1.0, mode="drop") > 0).any(1, keepdims=True)
    x_used = jnp.where(used, x, jnp.zeros((), x.dtype))
    w = {name: leaf.astype(x.dtype) for name, leaf in weights.items()}
    inputs = [jnp.einsum("td,edf->tef", x_used, w[n], preferred_element_type=dtype) for n in _inputs(activation)]
    hidden = _ACTIVATIONS[activation](*inputs).astype(x.dtype)
    each = jnp.einsum("tef,efd->ted", hidden, w["down"], preferred_element_type=dtype)
    y = jnp.einsum("te,ted->td", combine, each)
    return jnp.where(used, y, 0.0).astype(x.dtype)


@functools.partial(jax.jit, static_argnames=("activation", "tiles", "chosen"))
def _sorted(x, weights, token, expert, weight, counts, *, activation, tiles, chosen):
    """The sorted assignments, expert by expert."""
    del expert
    rows = token.shape[0]
    tiles = tuple(size for size in tiles if size <= rows) or (rows,)
    return _grouped((activation, tiles, chosen), x, weights, token, weight, counts)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped(static, *args):
    return _on_platform(static, _forward, lambda product, outer, *rest: forward(product, *rest))(*args)


def _grouped_forward(static, *args):
    return _grouped(static, *args), args


def _grouped_backward(static, saved, dy):
    dx, d_weights, d_weight = _on_platform(static, _backward, backward)(*saved, dy)
    return dx, d_weights, None, d_weight, None


_grouped.defvjp(_grouped_forward, _grouped_backward)


def _on_platform(static, xla, kernels):
    activation, tiles, chosen = static
    described = _ACTIVATIONS[activation], _inputs(activation)
    forms = {name: functools.partial(kernels, *form, *described) for name, form in FORMS.items()}
    # Under vmap the loops' trip counts would become those of the longest member, and their slices gathers.
    return jax.custom_batching.sequential_vmap(
        by_platform(chosen, functools.partial(xla, (activation, tiles)), **forms)
    )


def _forward(static, x, weights, token, weight, counts):
    activation, tiles = static
    dtype = compute_dtype(x)
    token, weight = (jnp.pad(a, (0, tiles[-1])) for a in (token, weight.astype(dtype)))
    x_bits = pack(x)

    def expert(y, xs):
        w_bits, first, count = xs
        w = {name: unpack(leaf, weights[name].dtype).astype(x.dtype) for name, leaf in w_bits.items()}

        def tile(size, done, y):
            rows, valid = _rows(token, first + done, size, count - done)
            x_tile = _take(x_bits, rows, valid, x.dtype)
            inputs = [dot(x_tile, w[name], 1, 0, dtype) for name in _inputs(activation)]
            hidden = _ACTIVATIONS[activation](*inputs).astype(x.dtype)
            out = dot(hidden, w["down"], 1, 0, dtype)
            gate = jax.lax.dynamic_slice_in_dim(weight, first + done, size)[:, None]
            return y.at[rows].add(jnp.where(valid, gate * out, 0.0), mode="drop")

        return cascade(tiles, count, tile, y), None

    start = match_varying(jnp.zeros(x.shape, dtype), x)[0]
    packed = jax.tree.map(pack, weights)
    y, _ = jax.lax.scan(expert, start, (packed, jnp.cumsum(counts) - counts, counts))
    return y.astype(x.dtype)


def _backward(static, x, weights, token, weight, counts, dy):
    activation, tiles = static
    dtype, names, assignments = compute_dtype(x), _inputs(activation), token.shape[0]
    token, gates = (jnp.pad(a, (0, tiles[-1])) for a in (token, weight.astype(dtype)))
    x_bits, dy_bits = pack(x), pack(dy)

    def expert(carry, xs):
        w_bits, first, count = xs
        w = {name: unpack(leaf, weights[name].dtype).astype(x.dtype) for name, leaf in w_bits.items()}

        def tile(size, done, carry):
            dx, d_gates, dw = carry
            rows, valid = _rows(token, first + done, size, count - done)
            x_tile = _take(x_bits, rows, valid, x.dtype)
            dy_tile = _take(dy_bits, rows, valid, dy.dtype)
            inputs = [dot(x_tile, w[name], 1, 0, dtype) for name in names]
            hidden, pull = jax.vjp(_ACTIVATIONS[activation], *inputs)
            hidden = hidden.astype(x.dtype)
            gate = jax.lax.dynamic_slice_in_dim(gates, first + done, size)[:, None]
            gate = jnp.where(valid, gate, 0.0)
            d_hidden = dot(dy_tile, w["down"], 1, 1, dtype)
            # Rows of the next expert are set to 0 here and written by it later.
            d_gate = jnp.sum(d_hidden * hidden.astype(dtype), axis=1)
            d_gates = jax.lax.dynamic_update_slice_in_dim(d_gates, d_gate, first + done, axis=0)
            d_inputs = [d.astype(x.dtype) for d in pull(gate * d_hidden)]
            scaled = (gate * dy_tile.astype(dtype)).astype(x.dtype)
            added = {name: dot(x_tile, d, 0, 0, dtype) for name, d in zip(names, d_inputs, strict=True)}
            added["down"] = dot(hidden, scaled, 0, 0, dtype)
            dw = jax.tree.map(jnp.add, dw, added)
            dx_tile = sum(dot(d, w[name], 1, 1, dtype) for name, d in zip(names, d_inputs, strict=True))
            return dx.at[rows].add(jnp.where(valid, dx_tile, 0.0), mode="drop"), d_gates, dw

        zeros = match_varying({name: jnp.zeros(leaf.shape[1:], dtype) for name, leaf in weights.items()}, x)[0]
        dx, d_gates, dw = cascade(tiles, count, tile, (*carry, zeros))
        return (dx, d_gates), {name: pack(leaf.astype(weights[name].dtype)) for name, leaf in dw.items()}

    start = match_varying((jnp.zeros(x.shape, dtype), jnp.zeros(gates.shape, dtype)), x)[0]
    packed = jax.tree.map(pack, weights)
    (dx, d_gates), dw = jax.lax.scan(expert, start, (packed, jnp.cumsum(counts) - counts, counts))
    dw = {name: unpack(leaf, weights[name].dtype) for name, leaf in dw.items()}
    return dx.astype(x.dtype), dw, d_gates[:assignments].astype(weight.dtype)


def _rows(token, start, size, left):
    """Returns the tokens [size] of a tile, and as a column which of its rows belong to the expert."""
    return jax.lax.dynamic_slice_in_dim(token, start, size), (jnp.arange(size) < left)[:, None]


def _take(bits, rows, valid, dtype):
    tile = unpack(jnp.take(bits, rows, axis=0, mode="clip"), dtype)
    return jnp.where(valid, tile, jnp.zeros((), dtype))
