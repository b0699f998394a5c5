"""What comes from a file is data, never code, and stays in its directory."""

import re
from pathlib import Path

import jaxlab

SOURCES = sorted(Path(jaxlab.__file__).parent.rglob("*.py"))


def test_nothing_is_unpickled_or_evaluated():
    unsafe = r"(pickle|cPickle|dill|marshal|shelve)\b"
    bad = re.compile(
        rf"\b(import|from)\s+{unsafe}|\bpickle\.|allow_pickle\s*=\s*True|(?<![.\w])(eval|exec)\(|yaml\.load\("
    )
    found = [
        f"{path.name}:{number}: {line.strip()}"
        for path in SOURCES
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if bad.search(line)
    ]
    assert not found, "\n".join(found)


def test_arrays_are_loaded_without_objects():
    loads = [line for path in SOURCES for line in path.read_text().splitlines() if "np.load(" in line]
    assert loads and all("allow_pickle=False" in line for line in loads), loads
