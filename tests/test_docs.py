"""Every public name is documented, and every example in a docstring runs."""

import doctest
import importlib
import importlib.util
import inspect
from pathlib import Path

import conformance
import jax
import pytest

import jaxlab

FAMILIES = tuple(name for name in jaxlab.__all__ if name != "types")


def public():
    for family in FAMILIES:
        package = importlib.import_module(f"jaxlab.{family}")
        for name in package.__all__:
            yield f"{family}.{name}", getattr(package, name)


NAMES = dict(public())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_function_with_its_files_name_is_the_function(family):
    package = importlib.import_module(f"jaxlab.{family}")
    assert package.__all__ == sorted(package.__all__)
    for name in package.__all__:
        assert not inspect.ismodule(getattr(package, name)), f"{family}.{name} is the module"


def test_every_public_name_is_documented():
    for name, thing in NAMES.items():
        text = inspect.getdoc(thing) or ""
        assert len(text.split("\n")[0]) > 15, f"{name} has no docstring"
        if inspect.isfunction(thing) and len(inspect.signature(thing).parameters) > 2:
            assert "Args:" in text or "Example:" in text, f"{name} does not explain its arguments"


PACKAGE = Path(jaxlab.__file__).parent
EXAMPLES = [
    path.relative_to(PACKAGE).with_suffix("").as_posix()
    for family in [*FAMILIES, "types"]
    for path in sorted([PACKAGE / f"{family}.py", *(PACKAGE / family).rglob("*.py")])
    if path.exists() and ">>>" in path.read_text()
]


@pytest.mark.parametrize("module", EXAMPLES)
def test_examples_run(module):
    module = importlib.import_module("jaxlab." + module.replace("/", ".").removesuffix(".__init__"))
    runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.NORMALIZE_WHITESPACE)
    with jax.numpy_rank_promotion("allow"):
        for test in doctest.DocTestFinder().find(module, globs={**vars(module), "jax": jax, "jnp": jax.numpy}):
            runner.run(test)
    assert runner.summarize(verbose=False).failed == 0


def test_every_public_name_has_a_conformance_case():
    """A name whose row or file is new cannot slip past the suite: its case must be declared in some test file."""
    for number, path in enumerate(sorted(Path(__file__).parent.rglob("test_*.py"))):
        if "conformance_tests(" in path.read_text() and path.name != Path(__file__).name:
            spec = importlib.util.spec_from_file_location(f"declared_cases_{number}", path)
            spec.loader.exec_module(importlib.util.module_from_spec(spec))
    functions = {id(case.function) for case in conformance.REGISTERED}
    covered = {name for case in conformance.REGISTERED for name in case.covers}
    assert covered <= set(NAMES), f"cases cover what is not public: {sorted(covered - set(NAMES))}"
    missing = [name for name, thing in NAMES.items() if not (inspect.isclass(thing) or id(thing) in functions)]
    missing = sorted(set(missing) - covered)
    assert not missing, f"no conformance case: {', '.join(missing)}"


def test_every_public_function_is_annotated():
    """What editors show: every parameter has a type, and so has the result."""
    bare = []
    for name, thing in NAMES.items():
        if inspect.isfunction(thing):
            signature = inspect.signature(thing)
            named = [p for p in signature.parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
            names = [p.name for p in named if p.annotation is p.empty]
            names += ["its result"] if signature.return_annotation is signature.empty else []
            bare += [f"{name}: {', '.join(names)}"] if names else []
    assert not bare, f"without a type: {'; '.join(bare)}"
