"""QUEACO: Borrowing Treasures from Weakly-labeled Behavior Data for Query Attribute Value Extraction.

2021, arXiv 2108.08468. Few queries are tagged by people, very many weakly, by what their users clicked. A teacher that
learnt from the strong tags refines the weak ones for a student, and learns in turn from what its labels do to the
student's loss on the strong data. Found values are then brought to their canonical form by counts of clicks.

    refine   y_t = weak tag if it is no O and P_T(weak tag) >= delta, weight 1; else the teacher's tag, weight P_T(y_t)
    student  theta' = step on L_S = mean_t w_t CE(y_t, S)
    feedback h = L_strong(theta) - L_strong(theta'), by default to first order <grad L_strong(theta'), theta - theta'>
    teacher  step on (h - h_mean) CE(teacher's own tags, T) + L_strong(T)
    values   p(v | s) = (N_sv + 1) / (N_s + V); the most probable v if p >= tau and N_s is large enough, else none

Tags: 0 = O, 1 + 2 t = begin of type t, 2 + 2 t = inside. Reconstructed: the rule of refinement with delta = 0.3, the
running mean of h (0.99), smoothing by one, tau = 0.5 and a support of ten; the feedback follows Meta Pseudo Labels
(arXiv 2003.10580), whose learning rate it takes from the student's step itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from jaxlab.mutual.peers import as_outputs
from jaxlab.ops.collectives import all_sum, global_mean, value_and_grad
from jaxlab.ops.masked import compute_dtype, safe_divide, zero_where_false
from jaxlab.types import Layer, Learner, LearnerState, PyTree, StatefulLayer, as_stateful


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QueacoState(LearnerState):
    """State of `queaco`; `params`, `net_state` and `opt_state` have the entries `student` and `teacher`.

    Attributes:
        feedback_mean: float32 [], running mean of the feedback.
    """

    feedback_mean: Array


def queaco(
    net: Layer | StatefulLayer | Callable[..., Any],
    optimizer: optax.GradientTransformation,
    teacher_optimizer: optax.GradientTransformation | None = None,
    *,
    mode: str = "refine",
    threshold: float = 0.3,
    feedback: str = "product",
    decay: float = 0.99,
    axis_name: str | None = None,
) -> Learner:
    """Returns a learner of a student on refined weak tags and of a teacher on what they did to the student.

    Args:
        net: tagger whose `apply` gives logits `[B, L, K]` or a dict with `logits`; student and teacher are two of them.
        optimizer: of the student.
        teacher_optimizer: of the teacher; None = as the student's.
        mode: of `refine_weak_labels`.
        threshold: delta.
        feedback: "product" (to first order) or "drop" (of the loss itself).
        decay: of the running mean that is taken off the feedback.
        axis_name: mapped axis over which the queries are spread.

    Returns:
        A `Learner` with a `QueacoState`. `init(key, batch, params=None)`: `params` of a network that was trained on
        strong tags become those of both. `batch`: `x [B, L]`, `y int [B, L]` (-1 = untagged), optional `where [B, L]`,
        and `weak`, a dict of the same. Metrics: `student`, `teacher` (losses), `strong` (the student's after its step)
        and `feedback`. `predict` gives the student's `logits` and `teacher_logits`.

    Raises:
        ValueError: an option is unknown or out of range.

    Example:
        >>> from jaxlab.ops.layers import dense
        >>> net = Layer(lambda key, dims: dense(3).init(key, 4), lambda p, x: dense(3).apply(p, jax.nn.one_hot(x, 4)))
        >>> learner, tags = queaco(net, optax.sgd(0.1)), jnp.array([[1, 2, 0]])
        >>> batch = {"x": tags, "y": tags, "weak": {"x": tags, "y": jnp.zeros_like(tags)}}
        >>> state = jax.jit(learner.init)(jax.random.key(0), batch)
        >>> sorted(jax.jit(learner.update)(state, batch, None)[1])
        ['feedback', 'strong', 'student', 'teacher']

    Source:
        Zhang et al., arXiv 2108.08468, section 3 (reconstructed); Pham et al., arXiv 2003.10580 (the feedback).
    """
    if feedback not in ("product", "drop"):
        raise ValueError(f"feedback={feedback!r} must be 'product' or 'drop'")
    if not 0 <= decay < 1:
        raise ValueError(f"decay={decay} must be at least 0 and below 1")
    _check(mode, threshold)
    net = as_stateful(net)
    teacher_optimizer = optimizer if teacher_optimizer is None else teacher_optimizer

    def init(key, batch, *, params=None):
        net_state = {}
        if params is None:
            x = batch["x"]
            params, net_state = net.init(key, jax.ShapeDtypeStruct(x.shape[1:], x.dtype))
        both = {"student": params, "teacher": jax.tree.map(jnp.copy, params)}
        states = {"student": net_state, "teacher": jax.tree.map(jnp.copy, net_state)}
        opt_state = {"student": optimizer.init(params), "teacher": teacher_optimizer.init(params)}
        return QueacoState(both, states, opt_state, jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32))

    def tags(params, state, x):
        outputs, state = net.apply(params, state, x, train=True)
        return as_outputs(outputs)["logits"], state

    def update(state, batch, key):
        del key
        weak = batch["weak"]
        real = [d.get("where", None) for d in (batch, weak)]
        strong_where, weak_where = (
            jnp.ones(d["y"].shape, bool) if w is None else w for d, w in zip((batch, weak), real, strict=True)
        )
        strong_x, weak_x = zero_where_false(batch["x"], strong_where), zero_where_false(weak["x"], weak_where)
        own, memory = state.params, state.net_state
        mean = lambda logits, labels, weights, where: _cross_entropy(logits, labels, weights, where, axis_name)
        graded = lambda loss: value_and_grad(loss, axis_name=axis_name, has_aux=True)

        teacher_logits, _ = tags(own["teacher"], memory["teacher"], weak_x)
        probs = jax.nn.softmax(zero_where_false(teacher_logits, weak_where).astype(compute_dtype(teacher_logits)))
        labels, weights = refine_weak_labels(probs, weak["y"], where=weak_where, threshold=threshold, mode=mode)

        def student_loss(params):
            logits, new = tags(params, memory["student"], weak_x)
            return mean(logits, labels, weights, weak_where), new

        (loss, student_memory), grads = graded(student_loss)(own["student"])
        updates, student_opt = optimizer.update(grads, state.opt_state["student"], own["student"])
        student = optax.apply_updates(own["student"], updates)

        def strong_loss(params):
            logits, new = tags(params, student_memory, strong_x)
            return mean(logits, batch["y"], None, strong_where), new

        (after, _), strong_grads = graded(strong_loss)(student)
        if feedback == "product":
            h = feedback_product(own["student"], student, strong_grads)
        else:
            h = strong_loss(own["student"])[0] - after
        h = jax.lax.stop_gradient(h.astype(jnp.float32))
        before = jnp.where(state.step == 0, h, state.feedback_mean)  # the first feedback is its own mean
        settled, advantage = decay * before + (1 - decay) * h, h - before

        def teacher_loss(params):
            logits, _ = tags(params, memory["teacher"], weak_x)
            chosen = jax.lax.stop_gradient(jnp.argmax(zero_where_false(logits, weak_where), axis=-1))
            strong, new = tags(params, memory["teacher"], strong_x)
            likely = mean(logits, chosen, None, weak_where)
            return advantage * likely + mean(strong, batch["y"], None, strong_where), new

        (taught, teacher_memory), grads = graded(teacher_loss)(own["teacher"])
        updates, teacher_opt = teacher_optimizer.update(grads, state.opt_state["teacher"], own["teacher"])
        new = QueacoState(
            {"student": student, "teacher": optax.apply_updates(own["teacher"], updates)},
            {"student": student_memory, "teacher": teacher_memory},
            {"student": student_opt, "teacher": teacher_opt},
            state.step + 1,
            settled,
        )
        return new, {"student": loss, "teacher": taught, "strong": after, "feedback": h}

    def predict(state, batch):
        give = lambda name: as_outputs(net.apply(state.params[name], state.net_state[name], batch["x"], train=False)[0])
        return {**give("student"), "teacher_logits": give("teacher")["logits"]}

    return Learner(init, update, predict)


def refine_weak_labels(
    teacher_probs: Array, weak: Array, *, where: Array | None = None, threshold: float = 0.3, mode: str = "refine"
) -> tuple[Array, Array]:
    """Returns the tags a student learns, and their weights.

    A weak tag other than O stays with weight 1 if the teacher gives it at least `threshold`; everywhere else stands the
    teacher's tag, weighted by its probability.

    Args:
        teacher_probs: float [..., K]; no gradient reaches them.
        weak: int [...], 0 = O, -1 = no weak tag.
        where: bool [...], real tokens.
        threshold: delta in [0, 1].
        mode: "refine"; "weak" keeps all weak tags (weight 0 at -1), "pseudo" takes the teacher's alone.

    Returns:
        `labels` int32 [...], 0 where masked; `weights` [...] in the dtype of the probabilities, 0 where masked.

    Raises:
        ValueError: shapes do not fit or an option is out of range.

    Example:
        >>> probs = jnp.array([[0.125, 0.5, 0.375], [0.75, 0.125, 0.125]])
        >>> labels, weights = jax.jit(refine_weak_labels)(probs, jnp.array([2, 2]))
        >>> labels.tolist(), weights.tolist()
        ([2, 0], [1.0, 0.75])

    Source:
        Zhang et al., arXiv 2108.08468, section 3.2 (reconstructed).
    """
    _check(mode, threshold)
    if teacher_probs.ndim < 1 or weak.shape != teacher_probs.shape[:-1]:
        raise ValueError(f"weak has shape {weak.shape}, expected {teacher_probs.shape[:-1]}, as teacher_probs")
    if where is not None and where.shape != weak.shape:
        raise ValueError(f"where has shape {where.shape}, expected {weak.shape}")
    keep = jnp.ones(weak.shape, bool) if where is None else where
    probs, weak = zero_where_false(jax.lax.stop_gradient(teacher_probs), keep), jnp.asarray(weak, jnp.int32)
    best = jnp.argmax(probs, axis=-1).astype(jnp.int32)
    sure = jnp.max(probs, axis=-1)
    own = jnp.take_along_axis(probs, jnp.maximum(weak, 0)[..., None], axis=-1)[..., 0]
    if mode == "refine":
        stays = (weak > 0) & (own >= threshold)
    else:
        stays = jnp.full(weak.shape, mode == "weak")
    labels = jnp.where(stays, jnp.maximum(weak, 0), best)
    weights = jnp.where(stays, (weak >= 0).astype(sure.dtype), sure)
    return jnp.where(keep, labels, 0), jnp.where(keep, weights, jnp.zeros((), weights.dtype))


def feedback_product(params: PyTree, new_params: PyTree, grads: PyTree) -> Array:
    """Returns by how much a step lowered a loss, to first order: `<grads, params - new_params>`.

    Args:
        params: before the step.
        new_params: after it.
        grads: of the loss, there.

    Returns:
        Scalar in the accumulation dtype.

    Example:
        >>> float(jax.jit(feedback_product)({"w": jnp.array([3.0])}, {"w": jnp.array([2.0])}, {"w": jnp.array([0.5])}))
        0.5

    Source:
        Pham et al., Meta Pseudo Labels, arXiv 2003.10580, eq. 2, with the student's step for its gradient times the
        learning rate.
    """

    def term(a, b, g):
        dtype = compute_dtype(a, g)
        return jnp.sum((a.astype(dtype) - b.astype(dtype)) * g.astype(dtype))

    return sum(jax.tree.leaves(jax.tree.map(term, params, new_params, grads)))


def value_probabilities(counts: Array, *, smoothing: float = 1.0) -> Array:
    """Returns how probable each canonical value is for each surface form.

    `p(v | s) = (N_sv + smoothing) / (sum_v N_sv + smoothing V)`.

    Args:
        counts: float >= 0 [S, V], clicks from queries with the surface form to products with the value.
        smoothing: > 0.

    Returns:
        float [S, V] in the dtype of `counts`, rows of sum 1.

    Raises:
        ValueError: `counts` is not [S, V] or `smoothing` is not positive.

    Example:
        >>> jax.jit(value_probabilities)(jnp.array([[5.0, 1.0], [0.0, 0.0]])).tolist()
        [[0.75, 0.25], [0.5, 0.5]]

    Source:
        Zhang et al., arXiv 2108.08468, section 4 (reconstructed).
    """
    if counts.ndim != 2:
        raise ValueError(f"counts must be [S, V], got {counts.shape}")
    if not smoothing > 0:
        raise ValueError(f"smoothing={smoothing} must be positive")
    wide = counts.astype(compute_dtype(counts)) + smoothing
    # Divided by the largest first, so that huge counts have a sum.
    wide = wide / jnp.max(wide, axis=1, keepdims=True)
    return (wide / jnp.sum(wide, axis=1, keepdims=True)).astype(counts.dtype)


def normalize_values(
    counts: Array, *, smoothing: float = 1.0, threshold: float = 0.5, min_support: float = 10.0
) -> Array:
    """Returns the canonical value of each surface form.

    Args:
        counts: float >= 0 [S, V], see `value_probabilities`.
        smoothing: of the probabilities.
        threshold: tau, least probability.
        min_support: least number of clicks.

    Returns:
        int32 [S]; -1 where the form stays as it is.

    Raises:
        ValueError: see `value_probabilities`.

    Example:
        >>> jax.jit(normalize_values)(jnp.array([[30.0, 1.0, 0.0], [3.0, 0.0, 0.0], [20.0, 20.0, 0.0]])).tolist()
        [0, -1, -1]

    Source:
        Zhang et al., arXiv 2108.08468, section 4 (reconstructed).
    """
    probs = value_probabilities(counts, smoothing=smoothing)
    support = jnp.sum(counts.astype(compute_dtype(counts)), axis=1)
    sure = (jnp.max(probs, axis=1) >= threshold) & (support >= min_support)
    return jnp.where(sure, jnp.argmax(probs, axis=1), -1).astype(jnp.int32)


def bio_spans(tags: np.ndarray) -> list[tuple[int, int, int]]:
    """Returns the spans of one tagged sequence; an inside tag without its begin opens one.

    Args:
        tags: int [L], host array; 0 = O, 1 + 2 t = begin, 2 + 2 t = inside.

    Returns:
        `(start, stop, type)`, stop exclusive.

    Raises:
        ValueError: `tags` is not one sequence.

    Example:
        >>> bio_spans(np.array([1, 2, 0, 3, 3, 2]))
        [(0, 2, 0), (3, 4, 1), (4, 5, 1), (5, 6, 0)]

    Source:
        The convention of the CoNLL-2000 evaluation.
    """
    tags = np.asarray(tags)
    if tags.ndim != 1:
        raise ValueError(f"tags must be [L], got {tags.shape}")
    spans: list[tuple[int, int, int]] = []
    for i, tag in enumerate(tags.tolist()):
        if tag > 0:
            inside, kind = tag % 2 == 0, (tag - 1) // 2
            if inside and spans and spans[-1][1:] == (i, kind):
                spans[-1] = (spans[-1][0], i + 1, kind)
            else:
                spans.append((i, i + 1, kind))
    return spans


def span_f1(tags: Array, gold: Array, *, where: Array | None = None, axis_name: str | None = None) -> Array:
    """Returns the F1 of exactly found spans over all sequences.

    `2 hits / (spans found + spans there)`, spans as in `bio_spans`.

    Args:
        tags: int [B, L], predicted.
        gold: int [B, L].
        where: bool [B, L], real tokens; the others count as O.
        axis_name: mapped axis over which the sequences are spread.

    Returns:
        float32 scalar; 0 if neither has a span.

    Raises:
        ValueError: shapes do not fit.

    Example:
        >>> float(jax.jit(span_f1)(jnp.array([[1, 2, 3]]), jnp.array([[1, 0, 3]])))
        0.5

    Source:
        The convention of the CoNLL-2000 evaluation.
    """
    if tags.ndim != 2 or gold.shape != tags.shape:
        raise ValueError(f"tags and gold must both be [B, L], got {tags.shape} and {gold.shape}")
    if where is not None and where.shape != tags.shape:
        raise ValueError(f"where has shape {where.shape}, expected {tags.shape}")

    def spans(tags):
        """Returns where spans start, how many tokens follow, and their types."""
        tags = jnp.asarray(tags) if where is None else jnp.where(where, tags, 0)
        kind = (tags - 1) // 2  # -1 of O
        before = jnp.pad(kind[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
        goes_on = (tags > 0) & (tags % 2 == 0) & (before == kind)
        # A span's end is the next token that does not go on; ends found from the right.
        place = jnp.broadcast_to(jnp.arange(tags.shape[1])[None, :], tags.shape)
        stop = jnp.where(goes_on, tags.shape[1], place)
        following = jnp.pad(stop[:, 1:], ((0, 0), (0, 1)), constant_values=tags.shape[1])
        end = jax.lax.cummin(following, axis=1, reverse=True)
        return (tags > 0) & ~goes_on, end, kind

    (found, stop, kind), (there, gold_stop, gold_kind) = spans(tags), spans(gold)
    hit = found & there & (stop == gold_stop) & (kind == gold_kind)
    number = lambda mask: all_sum(jnp.sum(mask, dtype=jnp.float32), axis_name)
    return safe_divide(2 * number(hit), number(found) + number(there))


def _cross_entropy(logits, labels, weights, where, axis_name):
    """Returns the mean over real, tagged tokens of the weighted cross entropy."""
    labels = jnp.asarray(labels)
    keep = where & (labels >= 0)
    log_p = jax.nn.log_softmax(zero_where_false(logits, keep).astype(compute_dtype(logits)))
    terms = -jnp.take_along_axis(log_p, jnp.maximum(labels, 0)[..., None], axis=-1)[..., 0]
    terms = terms if weights is None else terms * weights.astype(terms.dtype)
    return global_mean(terms, keep, axis_name=axis_name)


def _check(mode, threshold):
    if mode not in ("refine", "weak", "pseudo"):
        raise ValueError(f"mode={mode!r} must be 'refine', 'weak' or 'pseudo'")
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold={threshold} must be between 0 and 1")
