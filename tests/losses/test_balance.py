"""The weight of a balanced loss: the papers' ratio of gradient norms, one value for every split of the batch."""

import pytest
import torch
from torch import nn

from trainer.losses.balance import Balance, BalanceConfig

LIKE = torch.zeros(())
OFFSET = Balance.OFFSET


def gradients(seed: int, batch: int = 4, channels: int = 3) -> torch.Tensor:
    return torch.randn(batch, channels, 6, 5, generator=torch.Generator().manual_seed(seed))


def measured(
    balance: Balance, reference: torch.Tensor, group: torch.Tensor, features=None, *, parts: int = 1, world: int = 1
):
    """One update: each micro-batch hands in its gradients, `world` equal ranks are summed."""
    for part in range(parts):
        rows = slice(part * len(reference) // parts, (part + 1) * len(reference) // parts)
        given = None if features is None else features[rows]
        balance.observe(Balance.REFERENCE, reference[rows], given)
        balance.observe("adversarial", group[rows], given)
    balance.update(lambda total: total * world, world=world)
    return balance.ratio("adversarial", like=LIKE).item()


def test_without_a_balance_the_weight_is_one_from_the_first_update() -> None:
    balance = Balance(BalanceConfig(kind="none"))
    assert not balance.active
    assert balance.ratio("adversarial", like=LIKE).item() == 1.0


@pytest.mark.parametrize("kind", ["output", "last_layer"])
def test_a_group_weighs_nothing_until_both_norms_are_known(kind) -> None:
    balance = Balance(BalanceConfig(kind=kind))
    assert balance.ratio("adversarial", like=LIKE).item() == 0.0
    balance.observe(Balance.REFERENCE, gradients(0), torch.randn(4, 2, 6, 5))
    balance.update(lambda total: total, world=1)
    assert balance.ratio("adversarial", like=LIKE).item() == 0.0


def test_at_the_output_the_ratio_is_that_of_the_norms_there() -> None:
    reference, group = gradients(0), 7 * gradients(1)
    found = measured(Balance(BalanceConfig(kind="output", smoothing=0.0)), reference, group)
    assert found == pytest.approx((reference.norm() / group.norm()).item(), rel=1e-5)


def test_at_the_last_layer_the_ratio_is_that_of_the_gradients_of_its_weights() -> None:
    layer = nn.Conv2d(2, 3, 3, padding=1)
    features = torch.randn(4, 2, 6, 5, generator=torch.Generator().manual_seed(2))
    reference, group = gradients(0), gradients(1)
    norms = [torch.autograd.grad(layer(features), layer.weight, g)[0].norm() for g in (reference, group)]
    found = measured(Balance(BalanceConfig(kind="last_layer", smoothing=0.0)), reference, group, features)
    assert found == pytest.approx((norms[0] / (norms[1] + OFFSET)).item(), rel=1e-5)  # Esser et al. 2021, eq. 7


@pytest.mark.parametrize("kind", ["output", "last_layer"])
def test_micro_batches_and_their_sum_give_one_ratio(kind) -> None:
    features = torch.randn(4, 2, 6, 5, generator=torch.Generator().manual_seed(2))
    config = BalanceConfig(kind=kind, smoothing=0.0)
    whole, halves = (measured(Balance(config), gradients(0), gradients(1), features, parts=parts) for parts in (1, 2))
    assert halves == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize("kind", ["output", "last_layer"])
def test_two_ranks_with_half_the_batch_have_the_norms_of_one_rank_with_all_of_it(kind) -> None:
    features = torch.randn(4, 2, 6, 5, generator=torch.Generator().manual_seed(2))
    config = BalanceConfig(kind=kind, smoothing=0.0)
    one = Balance(config)
    measured(one, gradients(0), gradients(1), features)
    ranks = [Balance(config), Balance(config)]
    handed: list[torch.Tensor] = []
    for collect in (True, False):  # first what each hands in, then the sum of both
        for rank, balance in enumerate(ranks):
            rows = slice(2 * rank, 2 * rank + 2)
            for name, seed in ((Balance.REFERENCE, 0), ("adversarial", 1)):
                # a rank's gradient is that of the mean over its own samples: twice the share of the whole
                balance.observe(name, 2 * gradients(seed)[rows], features[rows])

            def reduce(mine: torch.Tensor, collect: bool = collect) -> torch.Tensor:
                if collect:
                    handed.append(mine)
                return sum(handed, torch.zeros_like(mine))

            balance.update(reduce, world=2)
    for balance in ranks:
        for name, norm in one.norms.items():
            assert balance.norms[name].item() == pytest.approx(norm.item(), rel=1e-5)


def test_norms_are_smoothed_and_the_first_is_taken_as_it_is() -> None:
    balance = Balance(BalanceConfig(kind="output", smoothing=0.9))
    unit = torch.ones(1, 1, 1, 1)
    measured(balance, unit, unit)
    assert balance.norms["adversarial"].item() == pytest.approx(1.0)
    measured(balance, unit, 11 * unit)
    assert balance.norms["adversarial"].item() == pytest.approx(0.9 + 1.1)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_leaves_the_average_as_it_was(bad: float) -> None:
    balance = Balance(BalanceConfig(kind="output", smoothing=0.5))
    before = measured(balance, gradients(0), gradients(1))
    poisoned = gradients(1)
    poisoned[0, 0, 0, 0] = bad
    assert measured(balance, gradients(0), poisoned) == pytest.approx(before)


def test_the_ratio_has_a_ceiling() -> None:
    found = measured(Balance(BalanceConfig(kind="output", ceiling=5.0)), gradients(0), 1e-6 * gradients(1))
    assert found == 5.0


def test_an_update_in_which_nothing_was_measured_changes_nothing() -> None:
    balance = Balance(BalanceConfig(kind="output"))
    before = measured(balance, gradients(0), gradients(1))
    balance.update(lambda total: pytest.fail("no rank has anything to sum"), world=1)
    assert balance.ratio("adversarial", like=LIKE).item() == before


def test_what_is_exported_and_loaded_goes_on_bit_for_bit() -> None:
    one, other = (Balance(BalanceConfig(kind="output")) for _ in range(2))
    measured(one, gradients(0), gradients(1))
    other.load(one.export(), torch.device("cpu"))
    assert measured(one, gradients(2), gradients(3)) == measured(other, gradients(2), gradients(3))


@pytest.mark.parametrize("smoothing", [-0.1, 1.0])
def test_a_smoothing_that_never_learns_is_refused_by_name(smoothing: float) -> None:
    with pytest.raises(ValueError, match=r"^smoothing: "):
        BalanceConfig(smoothing=smoothing)


def test_a_first_measure_that_is_not_finite_does_not_count_as_the_first() -> None:
    balance, healthy = (Balance(BalanceConfig(kind="output", smoothing=0.9)) for _ in range(2))
    assert measured(balance, gradients(0), gradients(1) * float("nan")) == 0.0
    assert measured(balance, gradients(0), gradients(1)) == measured(healthy, gradients(0), gradients(1))
