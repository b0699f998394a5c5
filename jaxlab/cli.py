"""The command `jaxlab`: train, eval, papers, show, cite, claim, bench, doctor."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import NoReturn


class BadInput(ValueError):
    """Input that the user can mend: one line on stderr and exit code 2."""


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, with the nearest flag or command."""

    def error(self, message: str) -> NoReturn:
        """Raises BadInput instead of printing the usage."""
        raise BadInput(message)


def nearest(word: str, choices) -> str:
    """Returns ` (did you mean 'x'?)` or nothing."""
    import difflib

    close = difflib.get_close_matches(word, list(choices), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def build_parser() -> Parser:
    """Returns the parser of all commands but `train`, whose flags depend on the recipe."""
    from importlib.metadata import version

    parser = Parser(prog="jaxlab", description="The methods of 218 research papers in JAX.")
    parser.add_argument("--version", action="version", version=f"jaxlab {version('jaxlab')}")
    parser.add_argument("--traceback", action="store_true", help="show the whole traceback of an error")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)

    commands.add_parser("train", help="train a recipe: jaxlab train [RECIPE] [--flags]", add_help=False)

    p = commands.add_parser("eval", help="the test figures of a run's newest checkpoint")
    p.add_argument("run", type=Path, metavar="RUN")
    p.add_argument("--json", action="store_true")

    p = commands.add_parser("papers", help="the catalogue: what works, what each claim gave")
    p.add_argument("--family")
    p.add_argument("--missing", action="store_true", help="only those that do not work yet")
    p.add_argument("--json", action="store_true")

    p = commands.add_parser("show", help="the card of one paper: by key, number, arXiv id or words of the title")
    p.add_argument("words", nargs="+", metavar="PAPER")

    p = commands.add_parser("cite", help="BibTeX entries")
    p.add_argument("keys", nargs="+", metavar="KEY")

    p = commands.add_parser("claim", help="run the papers' claim checks")
    p.add_argument("keys", nargs="*", metavar="KEY")
    p.add_argument("--family")
    p.add_argument("--stale", action="store_true", help="those whose code changed since they were recorded")
    p.add_argument("--record", action="store_true", help="write the result beside the claim")
    p.add_argument("--smoke", action="store_true", help="seconds instead of a minute; no verdict")
    p.add_argument("--json", action="store_true")

    p = commands.add_parser("bench", help="time a kernel against its ceiling, the naive form and its peer")
    p.add_argument("name", metavar="NAME")
    p.add_argument("--rounds", type=int, default=9)
    p.add_argument("--quick", action="store_true", help="small sizes: tries the machinery, says nothing of speed")
    p.add_argument("--record", action="store_true", help="append the run to jaxlab/bench/results")
    p.add_argument("--json", action="store_true")

    p = commands.add_parser("doctor", help="what this machine has, and whether the kernels agree on it")
    p.add_argument("--json", action="store_true")
    return parser


def recipe_parser(recipe) -> Parser:
    """Returns the parser of `jaxlab train <recipe>`: every field of the recipe is a typed flag."""
    parser = Parser(
        prog=f"jaxlab train {recipe.name}", description=recipe.__doc__.split("\n", 1)[0], allow_abbrev=False
    )
    for field in dataclasses.fields(recipe):
        kind = {"int": int, "float": float, "str": str}[str(field.type)]
        flag = "--" + field.name.replace("_", "-")
        parser.add_argument(flag, type=kind, default=field.default, help=f"default {field.default!r}")
    parser.add_argument("--run-dir", type=Path, default=None)
    parser.add_argument("--resume", type=Path, default=None, metavar="DIR", help="go on with the run in DIR")
    parser.add_argument("--quiet", action="store_true")
    parser.add_argument(
        "--grace-seconds", type=float, default=0.0, help="leave with 75 that long after a signal; 0 = when saved"
    )
    parser.add_argument("--profile", action="store_true", help="trace a few steps, for TensorBoard and Perfetto")
    parser.add_argument("--debug-nans", action="store_true", help="stop in the operation that makes the first NaN")
    parser.add_argument("--traceback", action="store_true")
    return parser


def need(extra: str, *modules: str) -> None:
    """Raises BadInput in one line if the modules of an extra are not installed."""
    from importlib.util import find_spec

    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        raise BadInput(f"{', '.join(missing)} not installed: pip install 'jaxlab[{extra}]'")


def command_train(arguments: list[str]) -> int:
    """Trains a recipe, by default the flagship."""
    need("train", "orbax.checkpoint" if _has("orbax") else "orbax", "sklearn", "tensorflow_datasets", "matplotlib")
    from jaxlab.engine.recipes import RECIPES, find_recipe, from_config

    name, rest = "mutual_moe", arguments
    if arguments and not arguments[0].startswith("-"):
        name, rest = arguments[0], arguments[1:]
    if rest and rest[0] in ("-h", "--help") and rest is arguments:
        print(f"recipes: {', '.join(sorted(RECIPES))}\n")
    parser = recipe_parser(find_recipe(name))
    args, unknown = parser.parse_known_args(rest)
    flags = [option for action in parser._actions for option in action.option_strings]
    if unknown:
        word = unknown[0].split("=", 1)[0]
        raise BadInput(f"unknown flag {word}{nearest(word, flags)}; see jaxlab train {name} --help")
    given = {f.name: getattr(args, f.name) for f in dataclasses.fields(find_recipe(name))}

    from jaxlab.engine import loop, processes
    from jaxlab.engine.signals import SAVED

    if args.resume is not None:
        config = loop.read_config(args.resume)
        if arguments and not arguments[0].startswith("-") and config.get("recipe") != name:
            raise BadInput(f"{args.resume} is a run of recipe {config.get('recipe')}, not of {name}")
        recipe, run_dir = from_config(config), args.resume
        if args.run_dir is not None and args.run_dir != args.resume:
            raise BadInput("--resume goes on in its own directory: leave --run-dir out")
        saved = dataclasses.asdict(recipe)
        explicit = {a.dest for a in parser._actions if any(o in _flag_names(rest) for o in a.option_strings)}
        changed = [n for n in explicit & saved.keys() if given[n] != saved[n]]
        if changed:
            keys = ", ".join(f"{n}: {saved[n]!r} then, {given[n]!r} now" for n in sorted(changed))
            raise BadInput(f"--resume goes on with the run's own configuration; it differs in {keys}")
    else:
        recipe = find_recipe(name)(**given)
        run_dir = args.run_dir if args.run_dir is not None else loop.default_run_dir(recipe)
    result = loop.train(
        recipe.prepared(),
        run_dir,
        resume=args.resume is not None,
        quiet=args.quiet,
        grace_seconds=args.grace_seconds,
        debug_nans=args.debug_nans,
        profile=args.profile,
    )
    if processes.index() > 0:
        return 0 if result.finished else SAVED
    if not result.finished:
        print(f"saved at step {result.step}; go on with:\n  jaxlab train --resume {run_dir}")
        return SAVED
    print("\n".join(recipe.report(run_dir, result.evaluation)))
    print(f"checkpoint, metrics, TensorBoard events and plots: {run_dir}")
    print(f"figures again:    jaxlab eval {run_dir}")
    print(f"after a stop:     jaxlab train --resume {run_dir}")
    return 0


def _has(module: str) -> bool:
    from importlib.util import find_spec

    return find_spec(module) is not None


def _flag_names(arguments: list[str]) -> set[str]:
    return {argument.split("=", 1)[0] for argument in arguments if argument.startswith("--")}


def command_eval(args: argparse.Namespace) -> int:
    """Prints the test figures of a run."""
    need("train", "orbax", "sklearn", "tensorflow_datasets")
    from jaxlab.engine import loop

    result = loop.evaluate(args.run)
    if args.json:
        print(json.dumps(result))
        return 0
    accuracy = ", ".join(f"{100 * a:.2f}%" for a in result["test_accuracy"])
    print(f"step {result['step']}: test accuracy {accuracy}; together {100 * result['ensemble_accuracy']:.2f}%")
    print(f"parameters {result['params_sha256']}")
    return 0


def command_papers(args: argparse.Namespace) -> int:
    """Prints the catalogue."""
    from jaxlab import catalog

    families = sorted({paper.family for paper in catalog.papers()})
    if args.family is not None and args.family not in families:
        raise BadInput(
            f"unknown family {args.family!r}{nearest(args.family, families)}; there is {', '.join(families)}"
        )
    rows = catalog.json_rows(family=args.family, missing=args.missing)
    print(json.dumps(rows) if args.json else catalog.table(rows))
    return 0


def command_show(args: argparse.Namespace) -> int:
    """Prints the card of one paper."""
    from jaxlab import catalog

    print(catalog.card(catalog.find(" ".join(args.words))))
    return 0


def command_cite(args: argparse.Namespace) -> int:
    """Prints BibTeX."""
    from jaxlab import catalog

    found = [catalog.find(key) for key in args.keys]
    print("\n\n".join(catalog.bibtex(paper) for paper in found))
    return 0


def command_claim(args: argparse.Namespace) -> int:
    """Runs claim checks."""
    from jaxlab.claims import harness

    return harness.command(args)


def command_bench(args: argparse.Namespace) -> int:
    """Times a kernel, the losses or a step of peers, or the models of `mil` as their bags grow."""
    from jaxlab.bench import kernels, losses, mil, peers, runner

    if args.name == "mil":
        return mil.command(args)
    return runner.command(args, {**kernels.BENCHES, **losses.BENCHES, **peers.BENCHES})


def command_doctor(args: argparse.Namespace) -> int:
    """Runs every kernel on the devices present and says how far its implementations differ."""
    from jaxlab.engine import doctor

    report = doctor.examine()
    print(json.dumps(report) if args.json else doctor.render(report))
    return 0 if all(row["agrees"] for row in report["kernels"]) else 1


COMMANDS = {
    "eval": command_eval,
    "papers": command_papers,
    "show": command_show,
    "cite": command_cite,
    "claim": command_claim,
    "bench": command_bench,
    "doctor": command_doctor,
}


# By name, because their module belongs to the engine, which most commands do not import.
CODES = {"InputError": 2, "BadNumbersError": 76}


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns its exit code.

    0 done, 1 error, 2 bad input, 75 stopped and saved (start me again), 76 stopped on bad numbers, 130 interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    show_traceback = "--traceback" in arguments
    try:
        words = [a for a in arguments if a != "--traceback"]
        if words[:1] == ["train"]:
            return command_train(words[1:])
        commands = ["train", *COMMANDS]
        if words and not words[0].startswith("-") and words[0] not in commands:
            raise BadInput(f"unknown command {words[0]!r}{nearest(words[0], commands)}; there is {', '.join(commands)}")
        parser = build_parser()
        args = parser.parse_args(words)
        if args.command is None:
            parser.print_help()
            return 0
        return COMMANDS[args.command](args)
    except BrokenPipeError:
        return 0
    except KeyboardInterrupt:
        print("jaxlab: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if show_traceback:
            raise
        code = 2 if isinstance(error, (BadInput, LookupError)) else CODES.get(type(error).__name__, 1)
        text = error.args[0] if isinstance(error, KeyError) and error.args else error
        hint = " (the whole story: --traceback)" if code == 1 else ""
        print(f"jaxlab: {' '.join(str(text).split())}{hint}", file=sys.stderr)
        return code


if __name__ == "__main__":
    sys.exit(main())
