"""Match: which regions of a trace are feed-forward networks, and why the others are not.

linears -> regions -> refusals, placement -> match       each asks the ones before it
codes: the reasons; facts: one trace; residual, feature_axis: two rules; body_graph, classify_body: the body

>>> [match.record.fqn for match in match_ffns(trace_module(model, (x,))) if match.record.accepted]
['layers.0.mlp', 'layers.1.mlp']
"""

from moefy.passes.match.match import Match, match_ffns

__all__ = ["Match", "match_ffns"]
