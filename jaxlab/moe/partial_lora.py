"""Exploiting Mixture-of-Experts Redundancy Unlocks Multimodal Generative Abilities (2025, arXiv 2503.22517).

A pretrained mixture of text experts learns to write tokens of a new modality with few new parameters: its experts are
redundant, so that low-rank updates in them suffice; the updates act on tokens of the new modality only, so that text is
what it was, to the bit; and the new embeddings start where the geometry of the new tokens fits that of the text.

    partial LoRA   y = x W + m (alpha / r) (x A) B,  m = 1 for new tokens, 0 for text; W frozen, B = 0 at first
    start          E_new = diag(1 / q) T' X, at the mean length of X; T the entropic Gromov-Wasserstein coupling of the
                   distances among text embeddings X and among codebook vectors Z
    coupling       least of sum |C1_ik - C2_jl|^2 T_ij T_kl - eps H(T): T <- Sinkhorn(2 [f(C1) + f(C2) - 2 C1 T C2])
    redundancy     mean cosine of the outputs of two experts on the same tokens
    pathways       P(e | modality), and the Jensen-Shannon divergence of two modalities

Reconstructed, but for partial LoRA and entropic Gromov-Wasserstein, which are well known: ranks, what is aligned, the
start from matched mean distances, the measures. A dense network becomes experts by `dense_to_emoe` with k = E.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxlab.moe.experts import layer_experts
from jaxlab.ops.collectives import all_sum, match_varying
from jaxlab.ops.masked import compute_dtype, safe_divide, safe_normalize
from jaxlab.ops.sharding import rows_mixed
from jaxlab.ops.transport import sinkhorn
from jaxlab.types import Layer, RoutingPlan


def init_lora(key: Array, inputs: int, outputs: int, *, rank: int = 16) -> dict[str, Array]:
    """Returns a low-rank update that is 0 at first: `a` [inputs, r] from N(0, 1 / r), `b` [r, outputs] of zeros.

    Args:
        key: of `a`.
        inputs: size of x.
        outputs: size of y.
        rank: r, at least 1.

    Returns:
        A dict of `a` and `b`; for experts, `jax.vmap` over keys.

    Raises:
        ValueError: `rank` is less than 1.

    Example:
        >>> jax.tree.map(jnp.shape, jax.eval_shape(lambda key: init_lora(key, 6, 4, rank=2), jax.random.key(0)))
        {'a': (6, 2), 'b': (2, 4)}
    """
    if rank < 1:
        raise ValueError(f"rank={rank} must be at least 1")
    return {"a": jax.random.normal(key, (inputs, rank)) * rank**-0.5, "b": jnp.zeros((rank, outputs))}


def partial_lora(x: Array, w: Array, lora: Any, new: Array, *, alpha: float = 16.0) -> Array:
    """Returns `x W + m (alpha / r) (x A) B`: a frozen product, and its update for tokens of the new modality.

    Args:
        x: float [..., n].
        w: float [n, m], frozen: it gets no gradient, while x does through it.
        lora: of `init_lora`.
        new: bool [...], tokens of the new modality; all others get exactly `x W`.
        alpha: scale; divided by the rank.

    Returns:
        [..., m] in the dtype of `x`.

    Raises:
        ValueError: shapes do not fit.

    Example:
        >>> lora = {"a": jnp.ones((1, 1)), "b": jnp.ones((1, 1))}
        >>> run = jax.jit(lambda x, new: partial_lora(x, jnp.ones((1, 1)), lora, new, alpha=2.0))
        >>> run(jnp.ones((2, 1)), jnp.array([True, False])).tolist()
        [[3.0], [1.0]]

    Source:
        arXiv 2503.22517, section 3 (partial LoRA: InternLM-XComposer2, arXiv 2401.16420).
    """
    if new.shape != x.shape[:-1]:
        raise ValueError(f"new has shape {new.shape}, expected {x.shape[:-1]}")
    shapes = (lora["a"].shape[0], lora["b"].shape[1])
    if w.ndim != 2 or w.shape != shapes or x.shape[-1] != w.shape[0]:
        raise ValueError(
            f"x must be [..., n], w [n, m], a [n, r], b [r, m], got n, m of x {x.shape}, w {w.shape}, {shapes}"
        )
    dtype = compute_dtype(x)
    product = lambda x, w: jnp.matmul(x, w.astype(x.dtype), preferred_element_type=dtype)
    frozen = product(x, jax.lax.stop_gradient(w))
    # Text does not even pass through the update, so that nothing there, infinities included, can reach it.
    inputs = jnp.where(new[..., None], x, jnp.zeros((), x.dtype))
    update = product(product(inputs, lora["a"]).astype(x.dtype), lora["b"]) * (alpha / lora["a"].shape[1])
    return jnp.where(new[..., None], frozen + update, frozen).astype(x.dtype)


def partial_lora_moe(params: Any, lora: Any, x: Array, plan: RoutingPlan, new: Array, *, alpha: float = 16.0) -> Array:
    """Returns the output of frozen SwiGLU experts with a partial LoRA on each of their matrices.

    Args:
        params: dict of `gate`, `up` [E, d, f] and `down` [E, f, d], frozen.
        lora: dict of the same names, each of `init_lora` with a leading axis E.
        x: float [T, d].
        plan: of the frozen router.
        new: bool [T], tokens of the new modality.
        alpha: as in `partial_lora`.

    Returns:
        [T, d] in the dtype of `x`: text tokens get what the experts gave before.

    Raises:
        ValueError: a shape does not fit.

    Example:
        >>> from jaxlab import moe
        >>> experts = moe.swiglu_experts(2, 3)
        >>> def run(key):
        ...     params = experts.init(key, 4)
        ...     keys = jax.random.split(key, 2)
        ...     lora = {n: jax.vmap(lambda k: init_lora(k, *w.shape[1:], rank=1))(keys) for n, w in params.items()}
        ...     plan = moe.plan_from_weights(jnp.ones((5, 2)))
        ...     return partial_lora_moe(params, lora, jnp.ones((5, 4)), plan, jnp.arange(5) > 2)
        >>> jax.eval_shape(run, jax.random.key(0)).shape
        (5, 4)
    """
    if set(params) != {"gate", "up", "down"} or set(lora) != set(params):
        raise ValueError(f"params and lora must have gate, up and down, got {sorted(params)} and {sorted(lora)}")
    if new.shape != x.shape[:1]:
        raise ValueError(f"new has shape {new.shape}, expected {x.shape[:1]}")

    def one(p, rows):
        rows, flag = rows[:, :-1], rows[:, -1] > 0
        apply = lambda name, h: partial_lora(h, p["frozen"][name], p["lora"][name], flag, alpha=alpha)
        return apply("down", jax.nn.silu(apply("gate", rows)) * apply("up", rows))

    # Experts see rows alone, so that the modality travels with them.
    marked = jnp.concatenate([x, new[:, None].astype(x.dtype)], axis=1)
    experts = layer_experts(plan.num_experts, Layer(lambda key, size: None, one))
    return experts.apply({"frozen": params, "lora": lora}, marked, plan)


def entropic_gw(
    c1: Array, c2: Array, *, eps: float = 5e-3, steps: int = 50, iterations: int = 100
) -> tuple[Array, Array]:
    """Returns a coupling of two spaces that keeps distances, by entropic Gromov-Wasserstein.

    Least of `sum |C1_ik - C2_jl|^2 T_ij T_kl - eps H(T)` over couplings with equal weights, by projected steps: each
    takes the Sinkhorn coupling of the present `gw_gradient`. It finds a local minimum. The start is the coupling of
    points by their sorted distances to all others: the uniform coupling says nothing about which point is which.

    Args:
        c1: float [n, n], distances in the first space, of the scale of `c2` (both divided by their maximum).
        c2: float [m, m], in the second.
        eps: > 0, weight of the entropy, times the largest entry of the gradient.
        steps: of the outer loop.
        iterations: of Sinkhorn in each.

    Returns:
        `(coupling [n, m], value [])` in the dtype of accumulation; rows sum to 1 / n, columns to 1 / m. No gradient.

    Raises:
        ValueError: a shape does not fit or an option is out of range.

    Example:
        >>> coupling, value = jax.eval_shape(entropic_gw, jnp.ones((3, 3)), jnp.ones((4, 4)))
        >>> coupling.shape, value.shape
        ((3, 4), ())

    Source:
        Peyre, Cuturi, Solomon, Gromov-Wasserstein Averaging of Kernel and Distance Matrices, ICML 2016.
    """
    for name, c in (("c1", c1), ("c2", c2)):
        if c.ndim != 2 or c.shape[0] != c.shape[1] or not c.shape[0]:
            raise ValueError(f"{name} must be square, got shape {c.shape}")
    if not eps > 0 or steps < 1 or iterations < 1:
        raise ValueError(f"eps={eps} must be positive, steps={steps} and iterations={iterations} at least 1")
    dtype = compute_dtype(c1, c2)
    c1, c2 = (jax.lax.stop_gradient(c).astype(dtype) for c in (c1, c2))
    return rows_mixed(_entropic_gw)(*match_varying(c1, c2), eps=eps, steps=steps, iterations=iterations)


def gw_gradient(c1: Array, c2: Array, coupling: Array) -> Array:
    """Returns the gradient of `sum_ijkl |C1_ik - C2_jl|^2 T_ij T_kl` by T, for symmetric distances.

    `2 [ (C1 * C1) p 1' + 1 (q' (C2 * C2)) - 2 C1 T C2 ]` with the marginals p and q of T.

    Args:
        c1: float [n, n].
        c2: float [m, m].
        coupling: float [n, m].

    Returns:
        [n, m]; half of its inner product with the coupling is the value.

    Raises:
        ValueError: shapes do not fit.

    Example:
        >>> pair = jnp.array([[0.0, 1.0], [1.0, 0.0]])
        >>> jax.jit(gw_gradient)(pair, jnp.zeros((1, 1)), jnp.array([[0.5], [0.5]])).tolist()
        [[1.0], [1.0]]
    """
    if coupling.ndim != 2 or c1.shape != (coupling.shape[0],) * 2 or c2.shape != (coupling.shape[1],) * 2:
        raise ValueError(
            f"c1, c2 and coupling must be [n, n], [m, m], [n, m], got {c1.shape}, {c2.shape}, {coupling.shape}"
        )
    product = lambda a, b: jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
    rows = product(c1 * c1, jnp.sum(coupling, axis=1))
    columns = product(c2 * c2, jnp.sum(coupling, axis=0))
    return 2 * (rows[:, None] + columns[None, :] - 2 * product(product(c1, coupling), c2))


def barycentric_embedding(coupling: Array, x: Array) -> Array:
    """Returns embeddings of new tokens: the mean of the text embeddings that each is coupled with.

    Args:
        coupling: float [n, m], of `entropic_gw`.
        x: float [n, d], text embeddings.

    Returns:
        [m, d] in the dtype of `x`, every row at the mean length of the rows of x; 0 where a mean is 0.

    Raises:
        ValueError: shapes do not fit.

    Example:
        >>> jax.jit(barycentric_embedding)(jnp.array([[0.5, 0.0], [0.0, 0.5]]), jnp.array([[3.0], [-1.0]])).tolist()
        [[2.0], [-2.0]]
    """
    if coupling.ndim != 2 or x.ndim != 2 or coupling.shape[0] != x.shape[0]:
        raise ValueError(f"coupling and x must be [n, m] and [n, d], got {coupling.shape} and {x.shape}")
    wide = x.astype(compute_dtype(x))
    mean = jnp.matmul(coupling.T.astype(wide.dtype), wide, precision=jax.lax.Precision.HIGHEST)
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(wide)))
    unit = safe_divide(wide, jnp.broadcast_to(largest, wide.shape))
    square = jnp.sum(unit * unit, axis=1)
    length = jnp.mean(jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)) * largest
    return (length * safe_normalize(mean, eps=1e-30)).astype(x.dtype)


def expert_output_similarity(outputs: Array, *, where: Array | None = None) -> Array:
    """Returns how redundant experts are: the mean cosine of two different experts' outputs on the same token.

    Args:
        outputs: float [E, T, d].
        where: bool [T], tokens that exist.

    Returns:
        Scalar in at least float32, in [-1, 1]; 0 for one expert or no token.

    Raises:
        ValueError: a shape does not fit.

    Example:
        >>> round(float(jax.jit(expert_output_similarity)(jnp.ones((3, 2, 4)))), 4)
        1.0
    """
    if outputs.ndim != 3 or (where is not None and where.shape != outputs.shape[1:2]):
        raise ValueError(f"outputs must be [E, T, d] and where [T], got shape {outputs.shape}")
    experts, tokens, _ = outputs.shape
    keep = jnp.ones(tokens, bool) if where is None else where
    wide = jnp.where(keep[None, :, None], outputs, jnp.zeros((), outputs.dtype)).astype(compute_dtype(outputs))
    unit = safe_normalize(wide)
    # All pairs at once: |sum of unit vectors|^2 counts each pair twice and each vector with itself.
    together = jnp.sum(jnp.sum(unit, axis=0) ** 2, axis=1) - jnp.sum(unit**2, axis=(0, 2))
    pairs = jnp.sum(keep, dtype=unit.dtype) * (experts * (experts - 1))
    return safe_divide(jnp.sum(together), pairs)


def modality_routing(plan: RoutingPlan, modality: Array, num_modalities: int, *, axis_name: str | None = None) -> Array:
    """Returns the distribution of each modality's assignments over the experts.

    Args:
        plan: a routing plan.
        modality: int [T] in 0 .. M - 1; others are left out.
        num_modalities: M.
        axis_name: mapped axis over which the tokens are spread.

    Returns:
        float32 [M, E], rows sum to 1, or 0 for a modality without tokens; no gradient.

    Raises:
        ValueError: a shape does not fit or `num_modalities` is less than 1.

    Example:
        >>> from jaxlab.moe import plan_from_weights
        >>> run = jax.jit(lambda w, kind: modality_routing(plan_from_weights(w), kind, 2))
        >>> run(jnp.eye(3), jnp.array([0, 1, 1])).tolist()
        [[1.0, 0.0, 0.0], [0.0, 0.5, 0.5]]
    """
    if modality.shape != plan.scores.shape[:1]:
        raise ValueError(f"modality has shape {modality.shape}, expected {plan.scores.shape[:1]}")
    if num_modalities < 1:
        raise ValueError(f"num_modalities={num_modalities} must be at least 1")
    args = match_varying(plan.token, plan.expert, jnp.asarray(modality), plan.counts)
    counts = all_sum(rows_mixed(_count)(*args, num_modalities=num_modalities), axis_name)
    return safe_divide(counts, jnp.broadcast_to(jnp.sum(counts, axis=1, keepdims=True), counts.shape))


def js_divergence(p: Array, q: Array) -> Array:
    """Returns the Jensen-Shannon divergence of two distributions: 0 if equal, log 2 if disjoint.

    `(KL(p | m) + KL(q | m)) / 2` with `m = (p + q) / 2`.

    Args:
        p: float >= 0 [..., E], sums to 1.
        q: float >= 0 [..., E].

    Returns:
        [...] in the dtype of `p`.

    Raises:
        ValueError: shapes differ.

    Example:
        >>> round(float(jax.jit(js_divergence)(jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0]))), 4)
        0.6931
    """
    if p.shape != q.shape or not p.ndim:
        raise ValueError(f"p and q must have one shape [..., E], got {p.shape} and {q.shape}")
    dtype = p.dtype
    p, q = p.astype(compute_dtype(p)), q.astype(compute_dtype(q))
    middle = (p + q) / 2

    def part(a):
        some = a > 0
        ratio = jnp.where(some, a, 1.0) / jnp.where(some, middle, 1.0)
        return jnp.sum(a * jnp.log(ratio), axis=-1)

    return ((part(p) + part(q)) / 2).astype(dtype)


def _entropic_gw(c1, c2, *, eps, steps, iterations):
    # Sorted distances to all others, brought to the same number, tell points apart without knowing the other space.
    grid = jnp.linspace(0.0, 1.0, 16, dtype=c1.dtype)
    profile = lambda c: jnp.quantile(c, grid, axis=1).T
    first, second = profile(c1), profile(c2)
    apart = jnp.sum((first[:, None, :] - second[None, :, :]) ** 2, axis=2)
    step = lambda coupling, _: (_couple(gw_gradient(c1, c2, coupling), eps, iterations), None)
    coupling, _ = jax.lax.scan(step, _couple(apart, eps, iterations), None, length=steps)
    value = jnp.sum(gw_gradient(c1, c2, coupling) * coupling) / 2
    return coupling, value


def _couple(cost, eps, iterations):
    # The scale of the entropy follows that of the costs; what is equal for a whole row or column changes nothing.
    cost = cost - jnp.min(cost)
    largest = jnp.max(cost)
    return sinkhorn(safe_divide(cost, jnp.broadcast_to(largest, cost.shape)), epsilon=eps, iterations=iterations)


def _count(token, expert, modality, like, *, num_modalities):
    experts = like.shape[0]
    kind = modality[token]
    known = (kind >= 0) & (kind < num_modalities) & (expert < experts)
    zeros = match_varying(jnp.zeros((num_modalities + 1, experts), jnp.float32), expert)[0]
    target = jnp.where(known, kind, num_modalities)
    return zeros.at[target, jnp.minimum(expert, experts - 1)].add(jnp.where(known, 1.0, 0.0))[:num_modalities]
