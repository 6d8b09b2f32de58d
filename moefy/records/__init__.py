"""What moefy found and what it did, as plain data: no tensors, no graphs, no modules.

``FFNMatch`` is one candidate that the matcher saw (also a refused one), ``LayerRecord`` what became of it,
``PassRecord`` what one graph pass did.
"""

from moefy.records.graph_pass import PassRecord
from moefy.records.layer import Action, LayerRecord
from moefy.records.match import FFNMatch, Form, Kind, Selection

__all__ = ["Action", "FFNMatch", "Form", "Kind", "LayerRecord", "PassRecord", "Selection"]
