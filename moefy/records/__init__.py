"""What moefy found and what it did, as plain data: no tensors, no graphs, no modules.

``FFNMatch`` is one candidate that the matcher saw (also a refused one), ``LayerRecord`` what became of it,
``PassRecord`` what one graph pass did. ``KnownBody`` names what lies between an FFN's linears.
"""

from moefy.records.body import GLU, GLU_FORMS, KnownBody
from moefy.records.graph_pass import PassRecord
from moefy.records.layer import NOT_EXACT, Action, LayerRecord
from moefy.records.match import FFNMatch, Form, Kind, Selection

__all__ = [
    "GLU",
    "GLU_FORMS",
    "NOT_EXACT",
    "Action",
    "FFNMatch",
    "Form",
    "Kind",
    "KnownBody",
    "LayerRecord",
    "PassRecord",
    "Selection",
]
