"""Match: which regions of a trace are feed-forward networks, and why the others are not."""

from moefy.passes.match.match import Match, match_ffns

__all__ = ["Match", "match_ffns"]
