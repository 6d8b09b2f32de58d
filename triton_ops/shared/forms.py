"""``Form``: one way to compute a product, with the calls that it takes.

A product has a record of its arguments, the call, and a tuple of forms, best first:

    FORMS = (
        Form("hopper", takes=..., run=...),            Gluon, on Hopper alone
        Form("descriptor", takes=..., run=...),        Triton, weights by tensor descriptors
        Form("pointer", takes=anything, run=...),      Triton, by pointers: takes every call
    )
    form_for(FORMS, call).run(call)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple


class Form(NamedTuple):
    """One implementation of a product.

    Attributes:
        name: "hopper", "descriptor" or "pointer".
        takes: ``call -> bool``, whether it can compute this call, told by shapes, strides, dtypes and the device alone.
        run: ``call -> result``.
    """

    name: str
    takes: Callable[[Any], bool]
    run: Callable[[Any], Any]


def form_for(forms: Sequence[Form], call: Any) -> Form:
    """The first form that takes ``call``."""
    for form in forms:
        if form.takes(call):
            return form
    raise AssertionError("the last form takes every call")


def anything(call: Any) -> bool:
    """True: what the last form takes."""
    return True
