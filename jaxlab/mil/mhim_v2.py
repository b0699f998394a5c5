"""MIL Framework with Masked Hard Instance Mining for Gigapixel Histopathology Image Analysis (MHIM v2, 2025).

Full title: Multiple Instance Learning Framework with Masked Hard Instance Mining for Gigapixel Histopathology Image
Analysis, arXiv 2509.11526. Three changes to the first version (`mhim`): the teacher's score is the class probability
that an instance's share of the bag feature has; only the highest scores are masked; and of the rest a random part is
not thrown away but compressed into k tokens by a global recycle network.

    score_i   = max_c softmax_c(a_i h_i W),    a attention, h features, W the weights of the classifier
    masked    = the highest scores;   the others are split at random into kept and recycled
    G         = MHA(queries norm(Q), keys and values norm(recycled)),    no residual
    student   = model([kept; G]);      L = CE + weight * consistency(z_S, z_T)
    Q        <- query_decay Q + (1 - query_decay) mean over bags of sg(G),    teacher <- moving average of the student

Q has no gradient; at test there is neither mask nor G. The bias of the classifier cancels in the score (the code adds
one number to all classes).

Reconstructed: bags in batches (the code has one bag a step): Q follows the mean of their G. A bag with nothing to
recycle has no G, and one of which everything would be masked stays whole. For the dual-stream model the score is the
largest instance logit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from jaxlab.mil.mhim import bag_probabilities, check_ratios, hard_instance_mask, layout_of, student_loss
from jaxlab.mil.models import at_least_one, dropped, xavier_dense
from jaxlab.mil.pooling import Bags, group
from jaxlab.ops.collectives import all_sum, axis_index, value_and_grad
from jaxlab.ops.layers import feature_norm
from jaxlab.ops.masked import compute_dtype, masked_sum, safe_divide, zero_where_false
from jaxlab.ops.sharding import rows_mixed
from jaxlab.ops.trees import ema_update
from jaxlab.types import Layer, Learner, LearnerState, StatefulLayer, accepted


def mhim_v2(
    encoder: Layer,
    model: Layer,
    optimizer: optax.GradientTransformation,
    *,
    ratio_high: float | Callable[[Array], Array] = 0.03,
    high_random: float = 1.0,
    keep_ratio: float = 0.8,
    num_tokens: int = 10,
    recycling: StatefulLayer | None = None,
    weight: float = 0.5,
    decay: float | Callable[[Array], Array] = 0.9997,
    query_decay: float = 0.9998,
    axis_name: str | None = None,
) -> Learner:
    """Returns a learner that trains a bag model without its salient instances and with the rest partly compressed.

    Args:
        encoder: network over single instances, such as `instance_encoder(activation=jax.nn.gelu)`.
        model: bag model over its features, such as `abmil(2, activation=jax.nn.relu)`.
        optimizer: of the student.
        ratio_high: share of the bag masked for its high score, or a function of the step.
        high_random: see `select_mask`.
        keep_ratio: share of the instances that are not masked which the student sees as they are; the others are
            recycled.
        num_tokens: k, tokens that stand for the recycled instances of a bag.
        recycling: replaces `global_recycling(num_tokens)`.
        weight: of the consistency term.
        decay: of the teacher's moving average, or a function of the step.
        query_decay: of the global query.
        axis_name: mapped axis over which the bags are spread.

    Returns:
        A `Learner` with batches and metrics as of `mhim`. `init(key, batch, params=None, teacher=None)`: parameters are
        dicts of `encoder`, `model` and (the student's) `recycling`; `state.net_state` has `teacher` and `query`.

    Raises:
        ValueError: an option is out of range.

    Example:
        >>> from jaxlab.mil import abmil, instance_encoder
        >>> learner = mhim_v2(instance_encoder(8), abmil(2), optax.sgd(0.1), num_tokens=2)
        >>> batch = {"x": jnp.ones((3, 10, 4)), "y": jnp.array([0, 1, 1])}
        >>> step = lambda key: learner.update(learner.init(key, batch), batch, key)
        >>> state, metrics = jax.eval_shape(step, jax.random.key(0))
        >>> sorted(metrics)
        ['accuracy', 'consistency', 'kept', 'loss']

    Source:
        Tang et al., arXiv 2509.11526; code DearCaat/MHIM-MIL (defaults of its options; its README tunes `ratio_high`
        0.01 to 0.05, `keep_ratio` 0.8 or 0.9, k 1 to 10, and starts the teacher from a trained baseline).
    """
    check_ratios(keep_ratio=keep_ratio)
    if weight < 0:
        raise ValueError(f"weight={weight} must not be negative")
    recycling = global_recycling(num_tokens) if recycling is None else recycling
    high_now = ratio_high if callable(ratio_high) else lambda step: ratio_high
    decay_now = decay if callable(decay) else lambda step: decay

    def init(key, batch, *, params=None, teacher=None):
        keys = jax.random.split(key, 3)
        size = batch["x"].shape[-1]
        own = encoder.init(keys[0], size) if params is None else params["encoder"]
        width = jax.eval_shape(encoder.apply, own, jax.ShapeDtypeStruct((1, size), jnp.float32)).shape[-1]
        params = {"encoder": own, "model": model.init(keys[1], width)} if params is None else params
        merge, query = recycling.init(keys[2], width)
        student = {"recycling": merge, **params}
        both = {name: params[name] for name in ("encoder", "model")}
        teacher = jax.tree.map(jnp.copy, both) if teacher is None else teacher
        net_state = {"teacher": teacher, "query": query}
        return LearnerState(student, net_state, optimizer.init(student), jnp.zeros((), jnp.int32))

    def update(state, batch, key):
        def loss(params):
            return mhim_v2_loss(
                params,
                state.net_state["teacher"],
                state.net_state["query"],
                batch,
                encoder=encoder,
                model=model,
                recycling=recycling,
                ratio_high=high_now(state.step),
                high_random=high_random,
                keep_ratio=keep_ratio,
                weight=weight,
                key=jax.random.fold_in(key, axis_index(axis_name)),
                axis_name=axis_name,
            )

        (_, (metrics, merged)), grads = value_and_grad(loss, axis_name=axis_name, has_aux=True)(state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        own = {name: params[name] for name in ("encoder", "model")}
        net_state = {
            "teacher": ema_update(state.net_state["teacher"], own, decay=decay_now(state.step)),
            "query": update_query(state.net_state["query"], *merged, decay=query_decay, axis_name=axis_name),
        }
        return LearnerState(params, net_state, opt_state, state.step + 1), metrics

    def predict(state, batch):
        layout = layout_of(batch)
        x = zero_where_false(batch["x"], group(batch["x"], **layout).keep)
        outputs = model.apply(state.params["model"], encoder.apply(state.params["encoder"], x), **layout)
        return {**outputs, "probs": bag_probabilities(outputs)}

    return Learner(init, update, predict)


def mhim_v2_loss(
    params: Mapping[str, Any],
    teacher: Mapping[str, Any],
    query: Any,
    batch: Mapping[str, Array],
    *,
    encoder: Layer,
    model: Layer,
    recycling: StatefulLayer,
    ratio_high: float | Array = 0.03,
    high_random: float = 1.0,
    keep_ratio: float = 0.8,
    weight: float = 0.5,
    key: Array,
    axis_name: str | None = None,
) -> tuple[Array, tuple[dict[str, Array], tuple[Array, Array]]]:
    """Returns the student's loss on kept instances and recycled tokens, and what the query learns from.

    Args:
        params: the student's `encoder`, `model` and `recycling`.
        teacher: the teacher's `encoder` and `model`; no gradient reaches them.
        query: state of the recycling; no gradient reaches it.
        batch: `x`, `y`, and `where` or `segment_ids` (see `mhim`).
        encoder: network over single instances.
        model: bag model.
        recycling: `global_recycling(k)`.
        ratio_high: see `mhim_v2`, as are `high_random`, `keep_ratio` and `weight`.
        high_random: see `select_mask`.
        keep_ratio: share of the instances that are not masked which the student sees as they are.
        weight: of the consistency term.
        key: for dropout, masks and the split.
        axis_name: mapped axis over which the bags are spread.

    Returns:
        Scalar loss over the bags of all shards; the metrics of `mhim_loss`; and tokens [B, k, D] with bool [B], the
        bags that have them, for `update_query`.

    Raises:
        ValueError: an option is out of range.

    Example:
        >>> from jaxlab import mil
        >>> nets = {"encoder": mil.instance_encoder(8), "model": mil.abmil(2), "recycling": global_recycling(2)}
        >>> batch = {"x": jnp.ones((3, 10, 4)), "y": jnp.array([0, 1, 1])}
        >>> def loss(key):
        ...     merge, query = nets["recycling"].init(key, 8)
        ...     both = {"encoder": nets["encoder"].init(key, 4), "model": nets["model"].init(key, 8)}
        ...     return mhim_v2_loss({**both, "recycling": merge}, both, query, batch, **nets, key=key)[0]
        >>> jax.eval_shape(loss, jax.random.key(0)).shape
        ()

    Source:
        Tang et al., arXiv 2509.11526; code DearCaat/MHIM-MIL, `modules/mhim.py`.
    """
    layout = layout_of(batch)
    bags = group(batch["x"], **layout)
    x = zero_where_false(batch["x"], bags.keep)
    keys = jax.random.split(key, 7)

    def forward(net, params, x, key):
        return net.apply(params, x, **accepted(net.apply, key=key, train=True))

    def pool(params, h, key, layout):
        return model.apply(params, h, **layout, **accepted(model.apply, key=key, train=True))

    features = jax.lax.stop_gradient(forward(encoder, teacher["encoder"], x, keys[0]))
    seen = jax.lax.stop_gradient(pool(teacher["model"], features, keys[1], layout))
    scores = jax.lax.stop_gradient(_score(seen, features, teacher["model"], bags))
    masked = hard_instance_mask(scores, ratio_high=ratio_high, high_random=high_random, key=keys[2], **layout)
    left = bags.keep & jnp.logical_not(masked)
    kept, recycled = recycle_split(left, keep_ratio=keep_ratio, key=keys[3], **{**layout, "where": None})
    h = forward(encoder, params["encoder"], x, keys[4])
    ids = {name: layout[name] for name in ("segment_ids", "num_segments")}
    tokens, _ = recycling.apply(params["recycling"], query, h, where=recycled, **ids, key=keys[5], train=True)
    some = rows_mixed(lambda mask, bags: bags.only(mask).count > 0)(recycled, bags)
    longer, new_layout = _appended(h, kept, tokens, some, bags)
    outputs = pool(params["model"], longer, keys[6], new_layout)
    loss, metrics = student_loss(outputs, seen, batch, kept, bags.keep, weight=weight, axis_name=axis_name)
    return loss, (metrics, (jax.lax.stop_gradient(tokens), some))


def class_aware_score(attention: Array, features: Array, head: Array, *, where: Array | None = None) -> Array:
    """Returns the largest class probability of each instance's share of the bag feature: `max_c softmax_c(a_i h_i W)`.

    Args:
        attention: float [...], weights a of the instances ([B, N] or [T]).
        features: float [..., D], what is pooled.
        head: float [D, C], weights W of the classifier; its bias plays no part.
        where: bool [...], real instances.

    Returns:
        Float [...] in [1/C, 1], in the dtype of `features`; 0 on padding.

    Raises:
        ValueError: shapes do not fit.

    Example:
        >>> jax.jit(class_aware_score)(jnp.zeros((1, 3)), jnp.ones((1, 3, 4)), jnp.ones((4, 2))).tolist()
        [[0.5, 0.5, 0.5]]

    Source:
        Code DearCaat/MHIM-MIL, `get_pseudo_score`.
    """
    if features.shape[:-1] != attention.shape or head.ndim != 2 or head.shape[0] != features.shape[-1]:
        raise ValueError(f"attention {attention.shape}, features {features.shape} and head {head.shape} do not fit")
    if where is not None and where.shape != attention.shape:
        raise ValueError(f"where has shape {where.shape}, expected {attention.shape}")
    dtype = compute_dtype(features)
    share = zero_where_false(attention, where)[..., None].astype(dtype) * zero_where_false(features, where).astype(
        dtype
    )
    best = jnp.max(jax.nn.softmax(jnp.matmul(share, head.astype(dtype))), axis=-1)
    return zero_where_false(best, where).astype(features.dtype)


def class_aware_score_multihead(
    attention: Array, values: Array, out: Mapping[str, Array], head: Array, *, where: Array | None = None
) -> Array:
    """Returns `class_aware_score` for attention with heads: their weighted values, joined and projected, are the share.

    Args:
        attention: float [..., H], the class token's attention (`transmil`'s `attention`).
        values: float [..., H, d] (its `values`).
        out: the layer's output projection, `w` [H d, D] and `b` [D].
        head: float [D, C], weights of the classifier.
        where: bool [...], real instances.

    Returns:
        Float [...] in [1/C, 1], in the dtype of `values`; 0 on padding.

    Raises:
        ValueError: shapes do not fit.

    Example:
        >>> out = {"w": jnp.ones((4, 4)), "b": jnp.zeros(4)}
        >>> score = jax.jit(class_aware_score_multihead)
        >>> score(jnp.zeros((3, 2)), jnp.ones((3, 2, 2)), out, jnp.ones((4, 2))).tolist()
        [0.5, 0.5, 0.5]

    Source:
        Code DearCaat/MHIM-MIL, `get_pseudo_score_trans`.
    """
    if values.shape[:-1] != attention.shape:
        raise ValueError(
            f"attention has shape {attention.shape}, values {values.shape}: expected [..., H] and [..., H, d]"
        )
    dtype = compute_dtype(values)
    share = zero_where_false(attention, where)[..., None].astype(dtype) * zero_where_false(values, where).astype(dtype)
    joined = share.reshape(*attention.shape[:-1], -1)
    wide = {name: value.astype(dtype) for name, value in out.items()}
    projected = xavier_dense(wide["w"].shape[1]).apply(wide, joined)
    ones = jnp.ones(attention.shape[:-1], dtype)
    return class_aware_score(ones, projected, head, where=where).astype(values.dtype)


def recycle_split(
    keep: Array,
    *,
    keep_ratio: float,
    key: Array,
    where: Array | None = None,
    segment_ids: Array | None = None,
    num_segments: int | None = None,
) -> tuple[Array, Array]:
    """Returns a random part of each bag's instances, `floor(keep_ratio * n)` of n, and the rest.

    Args:
        keep: bool [B, N] or [T], the instances to split.
        keep_ratio: share of the first part, in [0, 1].
        key: decides the split.
        where: bool, like `keep`, real instances.
        segment_ids: int [T], bag of each instance, -1 = padding.
        num_segments: B, with `segment_ids`.

    Returns:
        Two masks like `keep`, disjoint, together `keep`.

    Raises:
        ValueError: shapes do not fit or `keep_ratio` is out of range.

    Example:
        >>> split = jax.jit(lambda key: recycle_split(jnp.ones((1, 10), bool), keep_ratio=0.8, key=key))
        >>> kept, rest = split(jax.random.key(0))
        >>> int(kept.sum()), int(rest.sum())
        (8, 2)

    Source:
        Code DearCaat/MHIM-MIL, `Merge.masking`.
    """
    check_ratios(keep_ratio=keep_ratio)
    bags = group(keep[..., None], where, segment_ids, num_segments)

    def split(keep, bags, key):
        keep = keep & bags.keep
        number = bags.only(keep).count.astype(jnp.float32)
        # A product that is whole must not be rounded down because of its last bit.
        first = jnp.floor(number * keep_ratio * (1 + 1e-6)).astype(jnp.int32)
        place = bags.rank(jnp.where(keep, bags.uniform(key), -1.0))
        kept = keep & (place < bags.spread(first))
        return kept, keep & jnp.logical_not(kept)

    return rows_mixed(split)(keep, bags, key)


def global_recycling(num_tokens: int, *, heads: int = 8, head_size: int = 64, dropout: float = 0.1) -> StatefulLayer:
    """Returns the global recycle network: k queries attend to the recycled instances of each bag.

    `G = MHA(norm(Q), norm(x), norm(x)) W + b`, without a residual; Q is the state.

    Args:
        num_tokens: k.
        heads: attention heads.
        head_size: size of each.
        dropout: of attention weights and of the result in training, in [0, 1).

    Returns:
        A `StatefulLayer`: `params, state = init(key, D)`, `state["query"]` [k, D]; `tokens, state = apply(params,
        state, x, where=, segment_ids=, num_segments=, key=None, train=False)` gives [B, k, D] and the state as it was:
        `update_query` advances it once per optimiser step. An empty bag gives the bias b.

    Raises:
        ValueError: an option is out of range; in `apply`, shapes do not fit or a key is missing.

    Example:
        >>> layer = global_recycling(2, heads=2, head_size=4)
        >>> tokens = lambda key: layer.apply(*layer.init(key, 3), jnp.ones((5, 6, 3)))[0]
        >>> jax.eval_shape(tokens, jax.random.key(0)).shape
        (5, 2, 3)

    Source:
        Code DearCaat/MHIM-MIL, `Merge` and `MCA` (the query starts uniform within sqrt(6 / (3 * 256 + D))).
    """
    at_least_one(num_tokens=num_tokens, heads=heads, head_size=head_size)
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout={dropout} must be in [0, 1)")
    norm, inner = feature_norm(eps=1e-5), heads * head_size
    to_query, to_pair = xavier_dense(inner, bias=False), xavier_dense(2 * inner, bias=False)

    def init(key, size):
        keys = jax.random.split(key, 4)
        bound = math.sqrt(6 / (3 * 256 + size))
        params = {
            "norm": norm.init(keys[0], size),
            "query": to_query.init(keys[1], size),
            "pair": to_pair.init(keys[2], size),
            "out": xavier_dense(size).init(keys[3], inner),
        }
        return params, {"query": jax.random.uniform(keys[0], (num_tokens, size), minval=-bound, maxval=bound)}

    def apply(params, state, x, *, where=None, segment_ids=None, num_segments=None, key=None, train=False):
        noisy = train and dropout > 0
        if noisy and key is None:
            raise ValueError("dropout in training needs a key")
        bags = group(x, where, segment_ids, num_segments)
        keys = jax.random.split(key) if noisy else None
        return rows_mixed(run)(params, jax.lax.stop_gradient(state["query"]), x, bags, keys), state

    def run(params, query, x, bags, keys):
        x = zero_where_false(x, bags.keep)
        q = to_query.apply(params["query"], norm.apply(params["norm"], query.astype(x.dtype)))
        pair = to_pair.apply(params["pair"], norm.apply(params["norm"], x)).reshape(*x.shape[:-1], 2, heads, head_size)
        q = q.reshape(-1, heads, head_size)
        scores = jnp.einsum("...hd,khd->...hk", pair[..., 0, :, :], q, preferred_element_type=compute_dtype(x))
        weights = jax.vmap(bags.softmax, in_axes=-2, out_axes=-2)(scores * head_size**-0.5)
        if keys is not None:
            weights = dropped(keys[0], weights, dropout)
        mixed = jax.vmap(bags.weigh, in_axes=-2, out_axes=-2)(pair[..., 1, :, :], weights)  # [B, k, H, d]
        tokens = xavier_dense(x.shape[-1]).apply(params["out"], mixed.reshape(*mixed.shape[:2], -1).astype(x.dtype))
        return tokens if keys is None else dropped(keys[1], tokens, dropout)

    return StatefulLayer(init, apply)


def update_query(
    state: Mapping[str, Array],
    tokens: Array,
    where: Array | None = None,
    *,
    decay: float = 0.9998,
    axis_name: str | None = None,
) -> dict[str, Array]:
    """Returns the state of the recycling after a step: `Q <- decay Q + (1 - decay) mean over bags of the tokens`.

    Args:
        state: `query` [k, D].
        tokens: float [B, k, D].
        where: bool [B], bags that have tokens; without any the query stays.
        decay: in [0, 1].
        axis_name: mapped axis over which the bags are spread.

    Returns:
        The new state; it has no gradient.

    Raises:
        ValueError: shapes do not fit or `decay` is out of range.

    Example:
        >>> new = jax.jit(lambda query: update_query({"query": query}, jnp.ones((2, 1, 1)), decay=0.75))
        >>> new(jnp.zeros((1, 1)))["query"].tolist()
        [[0.25]]

    Source:
        Code DearCaat/MHIM-MIL, `Merge.update_q_ema`.
    """
    check_ratios(decay=decay)
    query = state["query"]
    if tokens.ndim != 3 or tokens.shape[1:] != query.shape:
        raise ValueError(f"tokens has shape {tokens.shape}, expected [B, {query.shape[0]}, {query.shape[1]}]")
    keep = jnp.ones(tokens.shape[:1], bool) if where is None else where
    total = all_sum(masked_sum(tokens, keep, axis=0), axis_name)
    count = all_sum(jnp.sum(keep, dtype=total.dtype), axis_name)
    new = ema_update(query, safe_divide(total, count), decay=decay)
    return {"query": jax.lax.stop_gradient(jnp.where(count > 0, new, query))}


def _score(seen: Mapping[str, Array], features: Array, params: Mapping[str, Any], bags: Bags) -> Array:
    """The class-aware score of a plain model, of a transformer, or the instance logits of a dual-stream model."""
    if "instance_logits" in seen:
        return jnp.max(seen["instance_logits"], axis=-1)
    head = params["head"]["w"]
    if "values" in seen:
        out = params["layer_0"]["out"]
        return class_aware_score_multihead(seen["attention"], seen["values"], out, head, where=bags.keep)
    return class_aware_score(seen["attention"], features, head, where=bags.keep)


def _appended(h: Array, kept: Array, tokens: Array, some: Array, bags: Bags) -> tuple[Array, dict[str, Any]]:
    """Returns the instances followed by the tokens of their bags, and the layout of both."""
    size, k = tokens.shape[:2]
    there = jnp.broadcast_to(some[:, None], (size, k))

    def join(h, kept, tokens, there, bags):
        if bags.segment_ids is None:
            return jnp.concatenate([h, tokens], axis=1), jnp.concatenate([kept, there], axis=1), None
        ids = jnp.concatenate([bags.segment_ids, jnp.repeat(jnp.arange(size, dtype=jnp.int32), k)])
        keep = jnp.concatenate([kept, there.reshape(-1)])
        return jnp.concatenate([h, tokens.reshape(size * k, -1)]), keep, jnp.where(keep, ids, -1)

    x, where, ids = rows_mixed(join)(h, kept, tokens, there, bags)
    return x, {"where": where, "segment_ids": ids, "num_segments": None if ids is None else size}
