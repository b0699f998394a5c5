"""m2mKD: Module-to-Module Knowledge Distillation for Modular Transformers (2024, arXiv 2402.16918).

A monolithic teacher is cut into as many modules as a modular student (a mixture of experts) has, and each student
module learns from its teacher module alone. Both stand, one after the other, in the same place of a small frozen meta
network of one layer a module, so that their logits can be compared; all modules learn side by side, and at last the
student is put together and trained as a whole.

    u    = m_{i-1} o .. o m_1 (x)                                     (x itself for the first module)
    z_T  = m_K o .. o m_{i+1} (T_i(u))                                constant
    z_S  = m_K o .. o m_{i+1} (post_i(S_i(pre_i(u))))                 gradient to S_i and its stitches alone
    L_i  = (1 - a) CE(z_S, y) + a KD(z_S, z_T),  a = 0.5

    KD   soft: tau^2 mean over rows AND classes of softmax(z_T / tau) (log softmax(z_T / tau) - log softmax(z_S / tau))
         hard: CE(z_S, argmax z_T)

The official soft term is divided by rows times classes, not by rows: `normalize="numel"`, the default. Stitches are
linear layers where the student is not as wide as the meta network; they are dropped afterwards, as the paper does, or
kept. The last module of each network ends in logits.

Reconstructed: masks and unlabelled rows; weight 0.01 of the balance loss of a module that is a mixture.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from jaxlab.moe.balance import load_balancing_loss
from jaxlab.ops.collectives import global_mean, value_and_grad
from jaxlab.ops.masked import compute_dtype, zero_where_false
from jaxlab.types import Layer, Learner, LearnerState, PyTree

Module = Callable[[Array], Array]


def m2mkd(
    students: Sequence[Layer],
    meta: Sequence[Module],
    teacher: Sequence[Module],
    optimizer: optax.GradientTransformation,
    *,
    widths: Sequence[int],
    stitches: Sequence[tuple[Layer | None, Layer | None]] | None = None,
    meta_widths: Sequence[int] | None = None,
    alpha: float = 0.5,
    temperature: float = 1.0,
    kind: str = "soft",
    normalize: str = "numel",
    balance: float = 0.01,
    axis_name: str | None = None,
) -> Learner:
    """Returns a learner that distils every module of a teacher into its module of a student, all side by side.

    `sum_i L_i`, of which each depends on one module and its stitches alone; see the module's docstring.

    Args:
        students: K layers; `apply(params, h)` gives the next h, or a pair of it and a `RoutingPlan`.
        meta: K trained functions of h, which stay as they are.
        teacher: K trained functions of h, likewise.
        optimizer: of students and stitches; elementwise ones (AdamW) keep modules apart.
        widths: K sizes that the students are initialised with.
        stitches: K pairs of layers before and behind each student, None where there is none.
        meta_widths: K sizes of the meta network's h before each module, which `pre` is initialised with (`post` with
            the student's own width, which a module with one behind it keeps).
        alpha: weight of the distillation, in [0, 1].
        temperature: of the soft term.
        kind: "soft" or "hard".
        normalize: "numel" or "batch", of the soft term.
        balance: weight of `load_balancing_loss` of modules that give a plan.
        axis_name: mapped axis over which the examples are spread.

    Returns:
        A `Learner` with a `LearnerState` whose `params` are a dict of `module_0` and so on, each of `module`, `pre` and
        `post`. `batch`: `x [N, ...]`, `y int [N]` (-1 = unlabelled: distillation alone), optional `where [N]`. Metrics:
        `loss [K]`. `predict` gives `logits` of the students put together with their stitches.

    Raises:
        ValueError: lengths differ, or an option is out of range.

    Example:
        >>> from jaxlab.ops.layers import dense
        >>> frozen = [lambda h: 2 * h, lambda h: h[:, :2]]
        >>> learner = m2mkd([dense(3), dense(2)], frozen, frozen, optax.sgd(0.1), widths=[3, 3])
        >>> batch = {"x": jnp.ones((4, 3)), "y": jnp.array([0, 1, 1, 0])}
        >>> run = lambda key: learner.update(learner.init(key, batch), batch, key)[1]["loss"]
        >>> jax.jit(run)(jax.random.key(0)).shape
        (2,)

    Source:
        Lo et al., arXiv 2402.16918, section 3; code kamanphoebe/m2mKD.
    """
    number = len(students)
    stitches = [(None, None)] * number if stitches is None else list(stitches)
    if not number or {len(meta), len(teacher), len(widths), len(stitches)} != {number}:
        raise ValueError(
            f"students, meta, teacher, widths and stitches must have one length, got {number}, {len(meta)}, "
            f"{len(teacher)}, {len(widths)} and {len(stitches)}"
        )
    if any(layer is not None for pair in stitches for layer in pair) and (
        meta_widths is None or len(meta_widths) != number
    ):
        raise ValueError(f"meta_widths must have {number} sizes where there are stitches, got {meta_widths}")
    _check(alpha, temperature, kind, normalize)

    def init(key, batch):
        del batch
        params = {}
        for i, (student, (pre, post)) in enumerate(zip(students, stitches, strict=True)):
            keys = jax.random.split(jax.random.fold_in(key, i), 3)
            own = {"module": student.init(keys[0], widths[i])}
            if pre is not None:
                own["pre"] = pre.init(keys[1], meta_widths[i])
            if post is not None:
                own["post"] = post.init(keys[2], widths[i])
            params[f"module_{i}"] = own
        return LearnerState(params, {}, optimizer.init(params), jnp.zeros((), jnp.int32))

    def bound(params, i):
        """Returns the student module with its stitches as a function of the meta network's h."""
        own, (pre, post) = params[f"module_{i}"], stitches[i]

        def module(h):
            h = h if pre is None else pre.apply(own["pre"], h)
            out = students[i].apply(own["module"], h)
            h, plan = out if isinstance(out, tuple) else (out, None)
            return (h if post is None else post.apply(own["post"], h)), plan

        return module

    def losses(params, x, y, where):
        terms = []
        for i in range(number):
            wanted, _ = hybrid_forward(meta, i, teacher[i], x)
            z, plan = hybrid_forward(meta, i, bound(params, i), x)
            options = {"alpha": alpha, "temperature": temperature, "kind": kind, "normalize": normalize}
            term = m2mkd_loss(z, wanted, y, where=where, axis_name=axis_name, **options)
            if plan is not None:
                term = term + balance * load_balancing_loss(plan, axis_name=axis_name)
            terms.append(term)
        return jnp.stack(terms)

    def update(state, batch, key):
        del key
        keep = batch.get("where")
        keep = jnp.ones(batch["y"].shape, bool) if keep is None else keep
        x = zero_where_false(batch["x"], keep)

        def loss(params):
            each = losses(params, x, batch["y"], keep)
            return jnp.sum(each), each

        (_, each), grads = value_and_grad(loss, axis_name=axis_name, has_aux=True)(state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return LearnerState(params, {}, opt_state, state.step + 1), {"loss": each.astype(jnp.float32)}

    def predict(state, batch):
        h = batch["x"]
        for i in range(number):
            h, _ = bound(state.params, i)(h)
        return {"logits": h}

    return Learner(init, update, predict)


def hybrid_forward(meta: Sequence[Module], index: int, module: Callable[[Array], Any], x: Array) -> tuple[Array, Any]:
    """Returns the logits of the meta network in which one module is another one.

    Args:
        meta: K functions of h; constants.
        index: which is replaced, 0 to K - 1.
        module: the other one: h to h, or to a pair of h and anything.
        x: input of the network.

    Returns:
        `(logits, extra)`, extra being the second of the pair or None. What comes before the module is a constant; what
        comes behind passes gradient on to it.

    Raises:
        ValueError: `index` is out of range.

    Example:
        >>> meta = [lambda h: h + 1, lambda h: 10 * h]
        >>> jax.jit(lambda x: hybrid_forward(meta, 0, lambda h: h * h, x)[0])(jnp.array([3.0])).tolist()
        [90.0]
    """
    if not 0 <= index < len(meta):
        raise ValueError(f"index={index} must be between 0 and {len(meta) - 1}")
    h = x
    for stage in meta[:index]:
        h = stage(h)
    out = module(jax.lax.stop_gradient(h))
    h, extra = out if isinstance(out, tuple) else (out, None)
    for stage in meta[index + 1 :]:
        h = stage(h)
    return h, extra


def m2mkd_loss(
    logits: Array,
    teacher_logits: Array,
    labels: Array,
    *,
    alpha: float = 0.5,
    temperature: float = 1.0,
    kind: str = "soft",
    normalize: str = "numel",
    where: Array | None = None,
    axis_name: str | None = None,
) -> Array:
    """Returns `(1 - alpha) CE(z, y) + alpha KD(z, z_T)`; see the module's docstring.

    Args:
        logits: float [N, C], of the student in the meta network.
        teacher_logits: float [N, C], of the teacher there; a constant.
        labels: int [N]; -1 = unlabelled, which takes no part in the cross entropy.
        alpha: in [0, 1].
        temperature: > 0.
        kind: "soft" or "hard".
        normalize: of the soft term: "numel" by rows and classes, "batch" by rows.
        where: bool [N], rows that exist.
        axis_name: mapped axis over which the rows are spread.

    Returns:
        Scalar in the dtype of accumulation; 0 without rows.

    Raises:
        ValueError: a shape does not fit or an option is out of range.

    Example:
        >>> z = jnp.array([[0.0, 0.0]])
        >>> loss = jax.jit(lambda z, t: m2mkd_loss(z, t, jnp.array([0]), alpha=1.0))
        >>> float(loss(z, z)), round(float(loss(z, jnp.array([[1e4, 0.0]]))), 4)
        (0.0, 0.3466)

    Source:
        Code kamanphoebe/m2mKD (`m2mKDLoss`).
    """
    if logits.ndim != 2 or teacher_logits.shape != logits.shape or labels.shape != logits.shape[:1]:
        raise ValueError(
            f"logits and teacher_logits must be [N, C] and labels [N], got {logits.shape}, {teacher_logits.shape} and "
            f"{labels.shape}"
        )
    _check(alpha, temperature, kind, normalize)
    dtype, classes = compute_dtype(logits, teacher_logits), logits.shape[1]
    keep = jnp.ones(labels.shape, bool) if where is None else where
    z, wanted = (zero_where_false(a, keep).astype(dtype) for a in (logits, jax.lax.stop_gradient(teacher_logits)))
    known = keep & (labels >= 0) & (labels < classes)
    own = lambda ids: -jnp.take_along_axis(jax.nn.log_softmax(z, axis=1), ids[:, None], axis=1)[:, 0]
    cross = global_mean(own(jnp.where(known, labels, 0)), known, axis_name=axis_name)
    if kind == "hard":
        return (1 - alpha) * cross + alpha * global_mean(own(jnp.argmax(wanted, axis=1)), keep, axis_name=axis_name)
    p, q = (jax.nn.log_softmax(a / temperature, axis=1) for a in (wanted, z))
    terms = temperature**2 * jnp.sum(jnp.exp(p) * (p - q), axis=1)
    terms = terms / classes if normalize == "numel" else terms
    return (1 - alpha) * cross + alpha * global_mean(terms, keep, axis_name=axis_name)


def split_stages(layers: Sequence[Any], depths: Sequence[int]) -> list[list[Any]]:
    """Returns the layers of a network in groups: its modules.

    Args:
        layers: in order, whatever they are.
        depths: layers of each module; add up to their number.

    Returns:
        A list of K lists.

    Raises:
        ValueError: the depths do not fit.

    Example:
        >>> split_stages("abcdef", [1, 3, 2])
        [['a'], ['b', 'c', 'd'], ['e', 'f']]
    """
    if min(depths, default=0) < 1 or sum(depths) != len(layers):
        raise ValueError(f"depths={list(depths)} must be positive and add up to the {len(layers)} layers")
    ends = [sum(depths[: i + 1]) for i in range(len(depths))]
    return [list(layers[end - depth : end]) for depth, end in zip(depths, ends, strict=True)]


def assemble(params: PyTree, *, keep_stitches: bool = False) -> list[PyTree]:
    """Returns the trained student modules in order, from where the whole student is trained on.

    Args:
        params: of the learner's state.
        keep_stitches: whether each is a dict of `module`, `pre` and `post` instead of the module alone.

    Returns:
        A list of K pytrees.

    Example:
        >>> assemble({"module_0": {"module": 1, "pre": 2}, "module_1": {"module": 3}})
        [1, 3]
    """
    each = [params[f"module_{i}"] for i in range(len(params))]
    return each if keep_stitches else [own["module"] for own in each]


def _check(alpha, temperature, kind, normalize):
    if not 0 <= alpha <= 1 or not temperature > 0:
        raise ValueError(f"alpha={alpha} must be in [0, 1] and temperature={temperature} positive")
    if kind not in ("soft", "hard") or normalize not in ("numel", "batch"):
        raise ValueError(f"kind={kind!r} must be 'soft' or 'hard', normalize={normalize!r} 'numel' or 'batch'")
