"""Growing Transformers: Modular Composition and Layer-wise Expansion on a Frozen Substrate (2025, arXiv 2507.07129).

All models share one embedding of tokens that is made from what the characters look like and never trained. Because the
inputs of all are the same, specialists that were trained apart can be put together by the mean of their logits, without
a router; and a deep model can be grown layer by layer, each new one on top of frozen ones.

    embedding    glyph of each character as a bitmap, its principal components, unit length; a token of several
                 characters has the mean of theirs (again at unit length)
    composition  z(x) = sum_m w_m z_m(x), w_m = 1 / M: the normalised geometric mean of the specialists' distributions
    growth       stage l trains block l, the last norm and the head; blocks below are frozen and have no optimiser state

By convexity of logsumexp the cross entropy of the mean of logits is at most the mean of the specialists' cross
entropies. A new block whose last products start at 0 (`zero_outputs`) changes nothing at first.

Reconstructed: bit patterns of code points where no font is at hand; unit length of means; `zero_outputs`. Left out: the
paper's last step, low-rank updates of all layers together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from jaxlab.ops.collectives import all_sum
from jaxlab.ops.masked import compute_dtype

_BITS = 21  # of the largest code point of Unicode


def average_logits(logits: Array, weights: Array | None = None, *, axis_name: str | None = None) -> Array:
    """Returns the mean of M specialists' logits: their mixture without a router.

    `z = sum_m w_m z_m` with weights that sum to 1.

    Args:
        logits: float [M, ..., C], of the same inputs and classes, as from `jax.vmap(apply, (0, None))`.
        weights: float >= 0 [M]; None = equal.
        axis_name: mapped axis over which the specialists are spread, M on each device.

    Returns:
        [..., C] in the dtype of `logits`; 0 if all weights are.

    Raises:
        ValueError: a shape does not fit.

    Example:
        >>> jax.jit(average_logits)(jnp.array([[1.0, 2.0], [3.0, 0.0]])).tolist()
        [2.0, 1.0]

    Source:
        Bochkov, arXiv 2507.07129, section 3.
    """
    if logits.ndim < 2:
        raise ValueError(f"logits must be [M, ..., C], got shape {logits.shape}")
    if weights is not None and weights.shape != logits.shape[:1]:
        raise ValueError(f"weights has shape {weights.shape}, expected {logits.shape[:1]}")
    dtype = compute_dtype(logits)
    share = jnp.ones(logits.shape[0], dtype) if weights is None else weights.astype(dtype)
    whole = all_sum(jnp.sum(share), axis_name)
    share = share / jnp.where(whole > 0, whole, 1.0)
    wide = logits.astype(dtype) * share.reshape((-1,) + (1,) * (logits.ndim - 1))
    return all_sum(jnp.sum(wide, axis=0), axis_name).astype(logits.dtype)


def compose_experts(specialists: Sequence[Any]) -> Any:
    """Returns the parameters of specialists of one architecture as one pytree with a leading axis M.

    Args:
        specialists: M >= 1 pytrees of the same structure and shapes.

    Returns:
        The stacked pytree, for `jax.vmap(apply, (0, None))` and `average_logits`.

    Raises:
        ValueError: there is none, or shapes differ.

    Example:
        >>> compose_experts([{"w": np.zeros(2)}, {"w": np.ones(2)}])["w"].tolist()
        [[0.0, 0.0], [1.0, 1.0]]
    """
    if not specialists:
        raise ValueError("specialists must hold at least one model")
    shapes = [jax.tree.map(np.shape, params) for params in specialists]
    if any(other != shapes[0] for other in shapes):
        raise ValueError(f"specialists must have the same shapes, got {shapes}")
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *specialists)


def glyph_embedding(bitmaps: np.ndarray, size: int, *, characters: np.ndarray | None = None) -> np.ndarray:
    """Returns the frozen embedding of tokens by what their characters look like (host).

    Args:
        bitmaps: float [C, H, W], one of each character.
        size: d; principal components beyond those that exist are 0.
        characters: int [V, L], the characters of each token, -1 = none; None = every character is a token.

    Returns:
        float32 [V, d] of unit length (0 for a token without characters, and if all bitmaps are equal). The same
        bitmaps give the same embedding: signs are such that the largest loading of a component is positive.

    Raises:
        ValueError: a shape does not fit or `size` is less than 1.

    Example:
        >>> glyph_embedding(np.eye(3).reshape(3, 1, 3), 4).round(2)[0].tolist()[2:]
        [0.0, 0.0]

    Source:
        Bochkov, arXiv 2507.07129, section 2 (its earlier work on frozen visual embeddings).
    """
    bitmaps = np.asarray(bitmaps, np.float64)
    if bitmaps.ndim != 3 or size < 1:
        raise ValueError(f"bitmaps must be [C, H, W] and size={size} at least 1, got {bitmaps.shape}")
    flat = bitmaps.reshape(len(bitmaps), -1)
    flat = flat - flat.mean(axis=0)
    u, s, v = np.linalg.svd(flat, full_matrices=False)
    sign = np.sign(v[np.arange(len(v)), np.abs(v).argmax(axis=1)])
    used = min(size, int(np.sum(s > 1e-9 * max(1.0, s[:1].max(initial=0.0)))))
    embedding = np.zeros((len(flat), size))
    embedding[:, :used] = u[:, :used] * (s * sign)[:used]
    return _of_tokens(embedding, characters)


def codepoint_embedding(codes: np.ndarray, size: int) -> np.ndarray:
    """Returns a frozen embedding of tokens by the bits of their code points, where no glyphs are at hand (host).

    Args:
        codes: int [V] or [V, L], code points of each token's characters; -1 = none.
        size: d; the bits (-1 and 1) are repeated over it, each round with the signs of another pattern.

    Returns:
        float32 [V, d] of unit length; different characters differ if d is at least 21.

    Raises:
        ValueError: a shape does not fit or `size` is less than 1.

    Example:
        >>> a, b = codepoint_embedding(np.array([97, 98]), 21)
        >>> round(float(a @ b), 4)  # two of 21 bits differ
        0.8095
    """
    codes = np.asarray(codes, np.int64)
    codes = codes[:, None] if codes.ndim == 1 else codes
    if codes.ndim != 2 or size < 1:
        raise ValueError(f"codes must be [V] or [V, L] and size={size} at least 1, got {codes.shape}")
    places = np.arange(size)
    bits = 2.0 * ((codes[:, :, None] >> (places % _BITS)) & 1) - 1
    # A bit's neighbour decides its sign from the second round on, so that rounds are not copies of each other.
    neighbour = 2.0 * ((codes[:, :, None] >> ((places + places // _BITS) % _BITS)) & 1) - 1
    pattern = np.where(places < _BITS, bits, bits * neighbour)
    known = codes >= 0
    total = np.sum(np.where(known[:, :, None], pattern, 0.0), axis=1)
    return _unit(total / np.maximum(known.sum(axis=1), 1)[:, None])


def grow(params: Any, block: Any, *, zero_outputs: Sequence[str] = ()) -> Any:
    """Returns the parameters of a model with one more block on top of those it has.

    Args:
        params: dict with `blocks`, a dict of `block_0`, `block_1` and so on.
        block: parameters of the new one.
        zero_outputs: names of entries of the block (`out`, `ff/down`) that are set to 0: the last products before the
            residual stream.

    Returns:
        A new dict; nothing is copied that stays the same.

    Raises:
        ValueError: `params` has no blocks, or an entry does not exist.

    Example:
        >>> model = {"head": jnp.ones(2), "blocks": {"block_0": {"out": jnp.ones(1)}}}
        >>> grow(model, {"out": jnp.ones(1)}, zero_outputs=["out"])["blocks"]["block_1"]["out"].tolist()
        [0.0]

    Source:
        Bochkov, arXiv 2507.07129, section 4.
    """
    if not isinstance(params.get("blocks"), dict):
        raise ValueError(f"params must have a dict of blocks, got {sorted(params)}")
    for name in zero_outputs:
        block = _zeroed(block, name.split("/"), name)
    return {**params, "blocks": {**params["blocks"], f"block_{len(params['blocks'])}": block}}


def active_mask(params: Any, *, frozen: Sequence[str] = ("embedding",)) -> Any:
    """Returns which parameters the present stage trains: the last block and everything outside the blocks.

    Args:
        params: of `grow`.
        frozen: entries outside the blocks that are never trained.

    Returns:
        The pytree with a bool for every leaf.

    Raises:
        ValueError: `params` has no blocks.

    Example:
        >>> active_mask({"head": 1.0, "embedding": 2.0, "blocks": {"block_0": {"w": 3.0}, "block_1": {"w": 4.0}}})
        {'blocks': {'block_0': {'w': False}, 'block_1': {'w': True}}, 'embedding': False, 'head': True}
    """
    if not isinstance(params.get("blocks"), dict):
        raise ValueError(f"params must have a dict of blocks, got {sorted(params)}")
    last = f"block_{len(params['blocks']) - 1}"
    every = lambda tree, value: jax.tree.map(lambda _: value, tree)
    mask = {name: every(tree, name not in frozen) for name, tree in params.items() if name != "blocks"}
    return dict(sorted({**mask, "blocks": {n: every(tree, n == last) for n, tree in params["blocks"].items()}}.items()))


def train_active(optimizer: optax.GradientTransformation, mask: Any) -> optax.GradientTransformation:
    """Returns the optimiser for the parameters of a mask: others stay exactly as they are and cost no state.

    Args:
        optimizer: any optax transformation.
        mask: pytree of bools, of `active_mask`.

    Returns:
        An optax transformation.

    Example:
        >>> step = train_active(optax.sgd(1.0), {"a": True, "b": False})
        >>> grads = {"a": jnp.ones(()), "b": jnp.ones(())}
        >>> updates, _ = step.update(grads, step.init(grads), grads)
        >>> float(updates["a"]), float(updates["b"])
        (-1.0, 0.0)
    """
    labels = jax.tree.map(lambda keep: "active" if keep else "frozen", mask)
    return optax.partition({"active": optimizer, "frozen": optax.set_to_zero()}, labels)


def _of_tokens(embedding, characters):
    if characters is not None:
        characters = np.asarray(characters, np.int64)
        if characters.ndim != 2 or characters.max(initial=-1) >= len(embedding):
            raise ValueError(f"characters must be [V, L] below {len(embedding)}, got shape {characters.shape}")
        known = characters >= 0
        # Characters count at unit length in the mean, so that bold ones do not drown the others.
        each = _unit(embedding)[np.maximum(characters, 0)].astype(np.float64)
        embedding = np.sum(np.where(known[:, :, None], each, 0.0), axis=1)
    return _unit(embedding)


def _unit(x):
    length = np.linalg.norm(x, axis=1, keepdims=True)
    return np.divide(x, length, out=np.zeros_like(x), where=length > 1e-12).astype(np.float32)


def _zeroed(tree, path, name):
    if not isinstance(tree, dict) or path[0] not in tree:
        raise ValueError(f"zero_outputs names {name!r}, which the block does not have")
    inner = _zeroed(tree[path[0]], path[1:], name) if path[1:] else jax.tree.map(jnp.zeros_like, tree[path[0]])
    return {**tree, path[0]: inner}
