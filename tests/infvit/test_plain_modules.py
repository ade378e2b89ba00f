"""Rewrites apply only to plain modules: a modified module keeps its function."""

from __future__ import annotations

import dataclasses
import types

import pytest
import torch
from support import TINY, relative_error
from torch import nn
from torch.nn.utils import parametrize

from infexport.conversion.image_model import ImageModel
from infexport.errors import InfexportError
from infvit.fold import fold
from infvit.network import InfViT
from infvit.rewrite import is_plain
from infvit.stages import make_stages

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
PLACES = (
    "patch_embed", "encoder", "encoder.norm", "encoder.layers.0", "encoder.layers.1", "encoder.layers.0.norm1",
    "encoder.layers.1.norm1", "encoder.layers.1.norm2", "encoder.layers.1.ff", "encoder.layers.1.ff.0",
    "encoder.layers.1.ff.3", *(
        f"encoder.layers.{layer}.attn{part}"
        for layer in (0, 1)
        for part in ("", ".q_proj", ".k_proj", ".v_proj", ".out_proj", ".dense")
    ),
)  # fmt: skip


def mixed(x: torch.Tensor) -> torch.Tensor:
    """Module whose result depends on every token or patch."""
    return x * (1 + torch.tanh(x).mean(1, keepdim=True))


class Adapter(nn.Linear):
    """Linear layer that computes with more than its weights, like a low-rank adapter."""

    def forward(self, x):
        return super().forward(x) + torch.sin(3 * super().forward(x))


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


def adapt(module: nn.Module) -> bool:
    if type(module) is nn.Linear:
        module.__class__ = Adapter
    return type(module) is Adapter


def parametrise(module: nn.Module) -> bool:
    if type(module) in (nn.Linear, nn.LayerNorm, nn.Conv2d):
        parametrize.register_parametrization(module, "weight", Doubled())
        return True
    return False


def replace_forward(module: nn.Module) -> bool:
    usual = module.forward
    module.forward = types.MethodType(lambda self, x: mixed(usual(x)), module)
    return True


def hook(module: nn.Module) -> bool:
    module.register_forward_hook(lambda module, args, output: mixed(output))
    return True


def hook_before(module: nn.Module) -> bool:
    module.register_forward_pre_hook(lambda module, args: (mixed(args[0]),))
    return True


class Quantised(torch.Tensor):
    """Weight with its own multiplication in torch, like those of torchao."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            if func is torch.Tensor.detach:
                return func(*args).as_subclass(cls)
            out = func(*args, **(kwargs or {}))
            return torch.sin(3 * out) if func is nn.functional.linear else out


def quantise(module: nn.Module) -> bool:
    if type(module) is nn.Linear:
        module._parameters["weight"] = module.weight.detach().as_subclass(Quantised)
    return type(module) is nn.Linear


CHANGES = (adapt, parametrise, replace_forward, hook, hook_before, quantise)


def network_of(family: str) -> InfViT:
    torch.manual_seed(0)
    network = InfViT(dataclasses.replace(TINY[family], attention_dense=True)).double().eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.5)
    return network


def answers(network: InfViT, folded: bool) -> torch.Tensor:
    image = torch.randint(0, 256, (2, 24, 40, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    with torch.no_grad():
        if folded:
            return ImageModel(fold(network), MEAN, STD, "uint8", fold=True)(image)[0]
        mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (MEAN, STD))
        return network((image.permute(0, 3, 1, 2).double() / 255 - mean) / std)


@pytest.mark.parametrize("family", TINY)
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_whatever_is_done_to_a_module_is_done_in_the_folded_network(change, family):
    usual = answers(network_of(family), folded=False)
    assert relative_error(answers(network_of(family), folded=True), usual) <= 1e-12
    for place in PLACES:
        network = network_of(family)
        if change(network.get_submodule(place)):
            plain = answers(network, folded=False)
            assert relative_error(answers(network, folded=True), plain) <= 1e-12, place
            assert relative_error(plain, usual) > 1e-6, f"{place}: the change changes nothing"


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("place", ["encoder.layers.0.norm1", "encoder.layers.0.attn.q_proj", "encoder.layers.0.ff.0"])
def test_a_module_that_may_mix_tokens_is_not_given_chunks_of_them(change, place):
    network = network_of("linear")
    assert make_stages(fold(network), nn.Identity())
    if change(network.get_submodule(place)):
        with pytest.raises(ValueError, match=place.rpartition(".")[0]):
            make_stages(fold(network), nn.Identity())


def test_a_patch_embedding_of_overlapping_patches_keeps_its_normalisation():
    network = network_of("linear")
    network.patch_embed = nn.Conv2d(3, 24, 8, stride=8, padding=4, padding_mode="reflect").double()
    assert relative_error(answers(network, folded=True), answers(network, folded=False)) <= 1e-12


@pytest.mark.parametrize("change", [replace_forward, hook, hook_before], ids=lambda change: change.__name__)
def test_a_network_whose_call_is_another_is_refused(change):
    """An image model calls parts of it, and would leave out what comes before or after."""
    network = network_of("linear")
    change(network)
    with pytest.raises(InfexportError, match="a forward of its own"):
        ImageModel(fold(network), MEAN, STD, "uint8", fold=True)


def test_hooks_on_every_module_are_seen():
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: None)
    try:
        assert not is_plain(nn.Linear(2, 2), nn.Linear)
    finally:
        handle.remove()
    assert is_plain(nn.Linear(2, 2), nn.Linear)
