"""Activation checkpointing: the same bits, from one backward pass and from two, and less memory."""

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call

from trainer.losses import penalties
from trainer.networks import (
    AutoencoderConfig,
    EncoderConfig,
    GeneratorConfig,
    GlobalDiscriminatorConfig,
    ImageShape,
    KLAutoencoderConfig,
    PatchDiscriminatorConfig,
)

SHAPE = ImageShape(3, 32, 32)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def loss(network: Callable[..., Any], name: str) -> Tensor:
    """Of every output; discriminators also with R1, which differentiates them twice."""
    image = noise(2, *SHAPE)
    if name == "discriminator":
        image.requires_grad_()
        logits = network(image)
        return penalties.r1(logits, image).mean() + logits.square().mean()
    inputs = {
        "autoencoder": (image, noise(2, 4, 8, 8, seed=1), noise(3, 4, 8, 8, seed=2), True),
        "generator": (noise(2, 4, 8, 8, seed=1),),
        "encoder": (image,),
    }
    out = network(*inputs[name])
    return torch.stack([value.square().sum() for value in (out.values() if isinstance(out, dict) else [out])]).sum()


def build(config: Any, *, recompute: bool) -> nn.Module:
    torch.manual_seed(0)
    decodes = isinstance(config, (AutoencoderConfig, GeneratorConfig, KLAutoencoderConfig))
    more = {"parameters": 3} if decodes else {}
    network: nn.Module = dataclasses.replace(config, recompute=recompute).build(image=SHAPE, **more)
    return network.to(memory_format=torch.channels_last)


def taken(network: nn.Module, name: str) -> list[Tensor]:
    """The loss and the gradient of each parameter."""
    value = loss(network, name)
    return [value.detach(), *torch.autograd.grad(value, list(network.parameters()))]


MAP = {"latent_shape": "map", "latent": 4}
KL = {"width": 32, "multipliers": (1, 1, 1)}
NETWORKS = st.one_of(
    st.tuples(
        st.sampled_from(["autoencoder", "generator", "encoder"]),
        st.builds(dict, blocks=st.integers(0, 2), norm=st.sampled_from(["group", "none"]), width=st.just(4)),
    ),
    st.tuples(
        st.just("global"),
        st.builds(dict, blocks=st.integers(0, 2), norm=st.sampled_from(["group", "none"]), width=st.just(4)),
    ),
    st.tuples(
        st.just("kl"),
        st.builds(
            lambda blocks, attention: {**KL, "blocks": blocks, "attention": attention},
            blocks=st.integers(1, 2),
            attention=st.sampled_from([(), (2,), (1, 4)]),
        ),
    ),
    st.tuples(st.just("patch"), st.builds(dict, layers=st.integers(1, 3), norm=st.sampled_from(["group", "none"]))),
)
KINDS: dict[str, Any] = {
    "autoencoder": AutoencoderConfig,
    "kl": KLAutoencoderConfig,
    "generator": GeneratorConfig,
    "encoder": EncoderConfig,
    "global": GlobalDiscriminatorConfig,
    "patch": PatchDiscriminatorConfig,
}


@given(drawn=NETWORKS)
@settings(max_examples=25, deadline=None)
def test_losses_and_gradients_are_bit_equal_through_penalties_too(drawn: tuple[str, dict[str, Any]]) -> None:
    kind, fields = drawn
    name = {"kl": "autoencoder", "global": "discriminator", "patch": "discriminator"}.get(kind, kind)
    config = KINDS[kind](**fields, **(MAP if kind == name else {}))
    kept, again = (taken(build(config, recompute=on), name) for on in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))


def test_names_of_weights_do_not_depend_on_it() -> None:
    config = AutoencoderConfig(blocks=1)
    assert build(config, recompute=True).state_dict().keys() == build(config, recompute=False).state_dict().keys()


def test_weights_that_stood_in_for_the_networks_own_are_those_of_its_backward() -> None:
    """As a penalty's phase under stage 3 of ZeRO: the network's own are back before backward, and hold nothing."""
    own = build(GlobalDiscriminatorConfig(width=4, blocks=1), recompute=True)
    other = build(GlobalDiscriminatorConfig(width=4, blocks=1), recompute=False)
    wanted = taken(other, "discriminator")
    weights = {name: p.detach().clone().requires_grad_() for name, p in other.named_parameters()}
    own.to("meta")
    value = loss(lambda image: functional_call(own, weights, (image,)), "discriminator")
    found = [value.detach(), *torch.autograd.grad(value, list(weights.values()))]
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize(
    ("config", "share"),
    [
        (AutoencoderConfig(width=8, blocks=0, latent_shape="map", latent=4), 0.75),
        (AutoencoderConfig(width=8, blocks=2, latent_shape="map", latent=4), 0.4),
        (KLAutoencoderConfig(width=32, multipliers=(1, 1, 1)), 0.3),
    ],
)
def test_less_is_kept_for_backward(config: Any, share: float) -> None:
    held = []
    for on in (False, True):
        network = build(config, recompute=on)
        own = {p.untyped_storage().data_ptr() for p in network.parameters()}
        kept: dict[int, int] = {}

        def pack(tensor: Tensor, kept: dict[int, int] = kept, own: set[int] = own) -> Tensor:
            storage = tensor.untyped_storage()
            kept.update({storage.data_ptr(): storage.nbytes()} if storage.data_ptr() not in own else {})
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            value = loss(network, "autoencoder")
        held.append(sum(kept.values()))
        del value
    assert held[1] < share * held[0]


def test_without_gradients_nothing_is_kept_and_nothing_changes() -> None:
    config = AutoencoderConfig(blocks=1, **MAP)  # type: ignore[arg-type]
    with torch.no_grad():
        kept, again = (loss(build(config, recompute=on), "autoencoder") for on in (False, True))
    assert torch.equal(kept, again)


@pytest.mark.slow
def test_a_compiled_network_recomputes_too() -> None:
    config = AutoencoderConfig(width=4, multipliers=(1, 2), blocks=1)
    image, eps = noise(2, 3, 16, 16), noise(2, 16, seed=1)
    gradients = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about what its compiler still uses
        for on in (False, True):
            torch.manual_seed(0)
            network = dataclasses.replace(config, recompute=on).build(image=ImageShape(3, 16, 16), parameters=3)
            if on:
                network.compile()
            value = network(image, eps)["reconstruction"].square().sum()
            gradients.append(torch.autograd.grad(value, list(network.decoder.parameters())))
    for wanted, found in zip(*gradients, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-4)  # the compiler sums in another order
