"""Multiple Instance Learning Framework with Masked Hard Instance Mining for Whole Slide Image Classification.

MHIM-MIL (2023, arXiv 2307.15254).

A teacher, the moving average of the student, attends to the whole bag; what it finds most salient is hidden from the
student, which has to learn from the harder instances. A consistency term ties the two bag features.

    masked  = random, ratio_random  |  lowest attention, ratio_low  |  part of the highest attention, ratio_high
    L       = CE(student(bag without masked), y) + weight * sum_j -softmax(z_T / 0.1)_j log softmax(z_S)_j
    teacher <- decay * teacher + (1 - decay) * student,    after every step

z are bag features and the teacher's side is constant. At test the student sees whole bags. The paper's strategies:
HAM (high only), L-HAM (low and high), R-HAM (random and high), LR-HAM (all three).

Reconstructed: a bag of which nothing would be left stays whole; votes of several heads that tie are ordered by the mean
attention; which scores the dual-stream model gives (the attention of its classes, one head each).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from jaxlab.mil.pooling import Bags, group
from jaxlab.ops.collectives import axis_index, global_mean, value_and_grad
from jaxlab.ops.masked import compute_dtype, zero_where_false
from jaxlab.ops.reduction import reduce_terms
from jaxlab.ops.sharding import rows_mixed
from jaxlab.ops.trees import ema_update
from jaxlab.types import Layer, Learner, LearnerState, accepted


def mhim(
    model: Layer,
    optimizer: optax.GradientTransformation,
    *,
    ratio_high: float | Callable[[Array], Array] = 0.01,
    high_random: float = 0.5,
    ratio_random: float = 0.5,
    ratio_low: float = 0.0,
    weight: float = 0.1,
    decay: float | Callable[[Array], Array] = 0.9999,
    axis_name: str | None = None,
) -> Learner:
    """Returns a learner that trains a bag model on what its teacher does not find salient.

    Args:
        model: bag model whose dict has `logits`, `embedding` and `attention`, such as
            `with_encoder(instance_encoder(), abmil(2))`.
        optimizer: of the student.
        ratio_high: share of the bag masked for its high attention, or a function of the step
            (`lambda step: ham_ratio_schedule(0.03, step, total)`).
        high_random: share of the candidates of high attention that is masked; the candidates are
            `ratio_high / high_random` of the bag. 1 masks exactly the highest.
        ratio_random: share masked at random.
        ratio_low: share masked for its low attention.
        weight: of the consistency term.
        decay: of the teacher's moving average, or a function of the step.
        axis_name: mapped axis over which the bags are spread.

    Returns:
        A `Learner`. `init(key, batch, params=None, teacher=None)`: trained parameters to start from; the teacher starts
        as the student. Its parameters are `state.net_state["teacher"]`. `batch`: `x` [B, N, D] with `where` [B, N], or
        `x` [T, D] with `segment_ids` [T]; `y` int [B], -1 = unlabelled. `update` gives metrics `loss`, `accuracy`,
        `consistency` and `kept`, the share of instances that the student sees. `predict` gives the student's dict of
        whole bags with `probs`.

    Raises:
        ValueError: an option is out of range.

    Example:
        >>> from jaxlab.mil import abmil
        >>> learner = mhim(abmil(2), optax.sgd(0.1))
        >>> batch = {"x": jnp.ones((3, 10, 4)), "y": jnp.array([0, 1, 1])}
        >>> step = lambda key: learner.update(learner.init(key, batch), batch, key)
        >>> state, metrics = jax.eval_shape(step, jax.random.key(0))
        >>> sorted(metrics)
        ['accuracy', 'consistency', 'kept', 'loss']

    Source:
        Tang et al., arXiv 2307.15254; code DearCaat/MHIM-MIL, first version (defaults: ABMIL on CAMELYON-16; there the
        teacher starts from a trained baseline and the student from its first layer, Adam 2e-4, cosine, decay 1e-5).
    """
    if weight < 0:
        raise ValueError(f"weight={weight} must not be negative")
    high_now = ratio_high if callable(ratio_high) else lambda step: ratio_high
    decay_now = decay if callable(decay) else lambda step: decay
    check_ratios(ratio_random=ratio_random, ratio_low=ratio_low)
    if not callable(ratio_high):
        check_ratios(ratio_high=ratio_high)

    def init(key, batch, *, params=None, teacher=None):
        params = model.init(key, batch["x"].shape[-1]) if params is None else params
        teacher = jax.tree.map(jnp.copy, params) if teacher is None else teacher
        return LearnerState(params, {"teacher": teacher}, optimizer.init(params), jnp.zeros((), jnp.int32))

    def update(state, batch, key):
        def loss(params):
            return mhim_loss(
                params,
                state.net_state["teacher"],
                batch,
                model=model,
                ratio_high=high_now(state.step),
                high_random=high_random,
                ratio_random=ratio_random,
                ratio_low=ratio_low,
                weight=weight,
                key=jax.random.fold_in(key, axis_index(axis_name)),
                axis_name=axis_name,
            )

        (_, metrics), grads = value_and_grad(loss, axis_name=axis_name, has_aux=True)(state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        teacher = ema_update(state.net_state["teacher"], params, decay=decay_now(state.step))
        return LearnerState(params, {"teacher": teacher}, opt_state, state.step + 1), metrics

    def predict(state, batch):
        outputs = model.apply(state.params, batch["x"], **layout_of(batch))
        return {**outputs, "probs": bag_probabilities(outputs)}

    return Learner(init, update, predict)


def mhim_loss(
    params: Any,
    teacher: Any,
    batch: Mapping[str, Array],
    *,
    model: Layer,
    ratio_high: float | Array = 0.01,
    high_random: float = 0.5,
    ratio_random: float = 0.5,
    ratio_low: float = 0.0,
    weight: float = 0.1,
    key: Array | None = None,
    axis_name: str | None = None,
) -> tuple[Array, dict[str, Array]]:
    """Returns the student's cross-entropy on masked bags plus the consistency with the teacher's bag feature.

    Args:
        params: the student's; only they have a gradient.
        teacher: the teacher's parameters.
        batch: `x`, `y`, and `where` or `segment_ids` (see `mhim`).
        model: bag model whose dict has `logits`, `embedding` and `attention`; a dual-stream model (`max_logits` and
            `bag_logits`) has half a cross-entropy on each of its streams.
        ratio_high: see `mhim`, as are `high_random`, `ratio_random`, `ratio_low`.
        high_random: share of the candidates of high attention that is masked.
        ratio_random: share masked at random.
        ratio_low: share masked for its low attention.
        weight: of the consistency term.
        key: for masks and dropout; not needed if nothing is random.
        axis_name: mapped axis over which the bags are spread.

    Returns:
        Scalar loss over the bags of all shards, and a dict of float32 scalars: `loss`, `accuracy`, `consistency` and
        `kept`.

    Raises:
        ValueError: an option is out of range, or a key is missing.

    Example:
        >>> from jaxlab.mil import abmil
        >>> model, batch = abmil(2), {"x": jnp.ones((3, 10, 4)), "y": jnp.array([0, 1, 1])}
        >>> def loss(key):
        ...     params = model.init(key, 4)
        ...     return mhim_loss(params, params, batch, model=model, key=key)[0]
        >>> jax.eval_shape(loss, jax.random.key(0)).shape
        ()

    Source:
        Tang et al., arXiv 2307.15254, eqs. 5 to 10; code DearCaat/MHIM-MIL, first version.
    """
    layout = layout_of(batch)
    key_teacher, key_mask, key_student = (None,) * 3 if key is None else jax.random.split(key, 3)
    noisy = lambda key: accepted(model.apply, key=key, train=key is not None)
    seen = jax.lax.stop_gradient(model.apply(teacher, batch["x"], **layout, **noisy(key_teacher)))
    masked = hard_instance_mask(
        seen["attention"],
        ratio_random=ratio_random,
        ratio_low=ratio_low,
        ratio_high=ratio_high,
        high_random=high_random,
        key=key_mask,
        **layout,
    )
    keep = group(batch["x"], **layout).keep
    shown = keep & jnp.logical_not(masked)
    outputs = model.apply(params, batch["x"], **{**layout, "where": shown}, **noisy(key_student))
    return student_loss(outputs, seen, batch, shown, keep, weight=weight, axis_name=axis_name)


def hard_instance_mask(
    scores: Array,
    *,
    ratio_random: float = 0.0,
    ratio_low: float = 0.0,
    ratio_high: float | Array = 0.0,
    high_random: float = 1.0,
    fusion: str = "vote",
    key: Array | None = None,
    where: Array | None = None,
    segment_ids: Array | None = None,
    num_segments: int | None = None,
) -> Array:
    """Returns which instances to hide: a random part, a part of low and a part of high score, united.

    The parts may overlap, so that the union can be smaller than their sum. HAM is `ratio_high` alone, L-HAM with
    `ratio_low`, R-HAM with `ratio_random`, LR-HAM with both. A bag of which nothing would be left stays whole.

    Args:
        scores: float [B, N] or [T], the teacher's attention; heads as a further axis.
        ratio_random: share of each bag masked at random.
        ratio_low: share of each bag masked for its low score.
        ratio_high: share of each bag masked for its high score; may be an array (a schedule).
        high_random: see `select_mask`, for the high part.
        fusion: see `select_mask`.
        key: needed if `ratio_random` is above 0 or `high_random` below 1.
        where: bool [B, N] (or [T]), real instances.
        segment_ids: int [T], bag of each instance, -1 = padding.
        num_segments: B, with `segment_ids`.

    Returns:
        bool, [B, N] or [T]; False on padding.

    Raises:
        ValueError: shapes do not fit, an option is out of range, or a key is missing.

    Example:
        >>> mask = jax.jit(lambda scores: hard_instance_mask(scores, ratio_low=0.25, ratio_high=0.25))
        >>> mask(jnp.array([[0.1, 0.5, 0.4, 0.0]])).tolist()
        [[False, True, False, True]]

    Source:
        Code DearCaat/MHIM-MIL, first version, `get_mask`.
    """
    check_ratios(ratio_random=ratio_random, ratio_low=ratio_low)
    bags = _bags_of(scores, where, segment_ids, num_segments)
    keys = (None, None) if key is None else jax.random.split(key)
    masked = jnp.zeros(bags.keep.shape, bool)
    layout = {"where": where, "segment_ids": segment_ids, "num_segments": num_segments}
    if ratio_random:
        if key is None:
            raise ValueError(f"ratio_random={ratio_random} needs a key")
        masked = masked | _take(bags, bags.uniform(keys[0]), bags.keep, ratio_random)
    if ratio_low:
        masked = masked | select_mask(scores, ratio=ratio_low, largest=False, fusion=fusion, **layout)
    if isinstance(ratio_high, Array) or ratio_high:
        high = {"ratio": ratio_high, "random_ratio": high_random, "fusion": fusion, "key": keys[1]}
        masked = masked | select_mask(scores, **high, **layout)
    return rows_mixed(lambda masked, bags: masked & bags.spread(bags.sum(_rest(masked, bags)) > 0))(masked, bags)


def select_mask(
    scores: Array,
    *,
    ratio: float | Array,
    largest: bool = True,
    random_ratio: float = 1.0,
    fusion: str = "vote",
    key: Array | None = None,
    where: Array | None = None,
    segment_ids: Array | None = None,
    num_segments: int | None = None,
) -> Array:
    """Returns which instances of each bag have the highest (or lowest) scores, or a random part of them.

    With n instances there are `K = ceil(n ratio / random_ratio)` candidates, of which `ceil(K random_ratio)` are taken
    at random; where `ratio > random_ratio`, everything is a candidate and `ceil(n ratio)` are taken.

    Args:
        scores: float [B, N] or [T]; with a further axis of H heads they are fused.
        ratio: share of the bag, in [0, 1]; may be an array.
        largest: whether high or low scores are wanted.
        random_ratio: in (0, 1].
        fusion: of heads: "vote" (each names its K; the K most named, ties by mean score) or "mean" (K // H of each
            head, united).
        key: needed if `random_ratio` is below 1.
        where: bool [B, N] (or [T]), real instances.
        segment_ids: int [T], bag of each instance, -1 = padding.
        num_segments: B, with `segment_ids`.

    Returns:
        bool, [B, N] or [T]; False on padding. Equal scores are taken in order of position.

    Raises:
        ValueError: shapes do not fit, an option is out of range, or a key is missing.

    Example:
        >>> mask = jax.jit(lambda scores: select_mask(scores, ratio=0.5))
        >>> mask(jnp.array([[0.1, 0.5, 0.4, 0.0]])).tolist()
        [[False, True, True, False]]

    Source:
        Code DearCaat/MHIM-MIL, `select_mask_fn`.
    """
    if not 0 < random_ratio <= 1:
        raise ValueError(f"random_ratio={random_ratio} must be in (0, 1]")
    if not isinstance(ratio, Array):
        check_ratios(ratio=ratio)
    if fusion not in ("vote", "mean"):
        raise ValueError(f"fusion={fusion!r} must be 'vote' or 'mean'")
    if random_ratio < 1 and key is None:
        raise ValueError(f"random_ratio={random_ratio} needs a key")
    bags = _bags_of(scores, where, segment_ids, num_segments)
    noise = None if random_ratio == 1 else rows_mixed(lambda bags, key: bags.uniform(key))(bags, key)
    scores = zero_where_false(scores, bags.keep)
    options = {"largest": largest, "random_ratio": random_ratio, "fusion": fusion}
    return rows_mixed(_select)(scores, bags, jnp.asarray(ratio, jnp.float32), noise, **options)


def ham_ratio_schedule(ratio: float, step: Array | int, total: int) -> Array:
    """Returns `ratio (1 + cos(pi step / total)) / 2`: from `ratio` down to 0.

    Args:
        ratio: at the start.
        step: int, 0 to `total`.
        total: number of steps.

    Returns:
        float32 scalar.

    Raises:
        ValueError: `total` is below 1.

    Example:
        >>> ratio = jax.jit(lambda step: ham_ratio_schedule(0.04, step, 100))
        >>> round(float(ratio(50)), 3)
        0.02

    Source:
        Code DearCaat/MHIM-MIL, `cosine_scheduler`.
    """
    if total < 1:
        raise ValueError(f"total={total} must be at least 1")
    progress = jnp.clip(jnp.asarray(step, jnp.float32) / total, 0.0, 1.0)
    return ratio * 0.5 * (1 + jnp.cos(jnp.pi * progress))


def bag_consistency_loss(
    student: Array,
    teacher: Array,
    *,
    student_temperature: float = 1.0,
    teacher_temperature: float = 0.1,
    where: Array | None = None,
    axis_name: str | None = None,
    reduction: str = "mean",
) -> Array:
    """Returns the cross-entropy between two bag features read as logits.

    `mean over bags of -sum_j softmax(t / T_t)_j log softmax(s / T_s)_j`.

    Args:
        student: float [B, ..., D]; axes between are averaged (one feature for each class of a dual-stream model).
        teacher: float, like `student`; no gradient reaches it.
        student_temperature: T_s > 0.
        teacher_temperature: T_t > 0.
        where: bool [B], real bags.
        axis_name: mapped axis over which the bags are spread.
        reduction: "mean" (over all shards) or "none", `[B]`.

    Returns:
        Scalar in the accumulation dtype, or [B] in the dtype of `student`; no bag gives 0. It is smallest, the entropy
        of the teacher's side, where `student / T_s = teacher / T_t` up to a constant.

    Raises:
        ValueError: shapes do not fit or an option is out of range.

    Example:
        >>> z = jnp.array([[1.0, 0.0]])
        >>> loss = jax.jit(bag_consistency_loss)
        >>> float(loss(10 * z, z)) < float(loss(z, z))
        True

    Source:
        Tang et al., arXiv 2307.15254, eq. 8; code DearCaat/MHIM-MIL, `SoftTargetCrossEntropy_v2`.
    """
    if student.ndim < 2 or student.shape != teacher.shape:
        raise ValueError(f"student and teacher must have one shape [B, ..., D], got {student.shape}, {teacher.shape}")
    for name, value in (("student_temperature", student_temperature), ("teacher_temperature", teacher_temperature)):
        if not value > 0:
            raise ValueError(f"{name}={value} must be positive")
    if where is not None and where.shape != student.shape[:1]:
        raise ValueError(f"where has shape {where.shape}, expected {student.shape[:1]}")
    dtype = compute_dtype(student)
    s, t = (zero_where_false(z, where).astype(dtype) for z in (student, jax.lax.stop_gradient(teacher)))
    terms = -jax.nn.softmax(t / teacher_temperature) * jax.nn.log_softmax(s / student_temperature)
    terms = jnp.mean(jnp.sum(terms, axis=-1).reshape(student.shape[0], -1), axis=1)
    return reduce_terms(terms, where, reduction=reduction, axis_name=axis_name, dtype=student.dtype)


def student_loss(outputs, seen, batch, shown, keep, *, weight, axis_name):
    """Returns loss and metrics from the outputs of student and teacher and from which instances were shown."""
    labels = jnp.asarray(batch["y"])
    labelled = labels >= 0
    streams = [outputs["bag_logits"], outputs["max_logits"]] if "bag_logits" in outputs else [outputs["logits"]]
    ce = sum(_cross_entropy(z, labels, labelled, axis_name) for z in streams) / len(streams)
    features = [o["embedding"] for o in (outputs, seen)]
    if "bag_logits" in outputs:  # one feature for each class
        features = [f.reshape(*outputs["bag_logits"].shape, -1) for f in features]
    consistency = bag_consistency_loss(*features, axis_name=axis_name)
    loss = ce + weight * consistency
    right = (jnp.argmax(bag_probabilities(outputs), axis=-1) == labels).astype(jnp.float32)
    metrics = {
        "loss": loss,
        "accuracy": global_mean(right, labelled, axis_name=axis_name),
        "consistency": consistency,
        "kept": global_mean(shown.astype(jnp.float32), keep, axis_name=axis_name),
    }
    return loss, {name: value.astype(jnp.float32) for name, value in metrics.items()}


def bag_probabilities(outputs: Mapping[str, Array]) -> Array:
    """Returns [B, C]: softmax of the logits, or the mean of both streams' for a dual-stream model."""
    streams = [outputs["bag_logits"], outputs["max_logits"]] if "bag_logits" in outputs else [outputs["logits"]]
    return sum(jax.nn.softmax(z.astype(compute_dtype(z))) for z in streams) / len(streams)


def layout_of(batch: Mapping[str, Array]) -> dict[str, Any]:
    """Returns the keywords of a bag model for a batch of either layout."""
    ids = batch.get("segment_ids")
    return {
        "where": batch.get("where"),
        "segment_ids": ids,
        "num_segments": None if ids is None else batch["y"].shape[0],
    }


def check_ratios(**ratios: float) -> None:
    """Raises ValueError for a share outside [0, 1]."""
    for name, ratio in ratios.items():
        if not 0 <= ratio <= 1:
            raise ValueError(f"{name}={ratio} must be in [0, 1]")


def _cross_entropy(logits, labels, labelled, axis_name):
    z = logits.astype(compute_dtype(logits))
    terms = optax.softmax_cross_entropy_with_integer_labels(z, jnp.maximum(labels, 0))
    return global_mean(terms, labelled, axis_name=axis_name)


def _bags_of(scores, where, segment_ids, num_segments) -> Bags:
    plain = scores.ndim == (2 if segment_ids is None else 1)
    return group(scores[..., None] if plain else scores, where, segment_ids, num_segments)


def _rest(masked: Array, bags: Bags) -> Array:
    return (bags.keep & jnp.logical_not(masked)).astype(jnp.float32)


def _ceil(count: Array, ratio: Array) -> Array:
    # A product that is whole must not be rounded up because of its last bit.
    return jnp.ceil(count.astype(jnp.float32) * ratio * (1 - 1e-6)).astype(jnp.int32)


def _take(bags: Bags, noise: Array, candidates: Array, ratio) -> Array:
    """Returns a random `ceil(ratio * their number)` of the candidates of each bag."""
    wanted = _ceil(bags.sum(candidates.astype(jnp.float32)), ratio)
    place = bags.rank(jnp.where(candidates, noise, -1.0))
    return candidates & (place < bags.spread(wanted))


def _select(scores, bags, ratio, noise, *, largest, random_ratio, fusion):
    everything = ratio > random_ratio
    share = jnp.where(everything, 1.0, ratio / random_ratio)
    wanted = bags.spread(_ceil(bags.count, share))
    signed = scores if largest else -scores
    if scores.ndim == bags.keep.ndim:
        candidates = bags.rank(signed) < wanted
    else:
        places = jax.vmap(bags.rank, in_axes=-1, out_axes=-1)(signed)
        if fusion == "mean":
            candidates = jnp.any(places < (wanted // scores.shape[-1])[..., None], axis=-1)
        else:
            votes = jnp.sum(places < wanted[..., None], axis=-1)
            mean_place = bags.rank(jnp.mean(signed.astype(compute_dtype(scores)), axis=-1))
            candidates = bags.rank(votes - mean_place / (bags.spread(bags.count) + 1)) < wanted
    candidates = candidates & bags.keep
    if noise is None:
        return candidates
    return _take(bags, noise, candidates, jnp.where(everything, ratio, random_ratio))
