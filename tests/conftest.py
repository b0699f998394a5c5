"""Eight host devices, fast compilation and the strictest JAX, set before JAX is first imported."""

import os
import sys
from pathlib import Path

OPTIMISED = os.environ.get("JAXLAB_TEST_OPTIMISED") == "1"
flags = ["--xla_force_host_platform_device_count=8"]
if not OPTIMISED:
    flags.append("--xla_backend_optimization_level=0")
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *flags]).strip()
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path.home() / ".cache" / "jaxlab" / "xla-tests"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
os.environ.setdefault("MPLBACKEND", "Agg")

import jax  # noqa: E402 - the environment above has to be set first
import pytest  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent))


def pytest_configure(config):
    """Makes silent rank promotion an error in every test."""
    jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_collection_modifyitems(config, items):
    """Leaves the tests of compiled programs to the subprocess that runs at the default optimisation level."""
    wanted = [item for item in items if (item.get_closest_marker("optimised") is not None) == OPTIMISED]
    if len(wanted) != len(items):
        config.hook.pytest_deselected(items=[item for item in items if item not in wanted])
        items[:] = wanted


@pytest.fixture
def mesh8():
    """A mesh of eight devices called `data`, with Auto axes."""
    return jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
