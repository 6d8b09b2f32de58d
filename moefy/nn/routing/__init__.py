"""Where each token goes: the records of a routing, seats under a capacity, tokens laid out as rows."""

from moefy.nn.routing.routing import Choice, Routing

__all__ = ["Choice", "Routing"]
