"""Several processes as one run: who they are, how they start, and what they have to agree upon before anyone acts."""

from __future__ import annotations

import os
from collections.abc import Mapping

import jax
import numpy as np

from jaxlab._compat import multihost
from jaxlab.engine.errors import InputError

# A scheduler that JAX's own `initialize()` understands, and the variable that says how many processes it started.
SCHEDULERS = {"SLURM_JOB_ID": "SLURM_NTASKS", "OMPI_MCA_orte_hnp_uri": "OMPI_COMM_WORLD_SIZE"}


def arguments(environment: Mapping[str, str]) -> dict[str, object] | None:
    """Returns what `jax.distributed.initialize` needs, None for a run of one process.

    Plain variables come first: `JAXLAB_COORDINATOR=host:port`, `JAXLAB_PROCESSES`, `JAXLAB_PROCESS`. GKE's JobSet sets
    `JOBSET_NAME` and `JOB_COMPLETION_INDEX`, a Cloud TPU slice `TPU_WORKER_HOSTNAMES`, Slurm and Open MPI their own:
    those JAX reads by itself.

    Raises:
        InputError: only some of the plain variables are set, or they make no sense.
    """
    names = ("JAXLAB_COORDINATOR", "JAXLAB_PROCESSES", "JAXLAB_PROCESS")
    given = [name for name in names if environment.get(name)]
    if given and len(given) < len(names):
        raise InputError(f"{', '.join(given)} is set without {', '.join(n for n in names if n not in given)}")
    if given:
        try:
            count, index = int(environment[names[1]]), int(environment[names[2]])
        except ValueError:
            raise InputError(f"{names[1]} and {names[2]} must be whole numbers") from None
        if not 0 <= index < count:
            raise InputError(f"{names[2]}={index} must be between 0 and {names[1]}={count} less one")
        if count == 1:
            return None
        return {"coordinator_address": environment[names[0]], "num_processes": count, "process_id": index}
    for job, size in SCHEDULERS.items():
        if job in environment and int(environment.get(size, "1")) > 1:
            return {}
    if "," in environment.get("TPU_WORKER_HOSTNAMES", "") or environment.get("JOBSET_NAME"):
        return {}
    return None


def start(environment: Mapping[str, str] = os.environ) -> None:
    """Joins the other processes, if the environment says that there are any; to be called before any device is used."""
    given = arguments(environment)
    if given is not None and not jax.distributed.is_initialized():
        jax.distributed.initialize(**given)  # pyright: ignore[reportArgumentType]


def index() -> int:
    """Returns the number of this process."""
    return jax.process_index()


def count() -> int:
    """Returns the number of processes."""
    return jax.process_count()


def agree(mine: bool) -> bool:
    """Returns whether all processes say True; all of them have to call it."""
    if count() == 1:
        return mine
    return bool(np.all(multihost().process_allgather(np.array([mine]))))


def any_of(mine: bool) -> bool:
    """Returns whether one process at least says True; all of them have to call it."""
    return not agree(not mine)


def barrier(name: str) -> None:
    """Waits until all processes are here."""
    if count() > 1:
        multihost().sync_global_devices(name)
