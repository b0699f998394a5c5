"""The catalogue of the 218 papers: reads `papers.toml`, the claim records and the families' `__all__`, all as text.

Nothing here imports a method or JAX, so that `jaxlab papers` answers at once and works while a method is broken; the
test suite verifies by importing that the table tells the truth. A row of the table:

- `id`, `key`, `title`, `short` (the name people use), `year` (of the first version), `arxiv`, `arxiv_verified`,
  `family`, `kind`;
- `venue`, `authors`, `code`: empty where nobody has looked them up, never guessed;
- `public`: the names that `jaxlab.<family>` exports for this paper;
- `api`: for every function of the paper's card `""` (missing), a public name of the family, or the place or reason that
  stands in for it (`"ops.odd_even_sort"`, `"folded into groco_loss"`). A single bare word is always a public name;
- `claim`: what the claim states beforehand (`kind`, `evidence`, ...), absent until the method is written.

`python -m jaxlab.catalog --write` writes the families' README files and the table in the main README; `--check` exits
with 1 if that would change anything.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import functools
import hashlib
import json
import re
import sys
import textwrap
import tomllib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from types import MappingProxyType
from typing import Any

__all__ = [
    "FAMILIES",
    "AmbiguousPaper",
    "Paper",
    "UnknownPaper",
    "bench_table",
    "bibtex",
    "card",
    "claim_hash",
    "claim_of",
    "family_readme",
    "family_table",
    "find",
    "json_rows",
    "papers",
    "public_names",
    "source_hash",
    "table",
    "works",
]

FAMILIES = (
    "moe",
    "mutual",
    "distill",
    "contrastive",
    "information",
    "mil",
    "norm",
    "search",
    "continual",
    "curation",
    "peft",
    "icl",
    "align",
    "rl",
    "generative",
    "robust",
    "private",
    "graph",
    "vision",
    "geometry",
    "sequence",
    "theory",
)
EVIDENCE = ("paper", "scaled", "proxy", "mechanics")
BEGIN, END = "<!-- families:begin -->", "<!-- families:end -->"
BENCH_BEGIN, BENCH_END = "<!-- bench:begin -->", "<!-- bench:end -->"


class UnknownPaper(LookupError):
    """No paper or family answers to these words."""


class AmbiguousPaper(LookupError):
    """Several papers answer to these words."""


@dataclass(frozen=True)
class Paper:
    """One row of `papers.toml`."""

    id: int
    key: str
    title: str
    short: str
    year: int
    arxiv: str
    arxiv_verified: bool
    family: str
    venue: str
    authors: tuple[str, ...]
    code: str
    kind: str
    public: tuple[str, ...]
    api: Mapping[str, str] = field(hash=False)
    claim: Mapping[str, Any] | None = field(default=None, hash=False)


def papers() -> tuple[Paper, ...]:
    """Returns all papers, sorted by id."""
    return _parse(_root().joinpath("papers.toml").read_text(encoding="utf-8"))


def find(text: str) -> Paper:
    """Returns the one paper that the text names.

    Args:
        text: A key, a number (`98`, `098`), an arXiv id or address, the paper's short name, its title, one of its
            public functions, or words that its title holds and no other's; upper and lower case are the same.

    Returns:
        The paper. The first of these readings that fits decides.

    Raises:
        AmbiguousPaper: Several papers fit; the message lists them.
        UnknownPaper: None fits; the message names the nearest.
    """
    rows = papers()
    words = text.casefold().split()
    arxiv = re.search(r"(?:^|[:/])(\d{4}\.\d{4,5})(?:v\d+)?(?:\.pdf)?$", text.strip(), re.IGNORECASE)
    if not words:
        raise UnknownPaper("which paper? Give a key, a number, an arXiv id or words of the title")
    if re.fullmatch(r"[0-9]{1,3}", text.strip()):
        hits = [p for p in rows if p.id == int(text)]
        if not hits:
            raise UnknownPaper(f"no paper has the number {text.strip()}: they go from {rows[0].id} to {rows[-1].id}")
        return hits[0]
    if arxiv:
        hits = [p for p in rows if p.arxiv == arxiv[1]]
        if not hits:
            raise UnknownPaper(
                f"no paper has the arXiv id {arxiv[1]}{_did_you_mean(arxiv[1], (p.arxiv for p in rows))}"
            )
        return _only(text, hits)
    wanted = _plain(text)
    readings = (
        lambda p: "_".join(re.split(r"[\s_-]+", text.strip().casefold())) == p.key,
        lambda p: wanted and wanted == _plain(p.short),
        lambda p: wanted and wanted == _plain(p.title),
        lambda p: text.strip() in p.public,
        lambda p: wanted in _short_names(p) or set(words) <= _words(p),
        lambda p: all(word in f"{p.title} {p.short} {p.key}".casefold() for word in words),
    )
    for fits in readings:
        hits = [p for p in rows if fits(p)]
        if hits:
            return _only(text, hits)
    names = {name.casefold(): p.key for p in rows for name in (p.title, p.short, p.key)}
    close = difflib.get_close_matches(" ".join(words), names, n=1)
    hint = f" (did you mean {names[close[0]]!r}?)" if close else "; `jaxlab papers` lists them all"
    raise UnknownPaper(f"no paper answers to {text!r}{hint}")


def bibtex(paper: Paper) -> str:
    """Returns a BibTeX entry that leaves out what the table does not hold."""
    fields = {"title": f"{{{_latex(paper.title)}}}"}
    if paper.authors:
        fields["author"] = " and ".join(_latex(name) for name in paper.authors)
    fields["year"] = str(paper.year)
    if paper.arxiv and paper.arxiv_verified:
        fields["eprint"] = paper.arxiv
        fields["archivePrefix"] = "arXiv"
    if paper.venue:
        fields["note"] = _latex(paper.venue)
    lines = [f"  {name} = {{{value}}}," for name, value in fields.items()]
    return "\n".join([f"@misc{{{paper.key}{paper.year},", *lines, "}"])


def public_names(paper: Paper) -> tuple[str, ...]:
    """Returns every name that the row says `jaxlab.<family>` exports: `public`, then those that only `api` names."""
    named = [value for value in paper.api.values() if _is_public(value)]
    return tuple(dict.fromkeys([*paper.public, *named]))


def source_hash(paper: Paper) -> str:
    """Returns the SHA-256 of the bytes of the paper's method and claim files."""
    digest = hashlib.sha256()
    for file in _sources(paper):
        digest.update(file.read_bytes() + b"\0")
    return digest.hexdigest()


def claim_hash(paper: Paper) -> str:
    """Returns the SHA-256 of the code of the paper's method and claim files, without comments and docstrings."""
    digest = hashlib.sha256()
    for file in _sources(paper):
        digest.update(_code_of(file.read_text(encoding="utf-8")).encode() + b"\0")
    return digest.hexdigest()


def claim_of(paper: Paper) -> dict[str, Any] | None:
    """Returns what the paper's recorded claim says, or None if none is recorded.

    A claim is stale when its row or the code it was recorded with has changed or is gone. A record may hold
    `source_hash` beside `hash`: equal bytes settle the matter without parsing, and alike under every Python version.

    Returns:
        A dict of `verdict`, `evidence` and `stale`.

    Raises:
        ValueError: The record is not JSON or lacks a field; the message names the file.
    """
    file = _root().joinpath("claims", paper.family, f"{paper.key}.json")
    if not file.is_file():
        return None
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        verdict, evidence, recorded = record["verdict"], record["evidence"], record["hash"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"claims/{paper.family}/{paper.key}.json is no claim record: {error!r}") from error
    stated = None if paper.claim is None else dict(paper.claim)
    if not all(source.is_file() for source in _sources(paper)) or record.get("spec", stated) != stated:
        stale = True
    else:
        stale = record.get("source_hash") != source_hash(paper) and recorded != claim_hash(paper)
    return {"verdict": verdict, "evidence": evidence, "stale": stale}


def works(paper: Paper) -> bool:
    """Tells whether the paper's `api` is complete, its public names are exported and a claim is recorded."""
    complete = bool(paper.api) and all(paper.api.values()) and bool(paper.public)
    claim = claim_of(paper)
    measured = claim is not None and claim["verdict"] != "invalid"
    return complete and set(public_names(paper)) <= set(_exports(paper.family)) and measured


def json_rows(family: str | None = None, missing: bool = False) -> list[dict[str, Any]]:
    """Returns the catalogue as plain values.

    Args:
        family: Only this family's papers.
        missing: Only papers that do not work yet.

    Raises:
        UnknownPaper: There is no such family.
    """
    if family is not None and family not in FAMILIES:
        raise UnknownPaper(
            f"unknown family {family!r}{_did_you_mean(family, FAMILIES)}; there is {', '.join(FAMILIES)}"
        )
    rows = [
        {
            "id": paper.id,
            "key": paper.key,
            "family": paper.family,
            "title": paper.title,
            "arxiv": paper.arxiv,
            "works": works(paper),
            "public": list(paper.public),
            "claim": claim_of(paper),
        }
        for paper in papers()
        if family in (None, paper.family)
    ]
    return [row for row in rows if not (missing and row["works"])]


def card(paper: Paper) -> str:
    """Returns what `jaxlab show` prints: what the table, the claim record and the module's docstring say."""
    verified = "" if paper.arxiv_verified else " (not verified)"
    missing = sum(not value for value in paper.api.values())
    status = "works" if works(paper) else f"does not work yet: {_why_not(paper, missing)}"
    lines = [f"{paper.id:03d} {paper.key}: {paper.title}", ""]
    facts = {
        "known as": paper.short,
        "year": str(paper.year),
        "arXiv": f"{paper.arxiv}{verified}",
        "family": f"jaxlab.{paper.family}",
        "kind": paper.kind,
        "venue": paper.venue,
        "authors": ", ".join(paper.authors),
        "code": f"https://github.com/{paper.code}" if paper.code else "",
        "status": status,
        "public": ", ".join(paper.public),
        "claim": _claim_text(claim_of(paper)) or "none recorded",
        "states": ", ".join(f"{name} {value}" for name, value in (paper.claim or {}).items()),
    }
    for name, value in facts.items():
        if value:
            lines += textwrap.wrap(f"{name:<10}{value}", width=100, subsequent_indent=" " * 10, break_on_hyphens=False)
    width = max(len(name) for name in paper.api)
    lines += ["", f"Functions on the card ({len(paper.api) - missing} of {len(paper.api)} settled)"]
    lines += [f"  {name:<{width}}  {value or '-'}" for name, value in paper.api.items()]
    lines += ["", _docstring(_root().joinpath(paper.family, f"{paper.key}.py")) or "not implemented yet"]
    return "\n".join(lines)


def table(rows: Sequence[Mapping[str, Any]], width: int = 120) -> str:
    """Returns rows of `json_rows` as lines for a terminal, with the counts below."""
    cells = [
        (
            f"{r['id']:03d}",
            r["key"],
            r["family"],
            "works" if r["works"] else "-",
            _claim_text(r["claim"]) or "-",
            r["title"],
        )
        for r in rows
    ]
    header = ("id", "key", "family", "status", "claim", "title")
    widths = [max(len(row[i]) for row in [header, *cells]) for i in range(len(header) - 1)]
    # Even a narrow terminal shows how a title begins.
    room = max(width - sum(widths) - 2 * len(widths), 24)
    lines = []
    for row in [header, *cells]:
        title = row[-1] if len(row[-1]) <= room else row[-1][: room - 1].rstrip() + "…"
        lines.append("  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), title]).rstrip())
    done = sum(row["works"] for row in rows)
    verdicts = _verdicts(row["claim"] for row in rows)
    lines += ["", f"{len(rows)} papers, {done} work, {len(rows) - done} do not yet"]
    lines += [f"claims, {evidence}: {verdicts[evidence]}" for evidence in verdicts]
    return "\n".join(lines)


def family_table() -> str:
    """Returns the Markdown table of the families: papers, how many work, and the verdicts by kind of evidence."""
    rows = json_rows()
    lines = [
        "| family | what it is about | papers | work | " + " | ".join(f"claims: {e}" for e in EVIDENCE) + " |",
        "| --- | --- | ---: | ---: |" + " --- |" * len(EVIDENCE),
    ]
    for family in (*FAMILIES, None):
        own = [row for row in rows if family in (None, row["family"])]
        verdicts = _verdicts(row["claim"] for row in own)
        about = (_docstring(_root().joinpath(family, "__init__.py")) or "").split("\n", 1)[0] if family else ""
        name = "**all**" if family is None else f"[`{family}`](jaxlab/{family}/README.md)" if about else f"`{family}`"
        counts = [str(len(own)), str(sum(row["works"] for row in own))]
        cells = [name, _cell(about), *counts, *(verdicts.get(evidence, "") for evidence in EVIDENCE)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def bench_table() -> str:
    """Returns the newest recorded run of every benchmark as a Markdown table, with what it was measured on."""
    results = _root().joinpath("bench", "results")
    found = results.iterdir() if results.is_dir() else ()
    files = sorted((file for file in found if file.name.endswith(".json")), key=lambda file: file.name)
    runs = [json.loads(file.read_text(encoding="utf-8"))[-1] for file in files]
    if not runs:
        return "Nothing is recorded yet."
    lines = [
        "| kernel or loss | sizes | pass | time / peer's time | peer | of the ceiling's rate | MiB, peer's MiB |",
        "| --- | --- | --- | ---: | --- | ---: | --- |",
    ]
    for row in (row for run in runs for row in run["rows"]):
        sizes = ", ".join(f"{name} {value}" for name, value in row["params"].items() if name != "pass")
        ceiling = "" if row["ceiling_fraction"] is None else f"{row['ceiling_fraction']:.2f}"
        memory = ", ".join(f"{b / 2**20:.1f}" for b in (row["temp_bytes"], row["peer_temp_bytes"]) if b is not None)
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
        peer = row["peer"] or ""
        cells = [f"`{row['case']}`", sizes, row["params"].get("pass", ""), ratio, peer, ceiling, memory]
        lines.append("| " + " | ".join(cells) + " |")
    about = runs[0]
    lines += [
        "",
        f"Medians of {about['rounds']} interleaved rounds on {about['machine']}, JAX {about['versions']['jax']}, "
        f"{about['date'][:10]}; a float32 matrix product ran at {about['matmul_gflops']:.0f} GFLOP/s. "
        "Again: `jaxlab bench NAME`.",
    ]
    return "\n".join(lines)


def family_readme(family: str) -> str:
    """Returns the text of `jaxlab/<family>/README.md`: the family's docstring, then a row per paper."""
    about = _docstring(_root().joinpath(family, "__init__.py")) or ""
    lines = [
        "<!-- Generated by `python -m jaxlab.catalog --write` from the family's docstring and papers.toml. -->",
        "",
        f"# `jaxlab.{family}`",
        "",
        about,
        "",
        "| method | paper | public names | claim |",
        "| --- | --- | --- | --- |",
    ]
    for paper in (p for p in papers() if p.family == family):
        written = _root().joinpath(family, f"{paper.key}.py").is_file()
        method = f"[`{paper.key}`]({paper.key}.py)" if written else f"`{paper.key}`"
        verified = "" if paper.arxiv_verified else ", not verified"
        link = f"[arXiv {paper.arxiv}](https://arxiv.org/abs/{paper.arxiv}){verified}"
        names = ", ".join(f"`{name}`" for name in paper.public) or "not yet"
        claim = _claim_text(claim_of(paper)) or "none recorded"
        lines.append(f"| {method} | {_cell(paper.title)} ({paper.year}, {link}) | {names} | {claim} |")
    return "\n".join(lines) + "\n"


def _root() -> Traversable:
    """Returns the package's own folder; tests put another tree in its place."""
    return resources.files("jaxlab")


# Keyed by the text itself, so that a changed file can never be answered from the cache.
@functools.lru_cache(maxsize=4)
def _parse(text: str) -> tuple[Paper, ...]:
    """Returns the papers that the text of a `papers.toml` lists."""
    rows = []
    for entry in tomllib.loads(text)["paper"]:
        lists = {name: tuple(entry[name]) for name in ("authors", "public")}
        claim = MappingProxyType(entry["claim"]) if "claim" in entry else None
        rows.append(Paper(**(entry | lists | {"api": MappingProxyType(entry["api"]), "claim": claim})))
    return tuple(sorted(rows, key=lambda paper: paper.id))


@functools.lru_cache(maxsize=64)
def _all_of(source: str) -> tuple[str, ...]:
    """Returns the literal `__all__` of a module's source, without running it."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets):
            return tuple(ast.literal_eval(node.value))
    return ()


def _exports(family: str) -> tuple[str, ...]:
    """Returns the names that a family exports; none if there is no such package yet."""
    file = _root().joinpath(family, "__init__.py")
    return _all_of(file.read_text(encoding="utf-8")) if file.is_file() else ()


def _docstring(file: Traversable) -> str | None:
    """Returns a module's docstring without importing it; None if there is no file or no docstring."""
    return ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) if file.is_file() else None


def _sources(paper: Paper) -> tuple[Traversable, Traversable]:
    """Returns the method file and the claim file of a paper, whether or not they exist."""
    name = f"{paper.key}.py"
    return _root().joinpath(paper.family, name), _root().joinpath("claims", paper.family, name)


def _code_of(source: str) -> str:
    """Returns source as `ast` writes it, without comments and docstrings."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if documented and ast.get_docstring(node, clean=False) is not None:
            # A body of nothing is no syntax; `pass` keeps it one, for a definition that was only its docstring.
            node.body = node.body[1:] or ([] if isinstance(node, ast.Module) else [ast.Pass()])
    return ast.unparse(tree)


def _is_public(value: str) -> bool:
    """Tells a public name in `api` from a place (dotted) or a reason (several words)."""
    return value.isidentifier()


def _plain(text: str) -> str:
    """Returns the letters and digits of a text in lower case."""
    return "".join(char for char in text.casefold() if char.isalnum())


def _short_names(paper: Paper) -> set[str]:
    """Returns the short name as a whole and its parts (`UPGE / HPT`, `PowerNorm (PN)`), made plain."""
    parts = [paper.short, *re.split(r"[/(),+]", paper.short), paper.title.split(":", 1)[0]]
    return {_plain(part) for part in parts} - {""}


def _words(paper: Paper) -> set[str]:
    """Returns the whole words of a paper's title, short name and key, in lower case."""
    text = f"{paper.title} {paper.short} {paper.key.replace('_', ' ')}".casefold()
    return {*text.split(), *re.findall(r"\w+", text), *re.findall(r"[\w'-]+", text)}


def _only(text: str, hits: Sequence[Paper]) -> Paper:
    """Returns the only hit, or raises with the list of them."""
    if len(hits) == 1:
        return hits[0]
    listed = ", ".join(f"{p.key} ({p.title})" for p in hits[:8])
    more = f" and {len(hits) - 8} more" if len(hits) > 8 else ""
    raise AmbiguousPaper(f"{text!r} fits {len(hits)} papers: {listed}{more}")


def _did_you_mean(word: str, choices: Iterable[str]) -> str:
    """Returns ` (did you mean 'x'?)` for the nearest choice, or nothing."""
    close = difflib.get_close_matches(word, list(choices), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _latex(text: str) -> str:
    """Escapes the characters that LaTeX would act on."""
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return "".join(special.get(char, f"\\{char}" if char in "&%$#_{}" else char) for char in text)


def _cell(text: str) -> str:
    """Returns text that does not end a cell of a Markdown table."""
    return text.replace("|", "\\|")


def _claim_text(claim: Mapping[str, Any] | None) -> str:
    """Returns verdict and evidence, which are never shown apart."""
    return f"{claim['verdict']} ({claim['evidence']}{', stale' if claim['stale'] else ''})" if claim else ""


def _verdicts(claims: Iterable[Mapping[str, Any] | None]) -> dict[str, str]:
    """Returns for each kind of evidence that occurs the count of every verdict; stale ones are counted as such."""
    counts = Counter((c["evidence"], c["verdict"] + " (stale)" * c["stale"]) for c in claims if c is not None)
    kinds = [*EVIDENCE, *sorted({evidence for evidence, _ in counts} - set(EVIDENCE))]
    texts = {}
    for kind in kinds:
        texts[kind] = ", ".join(f"{n} {verdict}" for (e, verdict), n in sorted(counts.items()) if e == kind)
    return {kind: text for kind, text in texts.items() if text}


def _why_not(paper: Paper, missing: int) -> str:
    """Returns what a row still lacks, in a few words."""
    unexported = [name for name in public_names(paper) if name not in _exports(paper.family)]
    reasons = [
        f"{missing} of {len(paper.api)} functions missing" if missing else "",
        "no public name" if not paper.public else "",
        f"not exported: {', '.join(unexported)}" if unexported else "",
        "no claim recorded" if claim_of(paper) is None else "",
    ]
    return "; ".join(reason for reason in reasons if reason)


def _generated(package: Path) -> dict[Path, str]:
    """Returns the generated files of a checkout and what they should hold."""
    files = {
        package / family / "README.md": family_readme(family)
        for family in FAMILIES
        if (package / family / "__init__.py").is_file()
    }
    readme = package.parent / "README.md"
    if readme.is_file():
        text = readme.read_text(encoding="utf-8")
        for (start, stop), table_of in (((BEGIN, END), family_table), ((BENCH_BEGIN, BENCH_END), bench_table)):
            before, begin, rest = text.partition(start)
            _, end, after = rest.partition(stop)
            if begin and end:
                text = f"{before}{start}\n{table_of()}\n{stop}{after}"
        files[readme] = text
    return files


def main(argv: Sequence[str] | None = None) -> int:
    """Writes or checks the generated README files; returns 1 if a check finds one out of date."""
    parser = argparse.ArgumentParser(prog="python -m jaxlab.catalog", description=main.__doc__)
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--write", action="store_true", help="write the files that are out of date")
    mode.add_argument("--check", action="store_true", help="only name them")
    args = parser.parse_args(argv)
    package = Path(str(_root()))
    files = _generated(package)
    old = {file: text for file, text in files.items() if not file.is_file() or file.read_text(encoding="utf-8") != text}
    for file, text in old.items():
        if args.write:
            file.write_text(text, encoding="utf-8")
        print(f"{'wrote' if args.write else 'out of date:'} {file.relative_to(package.parent)}")
    if args.check and old:
        print("mend with: python -m jaxlab.catalog --write", file=sys.stderr)
    return int(args.check and bool(old))


if __name__ == "__main__":
    sys.exit(main())
