"""What is measured of each kernel, at the sizes of a small training run; `quick` is for trying the machinery."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlab import kernels
from jaxlab.bench.runner import Contest
from jaxlab.kernels import expert_ffn as expert_ffn_function

EXPERT_TILES = (512, 128, 64, 32)


def attention(quick: bool) -> Iterator[Contest]:
    """Causal attention against `jax.nn.dot_product_attention`, and a sliding window against itself without one."""
    rng = np.random.default_rng(0)
    for length in (256,) if quick else (2048, 4096):
        q, k, v = (jnp.asarray(rng.normal(size=(1, length, 4, 64)), jnp.float32) for _ in range(3))
        ours = lambda q, k, v: kernels.attention(q, k, v, causal=True)
        peer = lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=True)
        yield from _both("attention", {"T": length, "heads": 4, "size": 64}, ours, (q, k, v), "jax.nn", peer)
    length, window = (512, 128) if quick else (8192, 1024)
    q, k, v = (jnp.asarray(rng.normal(size=(1, length, 4, 64)), jnp.float32) for _ in range(3))
    near = lambda q, k, v: kernels.attention(q, k, v, causal=True, window=window)
    full = lambda q, k, v: kernels.attention(q, k, v, causal=True)
    yield from _both("attention", {"T": length, "window": window}, near, (q, k, v), "full causal", full)


def top_k_routing(quick: bool) -> Iterator[Contest]:
    """The whole routing against its parts written with `jax.lax.top_k`."""
    rng = np.random.default_rng(0)
    for experts, k in ((8, 2), (64, 8)):
        tokens = 256 if quick else 8192
        scores = jnp.asarray(rng.normal(size=(tokens, experts)), jnp.float32)

        def ours(scores, k=k):
            chosen = kernels.top_k_routing(scores, k, renormalize=True)
            return chosen.weights, chosen.counts, chosen.order

        def peer(scores, k=k, experts=experts):
            weights, ids = jax.lax.top_k(jax.nn.softmax(scores), k)
            one_hot = jax.nn.one_hot(ids.reshape(-1), experts)
            place = jnp.cumsum(one_hot, axis=0) * one_hot
            return weights / weights.sum(-1, keepdims=True), one_hot.sum(0), place.sum(-1)

        params = {"tokens": tokens, "experts": experts, "k": k, "pass": "fwd"}
        yield Contest("top_k_routing", params, ours, (scores,), ("lax.top_k and one-hot", peer))


def expert_ffn(quick: bool) -> Iterator[Contest]:
    """Dropless SwiGLU experts against all experts on all tokens; ceiling: a dense layer of the same arithmetic."""
    tokens, size, hidden = (128, 32, 64) if quick else (2048, 512, 1024)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(tokens, size)), jnp.float32)
    for experts in (4,) if quick else (8, 32):
        shapes = {"gate": (experts, size, hidden), "up": (experts, size, hidden), "down": (experts, hidden, size)}
        w = {n: jnp.asarray(rng.normal(size=s) * s[1] ** -0.5, jnp.float32) for n, s in shapes.items()}
        scores = jnp.asarray(rng.normal(size=(tokens, experts)), jnp.float32)
        plan = kernels.plan_from_top_k(kernels.top_k_routing(scores, 2, renormalize=True), scores)
        combine = jnp.zeros((tokens, experts)).at[plan.token, plan.expert].add(plan.weight)
        counts = np.asarray(plan.counts)
        executed = sum(_executed_rows(int(n)) for n in counts) / counts.sum()

        def ours(x, w, plan=plan):
            return expert_ffn_function(x, w, plan)

        def naive(x, w, combine=combine):
            def add(y, xs):
                gate, up, down, c = xs
                return y + c[:, None] * ((jax.nn.silu(x @ gate) * (x @ up)) @ down), None

            return jax.lax.scan(add, jnp.zeros_like(x), (w["gate"], w["up"], w["down"], combine.T))[0]

        def dense(x, w):
            return (jax.nn.silu(x @ w["gate"][0]) * (x @ w["up"][0])) @ w["down"][0]

        params = {"tokens": tokens, "experts": experts, "k": 2, "dtype": "float32"}
        twice = jnp.concatenate([x, x])
        yield from _both("expert_ffn", params, ours, (x, w), "all experts on all tokens", naive,
                         ceiling=(dense, (twice, {n: leaf[:1] for n, leaf in w.items()})), work=executed)  # fmt: skip


def grouped_matmul(quick: bool) -> Iterator[Contest]:
    """The grouped product against `jax.lax.ragged_dot`; ceiling: one product of the same rows."""
    rows, size, columns = (256, 32, 32) if quick else (4096, 256, 256)
    rng = np.random.default_rng(0)
    for groups in (4,) if quick else (8, 64):
        lhs = jnp.asarray(rng.normal(size=(rows, size)), jnp.float32)
        rhs = jnp.asarray(rng.normal(size=(groups, size, columns)), jnp.float32)
        sizes = rng.multinomial(rows, np.full(groups, 1 / groups)).astype(np.int32)
        ours = lambda a, b, sizes=sizes: kernels.grouped_matmul(a, b, sizes)
        peer = lambda a, b, sizes=sizes: jax.lax.ragged_dot(a, b, sizes)
        executed = sum(_executed_rows(int(n)) for n in sizes) / rows
        yield from _both("grouped_matmul", {"rows": rows, "groups": groups, "K": size, "N": columns}, ours, (lhs, rhs),
                         "lax.ragged_dot", peer, ceiling=(jnp.matmul, (lhs, rhs[0])), work=executed)  # fmt: skip


def selective_scan(quick: bool) -> Iterator[Contest]:
    """The selective scan against `lax.scan` with automatic differentiation."""
    length = 256 if quick else 2048
    rng = np.random.default_rng(0)
    u, delta = (jnp.asarray(rng.normal(size=(2, length, 64)), jnp.float32) for _ in range(2))
    into, out = (jnp.asarray(rng.normal(size=(2, length, 16)), jnp.float32) for _ in range(2))
    decay = -jnp.exp(jnp.asarray(rng.normal(size=(64, 16)), jnp.float32))

    def form(implementation):
        return lambda *args: kernels.selective_scan(*args, implementation=implementation)

    args = (u, jax.nn.softplus(delta), decay, into, out)
    params = {"B": 2, "L": length, "D": 64, "N": 16}
    yield from _both("selective_scan", params, form("xla"), args, "lax.scan", form("reference"))


def attention_pool(quick: bool) -> Iterator[Contest]:
    """Pooling of 16 bags of very different sizes against segment sums of the weighted values."""
    count, size = (2000, 32) if quick else (100_000, 512)
    rng = np.random.default_rng(0)
    sizes = rng.multinomial(count, rng.dirichlet(np.full(16, 0.5)))
    ids = jnp.asarray(np.repeat(np.arange(16), sizes), jnp.int32)
    values = jnp.asarray(rng.normal(size=(count, size)), jnp.float32)
    scores = jnp.asarray(rng.normal(size=count), jnp.float32)

    def form(implementation):
        return lambda v, s: kernels.attention_pool(v, s, ids, 16, implementation=implementation)

    params = {"instances": count, "bags": 16, "D": size}
    yield from _both("attention_pool", params, form("xla"), (values, scores), "segment sums", form("reference"))


BENCHES: dict[str, Callable[[bool], Iterator[Contest]]] = {
    f.__name__: f for f in (attention, top_k_routing, expert_ffn, grouped_matmul, selective_scan, attention_pool)
}


def _both(case, params, ours, args, name, peer, *, ceiling=None, work=None) -> Iterator[Contest]:
    """Yields the forward pass alone, then with the gradients of all arguments."""
    yield Contest(case, {**params, "pass": "fwd"}, ours, args, (name, peer), ceiling, work)
    more = None if ceiling is None else (_graded(ceiling[0], len(ceiling[1])), ceiling[1])
    both = {**params, "pass": "fwd_bwd"}
    yield Contest(case, both, _graded(ours, len(args)), args, (name, _graded(peer, len(args))), more, work)


def _graded(function: Callable[..., Any], count: int) -> Callable[..., Any]:
    """Returns value and gradients of a scalar whose cotangent is not constant."""
    return jax.value_and_grad(lambda *args: jnp.sum(jnp.sin(function(*args))), argnums=tuple(range(count)))


def _executed_rows(count: int) -> int:
    """Returns how many rows the cascade of tiles computes for a group of `count`."""
    done = 0
    for size in EXPERT_TILES:
        number = -(-(count - done) // size) if size == EXPERT_TILES[-1] else (count - done) // size
        done += number * size
    return done
