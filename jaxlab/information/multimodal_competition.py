"""Balancing Multimodal Training Through Game-Theoretic Regularization.

MCR, 2024, arXiv 2411.07335. Modalities trained jointly compete, and the one that learns faster leaves the others
undertrained. From I(X1, X2; Y) = I(X1; Y | X2) + I(X2; Y | X1) + what they share: a game in which each encoder raises
what its own modality contributes and lowers what its rival does, and a contrastive term for what is shared.

    z_m'      = z_m[pi],  pi a random permutation of the batch        (destroys what modality m says about its row)
    J_m       = mean JSD( softmax f(.., z_m', ..) || softmax f(.., z_m, ..) )       (<= log 2)
    game      = sum_m ( -J_m with gradient to encoder m alone + mean over rivals k of J_m with gradient to k alone )
    loss      = CE(fused) + unimodal_weight sum_m CE(head of m) + game_weight game
                + contrastive_weight NT-Xent of all latents by label
                + bottleneck_weight ||z - b(sg(fused logits))||^2

The two forms of J_m are the same number, so the VALUE of the game is 0, and the gradients by the prediction with
everything intact cancel: it is a direction of training, not a quantity to watch. Watch `modality_contributions`.

Weights, permutations and temperature are those of the official CREMA-D run (which has no bottleneck; the code feeds it
the fused logits where the paper says the label), the heads' weight 1 that of its configuration. The gradient is stopped
at what the fusion receives: hand over shares of the logits and the weights of a stopped branch stay, too, hand over
latents and they learn; the official code has both. Reconstructed: the mean over rivals for more than two modalities,
which keeps the game zero-sum, and the mask.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import optax
from jax import Array

from jaxlab.ops.collectives import all_sum, axis_index, gather_rows, global_mean
from jaxlab.ops.masked import compute_dtype, masked_logsumexp, safe_divide, safe_normalize, zero_where_false
from jaxlab.ops.reduction import reduce_terms
from jaxlab.ops.sharding import rows_mixed

MODES = ("greedy", "independent", "collaborative")


def mcr_loss(
    parts: Sequence[Array],
    labels: Array,
    *,
    key: Array,
    fuse: Callable[[Sequence[Array]], Array] | None = None,
    unimodal_logits: Sequence[Array] = (),
    latents: Sequence[Array] = (),
    reconstruct: Callable[[Array], Array] | None = None,
    unimodal_weight: float | Array = 1.0,
    game_weight: float | Array = 0.1,
    contrastive_weight: float | Array = 1.0,
    bottleneck_weight: float | Array = 0.0,
    temperature: float = 0.5,
    mode: str = "greedy",
    num_permutations: int = 32,
    where: Array | None = None,
    axis_name: str | None = None,
) -> Array:
    """Returns the loss of a classifier of several modalities that keeps them all in play, see the module.

    Args:
        parts: for each of M >= 2 modalities what the fusion receives, float [N, ...]: a share of the logits [N, C], or
            latents.
        labels: int [N] in 0 .. C - 1; -1 = unlabelled, which plays but has no other term.
        key: draws the permutations.
        fuse: from a list like `parts` (of any number of rows) to logits [N, C]; None = their sum.
        unimodal_logits: logits [N, C] of a head for each modality; () = no such term.
        latents: float [N, D] for each modality, for the contrastive and the bottleneck term; () = neither.
        reconstruct: from fused logits [N, C], which are constant, to all latents side by side, [N, M D]; None = no
            bottleneck.
        unimodal_weight: of the heads' cross entropies.
        game_weight: of the game.
        contrastive_weight: of `label_contrastive_loss`.
        bottleneck_weight: of the mean squared error of the reconstruction.
        temperature: of the contrastive term.
        mode: of the game, see `competition_loss`.
        num_permutations: see `competition_loss`.
        where: bool [N], real examples.
        axis_name: mapped axis over which the examples are spread.

    Returns:
        Scalar in the accumulation dtype (float32 for bfloat16 input).

    Raises:
        ValueError: shapes do not fit or an option is out of range.

    Example:
        >>> parts, labels = [jnp.eye(3), jnp.ones((3, 3))], jnp.array([0, 1, 2])
        >>> loss = jax.jit(lambda parts: mcr_loss(parts, labels, key=jax.random.key(0), num_permutations=2))
        >>> round(float(loss(parts)), 4)
        0.5514

    Source:
        Kontras, Strypsteen, Chatzichristos, Liang, Blaschko, De Vos, arXiv 2411.07335; code kkontras/MCR.
    """
    keep = _checked(parts, where, mode, num_permutations)
    if labels.shape != keep.shape:
        raise ValueError(f"labels has shape {labels.shape}, expected {keep.shape}")
    options = {"where": where, "axis_name": axis_name}
    labelled = keep & (labels >= 0)
    logits = _fused(fuse, [zero_where_false(part, keep) for part in parts])

    def cross_entropy(z):
        z = zero_where_false(z, keep).astype(compute_dtype(z))
        terms = optax.softmax_cross_entropy_with_integer_labels(z, jnp.maximum(labels, 0))
        return global_mean(terms, labelled, axis_name=axis_name)

    loss = cross_entropy(logits) + unimodal_weight * sum(cross_entropy(z) for z in unimodal_logits)
    game = competition_loss(parts, key=key, fuse=fuse, mode=mode, num_permutations=num_permutations, **options)
    loss = loss + game_weight * game
    if latents:
        shared = label_contrastive_loss(latents, labels, temperature=temperature, **options)
        loss = loss + contrastive_weight * shared
    if latents and reconstruct is not None:
        truth = jnp.concatenate([zero_where_false(z, keep) for z in latents], axis=-1)
        away = (truth - reconstruct(jax.lax.stop_gradient(logits))).astype(compute_dtype(truth))
        terms = jnp.mean(jnp.square(zero_where_false(away, keep)), axis=-1)
        loss = loss + bottleneck_weight * global_mean(terms, keep, axis_name=axis_name)
    return loss


def competition_loss(
    parts: Sequence[Array],
    *,
    key: Array,
    fuse: Callable[[Sequence[Array]], Array] | None = None,
    mode: str = "greedy",
    num_permutations: int = 32,
    where: Array | None = None,
    axis_name: str | None = None,
    reduction: str = "mean",
) -> Array:
    """Returns the game between modalities: each raises its own contribution J_m and lowers those of its rivals.

    Greedy: `sum_m (-J_m[gradient to m] + mean_{k != m} J_m[gradient to k])`, of value 0. Independent: the first half
    alone. Collaborative: `-sum_m J_m` with gradient to all.

    Args:
        parts: for each of M >= 2 modalities what the fusion receives, float [N, ...].
        key: draws the permutations.
        fuse: from a list like `parts` (of any number of rows) to logits [N, C]; None = their sum.
        mode: "greedy", "independent" or "collaborative".
        num_permutations: >= 1, over which J_m is averaged.
        where: bool [N], real examples, permuted among themselves.
        axis_name: mapped axis over which the examples are spread: permutations are of all shards.
        reduction: "mean" (over all shards) or "none", `[N]`.

    Returns:
        Scalar in the accumulation dtype (float32 for bfloat16 input), or `[N]` in the dtype of the first part; 0
        without any example.

    Raises:
        ValueError: shapes do not fit or an option is out of range.

    Example:
        >>> parts = [jnp.eye(3), jnp.zeros((3, 3))]  # the second says nothing
        >>> game = lambda parts: competition_loss(parts, key=jax.random.key(0), mode="independent", num_permutations=2)
        >>> bool(jax.jit(game)(parts) < 0)
        True

    Source:
        Kontras et al., arXiv 2411.07335; code kkontras/MCR (greedy, 32 permutations).
    """
    keep = _checked(parts, where, mode, num_permutations)
    number = len(parts)

    def run(keep, key, *parts):
        orders = _orders(key, keep, num_permutations, axis_name)
        share = lambda m, *players: _contribution(fuse, parts, keep, orders, axis_name, m, players)
        if mode == "collaborative":
            return -sum(share(m, *range(number)) for m in range(number))
        total = -sum(share(m, m) for m in range(number))
        if mode == "greedy":
            total = total + sum(share(m, k) for m in range(number) for k in range(number) if k != m) / (number - 1)
        return total

    terms = rows_mixed(run)(keep, key, *parts)
    return reduce_terms(terms, keep, reduction=reduction, axis_name=axis_name, dtype=parts[0].dtype)


def modality_contributions(
    parts: Sequence[Array],
    *,
    key: Array,
    fuse: Callable[[Sequence[Array]], Array] | None = None,
    num_permutations: int = 32,
    where: Array | None = None,
    axis_name: str | None = None,
) -> Array:
    """Returns by how much the prediction changes when one modality is permuted, J_m of the module.

    Args:
        parts: for each of M >= 2 modalities what the fusion receives, float [N, ...].
        key: draws the permutations.
        fuse: from a list like `parts` to logits [N, C]; None = their sum.
        num_permutations: >= 1.
        where: bool [N], real examples.
        axis_name: mapped axis over which the examples are spread.

    Returns:
        float [M] in nats, between 0 and log 2, in the dtype of the first part: a proxy of I(X_m; Y | the others).

    Raises:
        ValueError: shapes do not fit or an option is out of range.

    Example:
        >>> parts = [jnp.eye(3), jnp.zeros((3, 3))]  # the second says nothing
        >>> told = jax.jit(lambda parts: modality_contributions(parts, key=jax.random.key(0), num_permutations=2))
        >>> bool(told(parts)[0] > 0), float(told(parts)[1])
        (True, 0.0)

    Source:
        Kontras et al., arXiv 2411.07335.
    """
    keep = _checked(parts, where, MODES[0], num_permutations)

    def run(keep, key, *parts):
        players, orders = range(len(parts)), _orders(key, keep, num_permutations, axis_name)
        terms = [_contribution(fuse, parts, keep, orders, axis_name, m, players) for m in players]
        told = jnp.stack([global_mean(term, keep, axis_name=axis_name) for term in terms])
        return told.astype(parts[0].dtype)

    return rows_mixed(run)(keep, key, *parts)


def jensen_shannon_divergence(logits_a: Array, logits_b: Array) -> Array:
    """Returns the Jensen-Shannon divergence between two predictions, row by row.

    `1/2 KL(p || m) + 1/2 KL(q || m)` with `m = (p + q) / 2`, from the logarithms: probabilities of 0 do no harm.

    Args:
        logits_a: float [..., C].
        logits_b: float [..., C].

    Returns:
        float [...] in nats, between 0 and log 2, in the dtype of `logits_a`.

    Raises:
        ValueError: shapes differ.

    Example:
        >>> z = jnp.array([[30.0, -30.0]])
        >>> round(float(jax.jit(jensen_shannon_divergence)(z, -z)[0]), 4)
        0.6931

    Source:
        Lin, Divergence measures based on the Shannon entropy (1991).
    """
    if logits_a.shape != logits_b.shape:
        raise ValueError(f"logits_b has shape {logits_b.shape}, expected {logits_a.shape}, as logits_a")
    wide = compute_dtype(logits_a, logits_b)
    log_p, log_q = jax.nn.log_softmax(logits_a.astype(wide)), jax.nn.log_softmax(logits_b.astype(wide))
    log_m = jnp.logaddexp(log_p, log_q) - math.log(2)
    terms = jnp.exp(log_p) * (log_p - log_m) + jnp.exp(log_q) * (log_q - log_m)
    return (jnp.sum(terms, axis=-1) / 2).astype(logits_a.dtype)


def label_contrastive_loss(
    latents: Sequence[Array],
    labels: Array,
    *,
    temperature: float = 0.5,
    where: Array | None = None,
    axis_name: str | None = None,
    reduction: str = "mean",
) -> Array:
    """Returns NT-Xent between the latents of all modalities, those of one label being positives of each other.

    For each pair (a, p) of one label `-log exp(s_ap / t) / (exp(s_ap / t) + sum_n exp(s_an / t))`, n over the latents
    of other labels, s the cosine. By index instead of label it is `contrastive.nt_xent_loss`.

    Args:
        latents: float [N, D] for each modality; need not be normalised.
        labels: int [N]; -1 = unlabelled, takes no part.
        temperature: t > 0.
        where: bool [N], real examples.
        axis_name: mapped axis over which the examples are spread: pairs of all shards.
        reduction: "mean" over all pairs (of all shards), or "none", `[M, N]`, the mean over each anchor's own.

    Returns:
        Scalar in the accumulation dtype (float32 for bfloat16 input), or `[M, N]` in the dtype of the first latents; an
        anchor without negatives has loss 0; no pair gives 0.

    Raises:
        ValueError: shapes do not fit or an option is out of range.

    Example:
        >>> z, labels = jnp.eye(2), jnp.array([0, 1])
        >>> loss = jax.jit(lambda other: label_contrastive_loss([z, other], labels))
        >>> bool(loss(z) < loss(z[::-1]))
        True

    Source:
        Kontras et al., arXiv 2411.07335; code kkontras/MCR (temperature 0.5).
    """
    if not latents or any(z.ndim != 2 or z.shape != latents[0].shape for z in latents):
        raise ValueError(f"latents must have one shape [N, D], got {[z.shape for z in latents]}")
    rows = latents[0].shape[:1]
    for name, array in (("labels", labels), ("where", where)):
        if array is not None and array.shape != rows:
            raise ValueError(f"{name} has shape {array.shape}, expected {rows}")
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be positive")
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction={reduction!r} must be 'mean' or 'none'")
    labels = jnp.asarray(labels)
    keep = labels >= 0 if where is None else where & (labels >= 0)

    def run(labels, keep, *latents):
        number, rows = len(latents), labels.shape[0]
        dtype = compute_dtype(*latents)
        z = jnp.stack([safe_normalize(zero_where_false(v, keep).astype(dtype)) for v in latents], axis=1)
        others, exist = gather_rows(z, axis_name), gather_rows(keep, axis_name)
        same = labels[:, None] == gather_rows(labels, axis_name)[None, :]
        product = jnp.einsum("imd,jkd->imjk", z, others, precision=jax.lax.Precision.HIGHEST) / temperature
        scores = product.reshape(rows * number, -1)
        mine = ((axis_index(axis_name) * rows + jnp.arange(rows)) * number)[:, None] + jnp.arange(number)[None, :]
        spread = lambda pairs: jnp.repeat(jnp.repeat(pairs, number, axis=0), number, axis=1)
        both = spread(keep[:, None] & exist[None, :])
        positive = spread(same) & both & (mine.reshape(-1)[:, None] != jnp.arange(scores.shape[1])[None, :])
        negative = masked_logsumexp(scores, ~spread(same) & both)[:, None]
        some = jnp.isfinite(negative)
        terms = jnp.where(some, jax.nn.softplus(jnp.where(some, negative, 0.0) - scores), 0.0)
        total = jnp.sum(jnp.where(positive, terms, 0.0), axis=1).reshape(rows, number).T
        return total, jnp.sum(positive, axis=1, dtype=dtype).reshape(rows, number).T

    total, count = rows_mixed(run)(labels, keep, *latents)
    if reduction == "none":
        return safe_divide(total, count).astype(latents[0].dtype)
    return safe_divide(*(all_sum(jnp.sum(v), axis_name) for v in (total, count)))


def ogm_coefficients(
    logits: Array,
    labels: Array,
    *,
    alpha: float = 0.5,
    where: Array | None = None,
    axis_name: str | None = None,
) -> Array:
    """Returns the factors by which on-the-fly gradient modulation scales the gradients of two encoders.

    With `r_m` the ratio of the summed probabilities that modality m and its rival give to the right classes,
    `1 - tanh(alpha r_m)` for the one that is ahead (r_m > 1), and 1 for the other. A rival of MCR, for comparison.

    Args:
        logits: float [2, N, C], of each modality alone.
        labels: int [N]; -1 = unlabelled.
        alpha: > 0 (the code's runs try 0.1 to 0.8).
        where: bool [N], real examples.
        axis_name: mapped axis over which the examples are spread.

    Returns:
        float [2] in (0, 1], in the dtype of `logits`, without gradient; both 1 without any example.

    Raises:
        ValueError: shapes do not fit or `alpha` is not positive.

    Example:
        >>> z = jnp.array([[[5.0, 0.0]], [[0.0, 0.0]]])
        >>> [round(float(c), 2) for c in jax.jit(ogm_coefficients)(z, jnp.array([0]))]
        [0.24, 1.0]

    Source:
        Peng et al., arXiv 2203.15332, as in the code kkontras/MCR.
    """
    if logits.ndim != 3 or logits.shape[0] != 2 or labels.shape != logits.shape[1:2]:
        raise ValueError(f"logits and labels must be [2, N, C] and [N], got {logits.shape} and {labels.shape}")
    if where is not None and where.shape != labels.shape:
        raise ValueError(f"where has shape {where.shape}, expected {labels.shape}")
    if not alpha > 0:
        raise ValueError(f"alpha={alpha} must be positive")
    labels = jnp.asarray(labels)
    keep = labels >= 0 if where is None else where & (labels >= 0)
    z = jnp.where(keep[None, :, None], jax.lax.stop_gradient(logits), jnp.zeros((), logits.dtype))
    probs = jax.nn.softmax(z.astype(compute_dtype(logits)))
    right = jnp.take_along_axis(probs, jnp.maximum(labels, 0)[None, :, None], axis=-1)[..., 0]
    score = all_sum(jnp.sum(jnp.where(keep[None, :], right, 0.0), axis=1), axis_name)
    ratio = safe_divide(score, score[::-1])
    return jnp.where(ratio > 1, 1 - jnp.tanh(alpha * ratio), 1.0).astype(logits.dtype)


def _checked(parts, where, mode, num_permutations) -> Array:
    if len(parts) < 2:
        raise ValueError(f"parts must hold at least 2 modalities, got {len(parts)}")
    rows = parts[0].shape[:1]
    for number, part in enumerate(parts):
        if part.ndim < 2 or part.shape[:1] != rows:
            raise ValueError(f"parts[{number}] has shape {part.shape}, expected [{rows[0]}, ...]")
    if where is not None and where.shape != rows:
        raise ValueError(f"where has shape {where.shape}, expected {rows}")
    if mode not in MODES:
        raise ValueError(f"mode={mode!r} must be one of {', '.join(MODES)}")
    if num_permutations < 1:
        raise ValueError(f"num_permutations={num_permutations} must be at least 1")
    return jnp.ones(rows, bool) if where is None else where


def _fused(fuse, parts):
    return sum(parts[1:], parts[0]) if fuse is None else fuse(parts)


def _orders(key, keep, number, axis_name):
    """Returns int [P, n]: which row (of all shards) stands in for each of this shard's, the real ones permuted."""
    exist = gather_rows(keep, axis_name)
    rows = axis_index(axis_name) * keep.shape[0] + jnp.arange(keep.shape[0])
    place = jnp.maximum(jnp.cumsum(exist) - 1, 0)[rows]

    def one(key):
        # A random order of the real rows, which stand first; the k-th real row takes the k-th of it.
        return jnp.argsort(jnp.where(exist, jax.random.uniform(key, exist.shape), 2.0))[place]

    return jax.vmap(one)(jax.random.split(key, number))


def _contribution(fuse, parts, keep, orders, axis_name, permuted, players):
    """Returns J of modality `permuted` for each row [n], with gradient to the modalities in `players` alone."""
    parts = [zero_where_false(part, keep) for part in parts]
    intact = _fused(fuse, parts)
    wide = compute_dtype(intact)
    routed = [part if m in players else jax.lax.stop_gradient(part) for m, part in enumerate(parts)]
    everyone = gather_rows(routed[permuted], axis_name)

    def one(order):
        logits = _fused(fuse, [everyone[order] if m == permuted else part for m, part in enumerate(routed)])
        return jensen_shannon_divergence(logits.astype(wide), intact.astype(wide))

    return jnp.mean(jax.vmap(one)(orders), axis=0)
