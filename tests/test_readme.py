"""Every Python block of the README runs; the package is light to import and changes nothing."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)


@pytest.mark.parametrize("block", BLOCKS, ids=[f"block{i}" for i in range(len(BLOCKS))])
def test_block(block):
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})


def test_the_readme_has_its_parts():
    text = (ROOT / "README.md").read_text()
    assert len(BLOCKS) >= 3
    for picture in re.findall(r"!\[[^]]*\]\(([^)]+)\)", text):
        assert (ROOT / picture).exists(), picture


def test_importing_is_instant_and_initialises_nothing():
    code = (
        "import sys, time; t = time.time(); import jaxlab; assert 'jax' not in sys.modules; "
        "assert 'moe' in dir(jaxlab); assert time.time() - t < 0.5; "
        "import os, logging; before = dict(os.environ); from jaxlab import moe, mutual; "
        "import jax; from jax._src import xla_bridge; assert not xla_bridge._backends; "
        "assert before == dict(os.environ)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_private_and_experimental_jax_stays_in_compat():
    bad = re.compile(r"jax\._src|jax\.experimental|from jax import experimental|jax\.__version__")
    for path in (ROOT / "jaxlab").rglob("*.py"):
        if path.name != "_compat.py":
            assert not bad.search(path.read_text()), path


def test_nothing_is_unpickled():
    for path in (ROOT / "jaxlab").rglob("*.py"):
        assert not re.search(r"import pickle|allow_pickle=True|(?<!\.)\beval\(|(?<!\.)\bexec\(", path.read_text()), path


def test_optimised_tests_pass_at_the_default_level():
    """Runs the tests marked `optimised` in one process of their own, at XLA's default optimisation level."""
    import os

    environment = {**os.environ, "JAXLAB_TEST_OPTIMISED": "1"}
    environment["XLA_FLAGS"] = re.sub(r"--xla\S*", "", environment.get("XLA_FLAGS", ""))
    environment.pop("PYTEST_XDIST_WORKER", None)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-n", "0", "-m", "optimised", "-p", "no:cacheprovider", str(ROOT / "tests")],
        env=environment, cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode in (0, 5), done.stdout[-4000:]
