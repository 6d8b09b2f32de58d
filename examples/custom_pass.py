"""A graph pass of your own in the backend: query, key and value from one wide linear.

A pass is one class in one file. It edits an ``fx.GraphModule`` in place and returns how often it
matched. ``@register_pass`` is its line in the registry: from then on the backend runs it in its
stage, lints and times it, and ``moefy.passes`` keeps the record. This one finds linears that read
the same tensor and computes them as one:

    q = linear(x, a); k = linear(x, b)   ->   q, k = split(linear(x, cat([a, b])), ...)

    python examples/custom_pass.py
"""

from __future__ import annotations

import operator
from collections import defaultdict

import torch
import torch.nn.functional as F
from torch import fx
from transformers import LlamaConfig, LlamaForCausalLM

import moefy
from moefy.passes import Pass, clear_history, history, register_pass


def siblings(graph: fx.Graph) -> list[list[fx.Node]]:
    """Groups of two or more bias-free linears over parameters that read the same tensor."""
    groups: dict[fx.Node, list[fx.Node]] = defaultdict(list)
    for node in graph.find_nodes(op="call_function", target=F.linear):
        x, weight, bias = (*node.args, None)[:3]
        if bias is None and weight.op in ("placeholder", "get_attr"):
            groups[x].append(node)
    return [nodes for nodes in groups.values() if len(nodes) > 1]


@register_pass
class MergeSiblingLinears(Pass):
    """``linear(x, a), linear(x, b)`` become one linear and a split. Changes rounding at most."""

    name = "merge_sibling_linears"
    stage = "pre_grad"  # Dynamo's graph, where a linear is still F.linear; "post_grad" sees aten ops

    def rewrite(self, gm: fx.GraphModule) -> int:
        """Merge each group at its first linear; the number of groups."""
        groups = siblings(gm.graph)
        for nodes in groups:
            x, weights = nodes[0].args[0], [node.args[1] for node in nodes]
            widths = [weight.meta["example_value"].shape[0] for weight in weights]
            with gm.graph.inserting_before(nodes[0]):
                merged = gm.graph.call_function(F.linear, (x, gm.graph.call_function(torch.cat, (weights,))))
                parts = gm.graph.call_function(torch.split, (merged, widths, -1))
                for i, node in enumerate(nodes):
                    part = gm.graph.call_function(operator.getitem, (parts, i))
                    node.replace_all_uses_with(part)
            for node in nodes:
                gm.graph.erase_node(node)
        return len(groups)


def build_llama() -> LlamaForCausalLM:
    """A small Llama with random weights: two layers, each with three linears that read one tensor."""
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).eval()


def main() -> None:
    """Compile a Mixture-of-Experts with the pass; compare with the eager model."""
    torch.manual_seed(0)
    model = build_llama()
    moefy.transform(model, num_experts=4)
    ids = torch.randint(256, (2, 16))
    with torch.no_grad():
        eager = model(input_ids=ids, use_cache=False).logits
        clear_history()
        compiled = torch.compile(model, backend="moefy", options={"inner": "eager"})
        error = (compiled(input_ids=ids, use_cache=False).logits - eager).norm() / eager.norm()

    records = [record for run in history() for record in run.records]
    for record in records:
        nodes = f"{record.nodes_before} -> {record.nodes_after} nodes"
        print(f"{record.name:24} matched {record.matched}, {nodes}")
    matched = sum(r.matched for r in records if r.name == MergeSiblingLinears.name)
    print(f"the pass matched {matched} times; |compiled - eager| / |eager| = {error:.1e}")
    if matched != 2 or not error < 1e-5:
        raise SystemExit("expected one match a layer and the same logits")


if __name__ == "__main__":
    main()
