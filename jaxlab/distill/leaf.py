"""Learning to Focus: Causal Attention Distillation via Gradient-Guided Token Pruning (LeaF, 2025, arXiv 2506.07851).

Tokens of a prompt that move the student but not its stronger teacher confound it. They are found by comparing
gradients, deleted, and the student is distilled on the prompts with and without them, so that it learns where the
teacher looks.

    g_i = || d loss / d embedding_i ||, scaled to 0..1 over the prompt       (loss: cross entropy of the response)
    d_i = g_i(teacher) - g_i(student), scaled too
    confounding: d_i <= min(the floor(ratio n)-th smallest d, counted from 0, cap)
    L = weight KL(prompt) + (1 - weight) KL(prompt without a run of confounding tokens),
    KL = T^2 mean over response tokens of KL(softmax(t / T) || softmax(s / T))

Every run of neighbouring confounding tokens gives a prompt of its own, with the run deleted and the rest moved together
(not hidden from attention). Whether a sample is used (the teacher is right, the student wrong, deletion repairs it) is
the caller's `where`.

Departures from the official code: where both models agree everywhere it deletes every token, here none; its mask of
the response is not shifted against the logits, which is `shift=False` here. Reconstructed: weight 0.5 (the code mixes
rows).
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from jaxlab.mutual import consistency_loss
from jaxlab.ops.masked import compute_dtype, safe_divide, zero_where_false


def leaf_loss(
    logits: Array,
    teacher_logits: Array,
    pruned_logits: Array,
    pruned_teacher_logits: Array,
    *,
    where: Array,
    pruned_where: Array,
    weight: float = 0.5,
    temperature: float = 1.0,
    shift: bool = True,
    axis_name: str | None = None,
) -> Array:
    """Returns the distillation loss on prompts and on prompts without their confounding tokens.

    `weight KL(prompts) + (1 - weight) KL(pruned prompts)`, see `token_distillation_loss`.

    Args:
        logits: float [B, L, V], the student's.
        teacher_logits: float [B, L, W >= V]; no gradient reaches them.
        pruned_logits: float [M, K, V], the student's for pruned prompts.
        pruned_teacher_logits: float [M, K, W]; no gradient reaches them.
        where: bool [B, L], tokens of the response.
        pruned_where: bool [M, K]; a row without any is a sample that is not used.
        weight: in [0, 1].
        temperature: T > 0.
        shift: see `token_distillation_loss`.
        axis_name: mapped axis over which the sequences are spread.

    Returns:
        Scalar in the accumulation dtype (float32 for bfloat16 input).

    Raises:
        ValueError: shapes do not fit, or an option is out of range.

    Example:
        >>> z, keep = jnp.ones((1, 3, 4)), jnp.ones((1, 3), bool)
        >>> float(jax.jit(leaf_loss)(z, z, z, z, where=keep, pruned_where=keep))
        0.0

    Source:
        Guo et al., arXiv 2506.07851, section 3; code RUCBM/LeaF.
    """
    if not 0 <= weight <= 1:
        raise ValueError(f"weight={weight} must be between 0 and 1")
    options = {"temperature": temperature, "shift": shift, "axis_name": axis_name}
    whole = token_distillation_loss(logits, teacher_logits, where=where, **options)
    pruned = token_distillation_loss(pruned_logits, pruned_teacher_logits, where=pruned_where, **options)
    return weight * whole + (1 - weight) * pruned


def token_distillation_loss(
    logits: Array,
    teacher_logits: Array,
    *,
    where: Array,
    temperature: float = 1.0,
    shift: bool = True,
    axis_name: str | None = None,
) -> Array:
    """Returns the mean divergence from the teacher's predictions of the response's tokens to the student's.

    `T^2 mean KL(softmax(t / T) || softmax(s / T))` over the positions that predict a token of the response.

    Args:
        logits: float [B, L, V].
        teacher_logits: float [B, L, W >= V]; cut to V entries, no gradient reaches them.
        where: bool [B, L], tokens of the response.
        temperature: T > 0.
        shift: position i predicts token i + 1, so the mask moves by one; False takes it as it is, as the official code.
        axis_name: mapped axis over which the sequences are spread.

    Returns:
        Scalar in the accumulation dtype (float32 for bfloat16 input); 0 without a response.

    Raises:
        ValueError: shapes do not fit, or `temperature` is not positive.

    Example:
        >>> s, t = jnp.zeros((1, 2, 2)), jnp.array([[[0.0, 50.0], [9.0, 0.0]]])
        >>> round(float(jax.jit(token_distillation_loss)(s, t, where=jnp.array([[False, True]]))), 4)
        0.6931

    Source:
        Guo et al., arXiv 2506.07851; code RUCBM/LeaF (T = 1).
    """
    if logits.ndim != 3 or teacher_logits.shape[:-1] != logits.shape[:-1]:
        raise ValueError(f"logits and teacher_logits must be [B, L, V] and [B, L, W], got {logits.shape} and "
                         f"{teacher_logits.shape}")  # fmt: skip
    if teacher_logits.shape[-1] < logits.shape[-1]:
        raise ValueError(f"teacher_logits has {teacher_logits.shape[-1]} entries, expected at least {logits.shape[-1]}")
    if where.shape != logits.shape[:-1]:
        raise ValueError(f"where has shape {where.shape}, expected {logits.shape[:-1]}")
    size = logits.shape[-1]
    keep = jnp.concatenate([where[:, 1:], jnp.zeros_like(where[:, :1])], axis=1) if shift else where
    flat = lambda z: z[..., :size].reshape(-1, size)
    options = {"kind": "kl", "temperature": temperature, "axis_name": axis_name}
    return consistency_loss(flat(logits), flat(teacher_logits), where=keep.reshape(-1), **options)


def token_gradient_norms(loss: Callable[[Array], Array], embeddings: Array, *, where: Array) -> Array:
    """Returns how much each token of the prompt moves the loss, from 0 (least) to 1 (most) in its prompt.

    `|| d loss / d e_i ||`, scaled to 0..1 over the tokens kept.

    Args:
        loss: `loss(embeddings)`, a scalar; sequences must not meet in it but for the sum.
        embeddings: float [..., L, D].
        where: bool [..., L], tokens of the prompt.

    Returns:
        [..., L] in the dtype of `embeddings`, constants; 0 where masked and where all tokens move it alike.

    Raises:
        ValueError: shapes do not fit.

    Example:
        >>> weights = jnp.array([[1.0], [5.0], [3.0]])
        >>> norms = jax.jit(lambda e, where: token_gradient_norms(lambda e: jnp.sum(e * weights), e, where=where))
        >>> [round(g, 3) for g in norms(jnp.ones((3, 1)), jnp.ones(3, bool)).tolist()]
        [0.0, 1.0, 0.5]

    Source:
        Guo et al., arXiv 2506.07851, eq. 4; code RUCBM/LeaF.
    """
    if embeddings.ndim < 2 or where.shape != embeddings.shape[:-1]:
        raise ValueError(
            f"embeddings and where must be [..., L, D] and [..., L], got {embeddings.shape}, {where.shape}"
        )
    grads = zero_where_false(jax.grad(loss)(embeddings), where).astype(compute_dtype(embeddings))
    # Scaled before squaring, so that tiny and huge gradients keep their order.
    top = jnp.max(jnp.abs(grads), axis=(-2, -1), keepdims=True)
    norms = jnp.sqrt(jnp.sum(jnp.square(safe_divide(grads, top)), axis=-1))
    return jax.lax.stop_gradient(_scaled(norms, where)).astype(embeddings.dtype)


def confounding_mask(
    student_norms: Array,
    teacher_norms: Array,
    *,
    where: Array,
    ratio: float = 0.05,
    cap: float = 0.5,
    protected: Array | None = None,
) -> Array:
    """Returns which tokens the student is moved by and the teacher is not.

    `d = teacher - student`, scaled to 0..1 over the prompt; `d_i <= min(d sorted [floor(ratio n)], cap)`.

    Args:
        student_norms: float [..., L], see `token_gradient_norms`.
        teacher_norms: float [..., L].
        where: bool [..., L], the n tokens of the prompt.
        ratio: in [0, 1), share of the tokens below the threshold.
        cap: the threshold is at most this.
        protected: bool [..., L], tokens that are never confounding (blanks, line ends).

    Returns:
        bool [..., L]; nothing where all d are equal.

    Raises:
        ValueError: shapes do not fit or `ratio` is out of range.

    Example:
        >>> student, teacher = jnp.array([1.0, 0.2, 0.0]), jnp.array([0.0, 1.0, 0.1])
        >>> jax.jit(confounding_mask)(student, teacher, where=jnp.ones(3, bool)).tolist()
        [True, False, False]

    Source:
        Guo et al., arXiv 2506.07851; code RUCBM/LeaF (0.05, in other runs 0.1; cap 0.5).
    """
    shape = student_norms.shape
    if student_norms.ndim < 1 or teacher_norms.shape != shape or where.shape != shape:
        raise ValueError(f"student_norms, teacher_norms and where must have one shape [..., L], got {shape}, "
                         f"{teacher_norms.shape}, {where.shape}")  # fmt: skip
    if protected is not None and protected.shape != shape:
        raise ValueError(f"protected has shape {protected.shape}, expected {shape}")
    if not 0 <= ratio < 1:
        raise ValueError(f"ratio={ratio} must be at least 0 and below 1")
    dtype = compute_dtype(student_norms, teacher_norms)
    student, teacher = (zero_where_false(x, where).astype(dtype) for x in (student_norms, teacher_norms))
    apart = teacher - student
    inside = lambda fill: jnp.where(where, apart, fill)
    differs = jnp.max(inside(-jnp.inf), axis=-1, keepdims=True) > jnp.min(inside(jnp.inf), axis=-1, keepdims=True)
    scaled = jnp.where(where, _scaled(apart, where), jnp.inf)
    count = jnp.sum(where, axis=-1, keepdims=True)
    rank = jnp.floor(ratio * count + 1e-4).astype(jnp.int32)
    threshold = jnp.take_along_axis(jnp.sort(scaled, axis=-1), jnp.minimum(rank, shape[-1] - 1), axis=-1)
    found = where & differs & (scaled <= jnp.minimum(threshold, cap))
    return found if protected is None else found & jnp.logical_not(protected)


def mask_runs(mask: Array) -> Array:
    """Returns the number of the run of neighbouring tokens that each masked token belongs to.

    Args:
        mask: bool [..., L].

    Returns:
        int32 [..., L]: 0, 1, ... from the left, -1 outside. Delete run r with `prune_tokens(ids, runs == r)`.

    Raises:
        ValueError: `mask` is a scalar.

    Example:
        >>> jax.jit(mask_runs)(jnp.array([True, True, False, True])).tolist()
        [0, 0, -1, 1]

    Source:
        Guo et al., arXiv 2506.07851, span pruning; code RUCBM/LeaF.
    """
    if mask.ndim < 1:
        raise ValueError(f"mask must be [..., L], got shape {mask.shape}")
    before = jnp.concatenate([jnp.zeros_like(mask[..., :1]), mask[..., :-1]], axis=-1)
    number = jnp.cumsum(mask & jnp.logical_not(before), axis=-1) - 1
    return jnp.where(mask, number, -1).astype(jnp.int32)


def prune_tokens(ids: Array, drop: Array, *, where: Array | None = None, pad: int = 0) -> tuple[Array, Array]:
    """Returns the sequence without the dropped tokens, the rest moved together, and which tokens are real.

    Args:
        ids: int [..., L].
        drop: bool [..., L].
        where: bool [..., L], real tokens; the others are dropped as well.
        pad: fills the end.

    Returns:
        int [..., L] and bool [..., L]; positions are those of the new sequence.

    Raises:
        ValueError: shapes do not fit.

    Example:
        >>> ids, real = jax.jit(prune_tokens)(jnp.array([5, 6, 7]), jnp.array([False, True, False]))
        >>> ids.tolist(), real.tolist()
        ([5, 7, 0], [True, True, False])

    Source:
        Guo et al., arXiv 2506.07851 (deletion, not a mask of the attention).
    """
    if ids.ndim < 1 or drop.shape != ids.shape or (where is not None and where.shape != ids.shape):
        raise ValueError(f"ids, drop and where must have one shape [..., L], got {ids.shape} and {drop.shape}")
    ids = jnp.asarray(ids)
    gone = drop if where is None else drop | jnp.logical_not(where)
    order = jnp.argsort(gone, axis=-1, stable=True)
    real = jnp.logical_not(jnp.take_along_axis(gone, order, axis=-1))
    return jnp.where(real, jnp.take_along_axis(ids, order, axis=-1), jnp.asarray(pad, ids.dtype)), real


def _scaled(x: Array, where: Array) -> Array:
    low = jnp.min(jnp.where(where, x, jnp.inf), axis=-1, keepdims=True)
    high = jnp.max(jnp.where(where, x, -jnp.inf), axis=-1, keepdims=True)
    span = jnp.where(high > low, high - low, 1.0)
    return jnp.where(where & (high > low), (x - jnp.where(jnp.isfinite(low), low, 0.0)) / span, 0.0)
