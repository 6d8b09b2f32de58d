"""Small residual blocks, their rewrite into entries and exits, and a reference that runs the dense block per expert.

Contract: a block has ``norm`` and its FFN inline; ``source(x)`` is what the FFN reads. ``rewrite`` swaps the linears
named by ``ENTRIES`` and ``EXIT``. ``reference`` knows nothing of rows: it runs the dense block with the weights of each
expert on all tokens and mixes the outputs per token, so that autograd gives every gradient.

    >>> dense = Mlp(); block = rewrite(dense)
    >>> torch.allclose(block(x), reference(dense, block, x))
    True
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from moefy.nn import EntryLinear, ExitLinear, FFNLink, Router
from moefy.nn.experts.linear import ExpertLinear

D, H, E, K = 8, 12, 4, 2


class Mlp(nn.Module):
    """Inline two-layer MLP with dropout."""

    ENTRIES, EXIT, FEATURE_DIM, SHAPE = ("fc1",), "fc2", -1, (2, 5, D)

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop = nn.LayerNorm(D), nn.Dropout(0.0)
        self.fc1, self.fc2 = nn.Linear(D, H), nn.Linear(H, D)

    def source(self, x: Tensor) -> Tensor:
        return self.norm(x)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(self.drop(F.gelu(self.fc1(self.source(x)))))


class Glu(nn.Module):
    """Inline GLU: two sibling entries that read one tensor."""

    ENTRIES, EXIT, FEATURE_DIM, SHAPE = ("w1", "w3"), "w2", -1, (2, 5, D)

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(D)
        self.w1, self.w3 = nn.Linear(D, H, bias=False), nn.Linear(D, H, bias=False)
        self.w2 = nn.Linear(H, D, bias=False)

    def source(self, x: Tensor) -> Tensor:
        return self.norm(x)

    def forward(self, x: Tensor) -> Tensor:
        n = self.source(x)
        return x + self.w2(F.silu(self.w1(n)) * self.w3(n))


class BareGlu(Glu):
    """A GLU that reads the block's own input, which a checkpoint did not make."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Identity()

    def source(self, x: Tensor) -> Tensor:
        return x


class Conv(nn.Module):
    """1x1 convolutions in NCHW, with a per-channel scale between them."""

    ENTRIES, EXIT, FEATURE_DIM, SHAPE = ("pw1",), "pw2", -3, (2, D, 3, 2)

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.scale = nn.BatchNorm2d(D).eval(), nn.Parameter(torch.randn(H, 1, 1))
        self.pw1, self.pw2 = nn.Conv2d(D, H, 1), nn.Conv2d(H, D, 1)

    def source(self, x: Tensor) -> Tensor:
        return self.norm(x)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.pw2(F.relu(self.pw1(self.source(x))) * self.scale)


class Custom(Mlp):
    """An MLP whose body is ``act(block, hidden)``."""

    def __init__(self, act: Callable[[nn.Module, Tensor], Tensor], width: int = H) -> None:
        super().__init__()
        self.act = act
        self.scale, self.slope = nn.Parameter(torch.rand(H)), nn.Parameter(torch.tensor(0.5))
        self.fc2 = nn.Linear(width, D)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(self.act(self, self.fc1(self.source(x)))).view(x.shape)


BLOCKS: dict[str, Callable[[], nn.Module]] = {"mlp": Mlp, "glu": Glu, "bare": BareGlu, "conv": Conv}


class NoisyRouter(Router):
    """Noisy top-k (Shazeer et al. 2017): another routing at each call."""

    def logits(self, x: Tensor, feature_dim: int = -1) -> Tensor:
        logits_TE = super().logits(x, feature_dim)
        return logits_TE + torch.randn_like(logits_TE)


def rewrite(dense: nn.Module, *, distinct: bool = True, router: type[Router] = Router) -> nn.Module:
    """A copy of ``dense`` with experts: its own weights E times, or E different ones."""
    block, link = copy.deepcopy(dense), FFNLink("block")
    for index, name in enumerate((*dense.ENTRIES, dense.EXIT)):
        old = getattr(block, name)
        out, width = old.weight.shape[:2]
        options = {
            "bias": old.bias is not None,
            "link": link,
            "feature_dim": dense.FEATURE_DIM,
            "dtype": old.weight.dtype,
        }
        if name == dense.EXIT:
            new: ExpertLinear = ExitLinear(width, out, E, **options)
        else:
            lead = router(width, E, K, std=1.0, fqn="block", dtype=old.weight.dtype) if not index else None
            count = len(dense.ENTRIES)
            new = EntryLinear(width, out, E, index=index, count=count, router=lead, **options)
        fill(new, old, distinct)
        setattr(block, name, new)
    return block


@torch.no_grad()
def fill(new: ExpertLinear, old: nn.Module, distinct: bool) -> None:
    """Copy the dense weights to every expert, and tell the experts apart if asked to."""
    pairs = [(new.weight, old.weight.flatten(1)), *([(new.bias, old.bias)] if old.bias is not None else [])]
    for stacked, weight in pairs:
        stacked.copy_(weight)
        if distinct:
            stacked.add_(0.3 * torch.randn_like(stacked))


def reference(dense: nn.Module, block: nn.Module, x: Tensor) -> Tensor:
    """What ``block`` must return for ``x``: dense blocks mixed per token. Differentiable in ``block``'s parameters."""
    params = dict(block.named_parameters())
    router_ED = params.pop(f"{dense.ENTRIES[0]}.router.weight")
    shapes = {name: value.shape for name, value in dense.named_parameters()}
    outputs = []
    for e in range(E):
        own = {
            n: p[e].view(shapes[n]) if p.dim() > len(shapes[n]) or is_expert(dense, n) else p
            for n, p in params.items()
        }
        outputs.append(functional_call(dense, {**dict(dense.named_buffers()), **own}, (x,)))
    shared = {n: p for n, p in params.items() if not is_expert(dense, n)}
    source = functional_call(Source(dense), {f"block.{n}": p for n, p in shared.items()}, (x,))
    weights = mixing(source.movedim(dense.FEATURE_DIM, -1) @ router_ED.t())
    weights = weights.movedim(-1, 0).unsqueeze(dense.FEATURE_DIM)
    return (weights * torch.stack(outputs)).sum(0)


class Source(nn.Module):
    """``block.source`` as a module of its own."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return self.block.source(x)


def is_expert(dense: nn.Module, name: str) -> bool:
    """Whether the parameter belongs to the FFN's linears."""
    return name.split(".")[0] in (*dense.ENTRIES, dense.EXIT)


def mixing(logits: Tensor) -> Tensor:
    """``[..., E]`` weight of each expert: a softmax over the K largest logits, zero elsewhere."""
    chosen = torch.zeros_like(logits, dtype=torch.bool)
    for place in torch.cartesian_prod(*map(torch.arange, logits.shape[:-1])).tolist():
        values = logits[tuple(place)].tolist()
        best = sorted(range(len(values)), key=lambda e: (-values[e], e))[:K]
        chosen[tuple(place)][best] = True
    return torch.softmax(logits.masked_fill(~chosen, float("-inf")), dim=-1)


def inputs(dense: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
    """A random input of the block's shape."""
    return torch.randn(dense.SHAPE, dtype=dtype)


def results(
    forward: Callable[[Tensor], Tensor], parameters: nn.Module, x: Tensor, seed: int = 1
) -> list[Tensor]:
    """The output, the gradient of the input, and that of each parameter (zeros where there is none)."""
    parameters.zero_grad()
    torch.manual_seed(seed)
    x = x.detach().clone().requires_grad_()
    y = forward(x)
    assert type(y) is Tensor
    probe = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    (y * probe).sum().backward()
    grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters.parameters()]
    return [y.detach(), x.grad, *[g.clone() for g in grads]]


def assert_same(got: list[Tensor], expected: list[Tensor], tolerance: float = 1e-5) -> None:
    """Relative to the largest value of each tensor."""
    assert len(got) == len(expected)
    for place, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert a.shape == b.shape and a.dtype == b.dtype, place
        error = (a - b).abs().max().item() / max(b.abs().max().item(), 1e-3) if b.numel() else 0.0
        assert error <= tolerance, f"tensor {place}: {error:.1e}"
