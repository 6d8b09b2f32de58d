"""Groups of experts that a CPU kernel computes at once, and the layout of their rows.

T tokens, D model width, H expert hidden width, E experts, K top-k, N = T*K rows.

Contract: every row and every expert is in exactly one group; groups follow each other by row, by expert and by place.

    >>> bounds, rows = [(0, 2), (2, 2), (2, 3)], 4        # the last row is of no expert
    >>> [group.rows for group in expert_groups(layer, bounds, products=1, saved=0)]
    [slice(0, 4, None)]
"""

from __future__ import annotations

from typing import NamedTuple

from moefy.ops.cpu.layout import Bounds, InRows, Layout, layout_for
from moefy.ops.ffn_args import FFNArgs

# Bytes of the widest intermediate of a group, in fp32 or wider; a layer of at most twice as many is one group.
CHUNK_BYTES = 8 << 20


class ExpertGroup(NamedTuple):
    """Consecutive experts, their rows, and the places of these rows.

    Rows of no expert belong to the last group. If its layout is a batch, they form a group of their own behind it.
    """

    experts: slice
    rows: slice
    places: slice
    layout: Layout

    def of(self, layer: FFNArgs) -> FFNArgs:
        """The layer with these experts and their rows alone."""
        if (self.experts, self.rows) == (slice(0, len(layer.w_up)), slice(0, len(layer.order_N))):
            return layer
        weights = (None if w is None else w[self.experts] for w in layer[4:10])
        return FFNArgs._make((*layer[:2], layer.order_N[self.rows], layer.offsets_E, *weights, *layer[10:]))


def expert_groups(layer: FFNArgs, bounds: Bounds, *, products: int, saved: int) -> list[ExpertGroup]:
    """The experts as one group, or on a CPU as several when the intermediates would take fresh memory in every step.

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
    found: list[ExpertGroup] = []
    for e, stop in groups:
        first, last, place = bounds[e][0], bounds[stop - 1][1], found[-1].places.stop if found else 0
        within = [(a - first, b - first) for a, b in bounds[e:stop]]
        layout = _layout(layer, within, last - first, products, saved)
        if stop == len(bounds) and last < rows and isinstance(layout, InRows):
            last, layout = rows, InRows(bounds=within, rows=rows - first)
        found.append(
            ExpertGroup(slice(e, stop), slice(first, last), slice(place, place + layout.places), layout)
        )
    if found[-1].rows.stop < rows:
        left, place, e = rows - found[-1].rows.stop, found[-1].places.stop, len(bounds)
        nobody = InRows(bounds=[], rows=left)
        found.append(ExpertGroup(slice(e, e), slice(rows - left, rows), slice(place, place + left), nobody))
    return found


def _layout(layer: FFNArgs, bounds: Bounds, rows: int, products: int, saved: int) -> Layout:
    """For all products of these experts; in a batch what is saved is copied."""
    weights = [w for w in (layer.w_gate, layer.w_up, layer.w_down) if w is not None]
    matrices = [w.shape[1] * w.shape[2] for w in weights] * products
    return layout_for(layer.x_TD, bounds, rows, matrices=matrices, copied=(0, saved))
