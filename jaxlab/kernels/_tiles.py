"""Rows in tiles: what the kernels over groups of rows share."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp


def cascade(tiles, count, tile, carry):
    """Runs `carry = tile(size, done, carry)` over `count` rows, in as few tiles as the sizes allow."""
    done = jnp.zeros_like(count)
    for size in tiles:
        rest = count - done
        number = (rest + size - 1) // size if size == tiles[-1] else rest // size
        step = functools.partial(lambda i, c, size, done: tile(size, done + i * size, c), size=size, done=done)
        carry = jax.lax.fori_loop(jnp.zeros_like(number), number, step, carry)
        done = done + number * size
    return carry


def dot(a, b, contract_a, contract_b, dtype):
    return jax.lax.dot_general(a, b, (((contract_a,), (contract_b,)), ((), ())), preferred_element_type=dtype)


def pack(x):
    """Returns bfloat16 as uint16: XLA for CPU would turn the whole array to float32 around every slice of it."""
    return jax.lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.bfloat16 else x


def unpack(bits, dtype):
    return jax.lax.bitcast_convert_type(bits, dtype) if dtype == jnp.bfloat16 else bits
