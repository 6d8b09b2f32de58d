"""Two Hugging Face models from their configs: a Llama that generates, a BERT that trains a step.

They show the two forms that a rewrite takes. Llama's ``mlp`` modules are whole feed-forward
networks, so each becomes a ``moefy.MoE``. BERT splits its FFN over two sibling modules, so its
linears are swapped in place, and the rows between them carry their routing.

    python examples/hf_llama_bert.py
"""

from __future__ import annotations

import torch
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM

import moefy


def build_llama() -> LlamaForCausalLM:
    """Random weights; grouped-query attention, SwiGLU, RMSNorm."""
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).eval()


def build_bert() -> BertForMaskedLM:
    """Random weights; post-norm, gelu, dropout."""
    config = BertConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
    )
    return BertForMaskedLM(config).eval()


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    """``|got - expected| / |expected|``."""
    return ((got - expected).norm() / expected.norm()).item()


def llama() -> None:
    """Greedy generation gives the same tokens before ``transform``, after it, and after ``undo``."""
    model = build_llama()
    prompt = torch.randint(3, 512, (2, 12))
    settings = {"max_new_tokens": 16, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    dense = model.generate(prompt, **settings)

    moefy.transform(model, num_experts=8, top_k=2)
    print(model.model.layers[0].mlp)
    if not torch.equal(model.generate(prompt, **settings), dense):
        raise SystemExit("Llama generates something else")

    moefy.undo(model)
    if not torch.equal(model.generate(prompt, **settings), dense):
        raise SystemExit("undo did not bring the dense Llama back")
    print("Llama: generates the same tokens as MoE, and after undo\n")


def bert() -> None:
    """A padded batch gives the same logits; one masked-language step then reaches every expert."""
    model = build_bert()
    ids = torch.randint(5, 512, (4, 24))
    mask = (torch.arange(24) < torch.tensor([24, 17, 9, 24])[:, None]).long()
    with torch.no_grad():
        dense = model(input_ids=ids, attention_mask=mask).logits

    moefy.transform(model, num_experts=4, top_k=2)
    print(moefy.report(model))
    with torch.no_grad():
        error = relative(model(input_ids=ids, attention_mask=mask).logits, dense)
    print(f"BERT: |MoE - dense| / |dense| = {error:.1e}")
    if not error < 1e-5:
        raise SystemExit("BERT is not exact")

    model.train()
    labels = torch.where((torch.rand(ids.shape) < 0.15) & mask.bool(), ids, -100)
    labels[0, 0] = ids[0, 0]  # at least one word is masked
    model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
    up = model.bert.encoder.layer[0].intermediate.dense.weight
    norms = ", ".join(f"{norm:.1e}" for norm in up.grad.flatten(1).norm(dim=1))
    print(f"expert weights {list(up.shape)}, gradient norm of each expert: {norms}")
    if not torch.isfinite(up.grad).all() or not up.grad.any():
        raise SystemExit("the experts got no gradient")


def main() -> None:
    """Llama, then BERT."""
    torch.manual_seed(0)
    llama()
    bert()


if __name__ == "__main__":
    main()
