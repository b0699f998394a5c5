"""Mamba's selective scan: a linear recurrence whose decay and input depend on the step, in memory O(B L D)."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array

from jaxlab.kernels._select import choose
from jaxlab.ops.collectives import match_varying
from jaxlab.ops.masked import compute_dtype, zero_where_false
from jaxlab.ops.sharding import rows_mixed

_CHUNK = 64  # steps between the states that the backward starts from


def selective_scan(
    u: Array,
    delta: Array,
    A: Array,
    B: Array,
    C: Array,
    D: Array | None = None,
    *,
    where: Array | None = None,
    initial_state: Array | None = None,
    reverse: bool = False,
    return_state: bool = False,
    implementation: str = "auto",
) -> Array | tuple[Array, Array]:
    """Returns `y_t = sum_n C_tn h_tn + D u_t` with `h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t` in every channel.

    Arithmetic is float32. The backward recomputes the states chunk by chunk, so that memory is that of the arguments
    and results, without the factor N of the states.

    Args:
        u: [B, L, D] input.
        delta: [B, L, D] step sizes, after softplus.
        A: [D, N], decay rates, negative in Mamba (`-exp(A_log)`).
        B: [B, L, N], how the input enters the state.
        C: [B, L, N], how the state is read.
        D: [D], weight of the input's way around the state; None = 0.
        where: bool [B, L], real steps; the others leave the state as it is and give 0.
        initial_state: [B, D, N] state before the first step (before the last one with `reverse`); None = 0.
        reverse: from the last step to the first.
        return_state: also return the state after all steps.
        implementation: "auto", "reference" (step by step, differentiated by JAX) or "xla".

    Returns:
        [B, L, D] in the dtype of `u`; with `return_state` also [B, D, N] in the dtype of accumulation.

    Raises:
        ValueError: shapes do not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> ones = jnp.ones((1, 3, 1))
        >>> selective_scan(ones, ones, jnp.zeros((1, 1)), ones, ones).ravel().tolist()
        [1.0, 2.0, 3.0]

    Source:
        Gu, Dao, Mamba, arXiv 2312.00752, algorithm 2; code state-spaces/mamba.
    """
    chosen = choose("selective_scan", implementation, ("reference", "xla"))
    _check(u, delta, A, B, C, D, where, initial_state)
    dtype = compute_dtype(u, delta, A, B, C)
    masked = [zero_where_false(x, where).astype(dtype) for x in (u, delta, B, C)]
    start = jnp.zeros((u.shape[0], *A.shape), dtype) if initial_state is None else initial_state.astype(dtype)
    args = match_varying(*masked, A.astype(dtype), start)
    run = _reference if chosen == "reference" else functools.partial(_xla, chunk=_CHUNK)
    y, state = rows_mixed(functools.partial(run, reverse=reverse))(*args)
    if D is not None:
        y = y + masked[0] * D.astype(dtype)[None, None, :]
    y = y.astype(u.dtype)
    return (y, state) if return_state else y


def _check(u, delta, A, B, C, D, where, initial_state) -> None:
    if u.ndim != 3 or delta.shape != u.shape:
        raise ValueError(f"u and delta must both be [B, L, D], got {u.shape} and {delta.shape}")
    if A.ndim != 2 or A.shape[0] != u.shape[2]:
        raise ValueError(f"A has shape {A.shape}, expected ({u.shape[2]}, N)")
    expected = (*u.shape[:2], A.shape[1])
    for name, x in (("B", B), ("C", C)):
        if x.shape != expected:
            raise ValueError(f"{name} has shape {x.shape}, expected {expected}")
    if D is not None and D.shape != u.shape[2:]:
        raise ValueError(f"D has shape {D.shape}, expected {u.shape[2:]}")
    if where is not None and where.shape != u.shape[:2]:
        raise ValueError(f"where has shape {where.shape}, expected {u.shape[:2]}")
    if initial_state is not None and initial_state.shape != (u.shape[0], *A.shape):
        raise ValueError(f"initial_state has shape {initial_state.shape}, expected {(u.shape[0], *A.shape)}")


@functools.partial(jax.jit, static_argnames=("reverse",))
def _reference(u, delta, B, C, A, start, *, reverse):
    def step(h, xs):
        u, delta, B, C = xs
        h = jnp.exp(delta[:, :, None] * A[None]) * h + (delta * u)[:, :, None] * B[:, None, :]
        return h, jnp.einsum("bdn,bn->bd", h, C)

    time_first = [jnp.moveaxis(x, 1, 0) for x in (u, delta, B, C)]
    state, y = jax.lax.scan(step, start, time_first, reverse=reverse)
    return jnp.moveaxis(y, 0, 1), state


@functools.partial(jax.jit, static_argnames=("reverse", "chunk"))
def _xla(u, delta, B, C, A, start, *, reverse, chunk):
    """Cuts time into chunks [chunks, chunk, B, ...], channels last so that a step is one loop over vectors."""
    length = u.shape[1]
    if 0 in u.shape or A.shape[1] == 0:
        return match_varying(jnp.zeros_like(u), start)
    chunk = min(chunk, length)
    pad = -length % chunk

    def cut(x):
        x = jnp.moveaxis(jnp.flip(x, 1) if reverse else x, 1, 0)
        x = jnp.pad(x, ((0, pad), (0, 0), (0, 0)))  # a step of size 0 changes nothing
        return x.reshape(-1, chunk, *x.shape[1:])

    y, state = _scan(*(cut(x) for x in (u, delta, B, C)), A.T, jnp.moveaxis(start, 1, 2))
    y = jnp.moveaxis(y.reshape(-1, *y.shape[2:])[:length], 0, 1)
    return jnp.flip(y, 1) if reverse else y, jnp.moveaxis(state, 1, 2)


@jax.custom_vjp
def _scan(u, delta, B, C, A, start):
    """u, delta [c, s, B, D], B, C [c, s, B, N], A [N, D], start [B, N, D] give y [c, s, B, D] and the last state."""
    (y, _), state = _forward(u, delta, B, C, A, start)
    return y, state


def _forward(u, delta, B, C, A, start):
    """Also returns the state before each chunk."""

    def chunk(h, xs):
        h_new, y = jax.lax.scan(lambda h, x: _step(A, h, x), h, xs)
        return h_new, (y, h)

    state, outputs = jax.lax.scan(chunk, start, (u, delta, B, C))
    return outputs, state


def _step(A, h, xs):
    u, delta, B, C = xs
    h = jnp.exp(delta[:, None, :] * A[None]) * h + (delta * u)[:, None, :] * B[:, :, None]
    return h, jnp.sum(h * C[:, :, None], axis=1)


def _scan_forward(u, delta, B, C, A, start):
    (y, before), state = _forward(u, delta, B, C, A, start)
    return (y, state), (u, delta, B, C, A, before)


def _scan_backward(saved, cotangents):
    u, delta, B, C, A, before = saved
    dy, d_state = cotangents

    def chunk(carry, xs):
        u, delta, B, C, dy, h = xs
        _, states = jax.lax.scan(lambda h, x: (_step(A, h, x)[0], h), h, (u, delta, B, C))

        def step(carry, xs):
            dh, dA = carry
            u, delta, B, C, dy, h = xs
            decay = jnp.exp(delta[:, None, :] * A[None])
            entered = delta * u
            dC = jnp.sum((decay * h + entered[:, None, :] * B[:, :, None]) * dy[:, None, :], axis=2)
            dh = dh + C[:, :, None] * dy[:, None, :]
            d_log_decay = dh * decay * h
            dA = dA + jnp.sum(d_log_decay * delta[:, None, :], axis=0)
            d_entered = jnp.sum(dh * B[:, :, None], axis=1)
            d_delta = jnp.sum(d_log_decay * A[None], axis=1) + u * d_entered
            dB = jnp.sum(dh * entered[:, None, :], axis=2)
            return (dh * decay, dA), (delta * d_entered, d_delta, dB, dC)

        return jax.lax.scan(step, carry, (u, delta, B, C, dy, states), reverse=True)

    (d_start, dA), (du, d_delta, dB, dC) = jax.lax.scan(
        chunk, (d_state, jnp.zeros_like(A)), (u, delta, B, C, dy, before), reverse=True
    )
    return du, d_delta, dB, dC, dA, d_start


_scan.defvjp(_scan_forward, _scan_backward)
