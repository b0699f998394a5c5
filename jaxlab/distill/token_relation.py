"""VideoREPA (2025, arXiv 2505.23656).

Full title: VideoREPA: Learning Physics for Video Generation through Relational Alignment with Foundation Models.

A generator of videos takes over, from a frozen encoder of videos, not features but the relations between tokens: within
a frame (space) and across frames (time). A margin leaves small differences alone, so that a trained generator is guided
softly. With the rows of h and y the tokens of one video, each divided by its length,

    A = h h^T,   G = y y^T,   L = mean_ij relu(|A_ij - G_ij| - margin),   total = L_diffusion + 0.5 L

over all pairs of tokens (`full`), pairs of one frame (`spatial`) or of two frames (`temporal`). The encoder's side is
constant. Aligning token by token, as REPA does, is `feature_loss(..., kind="cosine")`.

The pairs are visited frame by frame and recomputed in the backward pass: memory grows as S N instead of N^2 (N = F S).
Reconstructed: masks.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array

from jaxlab.ops.layers import dense
from jaxlab.ops.masked import compute_dtype, safe_divide, safe_normalize, zero_where_false
from jaxlab.ops.reduction import reduce_terms
from jaxlab.ops.sharding import rows_mixed
from jaxlab.types import Layer


def token_relation_loss(
    tokens: Array,
    teacher_tokens: Array,
    *,
    margin: float = 0.1,
    mode: str = "full",
    where: Array | None = None,
    axis_name: str | None = None,
    reduction: str = "mean",
) -> Array:
    """Returns how far the cosines between a video's tokens are from those of the teacher's tokens, beyond a margin.

    `mean over pairs of relu(|cos(h_i, h_j) - cos(y_i, y_j)| - margin)`.

    Args:
        tokens: float [B, F, S, C], S tokens of each of F frames.
        teacher_tokens: float [B, F, S, D] on the same grid (see `match_grid`); no gradient reaches them.
        margin: >= 0.
        mode: "full", "spatial" (pairs within a frame) or "temporal" (pairs across frames).
        where: bool [B, F, S], tokens that exist.
        axis_name: mapped axis over which the videos are spread.
        reduction: "mean" over videos (of all shards) of the mean over pairs, or "none", `[B]`.

    Returns:
        Scalar in the accumulation dtype (float32 for bfloat16 input), or `[B]` in the dtype of `tokens`. A video
        without a pair (one frame in `temporal`) is no term; no term gives 0.

    Raises:
        ValueError: shapes do not fit, or an option is out of range.

    Example:
        >>> x, loss = jnp.cos(jnp.arange(24.0)).reshape(1, 2, 3, 4), jax.jit(token_relation_loss)
        >>> float(loss(x, 7 * x)), float(loss(x, x[..., ::-1])) < 1e-6
        (0.0, True)

    Source:
        Zhang et al., arXiv 2505.23656, section 4; code aHapBean/VideoREPA (margin 0.1, weight 0.5 of the loss).
    """
    if tokens.ndim != 4 or tokens.shape[:-1] != teacher_tokens.shape[:-1]:
        raise ValueError(
            f"tokens and teacher_tokens must be [B, F, S, C] and [B, F, S, D], got {tokens.shape} and "
            f"{teacher_tokens.shape}"
        )
    if where is not None and where.shape != tokens.shape[:-1]:
        raise ValueError(f"where has shape {where.shape}, expected {tokens.shape[:-1]}")
    if not margin >= 0:
        raise ValueError(f"margin={margin} must not be negative")
    if mode not in ("full", "spatial", "temporal"):
        raise ValueError(f"mode={mode!r} must be 'full', 'spatial' or 'temporal'")
    keep = jnp.ones(tokens.shape[:-1], bool) if where is None else where
    teacher = jax.lax.stop_gradient(teacher_tokens)
    terms, exist = rows_mixed(_terms)(tokens, teacher, keep, margin=margin, mode=mode)
    return reduce_terms(terms, exist, reduction=reduction, axis_name=axis_name, dtype=tokens.dtype)


def relation_matrix(x: Array, *, where: Array | None = None) -> Array:
    """Returns the cosines between all tokens.

    `R_ij = x_i . x_j / (|x_i| |x_j|)`; rows and columns of masked tokens, and of zero vectors, are 0.

    Args:
        x: float [..., N, C].
        where: bool [..., N], tokens that exist.

    Returns:
        [..., N, N] in the dtype of `x`.

    Raises:
        ValueError: shapes do not fit.

    Example:
        >>> jax.jit(relation_matrix)(jnp.array([[2.0, 0.0], [0.0, 1.0]])).tolist()
        [[1.0, 0.0], [0.0, 1.0]]

    Source:
        Zhang et al., arXiv 2505.23656, eqs. 3 and 4.
    """
    if x.ndim < 2 or (where is not None and where.shape != x.shape[:-1]):
        raise ValueError(f"x must be [..., N, C] and where [..., N], got {x.shape} and {getattr(where, 'shape', None)}")
    return rows_mixed(_cosines)(x, jnp.ones(x.shape[:-1], bool) if where is None else where)


def match_grid(features: int, *, frames: int, stride: int = 3, drop_first: bool = True) -> Layer:
    """Returns the layer that brings a generator's features onto an encoder's grid of tokens.

    Time is resized linearly to `frames`; space is halved, thirded, ... by a learned convolution whose side is its
    stride; a two-layer network then maps the channels to the encoder's width.

    Args:
        features: D, width of the encoder's tokens.
        frames: F, frames of the encoder.
        stride: of space; must divide height and width.
        drop_first: whether the first latent frame, which video encoders hold for one image, is left out.

    Returns:
        A `Layer`: `params = init(key, channels)`; `apply(params, x [B, T, H, W, C])` gives
        `[B, F, H W / stride^2, D]`.

    Raises:
        ValueError: an option is below 1; in `apply`, a shape does not fit.

    Example:
        >>> layer = match_grid(8, frames=4)
        >>> params = jax.jit(layer.init, static_argnums=1)(jax.random.key(0), 2)
        >>> jax.jit(layer.apply)(params, jnp.ones((1, 3, 6, 9, 2))).shape
        (1, 4, 6, 8)

    Source:
        Zhang et al., arXiv 2505.23656; the order (project, resize time, convolve space) as in code aHapBean/VideoREPA.
        Reconstructed: the projection has the encoder's width inside and SiLU.
    """
    if min(features, frames, stride) < 1:
        raise ValueError(f"features={features}, frames={frames} and stride={stride} must be at least 1")
    hidden, project, convolve = dense(features), dense(features), dense(features)

    def init(key, channels):
        keys = jax.random.split(key, 3)
        return {
            "hidden": hidden.init(keys[0], channels),
            "project": project.init(keys[1], features),
            "convolve": convolve.init(keys[2], stride * stride * features),
        }

    def apply(params, x):
        first = int(drop_first)
        if x.ndim != 5 or x.shape[1] <= first or x.shape[2] % stride or x.shape[3] % stride:
            raise ValueError(
                f"x has shape {x.shape}, expected [B, T > {first}, H, W, C], H and W divisible by {stride}"
            )
        x = project.apply(params["project"], jax.nn.silu(hidden.apply(params["hidden"], x[:, first:])))
        b, _, h, w, c = x.shape
        wide = jax.image.resize(x.astype(compute_dtype(x)), (b, frames, h, w, c), "linear", antialias=False)
        # A convolution as wide as its stride is a dense layer over patches.
        patches = wide.astype(x.dtype).reshape(b, frames, h // stride, stride, w // stride, stride, c)
        patches = jnp.moveaxis(patches, 3, 4).reshape(b, frames, (h // stride) * (w // stride), stride * stride * c)
        return convolve.apply(params["convolve"], patches)

    return Layer(init, apply)


def _terms(tokens, teacher, keep, *, margin, mode):
    """Returns the mean over each video's pairs [B] and whether it has any."""
    dtype = compute_dtype(tokens, teacher)
    h, y = (safe_normalize(zero_where_false(x, keep).astype(dtype)) for x in (tokens, teacher))
    frames = h.shape[1]

    @jax.checkpoint
    def of_frame(frame):
        """Returns the sum and the number of the pairs whose first token lies in this frame, each [B]."""
        pick = lambda x: jax.lax.dynamic_index_in_dim(x, frame, axis=1, keepdims=False)
        others = (lambda x: pick(x)[:, None]) if mode == "spatial" else (lambda x: x)
        product = functools.partial(jnp.einsum, "bsc,bftc->bsft", precision=jax.lax.Precision.HIGHEST)
        apart = jnp.abs(product(pick(h), others(h)) - product(pick(y), others(y)))
        pair = pick(keep)[:, :, None, None] & others(keep)[:, None]
        if mode == "temporal":
            pair = pair & (jnp.arange(frames) != frame)[None, None, :, None]
        sums = jnp.sum(jnp.where(pair, jax.nn.relu(apart - margin), 0.0), axis=(1, 2, 3))
        return sums, jnp.sum(pair, axis=(1, 2, 3), dtype=dtype)

    sums, counts = jax.lax.map(of_frame, jnp.arange(frames))
    total = jnp.sum(counts, axis=0)
    return safe_divide(jnp.sum(sums, axis=0), total), total > 0


def _cosines(x, keep):
    unit = safe_normalize(zero_where_false(x, keep).astype(compute_dtype(x)))
    product = jnp.einsum("...nc,...mc->...nm", unit, unit, precision=jax.lax.Precision.HIGHEST)
    return product.astype(x.dtype)
