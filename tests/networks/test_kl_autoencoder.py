"""The KL autoencoder's parts, each against its definition; tests/test_interchange.py holds the whole against
diffusers'."""

import torch
from torch import Tensor
from torch.nn import functional

from trainer.kernels.group_norm_silu import group_norm_silu
from trainer.networks import ImageShape, KLAutoencoderConfig
from trainer.networks.kl_autoencoder import Attention, Downsample, KLEncoder

IMAGE = ImageShape(3, 32, 48)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_f8_of_the_defaults_has_the_published_size() -> None:
    config = KLAutoencoderConfig()
    with torch.device("meta"):
        network = config.build(image=ImageShape(3, 256, 256), parameters=3)
    assert sum(p.numel() for p in network.parameters()) == 83_653_863
    assert config.factor == 8 and network.latent_size == config.latent_size(ImageShape(3, 256, 256)) == (4, 32, 32)


def test_normalisation_and_activation_are_those_of_their_definition() -> None:
    x, weight, bias = 3 * noise(2, 64, 5, 7) + 1, noise(64, seed=1), noise(64, seed=2)
    groups = x.view(2, 32, 2 * 5 * 7)
    deviation = (groups.var(2, unbiased=False, keepdim=True) + 1e-6).sqrt()
    normal = ((groups - groups.mean(2, keepdim=True)) / deviation).view_as(x)
    y = normal * weight.view(1, -1, 1, 1) + bias.view(1, -1, 1, 1)
    torch.testing.assert_close(group_norm_silu(x, 32, weight, bias, 1e-6), y * torch.sigmoid(y), rtol=0, atol=1e-12)


def test_attention_is_a_softmax_over_all_places_by_one_head() -> None:
    torch.manual_seed(0)
    layer = Attention(64).double()
    x = noise(2, 64, 3, 5)
    with torch.no_grad():
        places = layer.group_norm(x).flatten(2).transpose(1, 2)
        query, key, value = layer.to_q(places), layer.to_k(places), layer.to_v(places)
        seen = torch.softmax(query @ key.transpose(1, 2) / 64**0.5, dim=2) @ value
        wanted = x + layer.to_out(seen).transpose(1, 2).reshape_as(x)
        torch.testing.assert_close(layer(x), wanted, rtol=0, atol=1e-12)


def test_downsampling_sees_a_row_below_and_a_column_on_the_right() -> None:
    layer = Downsample(1).double()
    x = noise(1, 1, 4, 6).requires_grad_()
    out = layer(x)
    assert out.shape == (1, 1, 2, 3)
    (seen,) = torch.autograd.grad(out[0, 0, 0, 0], x)
    assert (seen[0, 0] != 0).nonzero().tolist() == [[row, column] for row in range(3) for column in range(3)]


def test_the_last_convolution_maps_the_features_to_the_reconstruction() -> None:
    """What the balance of kind last_layer takes for granted."""
    torch.manual_seed(0)
    network = KLAutoencoderConfig(width=32, multipliers=(1, 1, 2), blocks=1).build(image=IMAGE, parameters=3).double()
    out = network(noise(2, *IMAGE), noise(2, 4, 8, 12), noise(1, 4, 8, 12), features=True, moments=True)
    again = functional.conv2d(out["features"], network.last_layer, network.decoder.head.bias, padding=1)
    torch.testing.assert_close(again, out["reconstruction"], rtol=0, atol=1e-12)
    assert {name: tuple(value.shape) for name, value in out.items()} == {
        "kl": (2,),
        "moments": (2, 8, 8, 12),
        "features": (2, 32, 32, 48),
        "reconstruction": (2, 3, 32, 48),
        "sample": (1, 3, 32, 48),
    }


def test_the_posterior_is_the_moments_in_halves_the_second_clamped() -> None:
    torch.manual_seed(0)
    network = KLAutoencoderConfig(width=32, multipliers=(1, 1), blocks=1).build(image=IMAGE, parameters=3).double()
    assert isinstance(network.encoder, KLEncoder)
    with torch.no_grad():
        network.encoder.quant_conv.weight.mul_(300)
        moments = network.encoder.moments(noise(2, *IMAGE))
        mean, logvar = network.encode(noise(2, *IMAGE))
    assert torch.equal(mean, moments[:, :4]) and torch.equal(logvar, moments[:, 4:].clamp(-30, 20))
    assert moments[:, 4:].min() < -30 and moments[:, 4:].max() > 20


def test_every_parameter_is_reached() -> None:
    config = KLAutoencoderConfig(width=32, multipliers=(1, 2, 1), blocks=1, attention=(1, 4))
    network = config.build(image=ImageShape(3, 16, 16), parameters=3, learn_scale=True).double()
    out = network(noise(2, 3, 16, 16), noise(2, 4, 4, 4))
    sum((value.square() + value).sum() for value in out.values()).backward()
    unreached = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert unreached == []
