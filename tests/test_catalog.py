"""The catalogue: the table is whole and honest, and everything read from it is right."""

import importlib
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from jaxlab import catalog

PACKAGE = Path(catalog.__file__).parent
ROWS = tomllib.loads((PACKAGE / "papers.toml").read_text(encoding="utf-8"))["paper"]
METHOD = '''"""The card of a made-up method.

Two lines of idea.
"""

def loss(x):
    """Returns x."""
    return x + 1  # why
'''
CLAIM = '''"""The claim."""

def claim():
    """Runs."""
    return 1
'''


def groco():
    return catalog.find("groco")


def toml_of(**changes):
    """One row, groco, with fields changed."""
    row = next(dict(r) for r in ROWS if r["key"] == "groco") | changes
    api, _ = row.pop("api"), row.pop("claim", None)
    lines = [f"{name} = {json.dumps(value)}" for name, value in row.items()]
    return "\n".join(
        ["[[paper]]", *lines, "[paper.api]", *(f"{json.dumps(n)} = {json.dumps(v)}" for n, v in api.items())]
    )


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A small package: one working paper with a fresh claim."""
    package = tmp_path / "jaxlab"
    (package / "contrastive").mkdir(parents=True)
    (package / "claims" / "contrastive").mkdir(parents=True)
    api = {"groco_loss": "groco_loss", "odd_even_sort": "ops.odd_even_sort", "groco_multiview_loss": "folded into it"}
    (package / "papers.toml").write_text(toml_of(public=["groco_loss"], api=api))
    (package / "contrastive" / "__init__.py").write_text(
        '"""Pairs.\n\nUse this."""\n__all__ = ["groco_loss", "other"]\n'
    )
    (package / "contrastive" / "groco.py").write_text(METHOD)
    (package / "claims" / "contrastive" / "groco.py").write_text(CLAIM)
    (tmp_path / "README.md").write_text(f"above\n{catalog.BEGIN}\nold\n{catalog.END}\nbelow\n")
    monkeypatch.setattr(catalog, "_root", lambda: package)
    record = {"verdict": "effect seen", "evidence": "proxy", "hash": catalog.claim_hash(groco())}
    (package / "claims" / "contrastive" / "groco.json").write_text(json.dumps(record))
    return package


def test_there_are_218_rows_numbered_from_zero():
    assert [row["id"] for row in ROWS] == list(range(218))
    assert [paper.id for paper in catalog.papers()] == list(range(218))


@pytest.mark.parametrize("name", ["key", "arxiv", "title"])
def test_no_two_rows_share(name):
    values = [row[name] for row in ROWS]
    assert len(set(values)) == len(values)


def test_families_are_those_of_the_design():
    assert len(catalog.FAMILIES) == len(set(catalog.FAMILIES)) == 22
    assert {row["family"] for row in ROWS} == set(catalog.FAMILIES)


def test_fields_are_well_formed():
    for row in ROWS:
        assert re.fullmatch(r"[a-z][a-z0-9_]*", row["key"]), row["key"]
        assert re.fullmatch(r"\d{2}(0[1-9]|1[0-2])\.\d{4,5}", row["arxiv"]), row["key"]
        # A paper sent in on the last days of December gets an id of January.
        assert row["year"] in (2000 + int(row["arxiv"][:2]), 1999 + int(row["arxiv"][:2])), row["key"]
        assert row["title"] == " ".join(row["title"].split()) != "", row["key"]
        assert row["short"] and row["kind"], row["key"]
        assert row["code"] == "" or re.fullmatch(r"[\w-]+/[\w.-]+", row["code"]), row["key"]
        assert all(name == name.strip() != "" for name in row["authors"]), row["key"]
        assert not re.search(r"\?|memory|checked|verified|unknown", row["venue"]), row["key"]


def test_each_row_lists_the_functions_of_its_card():
    for row in ROWS:
        assert row["api"], row["key"]
        for name, value in row["api"].items():
            # A star stands for the functions of one prefix that the card does not spell out.
            assert re.fullmatch(r"[A-Za-z]\w*\*?", name), (row["key"], name)
            assert value == value.strip(), (row["key"], name)


def test_the_unverified_id_is_flagged():
    assert [row["key"] for row in ROWS if not row["arxiv_verified"]] == ["deep_learning_review"]
    assert "1905.13294 (not verified)" in catalog.card(catalog.find("33"))


def test_public_names_are_exported():
    """The table tells the truth, seen by importing; `works` itself reads text only."""
    for paper in catalog.papers():
        assert set(paper.public) <= set(catalog.public_names(paper))
        assert len(set(paper.public)) == len(paper.public), paper.key
        if catalog.public_names(paper):
            family = importlib.import_module(f"jaxlab.{paper.family}")
            absent = [name for name in catalog.public_names(paper) if name not in family.__all__]
            assert not absent, f"{paper.key}: {absent} not in jaxlab.{paper.family}.__all__"
            assert all(callable(getattr(family, name)) for name in catalog.public_names(paper)), paper.key


def test_exports_read_as_text_are_those_of_the_module():
    for file in PACKAGE.glob("*/__init__.py"):
        if file.parent.name in catalog.FAMILIES:
            module = importlib.import_module(f"jaxlab.{file.parent.name}")
            assert list(catalog._exports(file.parent.name)) == list(module.__all__) != []


@pytest.mark.parametrize(
    "text",
    [
        *(
            "groco",
            "GroCo",
            " groco ",
            "98",
            "098",
            "2301.02009",
            "arXiv:2301.02009v2",
            "https://arxiv.org/abs/2301.02009",
        ),
        *("Learning by Sorting", "sorting group ORDERING", "https://arxiv.org/pdf/2301.02009.pdf"),
        "Learning by Sorting: Self-supervised Learning with Group Ordering Constraints",
    ],
)
def test_find(text):
    assert catalog.find(text).key == "groco"


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("0", "gl_dmnet"),
        ("217", "transitive_invariance"),
        ("TELL", "tell"),
        ("power-norm", "power_norm"),
        ("muP", "abc_parametrization"),
        ("PowerNorm", "power_norm"),
        ("matryoshka representation", "matryoshka_representation"),
    ],
)
def test_find_by_other_names(text, key):
    assert catalog.find(text).key == key


def test_every_paper_answers_to_its_key_number_id_and_title():
    for paper in catalog.papers():
        for text in (paper.key, f"{paper.id:03d}", paper.arxiv, paper.title.upper(), paper.key.replace("_", " ")):
            assert catalog.find(text) is paper, text


@pytest.mark.parametrize(
    ("text", "listed"),
    [
        ("CCL", ["cyclical_curriculum", "counter_current"]),
        ("matryoshka", ["matryoshka_attack", "matryoshka_representation"]),
    ],
)
def test_ambiguous_words_list_the_candidates(text, listed):
    with pytest.raises(catalog.AmbiguousPaper, match="2 papers") as error:
        catalog.find(text)
    assert all(key in str(error.value) for key in listed)


def test_a_long_list_of_candidates_is_cut():
    with pytest.raises(catalog.AmbiguousPaper, match=r"and \d+ more$"):
        catalog.find("learning")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("grocoo", "did you mean 'groco'"),
        ("2301.02008", "did you mean '2301.02009'"),
        ("218", "from 0 to 217"),
        ("zzzzqqqq", "no paper answers to 'zzzzqqqq'"),
        ("  ", "which paper"),
        ("???", "no paper answers"),
    ],
)
def test_unknown_papers(text, message):
    with pytest.raises(LookupError, match=re.escape(message)):
        catalog.find(text)


def test_find_by_a_public_function(tree):
    assert catalog.find("groco_loss").key == "groco"


def test_bibtex_of_every_paper():
    for paper in catalog.papers():
        entry = catalog.bibtex(paper)
        plain = re.sub(r"\\[{}]", "", entry)
        depth = 0
        for char in plain:
            depth += {"{": 1, "}": -1}.get(char, 0)
            assert depth >= 0, entry
        assert depth == 0, entry
        assert entry.startswith(f"@misc{{{paper.key}{paper.year},\n"), entry
        assert ("author = " in entry) == bool(paper.authors), entry
        assert ("note = " in entry) == bool(paper.venue), entry
        assert ("eprint = " in entry) == ("archivePrefix = " in entry) == paper.arxiv_verified, entry
        assert not re.search(r"= \{\s*\}|None", entry), entry
        assert not re.search(r"(?<!\\)[&%$#]", entry), entry


def test_bibtex_by_example():
    assert catalog.bibtex(groco()) == (
        "@misc{groco2023,\n"
        "  title = {{Learning by Sorting: Self-supervised Learning with Group Ordering Constraints}},\n"
        "  year = {2023},\n"
        "  eprint = {2301.02009},\n"
        "  archivePrefix = {arXiv},\n"
        "  note = {ICCV 2023},\n"
        "}"
    )
    assert "author = {Kang Yi and Haoran Tang and Yumeng Li" in catalog.bibtex(catalog.find("gl_dmnet"))


def test_json_rows():
    rows = catalog.json_rows()
    assert json.loads(json.dumps(rows)) == rows
    assert len(rows) == 218
    for row in rows:
        assert list(row) == ["id", "key", "family", "title", "arxiv", "works", "public", "claim"]
        assert row["claim"] is None or list(row["claim"]) == ["verdict", "evidence", "stale"]
        assert isinstance(row["works"], bool)


def test_json_rows_of_a_family_and_of_what_is_missing(tree):
    assert [row["key"] for row in catalog.json_rows(family="contrastive")] == ["groco"]
    assert catalog.json_rows(family="moe") == []
    assert catalog.json_rows(missing=True) == []
    (tree / "claims" / "contrastive" / "groco.json").unlink()
    assert [row["key"] for row in catalog.json_rows(missing=True)] == ["groco"]
    with pytest.raises(LookupError, match="did you mean 'contrastive'"):
        catalog.json_rows(family="contrastiv")


def test_a_paper_works_only_when_all_of_it_is_there(tree):
    assert catalog.works(groco())
    init = tree / "contrastive" / "__init__.py"
    kept = init.read_text()
    init.write_text('__all__ = ["other"]\n')
    assert not catalog.works(groco())
    init.write_text(kept)
    table, row = tree / "papers.toml", groco()
    for changes in (
        {"api": {**row.api, "weighted_knn": ""}},
        {"api": {}},
        {"api": {**row.api, "weighted_knn": "not_exported"}},
        {"public": []},
    ):
        table.write_text(toml_of(**({"public": ["groco_loss"], "api": dict(row.api)} | changes)))
        assert not catalog.works(groco()), changes
    table.write_text(toml_of(public=["groco_loss"], api=dict(row.api)))
    assert catalog.works(groco())
    (tree / "claims" / "contrastive" / "groco.json").unlink()
    assert not catalog.works(groco())


def test_claim_hash_sees_code_and_nothing_else(tree):
    method, claim = tree / "contrastive" / "groco.py", tree / "claims" / "contrastive" / "groco.py"
    first, first_bytes = catalog.claim_hash(groco()), catalog.source_hash(groco())
    assert re.fullmatch(r"[0-9a-f]{64}", first)
    method.write_text('"""Another card."""\n\n\ndef loss(x):\n    """Says more."""\n    # and why\n    return x + 1\n')
    claim.write_text("def claim():\n    return 1  # seconds\n")
    assert catalog.claim_hash(groco()) == first
    assert catalog.source_hash(groco()) != first_bytes
    method.write_text(METHOD.replace("x + 1", "x + 2"))
    assert catalog.claim_hash(groco()) != first
    method.write_text(METHOD)
    claim.write_text(CLAIM.replace("return 1", "return 2"))
    assert catalog.claim_hash(groco()) != first
    claim.write_text(CLAIM)
    assert catalog.claim_hash(groco()) == first


def test_claim_hash_keeps_a_definition_that_is_only_a_docstring(tree):
    method = tree / "contrastive" / "groco.py"
    method.write_text('class Bad(ValueError):\n    """Bad."""\n')
    first = catalog.claim_hash(groco())
    method.write_text('class Bad(ValueError):\n    """Worse."""\n')
    assert catalog.claim_hash(groco()) == first
    method.write_text('class Worse(ValueError):\n    """Bad."""\n')
    assert catalog.claim_hash(groco()) != first


def test_claim_of(tree):
    fresh = {"verdict": "effect seen", "evidence": "proxy", "stale": False}
    method, record = tree / "contrastive" / "groco.py", tree / "claims" / "contrastive" / "groco.json"
    assert catalog.claim_of(groco()) == fresh
    method.write_text(METHOD.replace("x + 1", "x + 2"))
    assert catalog.claim_of(groco()) == {**fresh, "stale": True}
    # Equal bytes are enough, even if another Python wrote the code differently before hashing it.
    record.write_text(json.dumps({**fresh, "hash": "of another Python", "source_hash": catalog.source_hash(groco())}))
    assert catalog.claim_of(groco()) == fresh
    method.unlink()
    assert catalog.claim_of(groco()) == {**fresh, "stale": True}
    record.write_text('{"verdict": "effect seen"}')
    with pytest.raises(ValueError, match=r"claims/contrastive/groco\.json"):
        catalog.claim_of(groco())
    record.write_text("{")
    with pytest.raises(ValueError, match=r"claims/contrastive/groco\.json"):
        catalog.claim_of(groco())
    record.unlink()
    assert catalog.claim_of(groco()) is None


def test_card(tree):
    text = catalog.card(groco())
    assert text.startswith("098 groco: Learning by Sorting: ")
    for piece in ("2301.02009\n", "jaxlab.contrastive", "works", "effect seen (proxy)", "3 of 3", "Two lines of idea."):
        assert piece in text
    assert re.search(r"odd_even_sort +ops\.odd_even_sort", text)
    assert "not verified" not in text
    (tree / "contrastive" / "groco.py").unlink()
    (tree / "contrastive" / "__init__.py").write_text("__all__ = []\n")
    text = catalog.card(groco())
    assert text.endswith("not implemented yet")
    assert "not exported: groco_loss" in text
    assert "effect seen (proxy, stale)" in text


def test_every_card_can_be_printed():
    for paper in catalog.papers():
        text = catalog.card(paper)
        assert paper.title in text.split("\n", 1)[0]
        assert all(name in text for name in paper.api)


def test_table(tree):
    text = catalog.table(catalog.json_rows())
    header, row, *rest = text.split("\n")
    assert header.split() == ["id", "key", "family", "status", "claim", "title"]
    assert row.split()[:4] == ["098", "groco", "contrastive", "works"]
    assert "effect seen (proxy)" in row
    assert row.endswith("…")
    assert len(row) <= 120
    assert "1 papers, 1 work, 0 do not yet" in rest
    assert "claims, proxy: 1 effect seen" in rest
    assert "0 papers" in catalog.table([])


def test_family_table_counts(tree):
    lines = catalog.family_table().split("\n")
    assert len(lines) == 2 + len(catalog.FAMILIES) + 1
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1
    row = next(line for line in lines if "`contrastive`" in line)
    assert row == "| [`contrastive`](jaxlab/contrastive/README.md) | Pairs. | 1 | 1 |  |  | 1 effect seen |  |"
    assert lines[-1] == "| **all** |  | 1 | 1 |  |  | 1 effect seen |  |"
    (tree / "contrastive" / "groco.py").write_text("x = 1\n")
    assert "| 1 effect seen (stale) |" in catalog.family_table()


def test_family_readme(tree):
    text = catalog.family_readme("contrastive")
    assert "# `jaxlab.contrastive`\n\nPairs.\n\nUse this.\n" in text
    assert "| [`groco`](groco.py) |" in text
    assert "[arXiv 2301.02009](https://arxiv.org/abs/2301.02009)) | `groco_loss` | effect seen (proxy) |" in text


def test_write_then_check(tree, capsys):
    assert catalog.main(["--check"]) == 1
    assert not (tree / "contrastive" / "README.md").exists()
    assert catalog.main(["--write"]) == 0
    assert (tree / "contrastive" / "README.md").read_text() == catalog.family_readme("contrastive")
    readme = (tree.parent / "README.md").read_text()
    assert readme == f"above\n{catalog.BEGIN}\n{catalog.family_table()}\n{catalog.END}\nbelow\n"
    assert sorted(file.name for file in tree.rglob("README.md")) == ["README.md"]
    capsys.readouterr()
    assert catalog.main(["--write"]) == 0
    assert catalog.main(["--check"]) == 0
    assert capsys.readouterr().out == ""
    (tree / "contrastive" / "__init__.py").write_text('"""New words."""\n__all__ = ["groco_loss"]\n')
    assert catalog.main(["--check"]) == 1
    assert {line.split()[-1] for line in capsys.readouterr().out.splitlines()} == {
        "README.md",
        str(Path("jaxlab", "contrastive", "README.md")),
    }


def test_the_bench_table_is_that_of_the_newest_runs(tree):
    assert catalog.bench_table() == "Nothing is recorded yet."
    row = {
        "case": "scan",
        "params": {"L": 8, "pass": "fwd"},
        "ratio": 0.5,
        "peer": "lax.scan",
        "ceiling_fraction": None,
    }
    row |= {"temp_bytes": 2**20, "peer_temp_bytes": 2**21}
    run = {"rounds": 9, "machine": "two cores", "versions": {"jax": "0"}, "date": "2026-01-01T", "matmul_gflops": 4.0}
    (tree / "bench" / "results").mkdir(parents=True)
    runs = [{**run, "rows": [{**row, "ratio": 0.9}]}, {**run, "rows": [row]}]
    (tree / "bench" / "results" / "scan.json").write_text(json.dumps(runs))
    assert "| `scan` | L 8 | fwd | 0.50 | lax.scan |  | 1.0, 2.0 |" in catalog.bench_table()
    (tree.parent / "README.md").write_text(f"a\n{catalog.BENCH_BEGIN}\nold\n{catalog.BENCH_END}\nb\n")
    assert catalog.main(["--write"]) == 0
    text = (tree.parent / "README.md").read_text()
    assert text == f"a\n{catalog.BENCH_BEGIN}\n{catalog.bench_table()}\n{catalog.BENCH_END}\nb\n"


def test_a_readme_without_the_markers_is_left_alone(tree):
    (tree.parent / "README.md").write_text(f"nothing {catalog.BEGIN} to fill\n")
    assert catalog.main(["--write"]) == 0
    assert (tree.parent / "README.md").read_text() == f"nothing {catalog.BEGIN} to fill\n"


def test_the_generated_files_are_up_to_date(capsys):
    assert catalog.main(["--check"]) == 0, capsys.readouterr().out


def test_reading_the_catalogue_imports_no_jax():
    code = (
        "import sys; from jaxlab import catalog; catalog.json_rows(); catalog.card(catalog.find('groco')); "
        "print([m for m in ('jax', 'numpy', 'optax', 'flax') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
