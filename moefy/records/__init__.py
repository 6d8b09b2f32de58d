"""What moefy found and what it did, as plain data without tensors, graphs or modules.

``FFNMatch`` is one candidate that the matcher saw, accepted or refused. ``LayerRecord`` says what became of a
candidate, ``PassRecord`` what a graph pass did. ``KnownBody`` names what lies between an FFN's linears.

    >>> FFNMatch(fqn="h.0.mlp", entries=("h.0.mlp.up",), exit="h.0.mlp.down", kind="mlp", activation="gelu", d_model=64,
    ...          d_hidden=256, bias=True, form="module").accepted
    True
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
