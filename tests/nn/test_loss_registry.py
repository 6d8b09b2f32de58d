"""A balance loss is one decorated formula; its name is refused or known from there on, wherever it is written."""

from __future__ import annotations

import inspect
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import moefy
from moefy.config import MoEConfig
from moefy.config.declared import BALANCE
from moefy.errors import ConfigError
from moefy.nn import losses
from moefy.nn.losses import BALANCE_LOSSES, Assignment, balance_loss, switch

ROOT = Path(__file__).resolve().parents[2]
D, E, K = 8, 4, 2


@pytest.fixture
def mine() -> Iterator[str]:
    """A loss that is registered for one test."""

    @balance_loss("mine", "also_mine", counted=False)
    def three_switch(scores_TE: Tensor, slots: Assignment, *, times: float = 3.0) -> Tensor:
        """``times * switch``."""
        return times * switch.formula(scores_TE, slots)

    yield "mine"
    for name in ("mine", "also_mine"):
        del BALANCE_LOSSES[name], BALANCE[name]


def test_a_loss_is_one_formula(mine: str) -> None:
    loss = BALANCE_LOSSES[mine]
    scores, index = torch.rand(6, E).softmax(-1), torch.randint(E, (6, K))
    assert loss is BALANCE_LOSSES["also_mine"] and loss.__doc__ == "``times * switch``."
    torch.testing.assert_close(loss(scores, index, E), 3 * switch(scores, index, E))
    torch.testing.assert_close(loss(scores, index, E, times=5.0), 5 * switch(scores, index, E))


def test_its_name_works_everywhere(mine: str) -> None:
    aux = moefy.AuxLoss(weight=1.0, balance=mine)
    config = MoEConfig(num_experts=E, aux_loss=aux)
    assert MoEConfig.from_json(config.to_json()) == config
    x = torch.randn(6, D)
    values = []
    for name in (mine, "switch"):
        layer = moefy.MoE(D, 16, E, aux_loss=moefy.AuxLoss(weight=1.0, balance=name))
        layer(x)
        values.append(layer.l_aux)
    torch.testing.assert_close(values[0], 3 * values[1])
    with pytest.raises(ConfigError, match=r"aux_loss\.scope"):  # it said that it counts nothing
        moefy.AuxLoss(balance=mine, scope="global_batch")


@pytest.mark.parametrize(
    "program",
    [
        "import moefy; moefy.AuxLoss(balance='mixtrol')",
        "import moefy; moefy.MoEConfig(num_experts=2, aux_loss=moefy.AuxLoss(balance='mixtrol'))",
        "from moefy.config import AuxLoss; AuxLoss(balance='mixtrol')",
        "import moefy; moefy.MoEConfig.from_dict({'num_experts': 2, 'aux_loss': {'balance': 'mixtrol'}})",
        "import moefy; moefy.MoE(4, 8, 2, aux_loss=moefy.AuxLoss(balance='mixtrol'))",
        "import moefy, torch; moefy.transform(torch.nn.Linear(2, 2), num_experts=2, "
        "aux_loss=moefy.AuxLoss(balance='mixtrol'))",
    ],
)
def test_a_wrong_name_is_refused_before_any_work_in_a_fresh_process(program: str) -> None:
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    last = done.stderr.strip().splitlines()[-1]
    assert "ConfigError: aux_loss.balance" in last and "did you mean 'mixtral'" in last, done.stderr


def test_a_loss_of_a_pickle_that_is_not_registered_here_is_refused_by_the_layer(mine: str) -> None:
    aux = pickle.dumps(moefy.AuxLoss(balance=mine))
    facts, loss = BALANCE.pop(mine), BALANCE_LOSSES.pop(mine)
    try:
        with pytest.raises(ConfigError, match=r"aux_loss\.balance"):
            moefy.MoE(D, 16, E, aux_loss=pickle.loads(aux))
    finally:
        BALANCE[mine], BALANCE_LOSSES[mine] = facts, loss


def test_a_name_that_is_taken() -> None:
    def other(scores_TE: Tensor, slots: Assignment) -> Tensor:
        return scores_TE.sum()

    with pytest.raises(ConfigError, match="a name that switch does not have"):
        balance_loss("switch")(other)
    assert BALANCE_LOSSES["switch"] is switch


def test_the_signature_is_that_of_the_call(mine: str) -> None:
    names = ["scores_TE", "index_TK", "num_experts", "mask_T", "reduce", "offsets_E", "options"]
    assert all(list(inspect.signature(loss).parameters) == names for loss in BALANCE_LOSSES.values())


def test_a_loss_that_counts_nothing_refuses_a_wider_scope(mine: str) -> None:
    scores, index = torch.rand(6, E).softmax(-1), torch.randint(E, (6, K))
    for name in (mine, "importance"):
        with pytest.raises(ConfigError, match=r"reduce: .* counts no slots; .*'switch'.* do"):
            BALANCE_LOSSES[name](scores, index, E, reduce=lambda totals: totals)


def test_old_names_of_losses_stay() -> None:
    assert losses.load is losses.smooth_load
