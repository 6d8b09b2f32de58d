"""Which experts of a layer a kernel takes at once, and how their rows lie meanwhile.

T tokens, D model width, H expert hidden width, E experts, K top-k, N = T*K rows.

Contract: every row and every expert is in exactly one part; parts follow each other by row, by expert and by place.

    >>> bounds, rows = [(0, 2), (2, 2), (2, 3)], 4        # the last row is of no expert
    >>> [part.rows for part in parts(layer, bounds, products=1, saved=0)]
    [slice(0, 4, None)]
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from moefy.ops import checks
from moefy.ops.cpu.layout import Bounds, InRows, Layout, layout_for

CHUNK_BYTES = 8 << 20


class Layer(NamedTuple):
    """The arguments of ``expert_ffn`` in schema order."""

    x_TD: Tensor
    weights_TK: Tensor
    order_N: Tensor
    offsets_E: Tensor
    w_gate: Tensor | None
    b_gate: Tensor | None
    w_up: Tensor
    b_up: Tensor | None
    w_down: Tensor
    b_down: Tensor | None
    activation: str
    glu: str

    @property
    def saves_acted(self) -> bool:
        """Whether the first of the two tensors saved for the backward is the activations, not a gate's pre-activations.

        To compute them again costs a CPU: on 2 cores tanh-gelu took as long as one of the six products, where these
        are narrow (D=48, H=192). Autograd would save them as well, and the exit's input besides.
        """
        return self.w_gate is None and self.x_TD.device.type == "cpu"

    @property
    def saves_first(self) -> bool:
        """Whether the first of the two tensors saved for the backward is any."""
        return self.saves_acted or self.w_gate is not None

    @property
    def saved_features(self) -> int:
        """What is saved of a row."""
        return self.w_up.shape[1] + self.saves_first * self.w_down.shape[2]

    def bounds(self, op: str) -> Bounds:
        """First and end row of each expert."""
        return checks.bounds(op, self.offsets_E, self.order_N.shape[0])


class Part(NamedTuple):
    """Consecutive experts, their rows, and the places of these.

    The last one also has the rows of no expert, or, behind a batch, has these alone.
    """

    experts: slice
    rows: slice
    places: slice
    layout: Layout

    def of(self, layer: Layer) -> Layer:
        """The layer with these experts and their rows alone."""
        if (self.experts, self.rows) == (slice(0, len(layer.w_up)), slice(0, len(layer.order_N))):
            return layer
        weights = (None if w is None else w[self.experts] for w in layer[4:10])
        return Layer._make((*layer[:2], layer.order_N[self.rows], layer.offsets_E, *weights, *layer[10:]))


def parts(layer: Layer, bounds: Bounds, *, products: int, saved: int) -> list[Part]:
    """The experts as one part, or on a CPU as several when the intermediates would take fresh memory in every step.

    Large blocks come from the kernel page by page: with 32768 rows of 512 features a third of the time of a step went
    there. Small ones are used again, and stay in the cache.

    Args:
        layer: the whole layer.
        bounds: of its experts.
        products: how often each matrix is multiplied.
        saved: features of a row that are saved, or have been.
    """
    rows = layer.order_N.shape[0]
    row_bytes = max(layer.w_up.shape[1], layer.x_TD.shape[1]) * max(layer.x_TD.itemsize, 4)
    starts = [0]
    if layer.x_TD.device.type == "cpu" and rows * row_bytes > 2 * CHUNK_BYTES:
        for e, (_, end) in enumerate(bounds):
            if e > starts[-1] and (end - bounds[starts[-1]][0]) * row_bytes > CHUNK_BYTES:
                starts.append(e)
    groups = list(zip(starts, [*starts[1:], len(bounds)], strict=True))
    found: list[Part] = []
    for e, stop in groups:
        first, last, place = bounds[e][0], bounds[stop - 1][1], found[-1].places.stop if found else 0
        within = [(a - first, b - first) for a, b in bounds[e:stop]]
        layout = _layout(layer, within, last - first, products, saved)
        if stop == len(bounds) and last < rows and isinstance(layout, InRows):
            last, layout = rows, InRows(bounds=within, rows=rows - first)
        found.append(Part(slice(e, stop), slice(first, last), slice(place, place + layout.places), layout))
    if found[-1].rows.stop < rows:
        left, place, e = rows - found[-1].rows.stop, found[-1].places.stop, len(bounds)
        nobody = InRows(bounds=[], rows=left)
        found.append(Part(slice(e, e), slice(rows - left, rows), slice(place, place + left), nobody))
    return found


def _layout(layer: Layer, bounds: Bounds, rows: int, products: int, saved: int) -> Layout:
    """For all products of these experts; in a batch what is saved is copied."""
    weights = [w for w in (layer.w_gate, layer.w_up, layer.w_down) if w is not None]
    matrices = [w.shape[1] * w.shape[2] for w in weights] * products
    return layout_for(layer.x_TD, bounds, rows, matrices=matrices, copied=(0, saved))
