"""Emergent Mixture-of-Experts: Can Dense Pre-trained Transformers Benefit from Emergent Modular Structures?

EMoE, 2023, arXiv 2310.10908. The neurons of a pretrained feed-forward network already form modules. Cluster them by
their keys into experts of equal size, let each token use the k experts whose mean key it fits best, and tune like that,
without a new parameter: neurons that do harm stay out. Afterwards the experts go back to one dense network.

    dense      f(x) = act(x up + b) down + c         key of neuron j: column j of `up` (of `gate`, if there is one)
    clusters   equal-size k-means of the keys at unit length (exact assignment in every step)
    expert     f_e(x) = act(x up_e + b_e) down_e + c / k
    gate       score_e = x . mean of the keys of e (their own lengths), always of the present keys, never trained
    output     y = sum of f_e(x) over the k largest scores, each with weight 1: k = E is the dense network exactly

In training the official gate adds gate_noise N(0, 1) / E to the scores. It drops tokens (capacity 1.5) and has a
balance loss: here nothing is dropped, and the plan is there for any loss. Two faults of the release are not followed:
its gate is not frozen, and one term of its balance loss compares a probability with a logit.

Reconstructed: clustering on the host by successive shortest paths; gated networks (as in the paper's LLaMA code).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxlab.moe.dispatch import dropless
from jaxlab.moe.experts import layer_experts
from jaxlab.moe.plans import plan_from_ids
from jaxlab.ops.masked import compute_dtype, safe_normalize, zero_where_false
from jaxlab.types import Layer


def emoe_ffn(
    k: int,
    *,
    activation: Callable[[Array], Array] | None = None,
    noise: float = 1.0,
    normalize: bool = False,
) -> Layer:
    """Returns the feed-forward network in which each token uses the k experts whose mean key it fits best.

    `y = sum of f_e(x) over the k largest x . mean key_e` with weight 1 each; see the module.

    Args:
        k: experts of a token, 1 to E.
        activation: of the neurons, None = exact GELU; with a `gate` it is `activation(x gate) * (x up)`.
        noise: standard deviation of the noise on the scores in training, times E (the official default is 1).
        normalize: whether scores are cosines.

    Returns:
        A `Layer` whose parameters are those of `dense_to_emoe`, d -> d: `apply(params, x [T, d], where=None, key=None,
        train=False)` gives `(y [T, d], plan)`. Tokens that do not exist give 0. It has no `init` of its own.

    Raises:
        ValueError: an option is out of range; in `apply`, training with noise but without a key; in `init`, always.

    Example:
        >>> dense = {"up": jnp.ones((2, 4)), "down": jnp.ones((4, 2))}
        >>> params = dense_to_emoe(dense, np.array([0, 1, 0, 1]), k=1)
        >>> jax.jit(emoe_ffn(1, activation=jax.nn.relu).apply)(params, jnp.ones((1, 2)))[0].tolist()
        [[4.0, 4.0]]

    Source:
        Qiu, Huang, Fu, arXiv 2310.10908, section 3; code qiuzh20/EMoE.
    """
    if k < 1:
        raise ValueError(f"k={k} must be at least 1")
    if noise < 0:
        raise ValueError(f"noise={noise} must be at least 0")
    gelu = functools.partial(jax.nn.gelu, approximate=False)
    one = functools.partial(_expert, gelu if activation is None else activation)

    def init(key, size):
        raise ValueError("an emergent mixture starts from a dense network: make its parameters by dense_to_emoe")

    def apply(params, x, *, where=None, key=None, train=False):
        if x.ndim != 2:
            raise ValueError(f"x must be [tokens, features], got shape {x.shape}")
        experts = params["up"].shape[0]
        if not k <= experts:
            raise ValueError(f"k={k} must be between 1 and num_experts={experts}")
        if train and noise > 0 and key is None:
            raise ValueError("key is needed: the gate is noisy in training")
        x = zero_where_false(x, where)
        scores = jax.lax.stop_gradient(avg_k_scores(params, x, normalize=normalize))
        if train and noise > 0:
            scores = scores + noise / experts * jax.random.normal(key, scores.shape, scores.dtype)
        _, ids = jax.lax.top_k(scores, k)
        weights = jnp.ones(ids.shape, scores.dtype)
        plan = plan_from_ids(ids, weights, jax.nn.softmax(scores, axis=1), scores, where=where)
        y, plan = dropless()(layer_experts(experts, Layer(init, one)), params, x, plan)
        return y, plan

    return Layer(init, apply)


def avg_k_scores(params: Any, x: Array, *, normalize: bool = False) -> Array:
    """Returns how well each token fits the mean key of each expert.

    Args:
        params: of `dense_to_emoe`.
        x: float [T, d].
        normalize: whether both have unit length.

    Returns:
        [T, E] in at least float32.

    Example:
        >>> params = {"up": jnp.array([[[1.0, 3.0]], [[0.0, 2.0]]])}
        >>> avg_k_scores(params, jnp.array([[2.0]])).tolist()
        [[4.0, 2.0]]
    """
    keys = params.get("gate", params["up"])
    dtype = compute_dtype(x)
    mean, x = jnp.mean(keys.astype(dtype), axis=2), x.astype(dtype)
    if normalize:
        mean, x = safe_normalize(mean), safe_normalize(x)
    return jnp.matmul(x, mean.T, precision=jax.lax.Precision.HIGHEST)


def dense_to_emoe(params: Any, labels: np.ndarray | Array, *, k: int) -> Any:
    """Returns the parameters of `emoe_ffn` that a dense network's neurons make, cluster by cluster.

    Args:
        params: dict of `up` [d, F] and `down` [F, d], and where there is one `gate` [d, F], `up_bias` [F], `gate_bias`
            [F], `down_bias` [d].
        labels: int [F], the cluster of each neuron, equally many in each (`balanced_kmeans`); on the host.
        k: experts of a token, among which `down_bias` is split.

    Returns:
        The same dict with a leading axis E: `up` [E, d, F / E], `down` [E, F / E, d], `up_bias` [E, F / E], `down_bias`
        [E, d] (each `down_bias / k`). Neurons keep their order within a cluster.

    Raises:
        ValueError: clusters are not of equal size, a shape does not fit, or a name is unknown.

    Example:
        >>> dense = {"up": jnp.array([[1.0, 2.0, 3.0, 4.0]]), "down": jnp.zeros((4, 1))}
        >>> dense_to_emoe(dense, np.array([1, 0, 1, 0]), k=1)["up"].tolist()
        [[[2.0, 4.0]], [[1.0, 3.0]]]
    """
    labels = np.asarray(labels)
    counts = np.bincount(labels) if labels.ndim == 1 and labels.size and labels.min() >= 0 else np.zeros(1, int)
    if counts.min() < 1 or np.ptp(counts):
        raise ValueError(f"labels must be clusters 0 .. E - 1 of equal size, got sizes {counts.tolist()}")
    if not 1 <= k <= len(counts):
        raise ValueError(f"k={k} must be between 1 and num_experts={len(counts)}")
    if set(params) - set(_NEURON_AXIS) or not {"up", "down"} <= set(params):
        raise ValueError(f"params must have up and down, and may have gate and biases, got {sorted(params)}")
    order = np.argsort(labels, kind="stable").reshape(len(counts), -1)
    result = {}
    for name, leaf in params.items():
        axis = _NEURON_AXIS[name]
        if axis is None:
            result[name] = jnp.broadcast_to(leaf[None] / k, (len(counts), *leaf.shape))
            continue
        if leaf.shape[axis] != len(labels):
            raise ValueError(f"params[{name!r}] has shape {leaf.shape}, expected {len(labels)} neurons on axis {axis}")
        result[name] = jnp.moveaxis(jnp.take(leaf, order, axis=axis), axis, 0)
    return result


def emoe_to_dense(params: Any, *, k: int) -> Any:
    """Returns the dense network of all experts' neurons: what a tuned mixture is deployed as.

    Args:
        params: of `dense_to_emoe`, tuned or not.
        k: as given to `dense_to_emoe`; the bias is k times the mean of the experts' (trained apart, they may differ).

    Returns:
        The dense dict, neurons in the order of the experts: the same function as `emoe_ffn` with k = E.

    Example:
        >>> emoe_to_dense({"up": jnp.array([[[2.0]], [[1.0]]]), "down": jnp.zeros((2, 1, 1))}, k=1)["up"].tolist()
        [[2.0, 1.0]]
    """
    result = {}
    for name, leaf in params.items():
        axis = _NEURON_AXIS[name]
        if axis is None:
            result[name] = k * jnp.mean(leaf, axis=0)
        else:
            moved = jnp.moveaxis(leaf, 0, axis)
            result[name] = moved.reshape(*moved.shape[:axis], -1, *moved.shape[axis + 2 :])
    return result


def balanced_kmeans(x: np.ndarray | Array, num_clusters: int, *, seed: int = 0, steps: int = 100) -> np.ndarray:
    """Returns clusters of exactly equal size (host): k-means in which every step is an optimal assignment.

    Rows are taken at unit length. Start: k-means++ draws. A step assigns the rows to the means so that the sum of
    squared distances is the least that equal sizes allow; it ends when nothing moves.

    Args:
        x: float [F, d], such as the keys of neurons, `up.T`.
        num_clusters: E, divides F.
        seed: of the start.
        steps: at most.

    Returns:
        int64 [F] in 0 .. E - 1, each F / E times.

    Raises:
        ValueError: a shape does not fit or `num_clusters` does not divide F.

    Example:
        >>> x = np.array([[1.0, 0.0], [0.0, 1.0], [0.9, 0.1], [0.1, 0.9]])
        >>> labels = balanced_kmeans(x, 2)
        >>> bool(labels[0] == labels[2] != labels[1] == labels[3])
        True

    Source:
        arXiv 2310.10908, section 3.1 (constrained clustering of MoEfication, arXiv 2110.01786).
    """
    x = np.asarray(x, np.float64)
    if x.ndim != 2 or num_clusters < 1 or x.shape[0] % num_clusters or not len(x):
        raise ValueError(f"num_clusters={num_clusters} must divide the rows of x, which must be [F, d], got {x.shape}")
    x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    rng = np.random.default_rng(seed)
    centres = [x[rng.integers(len(x))]]
    for _ in range(num_clusters - 1):
        distance = np.min([((x - c) ** 2).sum(1) for c in centres], axis=0)
        total = distance.sum()
        centres.append(x[rng.choice(len(x), p=distance / total if total > 0 else None)])
    centres, labels = np.stack(centres), None
    for _ in range(max(1, steps)):
        cost = (x * x).sum(1)[:, None] - 2 * x @ centres.T + (centres * centres).sum(1)[None]
        new = _equal_assignment(cost)
        if labels is not None and np.array_equal(new, labels):
            break
        labels = new
        centres = np.stack([x[labels == e].mean(0) for e in range(num_clusters)])
    return labels


# The axis that counts the neurons in a dense network's parameters.
_NEURON_AXIS = {"up": 1, "gate": 1, "down": 0, "up_bias": 0, "gate_bias": 0, "down_bias": None}


def _expert(activation, params, x):
    product = functools.partial(jnp.matmul, preferred_element_type=compute_dtype(x))

    def affine(x, w, b):
        y = product(x, params[w].astype(x.dtype))
        return y + params[b].astype(y.dtype)[None] if b in params else y

    hidden = affine(x, "up", "up_bias")
    hidden = activation(affine(x, "gate", "gate_bias")) * hidden if "gate" in params else activation(hidden)
    return affine(hidden.astype(x.dtype), "down", "down_bias").astype(x.dtype)


def _equal_assignment(cost: np.ndarray) -> np.ndarray:
    """Returns the labels of least total cost with equally many rows in each column: row after row, the cheapest chain.

    A row may push another row out of a full column, that one a third, until a column with room is reached.
    """
    rows, columns = cost.shape
    room = np.full(columns, rows // columns)
    labels = np.full(rows, -1)
    for i in range(rows):
        # step[a, b]: the least that moving one row of a to b costs, and which row that is.
        step, mover = np.full((columns, columns), np.inf), np.zeros((columns, columns), int)
        for a in np.flatnonzero(np.bincount(labels[:i], minlength=columns) if i else []):
            members = np.flatnonzero(labels == a)
            change = cost[members] - cost[members, a][:, None]
            step[a], mover[a] = change.min(0), members[change.argmin(0)]
        best, source = cost[i].copy(), np.full(columns, -1)
        for _ in range(columns):
            through = best[:, None] + step
            shorter = through.min(0) < best - 1e-12
            if not shorter.any():
                break
            source[shorter], best[shorter] = through.argmin(0)[shorter], through.min(0)[shorter]
        free = np.where(room > 0, best, np.inf)
        b = int(free.argmin())
        room[b] -= 1
        while source[b] >= 0:
            a = source[b]
            labels[mover[a, b]] = b
            b = a
        labels[i] = b
    return labels
