"""What each gloo rank runs for ``test_distributed``: all scenarios, one after the other, results into one file.

Contract: ``python -m integration.ranks FOLDER`` with ``RANK`` and ``WORLD_SIZE`` set joins the other ranks through a
file in FOLDER and writes ``FOLDER/rank<i>.pt``: by scenario its tensors, or the text of the traceback. Every rank sees
its own batch, ``batch(name, seed=rank)``.

    run_ranks(2, folder)["ddp-aligned"][0]["grads"]      # rank 0's
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

import moefy
from integration.aux_models import AUX, pair
from integration.models import batch, call, dense, moe, randomize, routers, scalar, transformed
from moefy.nn.losses import GlobalCounts, switch

NAMES = ("aligned", "inline", "glu", "encoder")
STEPS = 2
SCENARIOS: dict[str, Callable[[int], dict[str, Any]]] = {}


def scenario(name: str) -> Callable[[Callable[[int], dict[str, Any]]], Callable[[int], dict[str, Any]]]:
    def register(function: Callable[[int], dict[str, Any]]) -> Callable[[int], dict[str, Any]]:
        SCENARIOS[name] = function
        return function

    return register


def whole(value: Tensor) -> Tensor:
    """A DTensor's full value."""
    full = value.full_tensor() if hasattr(value, "full_tensor") else value
    return full.detach().clone()


def bare_name(name: str) -> str:
    return name.removeprefix("_orig_mod.").removeprefix("module.").removeprefix("_orig_mod.")


def train(model: nn.Module, rank: int, name: str, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """``STEPS`` steps with clipping: the first step's gradients, the norms, and where it ends."""
    first: dict[str, Tensor] = {}
    norms = []
    for step in range(STEPS):
        optimizer.zero_grad(set_to_none=True)
        scalar(call(model, batch(name, seed=rank + 10 * step))).backward()
        if step == 0:
            first = {bare_name(n): whole(p.grad) for n, p in model.named_parameters() if p.grad is not None}
        norms.append(whole(nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
        optimizer.step()
    end = {bare_name(n): whole(p) for n, p in model.named_parameters()}
    return {"grads": first, "norms": torch.stack(norms), "end": end}


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)


def single_process(name: str, ranks: int) -> dict[str, Any]:
    """The same training in one process that minimises the mean of the ranks' losses."""
    model = moe(name)
    optimizer = adamw(model)
    first: dict[str, Tensor] = {}
    norms = []
    for step in range(STEPS):
        optimizer.zero_grad(set_to_none=True)
        losses = [scalar(call(model, batch(name, seed=rank + 10 * step))) for rank in range(ranks)]
        torch.stack(losses).mean().backward()
        if step == 0:
            first = {n: p.grad.detach().clone() for n, p in model.named_parameters()}
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), 0.5).detach())
        optimizer.step()
    end = {n: p.detach().clone() for n, p in model.named_parameters()}
    return {"grads": first, "norms": torch.stack(norms), "end": end}


def sharded(name: str) -> nn.Module:
    """FSDP2: each layer, then the rest."""
    model = moe(name)
    for layer in model.layers:
        fully_shard(layer)
    return fully_shard(model)


def _register() -> None:
    for name in NAMES:

        @scenario(f"ddp-{name}")
        def ddp(rank: int, name: str = name) -> dict[str, Any]:
            model = DistributedDataParallel(moe(name))
            return train(model, rank, name, adamw(model))

        @scenario(f"fsdp2-{name}")
        def fsdp2(rank: int, name: str = name) -> dict[str, Any]:
            model = sharded(name)
            return train(model, rank, name, adamw(model))

        @scenario(f"zero-{name}")
        def zero(rank: int, name: str = name) -> dict[str, Any]:
            model = DistributedDataParallel(moe(name))
            optimizer = ZeroRedundancyOptimizer(
                model.parameters(), optimizer_class=torch.optim.AdamW, lr=1e-2, weight_decay=0.1
            )
            return train(model, rank, name, optimizer)

    for name in ("aligned", "inline", "glu"):

        @scenario(f"ddp-compiled-{name}")
        def ddp_compiled(rank: int, name: str = name) -> dict[str, Any]:
            model = torch.compile(DistributedDataParallel(moe(name)), backend="aot_eager")
            return train(model, rank, name, adamw(model))

        @scenario(f"fsdp2-compiled-{name}")
        def fsdp2_compiled(rank: int, name: str = name) -> dict[str, Any]:
            model = moe(name)
            for layer in model.layers:
                layer.compile(backend="aot_eager")
                fully_shard(layer)
            fully_shard(model)
            return train(model, rank, name, adamw(model))

        @scenario(f"fsdp2-checkpoint-{name}")
        def fsdp2_checkpoint(rank: int, name: str = name) -> dict[str, Any]:
            from torch.distributed._composable import checkpoint

            model = moe(name)
            for layer in model.layers:
                checkpoint(layer)
                fully_shard(layer)
            fully_shard(model)
            return train(model, rank, name, adamw(model))

        @scenario(f"accumulate-{name}")
        def accumulate(rank: int, name: str = name) -> dict[str, Any]:
            """Two backwards, the first without communication; each rank sees (rank, rank + 2)."""
            model = DistributedDataParallel(moe(name))
            for part in range(2):
                with model.no_sync() if part == 0 else contextlib.nullcontext():
                    (scalar(model(*batch(name, seed=rank + 2 * part).values())) / 2).backward()
            return {"grads": {bare_name(n): whole(p.grad) for n, p in model.named_parameters()}}

        @scenario(f"idle-rank-{name}")
        def idle_rank(rank: int, name: str = name) -> dict[str, Any]:
            """The last rank has no tokens."""
            model = DistributedDataParallel(moe(name))
            x = batch(name, seed=0)[""]
            model(x if rank == 0 else x[:0]).square().sum().backward()
            return {"grads": {bare_name(n): whole(p.grad) for n, p in model.named_parameters()}}


_register()


def expert_modules() -> moefy.MoE:
    """A layer whose experts are modules."""
    torch.manual_seed(0)
    layer = moefy.MoE(
        8, num_experts=4, experts=lambda: nn.Sequential(nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 8))
    )
    return layer.double()


def expert_modules_batch(rank: int) -> Tensor:
    """Nothing for rank 1, and for rank 0 one token: two of four experts have none at all."""
    x = torch.linspace(-1, 1, 8, dtype=torch.float64)[None]
    return x if rank == 0 else x[:0]


@scenario("idle-expert-modules")
def idle_expert_modules(rank: int) -> dict[str, Any]:
    """Without ``find_unused_parameters``: it hangs where a parameter gets no gradient."""
    model = DistributedDataParallel(expert_modules())
    model(expert_modules_batch(rank)).square().sum().backward()
    return {"grads": {bare_name(n): whole(p.grad) for n, p in model.named_parameters()}}


def biased(rank: int | None, ranks: int, zero: bool = False) -> Tensor:
    """The balancing bias after two steps of two micro-batches; of all ranks' batches for ``rank=None``."""
    torch.manual_seed(0)
    layer = moefy.MoE(8, 12, 4, router=moefy.RouterSpec("bias_balanced", rate=0.1, std=1.0)).double()
    optimizer: torch.optim.Optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    if zero:
        optimizer = ZeroRedundancyOptimizer(layer.parameters(), optimizer_class=torch.optim.SGD, lr=0.0)
    model = layer if rank is None else DistributedDataParallel(layer)
    for step in range(2):
        for micro in range(2):
            for r in range(ranks) if rank is None else (rank,):
                generator = torch.Generator().manual_seed(100 * step + 10 * micro + r)
                x = torch.randn(5 + 3 * r, 8, dtype=torch.float64, generator=generator)
                model(x).sum().backward()
        optimizer.step()
    return layer.router.get_buffer("expert_bias").clone()


@scenario("bias-balanced")
def bias_balanced(rank: int) -> dict[str, Any]:
    """Every micro-batch synchronises, so that DistributedDataParallel broadcasts buffers before each forward."""
    return {"bias": biased(rank, dist.get_world_size())}


@scenario("bias-balanced-zero")
def bias_balanced_zero(rank: int) -> dict[str, Any]:
    """Each rank's share of the optimizer holds the router's weight on one rank alone."""
    return {"bias": biased(rank, dist.get_world_size(), zero=True)}


AUX_KINDS = ("ddp", "fsdp2", "fsdp2-checkpoint", "global")


def _aux_model(kind: str) -> nn.Module:
    from torch.distributed._composable import checkpoint

    aux = dataclasses.replace(AUX, scope="global_batch") if kind == "global" else AUX
    model = pair("inline", aux)[1]
    if kind in ("ddp", "global"):
        return DistributedDataParallel(model)
    for layer in model.layers:
        if kind == "fsdp2-checkpoint":
            checkpoint(layer)
        fully_shard(layer)
    return fully_shard(model)


def _register_aux() -> None:
    for kind in AUX_KINDS:

        @scenario(f"aux-{kind}")
        def aux(rank: int, kind: str = kind) -> dict[str, Any]:
            """Gradients of a step with auxiliary losses, and the load of this rank and of both."""
            model = _aux_model(kind)
            scalar(call(model, batch("inline", seed=rank))).backward()
            found: dict[str, Any] = {
                "grads": {bare_name(n): whole(p.grad) for n, p in model.named_parameters()}
            }
            for name, group in (("mine", None), ("all", dist.group.WORLD)):
                report = moefy.expert_load(model, group=group)
                found[name] = [list(layer.tokens_per_expert) for layer in report.layers]
            return found


_register_aux()


@scenario("router-init")
def router_init(rank: int) -> dict[str, Any]:
    """Ranks with different global seeds, before anything is broadcast."""
    models = {}
    for name in ("aligned", "glu"):
        model = dense(name)
        torch.manual_seed(1000 + rank)
        before = torch.get_rng_state()
        models[name] = transformed(model, name, expert_noise=0.1, seed=3)
        assert torch.equal(before, torch.get_rng_state())
    return {
        f"{name} {key}": value for name, model in models.items() for key, value in model.state_dict().items()
    }


def balance_sample(rank: int, step: int) -> tuple[Tensor, Tensor]:
    """Scores of 4 experts and the 2 best, another table for every rank and micro-batch."""
    generator = torch.Generator().manual_seed(10 * rank + step)
    logits = torch.randn(6, 4, dtype=torch.float64, generator=generator)
    return logits.softmax(-1).requires_grad_(), logits.topk(2).indices


@scenario("global-balance")
def global_balance(rank: int) -> dict[str, Any]:
    """The balance loss of the global batch over two micro-batches, in eager mode and compiled."""
    found: dict[str, Any] = {}

    def loss(scores: Tensor, index: Tensor, past: Tensor | None) -> tuple[Tensor, Tensor]:
        counts = GlobalCounts(dist.group.WORLD, past)
        return switch(scores, index, 4, reduce=counts), counts.totals

    for mode, run in (
        ("eager", loss),
        ("compiled", torch.compile(loss, backend="aot_eager", fullgraph=True)),
    ):
        past = None
        for step in range(2):
            scores, index = balance_sample(rank, step)
            value, past = run(scores, index, past)
            value.backward()
            found[f"{mode} {step}"] = (value.detach(), scores.grad, past)
    return found


@scenario("full-state-dict")
def full_state_dict(rank: int) -> dict[str, Any]:
    """A checkpoint of the sharded model, in the usual way."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    return get_model_state_dict(sharded("glu"), options=StateDictOptions(full_state_dict=True))


@scenario("load-sharded")
def load_sharded(rank: int) -> dict[str, Any]:
    """A full checkpoint goes into a sharded model whose experts were different."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    model = moe("inline")
    randomize(model, seed=9)
    for layer in model.layers:
        fully_shard(layer)
    fully_shard(model)
    state = moe("inline").state_dict() if rank == 0 else {}
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, state, options=options)
    with torch.no_grad():
        return {"output": call(model, batch("inline"))}


@scenario("refusals")
def refusals(rank: int) -> dict[str, Any]:
    """Transforming too late is a named error, and changes nothing."""
    found: dict[str, Any] = {}
    wrapped = DistributedDataParallel(dense("aligned"))
    late = dense("aligned")
    for layer in late.layers:
        fully_shard(layer)
    fully_shard(late)
    for key, model in (("ddp", wrapped), ("fsdp2", late)):
        before = {n: whole(v) for n, v in model.state_dict().items()}
        try:
            moefy.transform(model, 4, example_args=(batch("aligned")[""],))
            found[key] = "no error"
        except Exception as error:
            found[key] = f"{type(error).__name__}: {error}"
        after = {n: whole(v) for n, v in model.state_dict().items()}
        same = before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
        found[f"{key} unchanged"] = same
    return found


@scenario("mixed-precision")
def mixed_precision(rank: int) -> dict[str, Any]:
    """FSDP2 computes in bf16 and keeps fp32 weights."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    found = {}
    for name in ("aligned", "glu"):
        model = moe(name, torch.float32)
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for layer in model.layers:
            fully_shard(layer, mp_policy=policy)
        fully_shard(model, mp_policy=policy)
        output = call(model, batch(name, dtype=torch.float32))
        scalar(output.float()).backward()
        found[f"{name} dtype"] = str(output.dtype)
        found[f"{name} grads"] = {n: whole(p.grad) for n, p in model.named_parameters()}
        found[f"{name} routers"] = len(routers(model))
    return found


def run_ranks(size: int, folder: Path, timeout: float = 240) -> dict[str, list[Any]]:
    """Start ``size`` ranks on this machine and collect, by scenario, what each rank found."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": str(size),
    }
    command = [sys.executable, "-m", "integration.ranks", str(folder)]
    processes = []
    for rank in range(size):
        log = (folder / f"rank{rank}.log").open("w")
        processes.append(
            subprocess.Popen(
                command,
                env={**environment, "RANK": str(rank)},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        )
    try:
        codes = [process.wait(timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    logs = "\n".join((folder / f"rank{rank}.log").read_text()[-3000:] for rank in range(size))
    assert codes == [0] * size, f"ranks ended with {codes}:\n{logs}"
    results = [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(size)]
    return {name: [result[name] for result in results] for name in SCENARIOS}


def main() -> None:
    torch.set_num_threads(1)
    folder, rank, size = Path(sys.argv[1]), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting-point",
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=60),
    )
    results: dict[str, Any] = {}
    for name, function in SCENARIOS.items():
        torch.manual_seed(rank)
        try:
            results[name] = function(rank)
        except Exception:
            results[name] = traceback.format_exc()
        dist.barrier()
    torch.save(results, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
