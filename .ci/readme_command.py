"""Print the fenced shell block that follows ``<!-- command: NAME -->`` in a Markdown file.

CI runs what the README tells a reader to type, so the two cannot part:

    $ python .ci/readme_command.py README.md run
    python3 -m venv .venv && ...
"""

from __future__ import annotations

import re
import sys
from pathlib import Path


def command(markdown: str, name: str) -> str:
    """The one block of that name."""
    pattern = rf"<!-- command: {re.escape(name)} -->\s*```(?:bash|sh)\n(.*?)\n```"
    blocks = re.findall(pattern, markdown, re.DOTALL)
    if len(blocks) != 1:
        raise SystemExit(f"found {len(blocks)} blocks named {name!r}; expected one")
    return blocks[0]


if __name__ == "__main__":
    print(command(Path(sys.argv[1]).read_text(), sys.argv[2]))
