"""Merge, Then Compress: Demystify Efficient SMoE with Hints from Its Routing Policy (MC-SMoE, 2023, arXiv 2310.01334).

Merge the experts of a trained mixture without training: those that are used most become the centres of groups, the
others join the centre whose router logits are most like theirs, neurons are aligned, and every group becomes one
expert, the mean of its members by use. The router stays: several of its logits lead to one merged expert. Merged
experts are of low rank, so that a low-rank and a row-sparse part compress them further.

    alignment    argmax over permutations p of sum_i C[i, p(i)],  C = in_r in_e^T + out_r^T out_e, r the first member
    similarity   cosine of the router's logits of two experts over calibration tokens
    groups       over all layers the largest K frequencies are centres; the most used of every layer counts as 1
    merging      W_g = sum_e f_e W_e / (sum_e f_e + eps)
    compression  W = L R + S,  rank ceil(ratio h w / (h + w)) of the truncated SVD; rows of S are pruned in training by
                 the mean of |S dL/dS|, smoothed

Of the official variants: the global number of groups, router logits as base, alignment by weights. One variant indexes
the similarities by a loop counter instead of the expert: not followed. Recovery by distillation: `distill`.

Reconstructed: the gate's part of C for gated networks; grouping and numbers of groups on the host.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxlab.ops.assignment import linear_assignment
from jaxlab.ops.collectives import match_varying
from jaxlab.ops.masked import compute_dtype, safe_normalize
from jaxlab.ops.sharding import rows_mixed
from jaxlab.types import RoutingPlan

# The axis that counts the neurons in the parameters of one expert; None = has none.
_NEURON_AXIS = {"up": 1, "gate": 1, "down": 0, "up_bias": 0, "gate_bias": 0, "down_bias": None}


def merge_experts(
    experts: Any, labels: Array, usage: Array, *, num_groups: int, align: bool = True, eps: float = 1e-7
) -> Any:
    """Returns one expert for each group: the mean of its members by use, after alignment of their neurons.

    Args:
        experts: dict of `up` [E, d, f] and `down` [E, f, d], and where there are `gate` [E, d, f], `up_bias` and
            `gate_bias` [E, f], `down_bias` [E, d].
        labels: int [E], the group of each expert (`group_experts`).
        usage: float [E] >= 0, how often each is used; only ratios within a group count. Equal ones give the plain mean.
        num_groups: G.
        align: whether neurons are permuted to match those of the group's first member (`match_neurons`).
        eps: > 0, added to the sum of a group's usage.

    Returns:
        The dict with a leading axis G. A group that is not used at all gives 0, as officially.

    Raises:
        ValueError: a shape does not fit or an option is out of range.

    Example:
        >>> experts = {"up": jnp.array([[[1.0]], [[3.0]]]), "down": jnp.array([[[2.0]], [[4.0]]])}
        >>> run = jax.jit(lambda *args: merge_experts(*args, num_groups=1))
        >>> merged = run(experts, jnp.array([0, 0]), jnp.array([0.25, 0.75]))
        >>> round(float(merged["up"][0, 0, 0]), 4)
        2.5

    Source:
        Li et al., arXiv 2310.01334, section 3.1; code UNITES-Lab/MC-SMoE.
    """
    _check(experts)
    number = experts["up"].shape[0]
    if labels.shape != (number,) or usage.shape != (number,):
        raise ValueError(f"labels and usage must be [{number}], got {labels.shape} and {usage.shape}")
    if num_groups < 1 or not eps > 0:
        raise ValueError(f"num_groups={num_groups} must be at least 1 and eps={eps} positive")
    args = match_varying(experts, jnp.asarray(labels), jnp.asarray(usage))
    return rows_mixed(_merge)(*args, num_groups=num_groups, align=align, eps=eps)


def match_neurons(reference: Any, expert: Any) -> Array:
    """Returns the permutation of an expert's neurons that matches those of a reference best.

    Args:
        reference: dict of one expert: `up` [d, f], `down` [f, d] and perhaps `gate` [d, f].
        expert: the same of another.

    Returns:
        int32 [f], for `permute_neurons`; of no gradient.

    Raises:
        ValueError: the two do not have the same shapes.

    Example:
        >>> a = {"up": jnp.array([[1.0, 2.0, 3.0]]), "down": jnp.eye(3)[:, :1]}
        >>> jax.jit(lambda a: match_neurons(a, permute_neurons(a, jnp.array([2, 0, 1]))))(a).tolist()
        [1, 2, 0]

    Source:
        Li et al., arXiv 2310.01334, section 3.1 (weight matching of Git Re-Basin, arXiv 2209.04836).
    """
    _check(reference, ndim=2)
    if jax.tree.map(jnp.shape, reference) != jax.tree.map(jnp.shape, expert):
        raise ValueError("reference and expert must be dicts of the same shapes")
    both = [{n: jax.lax.stop_gradient(p[n]) for n in ("up", "gate", "down") if n in p} for p in (reference, expert)]
    dtype = compute_dtype(reference["up"])
    product = lambda a, b: jnp.matmul(a.astype(dtype), b.astype(dtype), precision=jax.lax.Precision.HIGHEST)
    terms = [product(both[0][n].T, both[1][n]) for n in ("up", "gate") if n in reference]
    return linear_assignment(sum(terms) + product(both[0]["down"], both[1]["down"].T), maximize=True)


def permute_neurons(expert: Any, permutation: Array) -> Any:
    """Returns the expert with its neurons in another order; its function stays the same.

    Args:
        expert: dict of one expert, as in `match_neurons`, with biases or without.
        permutation: int [f], old index of each new neuron.

    Returns:
        The permuted dict.

    Example:
        >>> a = {"up": jnp.array([[1.0, 2.0]]), "down": jnp.array([[3.0], [4.0]])}
        >>> permute_neurons(a, jnp.array([1, 0]))["down"].tolist()
        [[4.0], [3.0]]
    """
    _check(expert, ndim=2)
    axes = {n: _NEURON_AXIS[n] for n in expert}
    return {n: w if axes[n] is None else jnp.take(w, permutation, axis=axes[n]) for n, w in expert.items()}


def merge_plan(plan: RoutingPlan, labels: Array, *, num_groups: int) -> RoutingPlan:
    """Returns the plan of the old router for merged experts.

    A token may stand twice for one merged expert, if both its experts went there: its weights then add up.

    Args:
        plan: of E experts.
        labels: int [E], the group of each.
        num_groups: G.

    Returns:
        A `RoutingPlan` over G experts; `scores` are added up over a group, `logits` joined by logsumexp.

    Raises:
        ValueError: a shape does not fit.

    Example:
        >>> from jaxlab.moe import dense_weights, plan_from_weights
        >>> run = lambda w, labels: dense_weights(merge_plan(plan_from_weights(w), labels, num_groups=2))
        >>> jax.jit(run)(jnp.array([[0.25, 0.0, 0.75], [0.0, 1.0, 0.0]]), jnp.array([1, 0, 1])).tolist()
        [[0.0, 1.0], [1.0, 0.0]]
    """
    if labels.shape != plan.counts.shape or num_groups < 1:
        raise ValueError(f"labels must be {plan.counts.shape} and num_groups={num_groups} positive, got {labels.shape}")
    labels = jnp.asarray(labels)
    names = [field.name for field in dataclasses.fields(RoutingPlan)]
    fields = match_varying({n: getattr(plan, n) for n in names}, labels)
    return RoutingPlan(**rows_mixed(_merge_plan)(*fields, num_groups=num_groups))


def router_similarity(logits: Array, *, where: Array | None = None) -> Array:
    """Returns the cosine of every two experts' router logits over the tokens.

    Args:
        logits: float [T, E], such as a plan's.
        where: bool [T], tokens that exist.

    Returns:
        [E, E] in the dtype of `logits`.

    Raises:
        ValueError: a shape does not fit.

    Example:
        >>> jax.jit(router_similarity)(jnp.array([[1.0, 2.0, 0.0], [0.0, 0.0, 5.0]])).tolist()
        [[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    """
    if logits.ndim != 2 or (where is not None and where.shape != logits.shape[:1]):
        shape = None if where is None else where.shape
        raise ValueError(f"logits and where must be [T, E] and [T], got {logits.shape} and {shape}")
    keep = jnp.ones(logits.shape[0], bool) if where is None else where
    wide = jnp.where(keep[:, None], logits, jnp.zeros((), logits.dtype)).astype(compute_dtype(logits))
    cosine = lambda z: jnp.matmul(z.T, z, precision=jax.lax.Precision.HIGHEST)
    return rows_mixed(cosine)(safe_normalize(wide, axis=0)).astype(logits.dtype)


def groups_per_layer(usage: np.ndarray, average_groups: int, *, mergeable: np.ndarray | None = None) -> np.ndarray:
    """Returns how many groups each layer gets, so that the most used experts of all layers are centres (host).

    Args:
        usage: float [L, E], the share of assignments of each expert in its layer.
        average_groups: mean number of groups of the mergeable layers, 1 to E.
        mergeable: bool [L], layers that may be merged; the others keep all E. None = all.

    Returns:
        int64 [L], at least 1 each.

    Raises:
        ValueError: a shape does not fit, or `average_groups` is out of range or leaves no room beyond one a layer.

    Example:
        >>> groups_per_layer(np.array([[0.5, 0.4, 0.1], [0.9, 0.05, 0.05]]), 1).tolist()
        [1, 1]

    Source:
        Code UNITES-Lab/MC-SMoE: a threshold at the (K + 1)-th largest frequency, so that with ties there are fewer.
    """
    usage = np.array(usage, np.float64)
    if usage.ndim != 2 or not 1 <= average_groups <= usage.shape[1]:
        raise ValueError(f"average_groups={average_groups} must be between 1 and E, usage [L, E], got {usage.shape}")
    layers, experts = usage.shape
    merged = np.ones(layers, bool) if mergeable is None else np.asarray(mergeable, bool)
    if merged.shape != (layers,):
        raise ValueError(f"mergeable has shape {merged.shape}, expected ({layers},)")
    total = average_groups * int(merged.sum()) + experts * int((~merged).sum())
    usage[np.arange(layers), usage.argmax(axis=1)] = 1
    usage[~merged] = 1
    ordered = np.sort(usage.reshape(-1))[::-1]
    if total >= ordered.size:
        return np.full(layers, experts)
    if average_groups == 1:  # the centres are exactly those that count as 1
        return np.where(merged, 1, experts)
    threshold = ordered[total]
    if threshold >= 1:
        raise ValueError(f"average_groups={average_groups} is too few: more experts than that count as 1")
    return (usage > threshold).sum(axis=1)


def group_experts(
    usage: np.ndarray, similarity: np.ndarray, *, num_groups: int, capacity: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the group of each expert of a layer, around its most used ones (host).

    Args:
        usage: float [E].
        similarity: float [E, E], of `router_similarity`.
        num_groups: G, 1 to E.
        capacity: largest size of a group; None = any.

    Returns:
        `(labels, centres)`: int64 [E] in 0 .. G - 1, and the ids [G] of the centres, the most used first.

    Raises:
        ValueError: a shape does not fit or an option is out of range.

    Example:
        >>> similarity = np.array([[1.0, 0.0, 0.9], [0.0, 1.0, 0.2], [0.9, 0.2, 1.0]])
        >>> group_experts(np.array([0.5, 0.4, 0.1]), similarity, num_groups=2)[0].tolist()
        [0, 1, 0]

    Source:
        Li et al., arXiv 2310.01334, section 3.1; code UNITES-Lab/MC-SMoE.
    """
    usage, similarity = np.asarray(usage, np.float64), np.asarray(similarity, np.float64)
    experts = len(usage)
    if usage.ndim != 1 or similarity.shape != (experts, experts):
        raise ValueError(f"usage and similarity must be [E] and [E, E], got {usage.shape} and {similarity.shape}")
    if not 1 <= num_groups <= experts:
        raise ValueError(f"num_groups={num_groups} must be between 1 and num_experts={experts}")
    if capacity is not None and capacity * num_groups < experts:
        raise ValueError(f"capacity={capacity} times num_groups={num_groups} is less than the {experts} experts")
    order = np.argsort(-usage, kind="stable")
    centres = order[:num_groups]
    labels, size = np.full(experts, -1), np.ones(num_groups, int)
    labels[centres] = np.arange(num_groups)
    for e in order[num_groups:]:
        liking = similarity[e, centres].copy()
        if capacity is not None:
            liking[size >= capacity] = -np.inf
        labels[e] = liking.argmax()
        size[labels[e]] += 1
    return labels, centres


def low_rank_sparse(w: Array, *, ratio: float = 0.15) -> dict[str, Array]:
    """Returns `w = left right + sparse` with the best left and right of their rank.

    Args:
        w: float [h, w], a merged expert's matrix.
        ratio: in (0, 1], of the numbers of `left` and `right` to those of `w`; the rank is ceil(ratio h w / (h + w)).

    Returns:
        A dict of `left` [h, r], `right` [r, w] and `sparse` [h, w] (dense at first; `prune_rows` empties its rows), all
        trained. Singular values are shared out evenly.

    Raises:
        ValueError: `w` is no matrix or `ratio` is out of range.

    Example:
        >>> parts = jax.jit(low_rank_sparse)(jnp.ones((4, 4)))
        >>> parts["left"].shape, bool(np.abs(parts["sparse"]).max() < 1e-5)
        ((4, 1), True)

    Source:
        Li et al., arXiv 2310.01334, section 3.2 (LoSparse, arXiv 2306.11222).
    """
    if w.ndim != 2 or 0 in w.shape:
        raise ValueError(f"w must be a matrix, got shape {w.shape}")
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio={ratio} must be in (0, 1]")
    rank = min(*w.shape, math.ceil(ratio * w.shape[0] * w.shape[1] / (w.shape[0] + w.shape[1])))
    return rows_mixed(_low_rank_sparse)(w, rank=rank)


def kept_rows(
    step: Array, *, steps: int, final: float = 0.25, warmup: int = 100, begin: int = 1, end: int = 4
) -> Array:
    """Returns the share of rows that `prune_rows` keeps: 1 at first, then down by a cubic to `final`.

    `final + (1 - final) (1 - (t - begin warmup) / (steps - (begin + end) warmup))^3` from `begin warmup` on until
    `end warmup` before the end.

    Args:
        step: int [].
        steps: of the whole training.
        final: in [0, 1].
        warmup: unit of the two ends.
        begin: of them before pruning begins.
        end: of them with `final` at the end.

    Returns:
        float32 [].

    Raises:
        ValueError: the two ends leave nothing between them, or `final` is out of range.

    Example:
        >>> [round(v, 3) for v in jax.jit(lambda t: kept_rows(t, steps=1000))(jnp.array([100, 350, 600])).tolist()]
        [1.0, 0.344, 0.25]
    """
    if not 0 <= final <= 1:
        raise ValueError(f"final={final} must be in [0, 1]")
    length = steps - (begin + end) * warmup
    if length <= 0:
        raise ValueError(f"steps={steps} must be more than {begin + end} times warmup={warmup}")
    done = (jnp.asarray(step, jnp.float32) - begin * warmup) / length
    return final + (1 - final) * (1 - jnp.clip(done, 0, 1)) ** 3


def prune_rows(
    sparse: Any, grads: Any, state: Any = None, *, keep: Array | float, decay: float = 0.85
) -> tuple[Any, Any]:
    """Returns the sparse parts after an optimiser step, with the rows of least importance set to 0, and its memory.

    Importance of a row: mean of |s ds|, smoothed: `average <- decay average + (1 - decay) last`, `last` being that of
    the step before, as officially. The threshold is the entry that has `1 - keep` of all entries of all matrices below.

    Args:
        sparse: pytree of matrices [h, w].
        grads: of the loss by them.
        state: what the last call returned; None at first.
        keep: share of the entries that stay, of `kept_rows`.
        decay: of the average.

    Returns:
        `(sparse, state)`.

    Raises:
        ValueError: a leaf is no matrix.

    Example:
        >>> s = {"w": jnp.array([[1.0, 1.0], [3.0, 3.0]])}
        >>> state = {"average": s, "last": s}
        >>> jax.jit(lambda s: prune_rows(s, s, state, keep=0.25))(s)[0]["w"].tolist()
        [[0.0, 0.0], [3.0, 3.0]]

    Source:
        Code UNITES-Lab/MC-SMoE and LoSparse (beta1 = 0.85, without an uncertainty term).
    """
    for leaf in jax.tree.leaves(sparse):
        if leaf.ndim != 2:
            raise ValueError(f"sparse must hold matrices, got shape {leaf.shape}")
    now = jax.tree.map(lambda s, g: jnp.abs(s.astype(compute_dtype(s)) * g.astype(compute_dtype(s))), sparse, grads)
    zeros = jax.tree.map(jnp.zeros_like, now)
    state = {"average": zeros, "last": zeros} if state is None else state
    average = jax.tree.map(lambda a, b: decay * a + (1 - decay) * b, state["average"], state["last"])
    rows = [jnp.mean(leaf, axis=1) for leaf in jax.tree.leaves(average)]
    sizes = [np.full(leaf.shape[0], leaf.shape[1]) for leaf in jax.tree.leaves(average)]
    everyone, size = jnp.concatenate(rows), np.concatenate(sizes)
    order = jnp.argsort(everyone)
    below = jnp.cumsum(jnp.asarray(size)[order])
    cut = jnp.floor(float(size.sum()) * (1 - jnp.asarray(keep, jnp.float32)) + 1e-4).astype(below.dtype)
    threshold = everyone[order][jnp.searchsorted(below, cut, side="left", method="compare_all")]
    limit = jnp.where(cut > 0, threshold, -jnp.inf)
    masks = jax.tree.unflatten(jax.tree.structure(sparse), [row < limit for row in rows])
    pruned = jax.tree.map(lambda s, gone: jnp.where(gone[:, None], jnp.zeros((), s.dtype), s), sparse, masks)
    return pruned, {"average": average, "last": now}


def _check(experts, ndim=3):
    if set(experts) - set(_NEURON_AXIS) or not {"up", "down"} <= set(experts):
        raise ValueError(f"experts must have up and down, and may have gate and biases, got {sorted(experts)}")
    if experts["up"].ndim != ndim or experts["down"].shape != (
        *experts["up"].shape[:-2],
        experts["up"].shape[-1],
        experts["up"].shape[-2],
    ):
        raise ValueError(f"up and down do not fit together: {experts['up'].shape} and {experts['down'].shape}")


def _merge(experts, labels, usage, *, num_groups, align, eps):
    number = labels.shape[0]
    if align:
        first = jnp.argmax(labels[None, :] == labels[:, None], axis=1)
        reference = {n: w[first] for n, w in experts.items()}
        experts = jax.vmap(lambda r, e: permute_neurons(e, match_neurons(r, e)))(reference, experts)
    dtype = compute_dtype(usage)
    member = (labels[None, :] == jnp.arange(num_groups)[:, None]).astype(dtype)
    share = member * usage.astype(dtype)[None]
    share = share / (jnp.sum(share, axis=1, keepdims=True) + eps)

    def mean(w):
        flat = w.reshape(number, -1).astype(compute_dtype(w))
        merged = jnp.matmul(share.astype(flat.dtype), flat, precision=jax.lax.Precision.HIGHEST)
        return merged.reshape(num_groups, *w.shape[1:]).astype(w.dtype)

    return jax.tree.map(mean, experts)


def _merge_plan(fields, labels, *, num_groups):
    experts = labels.shape[0]
    used = fields["expert"] < experts
    merged = jnp.where(used, labels[jnp.minimum(fields["expert"], experts - 1)], num_groups).astype(jnp.int32)
    order = jnp.lexsort((fields["token"], merged))
    counts = match_varying(jnp.zeros(num_groups, jnp.int32), merged)[0].at[merged].add(1, mode="drop")
    member = labels[None, :] == jnp.arange(num_groups)[:, None]
    scores = jnp.matmul(fields["scores"], member.T.astype(fields["scores"].dtype), precision=jax.lax.Precision.HIGHEST)
    wide = jnp.where(member[None], fields["logits"][:, None, :], -jnp.inf)
    logits = jnp.where(member.any(1)[None], jax.nn.logsumexp(wide, axis=2), jnp.finfo(wide.dtype).min)
    rows = {"token": fields["token"][order], "expert": merged[order], "weight": fields["weight"][order]}
    return {**rows, "counts": counts, "scores": scores, "logits": logits, "dropped": fields["dropped"]}


def _low_rank_sparse(w, *, rank):
    wide = w.astype(compute_dtype(w))
    u, s, v = jnp.linalg.svd(wide, full_matrices=False)
    root = jnp.sqrt(s[:rank])
    left, right = u[:, :rank] * root[None], root[:, None] * v[:rank]
    rest = wide - jnp.matmul(left, right, precision=jax.lax.Precision.HIGHEST)
    return {"left": left.astype(w.dtype), "right": right.astype(w.dtype), "sparse": rest.astype(w.dtype)}
