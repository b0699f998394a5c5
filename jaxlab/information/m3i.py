"""Towards All-in-one Pre-training via Maximizing Multi-modal Mutual Information.

M3I, 2022, arXiv 2211.09807. Supervised, contrastive, image-text and masked pre-training are one objective, information
between what an encoder makes of the input and a target feature, with different targets and different predictive
distributions; so several of them can be trained at once, in a single stage.

    I(z_x; z_y | t_x, t_y)  >=  H(z_y | t_y) + E log P(z_y | z_x, t_x, t_y)
    softmax    log P = cos(z_x, z_y) / t - log sum_k exp(cos(z_x, z_y^k) / t)     InfoNCE, CLIP: z_y^k of the batch
    class      log P = log softmax(W z_x)_y                                       supervised
    gaussian   log P = -||z_x - z_y||^2 / (2 sigma^2)                             masked images, dense distillation
    laplace    log P = -||z_x - z_y||_1 / sigma
    loss       = -sum_j weight_j ( mean log P_j + entropy_weight_j H_j )          targets independent given the inputs

M3I mixes two images patch by patch (`patch_mix`); from the mixture, heads predict for each of the two the features that
an average of the encoder (`ops.ema_update`) has of its own patches (gaussian, targets normalised over their features),
and its label, its text or another view of it (softmax or class).

Gaussian and Laplace terms are means over the features, without the constant. Reconstructed (no code is public): the
weights 1, temperature 0.1 and mixing ratio 0.5; the entropy term by uniformity, which the paper leaves open.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from jaxlab.contrastive import info_nce_loss, uniformity
from jaxlab.ops.collectives import global_mean
from jaxlab.ops.masked import compute_dtype, masked_mean, safe_normalize, zero_where_false
from jaxlab.ops.reduction import reduce_terms

KINDS = ("softmax", "class", "gaussian", "laplace")


class TargetSpec(NamedTuple):
    """One target of pre-training: how it is predicted and how much it counts.

    Attributes:
        kind: "softmax", "class", "gaussian" or "laplace", the predictive distribution.
        weight: >= 0 of the whole target; 0 leaves it out.
        temperature: of "softmax".
        sigma: of "gaussian" and "laplace".
        normalize: whether the targets of the latter two are brought to mean 0 and variance 1 over their features.
        entropy_weight: of the targets' entropy, by minus their uniformity on the sphere (`contrastive.uniformity`); the
            softmax has it in its negatives, and constant targets do not need it.
    """

    kind: str
    weight: float = 1.0
    temperature: float = 0.1
    sigma: float = 1.0
    normalize: bool = True
    entropy_weight: float = 0.0


def m3i_loss(
    predictions: Sequence[Array],
    targets: Sequence[Array],
    specs: Sequence[TargetSpec],
    *,
    masks: Sequence[Array | None] | None = None,
    stop_gradient: bool = True,
    where: Array | None = None,
    axis_name: str | None = None,
) -> Array:
    """Returns minus the weighted sum of the targets' log likelihoods (and entropies).

    Args:
        predictions: for each target what its head says: float [N, D] ("softmax"), [N, C] logits ("class"), or [N, ...,
            D] like the target ("gaussian", "laplace").
        targets: features like their predictions, or int labels [N] for "class" (-1 = unlabelled).
        specs: one for each target.
        masks: bool [N, ...], which of the dense features of a target count (the patches of its own image); None = all.
        stop_gradient: whether targets are constants (an average of the encoder, a teacher).
        where: bool [N], real examples.
        axis_name: mapped axis over which the examples are spread: negatives come from all shards.

    Returns:
        Scalar in the accumulation dtype (float32 for bfloat16 input); 0 without any term.

    Raises:
        ValueError: the lists differ in length, shapes do not fit, or a spec is out of range.

    Example:
        >>> z, logits = jnp.eye(3), 4 * jnp.eye(3)
        >>> specs = [TargetSpec("softmax"), TargetSpec("class")]
        >>> loss = jax.jit(lambda z: m3i_loss([z, 4 * z], [jnp.eye(3), jnp.arange(3)], specs))
        >>> bool(loss(z) < loss(z[::-1]))
        True

    Source:
        Su et al., arXiv 2211.09807.
    """
    masks = [None] * len(specs) if masks is None else masks
    if not len(predictions) == len(targets) == len(specs) == len(masks):
        raise ValueError(
            f"predictions, targets, specs and masks must be as many, got {len(predictions)}, {len(targets)}, "
            f"{len(specs)} and {len(masks)}"
        )
    total = jnp.zeros((), compute_dtype(*predictions))
    for prediction, target, spec, mask in zip(predictions, targets, specs, masks, strict=True):
        if not spec.weight >= 0:
            raise ValueError(f"weight={spec.weight} must not be negative")
        if spec.weight == 0:
            continue
        options = {"where": where, "axis_name": axis_name}
        fixed = jax.lax.stop_gradient(target) if stop_gradient and spec.kind != "class" else target
        told = log_likelihood(prediction, fixed, spec, mask=mask, **options)
        if spec.entropy_weight:
            told = told - spec.entropy_weight * uniformity(target, **options)
        total = total - spec.weight * told
    return total


def log_likelihood(
    prediction: Array,
    target: Array,
    spec: TargetSpec,
    *,
    mask: Array | None = None,
    where: Array | None = None,
    axis_name: str | None = None,
    reduction: str = "mean",
) -> Array:
    """Returns the log likelihood of targets under what the head says, see the module.

    Args:
        prediction: float, of one head: [N, D], [N, C] logits or [N, ..., D].
        target: like the prediction, or int labels [N].
        spec: how it is predicted; its weight is not applied.
        mask: bool [N, ...], which dense features count.
        where: bool [N], real examples.
        axis_name: mapped axis over which the examples are spread.
        reduction: "mean" over the terms that exist (of all shards), or "none", `[N]`, of each example the mean of its.

    Returns:
        Scalar in the accumulation dtype (float32 for bfloat16 input), or `[N]` in the dtype of `prediction`.

    Raises:
        ValueError: shapes do not fit or the spec is out of range.

    Example:
        >>> z = jnp.array([[1.0, 3.0]])
        >>> float(log_likelihood(z, z + 2, TargetSpec("gaussian", normalize=False)))
        -2.0

    Source:
        Su et al., arXiv 2211.09807.
    """
    if spec.kind not in KINDS:
        raise ValueError(f"kind={spec.kind!r} must be one of {', '.join(KINDS)}")
    if where is not None and where.shape != prediction.shape[:1]:
        raise ValueError(f"where has shape {where.shape}, expected {prediction.shape[:1]}")
    options = {"axis_name": axis_name, "reduction": reduction}
    if spec.kind == "softmax":
        return -info_nce_loss(prediction, target, temperature=spec.temperature, where=where, **options)
    keep = jnp.ones(prediction.shape[:1], bool) if where is None else where
    wide = compute_dtype(prediction)
    clean = zero_where_false(prediction, keep).astype(wide)
    if spec.kind == "class":
        if prediction.ndim != 2 or target.shape != prediction.shape[:1]:
            raise ValueError(f"logits and labels must be [N, C] and [N], got {prediction.shape} and {target.shape}")
        terms = -optax.softmax_cross_entropy_with_integer_labels(clean, jnp.maximum(target, 0))
        return reduce_terms(terms, keep & (target >= 0), dtype=prediction.dtype, **options)
    if prediction.ndim < 2 or target.shape != prediction.shape:
        raise ValueError(f"target has shape {target.shape}, expected {prediction.shape}, as prediction")
    if mask is not None and mask.shape != prediction.shape[:-1]:
        raise ValueError(f"mask has shape {mask.shape}, expected {prediction.shape[:-1]}")
    if not spec.sigma > 0:
        raise ValueError(f"sigma={spec.sigma} must be positive")
    keep = keep.reshape(keep.shape + (1,) * (prediction.ndim - 2))
    keep = jnp.broadcast_to(keep, prediction.shape[:-1]) if mask is None else keep & mask
    clean, truth = (zero_where_false(v, keep).astype(wide) for v in (prediction, target))
    if spec.normalize:
        truth = safe_normalize(truth - jnp.mean(truth, axis=-1, keepdims=True)) * prediction.shape[-1] ** 0.5
    away = clean - truth
    size = jnp.square(away) / (2 * spec.sigma**2) if spec.kind == "gaussian" else jnp.abs(away) / spec.sigma
    terms = -jnp.mean(size, axis=-1)
    if reduction == "mean":
        return global_mean(terms, keep, axis_name=axis_name)
    own = masked_mean(terms.reshape(terms.shape[0], -1), keep.reshape(terms.shape[0], -1), axis=1)
    return reduce_terms(own, dtype=prediction.dtype, **options)


def patch_mix(a: Array, b: Array, *, key: Array, patch: int, ratio: float = 0.5) -> tuple[Array, Array]:
    """Returns images that take some patches from one image and the others from another.

    Args:
        a: [N, H, W, ...].
        b: like `a`.
        key: draws the patches of each image.
        patch: side of a patch; must divide H and W.
        ratio: share of the patches taken from `a`, in [0, 1], rounded to a whole number of patches, exact for each
            image.

    Returns:
        The mixtures, like `a`, and bool [N, H / patch, W / patch], True where a patch is of `a`.

    Raises:
        ValueError: shapes do not fit or an option is out of range.

    Example:
        >>> mix = jax.jit(lambda key: patch_mix(jnp.ones((1, 4, 4)), jnp.zeros((1, 4, 4)), key=key, patch=2))
        >>> image, mask = mix(jax.random.key(0))
        >>> float(image.sum()), int(mask.sum())
        (8.0, 2)

    Source:
        Su et al., arXiv 2211.09807 (shared mixing mask); ratio reconstructed.
    """
    if a.ndim < 3 or a.shape != b.shape:
        raise ValueError(f"a and b must have one shape [N, H, W, ...], got {a.shape} and {b.shape}")
    rows, height, width = a.shape[:3]
    if patch < 1 or height % patch or width % patch:
        raise ValueError(f"patch={patch} must divide the sides {height} and {width}")
    if not 0 <= ratio <= 1:
        raise ValueError(f"ratio={ratio} must be between 0 and 1")
    grid = (height // patch, width // patch)
    number = grid[0] * grid[1]
    noise = jax.random.uniform(key, (rows, number))
    rank = jnp.sum(noise[:, None, :] < noise[:, :, None], axis=-1)
    mask = (rank < round(ratio * number)).reshape(rows, *grid)
    full = jnp.repeat(jnp.repeat(mask, patch, axis=1), patch, axis=2)
    return jnp.where(full.reshape(full.shape + (1,) * (a.ndim - 3)), a, b), mask


def special_case(name: str) -> tuple[TargetSpec, ...]:
    """Returns the specs with which `m3i_loss` is a known pre-training.

    Args:
        name: "supervised" (a class), "contrastive" (the other view, both ways with its own projection), "clip" (image
            to text and text to image), "mim" (masked patches), "distillation" (features of a teacher, normalised), or
            "m3i" (dense features of the own patches, a global target, a class).

    Returns:
        A tuple of `TargetSpec`, one for each prediction.

    Raises:
        ValueError: `name` is unknown.

    Example:
        >>> [spec.kind for spec in special_case("m3i")]
        ['gaussian', 'softmax', 'class']

    Source:
        Su et al., arXiv 2211.09807.
    """
    cases = {
        "supervised": (TargetSpec("class"),),
        "contrastive": (TargetSpec("softmax"),),
        "clip": (TargetSpec("softmax", 0.5), TargetSpec("softmax", 0.5)),
        "mim": (TargetSpec("gaussian", normalize=False),),
        "distillation": (TargetSpec("gaussian"),),
        "m3i": (TargetSpec("gaussian"), TargetSpec("softmax"), TargetSpec("class")),
    }
    if name not in cases:
        raise ValueError(f"name={name!r} must be one of {', '.join(cases)}")
    return cases[name]
