"""Eight host devices, fast compilation and the strictest JAX, set before JAX is first imported."""

import collections
import os
import sys
import time
from importlib.metadata import version
from pathlib import Path

OPTIMISED = os.environ.get("JAXLAB_TEST_OPTIMISED") == "1"
AOT = os.environ.get("JAXLAB_TEST_AOT") == "1"
flags = ["--xla_force_host_platform_device_count=8"]
if not OPTIMISED:
    flags.append("--xla_backend_optimization_level=0")
    if version("jaxlib").startswith("0.10."):  # newer releases abort at this flag; it saves two thirds of compiling
        flags.append("--xla_cpu_use_fusion_emitters=false")
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
    """Leaves tests of compiled programs to the subprocess at the default level, and those for other devices to CI."""

    def marked(item, name):
        return item.get_closest_marker(name) is not None

    wanted = [i for i in items if marked(i, "aot") == AOT and (AOT or marked(i, "optimised") == OPTIMISED)]
    if len(wanted) != len(items):
        config.hook.pytest_deselected(items=[item for item in items if item not in wanted])
        items[:] = wanted


# On a machine that does nothing else, no method may cost more; elsewhere a clock proves nothing, so CI alone sets this.
METHOD_SECONDS = float(os.environ.get("JAXLAB_METHOD_SECONDS", "inf"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Notes the processor time of each test, which other work on the machine hardly changes."""
    began = time.process_time()
    try:
        return (yield)
    finally:
        item.user_properties.append(("cpu_seconds", time.process_time() - began))


def method_of(nodeid: str) -> str | None:
    """Returns `family/key` of the paper that a test belongs to; tests over all papers name it in brackets."""
    from jaxlab import catalog

    keys = {paper.key: f"{paper.family}/{paper.key}" for paper in catalog.papers()}
    path, _, test = nodeid.partition("::")
    shared = path.endswith(("test_claims.py", "test_docs.py"))
    key = test.partition("[")[2].rstrip("]").rpartition("/")[2] if shared else Path(path).stem[len("test_") :]
    return keys.get(key)


def costs(reports) -> dict[str, float]:
    """Returns the seconds of each method, dearest first."""
    seconds = collections.Counter()
    for report in reports:
        method = method_of(report.nodeid)
        if method is not None and report.when == "call":
            seconds[method] += dict(report.user_properties).get("cpu_seconds", 0.0)
    return dict(seconds.most_common())


def pytest_terminal_summary(terminalreporter):
    """Lists the dearest methods and the invariants that cases switched off."""
    reports = [r for kind in ("passed", "failed") for r in terminalreporter.stats.get(kind, [])]
    dearest = list(costs(reports).items())[:5]
    if dearest:
        listing = ", ".join(f"{method} {seconds:.1f} s" for method, seconds in dearest)
        terminalreporter.write_line(f"dearest methods: {listing}")
    off = sorted({value for r in reports for name, value in r.user_properties if name == "skipped_invariant"})
    for text in off:
        terminalreporter.write_line(f"switched off: {text}")


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session):
    """Fails the run when one method costs more than 218 of them could."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or hasattr(session.config, "workerinput"):
        return
    reports = [r for kind in ("passed", "failed") for r in reporter.stats.get(kind, [])]
    over = [f"{m} ({s:.1f} s)" for m, s in costs(reports).items() if s > METHOD_SECONDS]
    if over:
        reporter.write_line(f"above {METHOD_SECONDS:.0f} s of processor time: {', '.join(over)}")
        session.exitstatus = session.exitstatus or pytest.ExitCode.TESTS_FAILED


@pytest.fixture
def mesh8():
    """A mesh of eight devices called `data`, with Auto axes."""
    return jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
