"""Rewrite: matches in, a Mixture-of-Experts out; and the way back.

The stages in order; nothing of the model changes before ``installed``:

    make_plan        which matches, by which method, with which routers
    build_edits      new modules beside the old ones
    installed        swap them in, and back out on any error
    verify_outputs   compare with the dense outputs
    seal             let go of the dense weights
    restore_dense    the way back
"""

from moefy.rewrite.build import build_edits, pass_records
from moefy.rewrite.edit import Edit, installed
from moefy.rewrite.plan import Plan, make_plan
from moefy.rewrite.undo import restore_dense
from moefy.rewrite.verify import verify_outputs

__all__ = [
    "Edit",
    "Plan",
    "build_edits",
    "installed",
    "make_plan",
    "pass_records",
    "restore_dense",
    "verify_outputs",
]
