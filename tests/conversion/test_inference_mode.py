"""Conversions inside torch.inference_mode(): what they make are ordinary tensors, to be trained and updated later."""

import pytest
import torch
from model_zoo import CONVERSIONS, EVERY_CONVERSION, X, convnet
from torch import nn

from precisebn import convert_shared_head, convert_to_batchnorm, update_bn_stats
from precisebn.nn import use_domain


def inference_tensors(model: nn.Module) -> list[str]:
    return [name for name, t in (*model.named_parameters(), *model.named_buffers()) if t.is_inference()]


@EVERY_CONVERSION
@pytest.mark.filterwarnings("ignore:domain=0 chooses nothing")
@pytest.mark.parametrize("mixed", [False, True], ids=["one dtype", "weights of another dtype"])
def test_what_is_made_and_what_leads_back_are_ordinary_tensors(convert, mixed):
    model = convnet()
    if mixed:
        for layer in (model[1], model[7]):
            layer.weight.data, layer.bias.data = layer.weight.data.double(), layer.bias.data.double()
    with torch.inference_mode():
        converted = convert(model)
        assert inference_tensors(converted) == []
        assert inference_tensors(convert_to_batchnorm(converted, domain=0)) == []


@pytest.mark.parametrize("conversion", sorted(CONVERSIONS.keys() - {"frozen", "frozen, trainable affine", "cycle"}))
def test_they_are_trained_and_updated_as_ever(conversion):
    model = convnet()
    with torch.inference_mode():
        CONVERSIONS[conversion](model)
    with use_domain(0):
        update_bn_stats(model, [X, X + 1], None, process_group=False)
        model.eval()(X).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("how", ["concat", "domain", "cycle"])
def test_so_are_those_of_a_shared_head(how):
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tower = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())

        def forward(self, xs: list[torch.Tensor]) -> list[torch.Tensor]:
            return [self.tower(x) for x in xs]

    head = Head()
    with torch.inference_mode():
        convert_shared_head(head, how, levels=2)
        assert inference_tensors(head) == []
        convert_to_batchnorm(head, domain=None if how == "concat" else 0)
        assert inference_tensors(head) == []
