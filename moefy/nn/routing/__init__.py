"""Where each token goes, as plain records.

routing.py      ``Choice``, a router's decision; ``Routing``, the choice sorted by expert
capacity.py     which slots keep a seat
layout.py       how tokens lie in a tensor
token_tree.py   tokens that are more than one vector
"""

from moefy.nn.routing.layout import TokenLayout
from moefy.nn.routing.routing import Choice, Routing

__all__ = ["Choice", "Routing", "TokenLayout"]
