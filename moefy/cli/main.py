"""The command ``moefy``: report on a model, run a benchmark, show the environment.

Contract: results go to stdout. With ``--json`` stdout gets one JSON document and nothing else; what user code prints
goes to stderr. An error is one line on stderr. Exit codes: 0 done, 1 a check or the user's code failed, 2 bad usage, 3
no FFN found.

    $ moefy report mypackage.models:make_gpt --num-experts 8
    $ moefy report ./llama/config.json --json
    $ moefy bench transform --layers 6,12,24
    $ moefy env
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

import moefy
from moefy.errors import (
    ConfigError,
    MoefyError,
    NoFFNFound,
    PatternError,
    UnknownOption,
    UsageError,
)

DONE, FAILED, BAD_USAGE, NOTHING_FOUND, INTERRUPTED = 0, 1, 2, 3, 130

_EXIT_CODES = """exit codes:
  0  done
  1  a check failed, or the model's own code did
  2  bad usage
  3  no feed-forward network found"""

_TARGET = """TARGET is one of
  package.module:factory   a function without arguments that returns the model, or the tuple
                           (model, example_args[, example_kwargs]). The module is imported and
                           the function is called: this runs that code.
  config.json, or folder   of a Hugging Face model; built without memory. Nothing is downloaded
                           and no code from the folder runs."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    try:
        args = _parse(argv)
        with contextlib.redirect_stdout(sys.stderr):  # prints of the user's code are no result
            text, code = args.run(args)
        print(_printable(text), flush=True)
        return code
    except SystemExit as stop:  # argparse: usage errors are 2, --help is 0
        return stop.code if isinstance(stop.code, int) else BAD_USAGE
    except NoFFNFound as error:
        return _complain(error, NOTHING_FOUND)
    except (UsageError, ConfigError, UnknownOption, PatternError) as error:
        return _complain(error, BAD_USAGE)
    except MoefyError as error:
        return _complain(error, FAILED)
    except BrokenPipeError:  # the reader, such as head, stopped reading
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except KeyboardInterrupt:
        return INTERRUPTED


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands and options."""
    parser = argparse.ArgumentParser(
        prog="moefy",
        description="Turn the feed-forward networks of a PyTorch model into Mixture-of-Experts.",
        epilog=_EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command")
    _add_report(commands)
    _add_bench(commands)
    _add_env(commands)
    return parser


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.version:
        args.run = _run_version
    elif args.command is None:
        parser.error("a command is needed: report, bench or env")
    return args


def _add_report(commands: Any) -> None:
    parser = commands.add_parser(
        "report",
        help="what transform would do to a model, layer by layer, and what not and why",
        description="Find the feed-forward networks of a model and show what transform would do.",
        epilog=f"{_TARGET}\n\n{_EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("target", metavar="TARGET", help="MODULE:FACTORY, or a config.json (below)")
    number = {"type": int, "metavar": "N"}
    parser.add_argument("-e", "--num-experts", default=8, **number, help="per layer; default 8")
    parser.add_argument("-k", "--top-k", **number, help="experts per token; default 2, or the router's own")
    parser.add_argument("--router", metavar="NAME", help="of moefy.nn.routers; default top_k")
    glob = {"action": "append", "metavar": "GLOB"}
    parser.add_argument("--include", **glob, help="only layers whose name matches (repeatable)")
    parser.add_argument("--exclude", **glob, help="no layer whose name matches (repeatable)")
    parser.add_argument("--passes", action="store_true", help="compile, and list the graph passes")
    parser.add_argument(
        "--load", action="store_true", help="run a few training forwards, and show what each expert got"
    )
    parser.add_argument("--json", action="store_true", help="one JSON document, nothing folded")
    parser.set_defaults(run=_run_report)


def _add_bench(commands: Any) -> None:
    from moefy.bench import BENCHES

    parser = commands.add_parser("bench", help="measure what moefy costs on this machine")
    kinds = parser.add_subparsers(title="benchmarks", metavar="WHAT", dest="what", required=True)
    for bench in BENCHES:
        kind = kinds.add_parser(bench.name, help=bench.help, description=bench.help)
        bench.add_arguments(kind)
        kind.add_argument("--json", action="store_true", help="one JSON document")
        kind.set_defaults(run=lambda args, bench=bench: _run_bench(bench, args))


def _add_env(commands: Any) -> None:
    parser = commands.add_parser("env", help="versions, devices and which kernels are usable")
    parser.add_argument("--json", action="store_true", help="one JSON document")
    parser.set_defaults(run=_run_env)


def _run_version(args: argparse.Namespace) -> tuple[str, int]:
    return f"moefy {moefy.__version__}", DONE


def _run_report(args: argparse.Namespace) -> tuple[str, int]:
    from moefy.cli.load import load_on
    from moefy.cli.report import report_on

    options = {name: getattr(args, name) for name in ("num_experts", "top_k", "router", "include", "exclude")}
    if args.load and args.passes:
        raise UsageError("--load and --passes: one at a time")
    if args.load:
        load = load_on(args.target, **options)
        return load.to_json() if args.json else load.render(), DONE
    report = report_on(args.target, **options, passes=args.passes)
    text = report.to_json() if args.json else report.render(passes=args.passes)
    return text, DONE if report.rewritten else NOTHING_FOUND


def _run_bench(bench: Any, args: argparse.Namespace) -> tuple[str, int]:
    result = bench.run(args)
    return json.dumps(result.to_dict(), indent=2) if args.json else str(result), DONE


def _run_env(args: argparse.Namespace) -> tuple[str, int]:
    from moefy.reports.environment import environment, environment_table

    known = environment()
    return json.dumps(known, indent=2) if args.json else environment_table(known), DONE


def _complain(error: MoefyError, code: int) -> int:
    """Print the error in one line (a list of candidates may follow), after the traceback of the user's code if any."""
    from moefy.cli.targets import TargetFailed

    if isinstance(error, TargetFailed) and error.__cause__ is not None:
        cause = error.__cause__
        frames = cause.__traceback__
        own = frames.tb_next if frames is not None and frames.tb_next is not None else frames
        traceback.print_exception(type(cause), cause, own)  # without moefy's frame that called
    print(f"moefy: {error}", file=sys.stderr)
    return code


def _printable(text: str) -> str:
    from moefy.reports.text.tables import encodable

    return encodable(text)
