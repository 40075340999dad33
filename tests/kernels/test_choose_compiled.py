"""What torch.compile makes of an operation serves a step as the plain formula does."""

import pytest
import torch
from torch import Tensor

from trainer.kernels.choose import compiled


def _squares(x: Tensor) -> Tensor:
    return (x.exp() * x).square().sum(1)


@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")  # inductor's own
def test_a_compiled_backward_may_retain_its_graph_and_run_again() -> None:
    """Balanced losses take each group's gradient by itself."""
    x = torch.linspace(-1.0, 1.0, 12).view(2, 6).requires_grad_()
    (true,) = torch.autograd.grad(_squares(x).sum(), x)
    loss = compiled(_squares)(x).sum()
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    (second,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(first, true)
    assert torch.equal(first, second)
