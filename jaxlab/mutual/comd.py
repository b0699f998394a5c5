"""Unlock the Power: Competitive Distillation for Multi-Modal Large Language Models (CoMD, 2023, arXiv 2311.08213).

Student and teacher compete: an assessor scores both on a pool of examples. Where the teacher wins the student learns,
where the student wins the teacher does, and the next round's pool holds what is hard for the student, new examples like
it, and as many easy ones. The paper goes four rounds.

    gap      d = score_T - score_S, mean over both orders in which the assessor sees them
    groups   hard d >= tau,  won d <= -tau (by the student),  easy otherwise
    target   p* = softmax((1 - w) log p_S + w log p_T),  w = sigmoid(k d), constant
    student  a T^2 KL(p* || p_S) on hard and easy + (1 - a) CE(y, p_S)
    teacher  T^2 KL(p_S || p_T) on won
    pool     half hard, half easy, and a perturbed copy of each that is no duplicate of another (cosine below 0.9)

Reconstructed: all equations, from the abstract and the usual form of such loops (the paper's assessor is a language
model and its pool holds instructions; tau = 0.2, k = 10, T = 2, a = 0.5). The first stage, supervised alignment of a
projector, is plain training.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from jaxlab.mutual.mean_teacher import consistency_loss
from jaxlab.mutual.peers import as_outputs, example_dims
from jaxlab.ops.collectives import global_mean, value_and_grad
from jaxlab.ops.masked import compute_dtype, safe_normalize, zero_where_false
from jaxlab.ops.reduction import reduce_terms
from jaxlab.ops.sharding import rows_mixed
from jaxlab.types import Layer, Learner, LearnerState, StatefulLayer, as_stateful


def comd(
    student: Layer | StatefulLayer | Callable[..., Any],
    teacher: Layer | StatefulLayer | Callable[..., Any],
    optimizer: optax.GradientTransformation,
    *,
    temperature: float = 2.0,
    soft_weight: float = 0.5,
    threshold: float = 0.2,
    sharpness: float = 10.0,
    axis_name: str | None = None,
) -> Learner:
    """Returns a learner of a student and a teacher that learn where the other won.

    Args:
        student: network whose `apply` gives logits `[N, C]` or a dict with `logits`.
        teacher: the same.
        optimizer: of both, one state for all parameters.
        temperature: T.
        soft_weight: a.
        threshold: tau.
        sharpness: k.
        axis_name: mapped axis over which the examples are spread.

    Returns:
        A `Learner` with a `LearnerState` whose `params` and `net_state` have the entries `student` and `teacher`;
        `init(key, batch, params=None)` takes trained ones. `batch`: `x [N, ...]`, `y int [N]` (-1 = unlabelled),
        `gap [N]` (see `comd_round`; all 1 is one-way distillation), optional `where [N]`. Metrics: `student`, `teacher`
        (losses) and `hard`, `won` (shares). `predict` gives `logits` of the student and `teacher_logits`.

    Raises:
        ValueError: see `comd_losses`.

    Example:
        >>> from jaxlab.ops.layers import dense
        >>> learner = comd(dense(2), dense(2), optax.sgd(0.1))
        >>> batch = {"x": jnp.ones((3, 2)), "y": jnp.array([0, 1, -1]), "gap": jnp.array([1.0, 0.0, -1.0])}
        >>> state = jax.jit(learner.init)(jax.random.key(0), batch)
        >>> round(float(jax.jit(learner.update)(state, batch, None)[1]["won"]), 3)
        0.333

    Source:
        Li, Lin, Wang, Qian, arXiv 2311.08213 (reconstructed).
    """
    nets = {"student": as_stateful(student), "teacher": as_stateful(teacher)}
    options = {
        "temperature": temperature,
        "soft_weight": soft_weight,
        "threshold": threshold,
        "sharpness": sharpness,
        "axis_name": axis_name,
    }

    def init(key, batch, *, params=None):
        net_state = {name: {} for name in nets}
        if params is None:
            keys, dims = dict(zip(nets, jax.random.split(key), strict=True)), example_dims(batch["x"])
            made = {name: net.init(keys[name], dims) for name, net in nets.items()}
            params, net_state = ({name: pair[i] for name, pair in made.items()} for i in range(2))
        return LearnerState(params, net_state, optimizer.init(params), jnp.zeros((), jnp.int32))

    def update(state, batch, key):
        where = batch.get("where")
        where = jnp.ones(batch["y"].shape, bool) if where is None else where
        x = zero_where_false(batch["x"], where)
        keys = dict.fromkeys(nets) if key is None else dict(zip(nets, jax.random.split(key), strict=True))

        def total(params):
            logits, net_state = {}, {}
            for name, net in nets.items():
                out, net_state[name] = net.apply(params[name], state.net_state[name], x, key=keys[name], train=True)
                logits[name] = as_outputs(out)["logits"]
            gap, y = batch["gap"], batch["y"]
            losses = comd_losses(logits["student"], logits["teacher"], gap, y, where=where, **options)
            # Each loss holds the other's logits as constants, so the gradient of the sum is each network's own.
            return sum(losses), (dict(zip(nets, losses, strict=True)), net_state)

        run = value_and_grad(total, axis_name=axis_name, has_aux=True)
        (_, (metrics, net_state)), grads = run(state.params)
        hard, _, won = split_by_gap(batch["gap"], threshold=threshold, where=where)
        share = lambda mask: global_mean(mask.astype(jnp.float32), where, axis_name=axis_name)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {**metrics, "hard": share(hard), "won": share(won)}
        return LearnerState(params, net_state, opt_state, state.step + 1), metrics

    def predict(state, batch):
        give = lambda name: as_outputs(
            nets[name].apply(state.params[name], state.net_state[name], batch["x"], train=False)[0]
        )
        return {**give("student"), "teacher_logits": give("teacher")["logits"]}

    return Learner(init, update, predict)


def comd_losses(
    logits: Array,
    teacher_logits: Array,
    gap: Array,
    labels: Array | None = None,
    *,
    temperature: float = 2.0,
    soft_weight: float = 0.5,
    threshold: float = 0.2,
    sharpness: float = 10.0,
    where: Array | None = None,
    axis_name: str | None = None,
) -> tuple[Array, Array]:
    """Returns the student's and the teacher's loss; each is constant in the other's logits.

    See the module's docstring. A mean is over the examples that have the term.

    Args:
        logits: float [N, C], the student's.
        teacher_logits: float [N, C].
        gap: float [N], d, constant.
        labels: int [N], -1 = unlabelled; None = none.
        temperature: T > 0.
        soft_weight: a in [0, 1].
        threshold: tau >= 0.
        sharpness: k >= 0.
        where: bool [N], real examples.
        axis_name: mapped axis over which the examples are spread.

    Returns:
        Two scalars in the accumulation dtype; a term without examples is 0.

    Raises:
        ValueError: shapes do not fit or an option is out of range.

    Example:
        >>> z, t = jnp.array([[1.0, 0.0]]), jnp.array([[0.0, 1.0]])
        >>> losses = jax.jit(comd_losses)
        >>> [[round(float(v), 3) for v in losses(z, t, jnp.array([d]))] for d in (1.0, -1.0)]
        [[0.245, 0.0], [0.0, 0.49]]

    Source:
        Li, Lin, Wang, Qian, arXiv 2311.08213 (reconstructed).
    """
    if logits.ndim != 2 or teacher_logits.shape != logits.shape:
        raise ValueError(f"logits and teacher_logits must both be [N, C], got {logits.shape}, {teacher_logits.shape}")
    if labels is not None and labels.shape != logits.shape[:1]:
        raise ValueError(f"labels has shape {labels.shape}, expected {logits.shape[:1]}")
    if gap.shape != logits.shape[:1]:
        raise ValueError(f"gap has shape {gap.shape}, expected {logits.shape[:1]}")
    if not 0 <= soft_weight <= 1:
        raise ValueError(f"soft_weight={soft_weight} must be between 0 and 1")
    keep = jnp.ones(logits.shape[:1], bool) if where is None else where
    hard, easy, won = split_by_gap(gap, threshold=threshold, where=keep)
    z, t = zero_where_false(logits, keep), zero_where_false(teacher_logits, keep)
    target = competitive_targets(z, t, zero_where_false(gap, keep), temperature=temperature, sharpness=sharpness)
    own = jax.nn.log_softmax(z.astype(compute_dtype(z)) / temperature)
    entropy = jnp.sum(jnp.where(target > 0, target * jnp.log(jnp.where(target > 0, target, 1.0)), 0.0), axis=-1)
    soft = temperature**2 * (entropy - jnp.sum(target * own, axis=-1))
    student = soft_weight * reduce_terms(soft, hard | easy, axis_name=axis_name)
    if labels is not None:
        labels = jnp.asarray(labels)
        log_p = jax.nn.log_softmax(z.astype(compute_dtype(z)))
        terms = -jnp.take_along_axis(log_p, jnp.maximum(labels, 0)[:, None], axis=-1)[:, 0]
        student += (1 - soft_weight) * reduce_terms(terms, keep & (labels >= 0), axis_name=axis_name)
    options = {"kind": "kl", "temperature": temperature, "axis_name": axis_name}
    return student, consistency_loss(t, z, where=won, **options)


def competitive_targets(
    logits: Array, teacher_logits: Array, gap: Array, *, temperature: float = 1.0, sharpness: float = 10.0
) -> Array:
    """Returns the constant target between both predictions, nearer to the one that scored higher.

    `softmax(((1 - w) log p_S + w log p_T))`, p softened by T, `w = sigmoid(k d)`.

    Args:
        logits: float [N, C], the student's.
        teacher_logits: float [N, C].
        gap: float [N], d.
        temperature: T > 0.
        sharpness: k >= 0.

    Returns:
        float [N, C] in the accumulation dtype; no gradient reaches any argument.

    Raises:
        ValueError: an option is out of range.

    Example:
        >>> z, t = jnp.array([[9.0, 0.0]] * 2), jnp.array([[0.0, 9.0]] * 2)
        >>> jax.jit(competitive_targets)(z, t, jnp.array([1.0, -1.0])).round(3).tolist()
        [[0.0, 1.0], [1.0, 0.0]]

    Source:
        Reconstructed for arXiv 2311.08213.
    """
    if not temperature > 0 or sharpness < 0:
        raise ValueError(f"temperature={temperature} must be positive and sharpness={sharpness} at least 0")
    dtype = compute_dtype(logits, teacher_logits)
    z, t, d = (jax.lax.stop_gradient(a).astype(dtype) for a in (logits, teacher_logits, gap))
    w = jax.nn.sigmoid(sharpness * d)[:, None]
    log_p, log_q = (jax.nn.log_softmax(a / temperature) for a in (z, t))
    return jax.nn.softmax((1 - w) * log_p + w * log_q)


def split_by_gap(gap: Array, *, threshold: float = 0.2, where: Array | None = None) -> tuple[Array, Array, Array]:
    """Returns which examples are hard, easy, and won by the student.

    `d >= tau`, `|d| < tau`, `d <= -tau`.

    Args:
        gap: float [N], d.
        threshold: tau >= 0; at 0 a tie is hard.
        where: bool [N], real examples; the others are in no group.

    Returns:
        Three bool [N], of which every real example is in one.

    Raises:
        ValueError: `threshold` is negative or a shape does not fit.

    Example:
        >>> [m.tolist() for m in split_by_gap(jnp.array([0.5, 0.0, -0.5]))]
        [[True, False, False], [False, True, False], [False, False, True]]

    Source:
        Reconstructed for arXiv 2311.08213.
    """
    if threshold < 0:
        raise ValueError(f"threshold={threshold} must be at least 0")
    if where is not None and where.shape != gap.shape:
        raise ValueError(f"where has shape {where.shape}, expected {gap.shape}")
    keep = jnp.ones(gap.shape, bool) if where is None else where
    hard = keep & (gap >= threshold)
    won = keep & (gap <= -threshold) & ~hard
    return hard, keep & ~hard & ~won, won


def debiased_gap(assessor: Callable[[Any, Any], tuple[Any, Any]], teacher_answers: Any, answers: Any) -> np.ndarray:
    """Returns by how much the teacher's answers are better, freed from the assessor's liking of what comes first.

    `((T first: s_T - s_S) + (S first: s_T - s_S)) / 2`.

    Args:
        assessor: host function `(first, second) -> (scores of the first, scores of the second)`, each [N]; called
            twice.
        teacher_answers: whatever the assessor reads.
        answers: the student's.

    Returns:
        float64 [N]; exchanging the two changes the sign.

    Raises:
        ValueError: the assessor's two results differ in shape.

    Example:
        >>> likes_the_first = lambda first, second: (first + 0.5, second)
        >>> debiased_gap(likes_the_first, np.array([0.25]), np.array([0.75])).tolist()
        [-0.5]

    Source:
        Li, Lin, Wang, Qian, arXiv 2311.08213 (reconstructed).
    """
    first_teacher, second_student = (np.asarray(s, np.float64) for s in assessor(teacher_answers, answers))
    first_student, second_teacher = (np.asarray(s, np.float64) for s in assessor(answers, teacher_answers))
    shapes = {a.shape for a in (first_teacher, second_student, first_student, second_teacher)}
    if len(shapes) != 1:
        raise ValueError(f"the assessor gives scores of shapes {sorted(shapes)}, expected one shape")
    return (first_teacher - second_student + second_teacher - first_student) / 2


def comd_round(
    learner: Learner,
    state: LearnerState,
    pool: dict[str, Array],
    key: Array,
    *,
    score: Callable[[Array, dict[str, Array]], Array],
    perturb: Callable[[Array, Array], Array],
    size: int,
    threshold: float = 0.2,
    similarity: float | None = 0.9,
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Returns what the next round trains on: half hard and half easy examples, then a perturbed copy of each.

    Args:
        learner: a `comd`.
        state: its state.
        pool: `x [P, ...]`, `y [P]`, optional `where [P]`.
        key: decides the choice and the perturbations.
        score: `score(logits [P, C], pool)`, in [0, 1], of either network; an assessor that compares is
            `debiased_gap`, outside of `jit`.
        perturb: `perturb(key, x)`, new examples like these.
        size: of the choice, at least 1.
        threshold: tau.
        similarity: cosine from which on a later example is a duplicate and masked; None = no example is.

    Returns:
        `batch` with `x`, `y`, `gap` and `where`, `2 size` rows; metrics `hard`, `easy`, `won`, shares of the pool.

    Raises:
        ValueError: `size` is below 1.

    Example:
        >>> from jaxlab.ops.layers import dense
        >>> learner, pool = comd(dense(2), dense(2), optax.sgd(0.1)), {"x": jnp.eye(4), "y": jnp.zeros(4, int)}
        >>> @jax.jit
        ... def next_batch(key):
        ...     score = lambda z, pool: jax.nn.softmax(z)[:, 0]
        ...     options = {"score": score, "perturb": lambda key, x: 0.5 * x, "size": 2}
        ...     return comd_round(learner, learner.init(key, pool), pool, key, **options)[0]
        >>> next_batch(jax.random.key(0))["x"].shape
        (4, 4)

    Source:
        Li, Lin, Wang, Qian, arXiv 2311.08213 (reconstructed).
    """
    outputs = learner.predict(state, pool)
    where = pool.get("where")
    where = jnp.ones(len(pool["x"]), bool) if where is None else where
    gap = jax.lax.stop_gradient(score(outputs["teacher_logits"], pool) - score(outputs["logits"], pool))
    hard, easy, won = split_by_gap(gap, threshold=threshold, where=where)
    key_rows, key_new = jax.random.split(key)
    rows = balance_pool(key_rows, hard, easy, size=size)
    exist, rows = rows >= 0, jnp.maximum(rows, 0)
    old = pool["x"][rows]
    batch = {n: jnp.concatenate([v, v]) for n, v in {"y": pool["y"][rows], "gap": gap[rows], "where": exist}.items()}
    batch["x"] = jnp.concatenate([old, perturb(key_new, old)])
    if similarity is not None:
        flat = batch["x"].reshape(2 * size, -1)
        # An example that was chosen twice stays: the choice weighs, and only copies of it may be superfluous.
        new = remove_duplicates(flat, threshold=similarity, where=batch["where"])
        batch["where"] = batch["where"] & (new | (jnp.arange(2 * size) < size))
    shares = {n: global_mean(m.astype(jnp.float32), where) for n, m in (("hard", hard), ("easy", easy), ("won", won))}
    return batch, shares


def balance_pool(key: Array, hard: Array, easy: Array, *, size: int) -> Array:
    """Returns rows of the pool, half of them hard and half easy, drawn with replacement.

    Args:
        key: decides the draw.
        hard: bool [P].
        easy: bool [P].
        size: number of rows; of an odd number the larger half is hard.

    Returns:
        int32 [size]; an empty group is replaced by the other, and -1 stands everywhere if both are empty.

    Raises:
        ValueError: shapes differ or `size` is below 1.

    Example:
        >>> draw = jax.jit(balance_pool, static_argnames="size")
        >>> draw(jax.random.key(0), jnp.array([True, False]), jnp.array([False, True]), size=4).tolist()
        [0, 0, 1, 1]

    Source:
        Reconstructed for arXiv 2311.08213.
    """
    if hard.ndim != 1 or easy.shape != hard.shape:
        raise ValueError(f"hard and easy must both be [P], got {hard.shape} and {easy.shape}")
    if size < 1:
        raise ValueError(f"size={size} must be at least 1")
    u = jax.random.uniform(key, (size,))

    def choose(u, group):
        """The row at which the running count of the group passes its uniform share."""
        count = jnp.cumsum(group)
        return jnp.sum(count[None, :] <= jnp.floor(u * count[-1])[:, None], axis=1)

    def run(u, hard, easy):
        hard = jnp.where(jnp.any(hard), hard, easy)
        easy = jnp.where(jnp.any(easy), easy, hard)
        half = (size + 1) // 2
        rows = jnp.concatenate([choose(u[:half], hard), choose(u[half:], easy)])
        return jnp.where(jnp.any(hard), jnp.minimum(rows, len(hard) - 1), -1).astype(jnp.int32)

    return rows_mixed(run)(u, hard, easy)


def remove_duplicates(embeddings: Array, *, threshold: float = 0.9, where: Array | None = None) -> Array:
    """Returns which rows stay when every row goes that is too similar to an earlier one that stays.

    Args:
        embeddings: float [N, D].
        threshold: cosine from which on a row is a duplicate.
        where: bool [N], real rows; the others go.

    Returns:
        bool [N].

    Raises:
        ValueError: shapes do not fit.

    Example:
        >>> jax.jit(remove_duplicates)(jnp.array([[1.0, 0.0], [2.0, 0.1], [0.0, 1.0]])).tolist()
        [True, False, True]

    Source:
        Li, Lin, Wang, Qian, arXiv 2311.08213 (reconstructed).
    """
    if embeddings.ndim != 2:
        raise ValueError(f"embeddings must be [N, D], got {embeddings.shape}")
    if where is not None and where.shape != embeddings.shape[:1]:
        raise ValueError(f"where has shape {where.shape}, expected {embeddings.shape[:1]}")
    keep = jnp.ones(embeddings.shape[:1], bool) if where is None else where

    def run(x, keep):
        x = safe_normalize(zero_where_false(x, keep).astype(compute_dtype(x)))
        like = jnp.matmul(x, x.T, precision=jax.lax.Precision.HIGHEST) >= threshold

        def step(stay, row):
            i, like = row
            stay = stay.at[i].set(stay[i] & ~jnp.any(like & stay & (jnp.arange(len(stay)) < i)))
            return stay, None

        return jax.lax.scan(step, keep, (jnp.arange(len(keep)), like))[0]

    return rows_mixed(run)(jax.lax.stop_gradient(embeddings), keep)
