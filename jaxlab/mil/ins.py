"""INS (2023, arXiv 2307.02249).

Full title: Rethinking Multiple Instance Learning for Whole Slide Image Classification: A Good Instance Classifier is
All You Need. Instances of negative bags are negative for certain; those of positive bags may be either. So train an
instance classifier with partial labels: a contrastive loss that pulls together what is believed to be of one class,
prototypes of both classes, and pseudo labels that follow the nearest prototype.

    candidates   Y = [1, 0] in negative bags, [1, 1] in positive ones;   pseudo class l = argmax softmax(o) Y
    prototypes   mu_l <- m mu_l + (1 - m) q for each example in turn, then mu <- mu / |mu|
    pseudo label c <- phi c + (1 - phi) onehot(argmax softmax_c(q . mu_c) Y);   [1, 0] in negative bags
    L = CE(o, c) + 0.5 L_cont;   L_cont: MoCo's loss while warming up, then SupCon over [q; keys; queue] by pseudo class

q are normalised projections of a weak view, keys those of a strong view by a moving average of the network. A bag's
score is the largest probability of its instances.

Reconstructed: slots of the queue that are still empty take no part (the code fills them with noise); schedules count
optimiser steps where the code counts epochs (there phi never quite reaches its end); the bag constraint pools with
attention, as in the code, where the paper averages instances.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from jax import Array

from jaxlab.mil.mhim import check_ratios
from jaxlab.mil.models import abmil, at_least_one, xavier_dense
from jaxlab.ops.collectives import axis_index, gather_rows
from jaxlab.ops.masked import (
    compute_dtype,
    masked_logsumexp,
    masked_mean,
    safe_divide,
    safe_normalize,
    zero_where_false,
)
from jaxlab.ops.reduction import reduce_terms
from jaxlab.ops.sharding import rows_mixed
from jaxlab.ops.trees import ema_update
from jaxlab.types import Layer, Learner, LearnerState


def ins(
    encoder: Layer,
    optimizer: optax.GradientTransformation,
    *,
    num_instances: int,
    warmup_steps: int,
    total_steps: int,
    inherit_steps: int = 0,
    bag_steps: int = 0,
    queue_size: int = 8192,
    features: int = 128,
    temperature: float = 0.07,
    weight: float = 0.5,
    bag_weight: float = 1.0,
    prototype_decay: float = 0.9,
    key_decay: float = 0.999,
    phi: tuple[float, float] = (0.95, 0.8),
) -> Learner:
    """Returns a learner of an instance classifier from labels of bags.

    Args:
        encoder: network over single instances, features out.
        optimizer: of everything that is trained.
        num_instances: instances in the training set; the table of pseudo labels has so many rows.
        warmup_steps: steps of MoCo's loss before prototypes shape pseudo labels.
        total_steps: length of the schedule of phi.
        inherit_steps: first steps in which every instance has its bag's label (the code: one epoch).
        bag_steps: from this step on the bag constraint counts, if the batch has `bags`.
        queue_size: keys to remember.
        features: size of the projections.
        temperature: of both contrastive losses.
        weight: of the contrastive loss.
        bag_weight: of the bag constraint.
        prototype_decay: m.
        key_decay: of the network that makes the keys.
        phi: decay of the pseudo labels at the start and at the end.

    Returns:
        A `Learner`. `batch`: `x` [N, ...] weak view, `x_strong` likewise, `y` int [N] (label of the instance's bag, 0
        or 1), `index` int [N] (position in the training set), optional `where` [N], optional `bags` with `x`
        [B, M, ...], `y` [B] and `where` [B, M]. `net_state` has `confidence` [num_instances, 2], `prototypes`
        [2, features], the queue, and `average`, the network of the keys. Metrics `loss`, `classification`,
        `contrastive`, `bag`. `predict` gives `logits` and `probs` [N, 2] of instances; `max_pool` of the latter scores
        bags. For data on several devices use arrays with shardings under one `jit`: the table, prototypes and queue are
        global.

    Raises:
        ValueError: an option is out of range.

    Example:
        >>> from jaxlab.ops.layers import mlp
        >>> learner = ins(mlp([8]), optax.sgd(0.1), num_instances=6, warmup_steps=1, total_steps=9, queue_size=16)
        >>> x = jnp.ones((6, 4))
        >>> batch = {"x": x, "x_strong": x, "y": jnp.array([0, 0, 0, 1, 1, 1]), "index": jnp.arange(6)}
        >>> step = lambda key: learner.update(learner.init(key, batch), batch, key)
        >>> state, metrics = jax.eval_shape(step, jax.random.key(0))
        >>> state.net_state["confidence"].shape, sorted(metrics)
        ((6, 2), ['bag', 'classification', 'contrastive', 'loss'])

    Source:
        Qu et al., arXiv 2307.02249; code miccaiif/INS (defaults; SGD 0.01, momentum 0.9, decay 1e-3, batches of 64).
    """
    at_least_one(num_instances=num_instances, total_steps=total_steps, queue_size=queue_size, features=features)
    check_ratios(prototype_decay=prototype_decay, key_decay=key_decay, phi=phi[0], phi_end=phi[1])
    classifier, outer = xavier_dense(2), xavier_dense(features)
    pool = abmil(2)

    def widths(params, x):
        return jax.eval_shape(encoder.apply, params, jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype)).shape[-1]

    def project(params, h):
        inner = xavier_dense(h.shape[-1])
        return safe_normalize(outer.apply(params["outer"], jax.nn.relu(inner.apply(params["inner"], h))))

    def init(key, batch, *, params=None):
        keys = jax.random.split(key, 5)
        if params is None:
            x = batch["x"]
            dims = x.shape[1] if x.ndim == 2 else jax.ShapeDtypeStruct(x.shape[1:], x.dtype)
            own = encoder.init(keys[0], dims)
            width = widths(own, x)
            params = {
                "encoder": own,
                "classifier": classifier.init(keys[1], width),
                "projector": {
                    "inner": xavier_dense(width).init(keys[2], width),
                    "outer": outer.init(keys[3], width),
                },
                "bag": pool.init(keys[4], width),
            }
        average = {name: jax.tree.map(jnp.copy, params[name]) for name in ("encoder", "projector")}
        net_state = {
            "average": average,
            "queue": jnp.zeros((queue_size, features)),
            "queue_labels": jnp.zeros(queue_size, jnp.int32),
            "queue_filled": jnp.zeros(queue_size, bool),
            "queue_place": jnp.zeros((), jnp.int32),
            "prototypes": jnp.zeros((2, features)),
            "confidence": jnp.full((num_instances, 2), -1.0),  # unseen: negative marks that no label has come yet
        }
        return LearnerState(params, net_state, optimizer.init(params), jnp.zeros((), jnp.int32))

    def update(state, batch, key):
        del key
        net, step = state.net_state, state.step
        where = batch.get("where")
        keep = jnp.ones(batch["y"].shape, bool) if where is None else where
        x, strong = (zero_where_false(batch[name], keep) for name in ("x", "x_strong"))
        candidates = partial_labels(batch["y"])
        average = ema_update(net["average"], {n: state.params[n] for n in net["average"]}, decay=key_decay)
        keys = jax.lax.stop_gradient(project(average["projector"], encoder.apply(average["encoder"], strong)))
        table = net["confidence"][batch["index"]]
        table = jnp.where(table < 0, candidates / jnp.sum(candidates, axis=1, keepdims=True), table)
        warm = step < warmup_steps

        def loss(params):
            h = encoder.apply(params["encoder"], x)
            logits, q = classifier.apply(params["classifier"], h), project(params["projector"], h)
            pseudo = jnp.argmax(jax.nn.softmax(jax.lax.stop_gradient(logits)) * candidates, axis=1)
            near = jax.nn.softmax(jax.lax.stop_gradient(q) @ net["prototypes"].T)
            decay = phi_schedule(step, total_steps, start=phi[0], end=phi[1])
            moved = confidence_update(table, near, candidates, decay=decay)
            confidence = jnp.where(warm, table, moved)
            inherited = jax.nn.one_hot(batch["y"], 2, dtype=confidence.dtype)
            targets = jnp.where(step < inherit_steps, inherited, confidence)
            terms = -jnp.sum(targets * jax.nn.log_softmax(logits), axis=1)
            classification = masked_mean(terms, keep)
            options = {"temperature": temperature, "where": keep, "kv_where": net["queue_filled"]}
            contrastive = jax.lax.cond(
                warm,
                lambda q: moco_loss(q, keys, net["queue"], **options),
                lambda q: partial_supcon_loss(q, keys, pseudo, net["queue"], net["queue_labels"], **options),
                q,
            )
            bag = jnp.zeros(())
            if "bags" in batch:
                bags = batch["bags"]
                inside = encoder.apply(params["encoder"], zero_where_false(bags["x"], bags.get("where")))
                z = pool.apply(params["bag"], inside, where=bags.get("where"))["logits"]
                cross = jnp.mean(optax.softmax_cross_entropy_with_integer_labels(z, bags["y"]))
                bag = jnp.where(step >= bag_steps, cross, 0.0)
            total = classification + weight * contrastive + bag_weight * bag
            parts = {"loss": total, "classification": classification, "contrastive": contrastive, "bag": bag}
            return total, (parts, q, pseudo, confidence)

        grads, (metrics, q, pseudo, confidence) = jax.grad(loss, has_aux=True)(state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        rows = jnp.where(keep, batch["index"], num_instances)
        net_state = {
            **net,
            **_pushed(net, keys, pseudo, keep),
            "average": average,
            "prototypes": prototype_update(net["prototypes"], q, pseudo, decay=prototype_decay, where=keep),
            "confidence": net["confidence"].at[rows].set(confidence, mode="drop"),
        }
        return LearnerState(optax.apply_updates(state.params, updates), net_state, opt_state, step + 1), metrics

    def predict(state, batch):
        logits = classifier.apply(state.params["classifier"], encoder.apply(state.params["encoder"], batch["x"]))
        return {"logits": logits, "probs": jax.nn.softmax(logits)}

    return Learner(init, update, predict)


def partial_labels(bag_labels: Array) -> Array:
    """Returns which classes an instance may have: `[1, 0]` in a negative bag, `[1, 1]` in a positive one.

    Args:
        bag_labels: int [N], 0 or 1, label of each instance's bag.

    Returns:
        float32 [N, 2].

    Raises:
        ValueError: `bag_labels` is not [N].

    Example:
        >>> jax.jit(partial_labels)(jnp.array([0, 1])).tolist()
        [[1.0, 0.0], [1.0, 1.0]]
    """
    if bag_labels.ndim != 1:
        raise ValueError(f"bag_labels must be [N], got {bag_labels.shape}")
    positive = (jnp.asarray(bag_labels) == 1).astype(jnp.float32)
    return jnp.stack([jnp.ones_like(positive), positive], axis=1)


def confidence_update(confidence: Array, probs: Array, candidates: Array, *, decay: float | Array) -> Array:
    """Returns pseudo labels moved towards the likeliest candidate: `phi c + (1 - phi) onehot(argmax_c p_c Y_c)`.

    Args:
        confidence: float [N, C], pseudo labels c, rows of sum 1.
        probs: float [N, C], by the prototypes.
        candidates: float [N, C], Y, 1 for classes that are possible; a row with one gets exactly that label.
        decay: phi in [0, 1].

    Returns:
        [N, C] in the dtype of `confidence`; without gradient.

    Raises:
        ValueError: shapes differ.

    Example:
        >>> half = jnp.array([[0.5, 0.5], [1.0, 0.0]])
        >>> probs = jnp.array([[0.2, 0.8], [0.2, 0.8]])
        >>> jax.jit(confidence_update)(half, probs, jnp.array([[1.0, 1.0], [1.0, 0.0]]), decay=0.5).tolist()
        [[0.25, 0.75], [1.0, 0.0]]

    Source:
        Code miccaiif/INS, `partial_loss.confidence_update` (with two classes a single candidate is the negative one).
    """
    if not confidence.shape == probs.shape == candidates.shape or confidence.ndim != 2:
        raise ValueError(
            f"confidence, probs and candidates must have one shape [N, C], got {confidence.shape}, {probs.shape} and "
            f"{candidates.shape}"
        )
    best = jax.nn.one_hot(jnp.argmax(probs * candidates, axis=1), probs.shape[1], dtype=confidence.dtype)
    certain = jnp.sum(candidates > 0, axis=1, keepdims=True) == 1
    decay = jnp.where(certain, 0.0, jnp.asarray(decay, jnp.float32)).astype(confidence.dtype)
    return jax.lax.stop_gradient(decay * confidence + (1 - decay) * best)


def prototype_update(
    prototypes: Array,
    embeddings: Array,
    labels: Array,
    *,
    decay: float = 0.9,
    where: Array | None = None,
    axis_name: str | None = None,
) -> Array:
    """Returns prototypes after each example has pulled its class in turn, scaled to unit length at the end.

    `mu_l <- m mu_l + (1 - m) q`, one example after the other: the j-th of the n examples of a class has
    weight `(1 - m) m^(n - j)`, the prototype before them `m^n`.

    Args:
        prototypes: float [C, D].
        embeddings: float [N, D], q, in order.
        labels: int [N].
        decay: m in [0, 1].
        where: bool [N], real examples.
        axis_name: mapped axis over which the examples are spread; the shards follow one another.

    Returns:
        [C, D] in the dtype of `prototypes`, without gradient; a prototype of 0 that no example pulls stays 0.

    Raises:
        ValueError: shapes do not fit or `decay` is out of range.

    Example:
        >>> new = jax.jit(prototype_update)(jnp.zeros((2, 2)), jnp.array([[3.0, 4.0]]), jnp.array([1]))
        >>> [[round(p, 2) for p in row] for row in new.tolist()]
        [[0.0, 0.0], [0.6, 0.8]]

    Source:
        Code miccaiif/INS, `INS.forward`.
    """
    if prototypes.ndim != 2 or embeddings.ndim != 2 or prototypes.shape[1] != embeddings.shape[1]:
        raise ValueError(
            f"prototypes and embeddings must be [C, D] and [N, D], got {prototypes.shape}, {embeddings.shape}"
        )
    if labels.shape != embeddings.shape[:1] or (where is not None and where.shape != labels.shape):
        raise ValueError(f"labels and where must be [N] for {embeddings.shape[0]} embeddings, got {labels.shape}")
    check_ratios(decay=decay)
    keep = jnp.ones(labels.shape, bool) if where is None else where
    pull = rows_mixed(_pulled)(prototypes, embeddings, jnp.asarray(labels), keep, decay=decay, axis_name=axis_name)
    return jax.lax.stop_gradient(pull)


def partial_supcon_loss(
    queries: Array,
    keys: Array,
    labels: Array,
    queue: Array,
    queue_labels: Array,
    *,
    temperature: float = 0.07,
    where: Array | None = None,
    kv_where: Array | None = None,
    axis_name: str | None = None,
    reduction: str = "mean",
) -> Array:
    """Returns the supervised contrastive loss of queries against [queries; keys; queue] by pseudo class.

    `-mean over a of the same class, not i itself, of [s_ia - log sum_{b != i} exp s_ib]`, s cosine over temperature.

    Args:
        queries: float [N, D], the anchors.
        keys: float [N, D], their strong views; no gradient reaches them.
        labels: int [N], pseudo class of both.
        queue: float [M, D]; no gradient reaches it.
        queue_labels: int [M].
        temperature: > 0.
        where: bool [N], real anchors (and keys).
        kv_where: bool [M], filled slots of the queue.
        axis_name: mapped axis over which the anchors are spread: they meet the queries and keys of all shards. The
            queue is the same on each.
        reduction: "mean" (over all shards) or "none", [N].

    Returns:
        Scalar in the accumulation dtype, or [N] in the dtype of `queries`. An anchor's own key is always a positive.

    Raises:
        ValueError: shapes do not fit or an option is out of range.

    Example:
        >>> z, labels = jnp.eye(4)[:2], jnp.array([0, 1])
        >>> loss = jax.jit(partial_supcon_loss)
        >>> float(loss(z, z, labels, z, labels)) < float(loss(z, z, labels, z, jnp.array([1, 0])))
        True

    Source:
        Qu et al., arXiv 2307.02249, eq. 3; code miccaiif/INS, `SupConLoss` with a mask.
    """
    keep, filled = _contrast_masks(queries, keys, queue, where, kv_where, temperature)
    if labels.shape != queries.shape[:1] or queue_labels.shape != queue.shape[:1]:
        raise ValueError(f"labels {labels.shape} and queue_labels {queue_labels.shape} must be [N] and [M]")
    terms = rows_mixed(_supcon_terms)(
        queries,
        keys,
        jnp.asarray(labels),
        queue,
        jnp.asarray(queue_labels),
        keep,
        filled,
        temperature=temperature,
        axis_name=axis_name,
    )
    return reduce_terms(terms, keep, reduction=reduction, axis_name=axis_name, dtype=queries.dtype)


def moco_loss(
    queries: Array,
    keys: Array,
    queue: Array,
    *,
    temperature: float = 0.07,
    where: Array | None = None,
    kv_where: Array | None = None,
    axis_name: str | None = None,
    reduction: str = "mean",
) -> Array:
    """Returns the loss of telling a query's key from a queue: `log(exp s_ii + sum_m exp s_im) - s_ii`.

    Args:
        queries: float [N, D].
        keys: float [N, D], `keys[i]` belongs to `queries[i]`; no gradient reaches them.
        queue: float [M, D], negatives; no gradient reaches them.
        temperature: > 0; s is the cosine divided by it.
        where: bool [N], real pairs.
        kv_where: bool [M], filled slots of the queue.
        axis_name: mapped axis over which the pairs are spread, for the mean.
        reduction: "mean" (over all shards) or "none", [N].

    Returns:
        Scalar in the accumulation dtype, or [N] in the dtype of `queries`; 0 without a negative.

    Raises:
        ValueError: shapes do not fit or an option is out of range.

    Example:
        >>> q, other, queue = jnp.array([[1.0, 0.0]]), jnp.array([[0.0, 1.0]]), jnp.array([[0.0, 2.0]])
        >>> loss = jax.jit(moco_loss)
        >>> float(loss(q, q, queue)) < float(loss(q, other, queue))
        True

    Source:
        He et al., Momentum Contrast, arXiv 1911.05722, eq. 1; code miccaiif/INS, `SupConLoss` without a mask.
    """
    keep, filled = _contrast_masks(queries, keys, queue, where, kv_where, temperature)

    def run(queries, keys, queue, keep, filled):
        q, k, memory = _unit(queries, keep), _fixed(keys, keep), _fixed(queue, filled)
        own = jnp.sum(q * k, axis=1, keepdims=True) / temperature
        others = jnp.matmul(q, memory.T, precision=jax.lax.Precision.HIGHEST) / temperature
        both = jnp.concatenate([own, others], axis=1)
        there = jnp.concatenate([jnp.ones(own.shape, bool), jnp.broadcast_to(filled[None], others.shape)], axis=1)
        return masked_logsumexp(both, there) - own[:, 0]

    terms = rows_mixed(run)(queries, keys, queue, keep, filled)
    return reduce_terms(terms, keep, reduction=reduction, axis_name=axis_name, dtype=queries.dtype)


def phi_schedule(step: Array | int, total: int, *, start: float = 0.95, end: float = 0.8) -> Array:
    """Returns the decay of the pseudo labels, linear from `start` at step 0 to `end` at the last of `total` steps.

    Args:
        step: int, 0 to `total - 1`.
        total: number of steps.
        start: at step 0.
        end: at step `total - 1` and after it.

    Returns:
        float32 scalar.

    Raises:
        ValueError: `total` is below 1.

    Example:
        >>> phi = jax.jit(lambda step: phi_schedule(step, 4))
        >>> [round(float(phi(i)), 2) for i in range(4)]
        [0.95, 0.9, 0.85, 0.8]

    Source:
        Code miccaiif/INS, `set_conf_ema_m`.
    """
    at_least_one(total=total)
    progress = jnp.clip(jnp.asarray(step, jnp.float32) / max(total - 1, 1), 0.0, 1.0)
    return jnp.float32(start) + progress * (end - start)


def _pulled(prototypes, embeddings, labels, keep, *, decay, axis_name):
    dtype = compute_dtype(prototypes, embeddings)
    rows = gather_rows(zero_where_false(embeddings, keep).astype(dtype), axis_name)
    hits = gather_rows(jax.nn.one_hot(labels, prototypes.shape[0], dtype=dtype) * keep[:, None], axis_name)
    # How many of the same class come later; each of them fades what was there by m.
    later = jnp.sum((jnp.cumsum(hits[::-1], axis=0)[::-1] - hits) * hits, axis=1)
    weights = hits * ((1 - decay) * decay**later)[:, None]
    total = jnp.sum(hits, axis=0)
    pulled = (decay**total)[:, None] * prototypes.astype(dtype) + jnp.matmul(weights.T, rows)
    return safe_normalize(pulled).astype(prototypes.dtype)


def _pushed(net, keys, labels, keep):
    """The queue with the kept keys in the place of the oldest."""
    size = net["queue"].shape[0]
    place = net["queue_place"] + jnp.cumsum(keep.astype(jnp.int32)) - 1
    slot = jnp.where(keep, place % size, size)
    return {
        "queue": net["queue"].at[slot].set(keys.astype(net["queue"].dtype), mode="drop"),
        "queue_labels": net["queue_labels"].at[slot].set(labels.astype(jnp.int32), mode="drop"),
        "queue_filled": net["queue_filled"].at[slot].set(True, mode="drop"),
        "queue_place": (net["queue_place"] + jnp.sum(keep, dtype=jnp.int32)) % size,
    }


def _unit(x: Array, keep: Array) -> Array:
    return safe_normalize(zero_where_false(x, keep).astype(compute_dtype(x)))


def _fixed(x: Array, keep: Array) -> Array:
    return jax.lax.stop_gradient(_unit(x, keep))


def _supcon_terms(queries, keys, labels, queue, queue_labels, keep, filled, *, temperature, axis_name):
    q = _unit(queries, keep)
    rows, everyone, shown = (gather_rows(a, axis_name) for a in (q, labels, keep))
    strong = gather_rows(_fixed(keys, keep).astype(q.dtype), axis_name)
    contrast = jnp.concatenate([rows, strong, _fixed(queue, filled).astype(q.dtype)])
    classes = jnp.concatenate([everyone, everyone, queue_labels])
    there = jnp.concatenate([shown, shown, filled])
    similar = jnp.matmul(q, contrast.T, precision=jax.lax.Precision.HIGHEST) / temperature
    own = axis_index(axis_name) * len(labels) + jnp.arange(len(labels))
    itself = jnp.arange(len(classes))[None, :] == own[:, None]
    counted = there[None, :] & jnp.logical_not(itself)
    positive = counted & (classes[None, :] == labels[:, None])
    # Anchors under the mask see nothing; one entry keeps their logarithm finite until they are dropped.
    log_sum = masked_logsumexp(similar, counted | (itself & jnp.logical_not(keep)[:, None]))
    total = jnp.sum(jnp.where(positive, similar - log_sum[:, None], 0.0), axis=1)
    return -safe_divide(total, jnp.sum(positive, axis=1).astype(similar.dtype))


def _contrast_masks(queries, keys, queue, where, kv_where, temperature):
    if queries.ndim != 2 or keys.shape != queries.shape or queue.ndim != 2 or queue.shape[1] != queries.shape[1]:
        raise ValueError(
            f"queries, keys and queue must be [N, D], [N, D] and [M, D], got {queries.shape}, {keys.shape} and "
            f"{queue.shape}"
        )
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be positive")
    if where is not None and where.shape != queries.shape[:1]:
        raise ValueError(f"where has shape {where.shape}, expected {queries.shape[:1]}")
    if kv_where is not None and kv_where.shape != queue.shape[:1]:
        raise ValueError(f"kv_where has shape {kv_where.shape}, expected {queue.shape[:1]}")
    keep = jnp.ones(queries.shape[:1], bool) if where is None else where
    return keep, jnp.ones(queue.shape[:1], bool) if kv_where is None else kv_where
