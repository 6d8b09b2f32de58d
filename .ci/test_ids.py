"""List the ids of all tests of all legs, or say which ids of an earlier list are gone.

    $ python .ci/test_ids.py > after.txt
    $ python .ci/test_ids.py --before before.txt --renames renames.txt
    5769 before, 5807 now, 214 renamed, 0 lost

A line of ``renames.txt`` holds an old and a new prefix of ids, separated by " -> "; the first line that fits an id
renames it. Exit code 1 when an id is lost.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path


def collected() -> list[str]:
    """The ids of every leg, in the environment that runs this."""
    command = [sys.executable, "-m", "pytest", "--leg", "all", "--collect-only", "-q"]
    listed = subprocess.run(command, capture_output=True, text=True)
    if listed.returncode:
        raise SystemExit(listed.stdout + listed.stderr)
    return [line for line in listed.stdout.splitlines() if "::" in line]


def renamed(name: str, renames: list[tuple[str, str]]) -> str:
    """The new id of the test that was ``name``."""
    for old, new in renames:
        if name.startswith(old):
            return new + name[len(old) :]
    return name


def read_renames(path: Path | None) -> list[tuple[str, str]]:
    """``(old prefix, new prefix)`` for each line."""
    lines = path.read_text().splitlines() if path is not None else []
    return [(old, new) for old, arrow, new in (line.partition(" -> ") for line in lines) if arrow]


def lost(before: list[str], after: list[str], renames: list[tuple[str, str]]) -> list[str]:
    """The ids of ``before`` that ``after`` does not have under their new names."""
    known = set(after)
    return [name for name in before if renamed(name, renames) not in known]


def main() -> None:
    """Without options print the ids."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--before", type=Path)
    parser.add_argument("--renames", type=Path)
    args = parser.parse_args()
    after = collected()
    if args.before is None:
        print("\n".join(after))
        return
    before = [line for line in args.before.read_text().splitlines() if "::" in line]
    renames = read_renames(args.renames)
    gone = lost(before, after, renames)
    moved = sum(renamed(name, renames) != name for name in before)
    print("\n".join(gone))
    print(f"{len(before)} before, {len(after)} now, {moved} renamed, {len(gone)} lost")
    raise SystemExit(bool(gone))


if __name__ == "__main__":
    main()
