"""``Report``: what all reports share. A report is plain data with one JSON form and one text form.

Contract: a report says its facts in ``to_dict`` and draws them in ``render``; both come from the same fields. ``str()``
is the text for the terminal at hand, in ASCII where the stream can encode nothing else.

    >>> report = moefy.expert_load(model)                     # doctest: +SKIP
    >>> json.loads(report.to_json())["schema_version"]
    1
"""

from __future__ import annotations

import json
from typing import Any

from moefy.reports.text import tables

SCHEMA_VERSION = 1  # of the reports' JSON; grows when a key changes its meaning


class Report:
    """A report that knows its facts and how to draw them."""

    def to_dict(self) -> dict[str, Any]:
        """The facts as JSON types, ``schema_version`` among them."""
        raise NotImplementedError

    def render(self, width: int | None = None) -> str:
        """The text in ``width`` columns, by default the terminal's, or 108 where there is no terminal."""
        raise NotImplementedError

    def to_json(self, indent: int | None = 2) -> str:
        """``to_dict`` as one JSON object."""
        return json.dumps(self.to_dict(), indent=indent)

    def __str__(self) -> str:
        return tables.encodable(self.render())
