"""A balance loss is one decorated formula; its name is refused or known from there on, wherever it is written."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import moefy
from moefy.config import MoEConfig
from moefy.config.aux_loss import BALANCE
from moefy.errors import ConfigError
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
        "from moefy.config import AuxLoss; old = AuxLoss(balance='mixtrol'); "
        "import moefy; moefy.MoE(4, 8, 2, aux_loss=old)",
        "from moefy.config import MoEConfig; old = MoEConfig.from_dict({'num_experts': 2, 'aux_loss': "
        "{'balance': 'mixtrol'}}); import moefy, torch; moefy.transform(torch.nn.Linear(2, 2), config=old)",
    ],
)
def test_a_wrong_name_is_refused_before_any_work_in_a_fresh_process(program: str) -> None:
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    last = done.stderr.strip().splitlines()[-1]
    assert "ConfigError: aux_loss.balance" in last and "did you mean 'mixtral'" in last, done.stderr
