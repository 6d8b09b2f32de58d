"""Fail when a leg of CI ran fewer tests than recorded.

Reads pytest's JUnit file; a skipped or expected-to-fail test did not run. The figures stand in
``.ci/expected_tests``, one line a leg, and ``--record`` writes the present one:

    $ python .ci/count_tests.py light.xml light .ci/expected_tests
    light: 1200 tests ran, 1200 expected
"""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

HEADER = "# The least number of tests that each leg of .ci/run must execute, by `.ci/run --record`.\n"


def executed(junit: Path) -> int:
    """How many tests ran, by pytest's own account."""
    suites = list(ElementTree.parse(junit).getroot().iter("testsuite"))
    return sum(int(suite.attrib["tests"]) - int(suite.attrib["skipped"]) for suite in suites)


def expectations(path: Path) -> dict[str, int]:
    """Leg -> the least number of tests that must run."""
    text = path.read_text() if path.exists() else ""
    lines = [line.split("#")[0].split() for line in text.splitlines()]
    return {leg: int(number) for leg, number in filter(None, lines)}


def main() -> None:
    """``JUNIT LEG EXPECTED [--record]``."""
    junit, leg, path = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    ran, expected = executed(junit), expectations(path)
    if "--record" in sys.argv:
        expected[leg] = ran
        path.write_text(HEADER + "".join(f"{name} {n}\n" for name, n in sorted(expected.items())))
    if leg not in expected:
        raise SystemExit(f"{path} has no figure for {leg}; run .ci/run --record")
    print(f"{leg}: {ran} tests ran, {expected[leg]} expected")
    if ran < expected[leg]:
        raise SystemExit(f"{leg}: {expected[leg] - ran} tests no longer run")


if __name__ == "__main__":
    main()
