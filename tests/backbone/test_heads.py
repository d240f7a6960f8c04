"""The scalar head: starts at zero, keeps its precision, and changes units."""

import pytest
import torch

from rto_lightning.backbone.heads import ScalarHead


def filled(dtype: torch.dtype = torch.float32) -> ScalarHead:
    """A head that gives 1 * a + 2 * b - 3 * c + 0.5."""
    head = ScalarHead(3, dtype)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[1.0, 2.0, -3.0]]))
        head.bias.fill_(0.5)
    return head


def test_it_starts_at_zero_and_can_learn() -> None:
    head = ScalarHead(3, torch.float32)
    hidden = torch.tensor([[1.0, -2.0, 4.0]])
    assert torch.equal(head(hidden), torch.zeros(1))
    head(hidden).sum().backward()
    assert torch.equal(head.weight.grad, hidden)
    assert torch.equal(head.bias.grad, torch.ones(1))


def test_one_number_for_each_hidden_state() -> None:
    hidden = torch.tensor([[[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]], [[2.0, 0.0, 1.0], [0.0, 5.0, 0.0]]])
    assert torch.equal(filled()(hidden), torch.tensor([[0.5, 0.5], [-0.5, 10.5]]))
    assert filled()(hidden[0, 0]).shape == ()
    assert filled()(hidden[:1, :1]).shape == (1, 1)  # an axis of one is kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_computes_in_its_own_data_type(dtype) -> None:
    head = filled(dtype)
    hidden = torch.tensor([[8.0, 1 + 2**-7, 0.0]], dtype=torch.bfloat16)  # exact in bfloat16
    expected = 10.5 + 2**-6  # but this is not: it takes ten bits
    assert torch.tensor(expected).bfloat16().item() != expected
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.nn.functional.linear(hidden, hidden).dtype == torch.bfloat16  # autocast is on
        number = head(hidden)
    assert number.dtype == dtype
    assert number.item() == expected


def test_rescaling_gives_normalised_units() -> None:
    head = filled()
    hidden = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    before = head(hidden).detach()
    weight = head.weight
    head.rescale(mean=1.5, std=4.0)
    torch.testing.assert_close(head(hidden).detach(), (before - 1.5) / 4.0)
    assert head.weight is weight and weight.requires_grad  # an optimizer still holds it
    head(hidden).sum().backward()
    assert weight.grad is not None and bool(weight.grad.any())
