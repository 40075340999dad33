"""The KL autoencoder and diffusers' AutoencoderKL: one's weights in the other give the same latents and images."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from tests import starts
from trainer import checkpoint, interchange
from trainer.data import Stream
from trainer.generate import load
from trainer.networks import Autoencoder, ImageShape, KLAutoencoderConfig
from trainer.networks.kl_autoencoder import KLEncoder

if sys.version_info < (3, 11):
    pytest.skip("no diffusers there that goes with the tested huggingface_hub", allow_module_level=True)
from diffusers import AutoencoderKL

KINDS: dict[str, dict[str, Any]] = {
    "f4": {"multipliers": (1, 2, 4), "latent": 3},
    "f8": {"multipliers": (1, 2, 4, 4), "latent": 4},
    "f16": {"multipliers": (1, 1, 2, 2, 4), "latent": 16, "attention": (16,)},
}
FULL = {"f4": 55_312_063, "f8": 83_653_863, "f16": 69_610_963}
IMAGE = ImageShape(3, 32, 48)


def config(kind: str, **more: Any) -> KLAutoencoderConfig:
    return KLAutoencoderConfig(**{"width": 32, "blocks": 1, **KINDS[kind], **more})


def shaken(network: Any) -> Any:
    """Every weight and bias away from 0 and 1, so that one which is lost or exchanged shows."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return network


def ours(kind: str) -> Autoencoder:
    network: Autoencoder = shaken(config(kind).build(image=IMAGE, parameters=3, learn_scale=True))
    return network


def theirs(folder: Path) -> Any:
    """As a user of diffusers loads it, strictly."""
    network, said = AutoencoderKL.from_pretrained(folder, output_loading_info=True, local_files_only=True)
    assert not any(said.values()), said
    return network


def assert_equal(mine: Autoencoder, other: Any) -> None:
    """Moments, posterior, images of both; in float64 too, where nothing but another formula would show."""
    image = torch.rand(2, *IMAGE, generator=torch.Generator().manual_seed(1)) * 2 - 1
    assert isinstance(mine.encoder, KLEncoder)
    # sums of some thousand products of order 1, in another order: a few hundred roundings of 6e-8
    for dtype, tolerance in ((torch.float32, 5e-5), (torch.float64, 1e-12)):
        mine, other, x = mine.to(dtype), other.to(dtype), image.to(dtype)
        with torch.no_grad():
            posterior = other.encode(x).latent_dist
            mean, logvar = mine.encode(x)
            close(mine.encoder.moments(x), posterior.parameters, tolerance)
            close(mean, posterior.mean, tolerance)
            close(logvar, posterior.logvar, tolerance)
            assert mean.std() > 0.1 and logvar.std() > 0.1
            found = mine.decode(mean)
            close(found, other.decode(mean).sample, tolerance)
            assert found.std() > 0.1


def close(found: Tensor, wanted: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


def count(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_diffusers_loads_what_is_written_and_finds_the_same(kind: str, tmp_path: Path) -> None:
    network = ours(kind)
    interchange.write(tmp_path, network.state_dict(), config=config(kind), image=IMAGE)
    other = theirs(tmp_path)
    assert_equal(network, other)
    assert count(other) == count(network) - 1  # the log-scale
    assert other.config.scaling_factor == 0.18215 and other.config.sample_size == [32, 48]


@pytest.mark.parametrize("kind", KINDS)
def test_what_diffusers_saves_is_read_and_finds_the_same(kind: str, tmp_path: Path) -> None:
    form = interchange.describe(config(kind), IMAGE)
    other = shaken(AutoencoderKL(**{key: value for key, value in form.items() if key != "_class_name"}))
    other.save_pretrained(tmp_path)
    weights, found = interchange.read(tmp_path, config=config(kind), image=IMAGE)
    network = config(kind).build(image=IMAGE, parameters=3)
    network.load_state_dict(weights)
    assert_equal(network, other)
    assert {key: found[key] for key in form} == form  # their own file says what ours would


@pytest.mark.parametrize("kind", KINDS)
def test_at_full_size_both_have_the_published_number_of_parameters(kind: str) -> None:
    published = KLAutoencoderConfig(**KINDS[kind])
    image = ImageShape(3, 256, 256)
    with torch.device("meta"):
        network = published.build(image=image, parameters=3)
        other = AutoencoderKL(**{k: v for k, v in interchange.describe(published, image).items() if k[0] != "_"})
    assert count(network) == count(other) == FULL[kind]
    shapes = {interchange.to_theirs(name): tensor.shape for name, tensor in network.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in other.state_dict().items()}
    assert all(interchange.to_ours(interchange.to_theirs(name)) == name for name in network.state_dict())


def test_the_attention_of_older_files_is_read(tmp_path: Path) -> None:
    """Stable Diffusion 1's own: other names, and 1x1 convolutions."""
    network = ours("f8")
    interchange.write(tmp_path, network.state_dict(), config=config("f8"), image=IMAGE)
    path = tmp_path / interchange.WEIGHTS
    old = {}
    for name, tensor in safetensors.torch.load_file(path).items():
        then = name
        for before, now in interchange.BEFORE:
            then = then.replace(now, before)
        old[then] = tensor[..., None, None] if tensor.dim() == 2 else tensor
    assert not any(".to_" in name for name in old)
    safetensors.torch.save_file({name: tensor.half() for name, tensor in old.items()}, path)
    weights, _ = interchange.read(tmp_path, config=config("f8"), image=IMAGE)
    expected = {name: tensor for name, tensor in network.state_dict().items() if name != "log_scale"}
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        assert weights[name].dtype == torch.float32 and torch.equal(weights[name], tensor.half().float())


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("_class_name", "AutoencoderDC", "_class_name is AutoencoderDC, not AutoencoderKL"),
        ("norm_num_groups", 16, "norm_num_groups is 16, not 32"),
        ("use_quant_conv", False, "use_quant_conv is False, not True"),
        ("block_out_channels", [32, 64], "block_out_channels is [32, 64], not [32, 64, 128, 128]"),
        ("act_fn", "relu", "act_fn is relu, not silu"),
        ("shift_factor", 0.1, "shift_factor: 0.1 is not known here"),
        ("scaling_factor", "a", "scaling_factor: 'a' is no number"),
    ],
)
def test_another_network_is_refused_by_the_key_that_differs(key: str, value: Any, said: str, tmp_path: Path) -> None:
    interchange.write(tmp_path, ours("f8").state_dict(), config=config("f8"), image=IMAGE)
    path = tmp_path / interchange.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(ValueError) as refused:
        interchange.read(tmp_path, config=config("f8"), image=IMAGE)
    assert str(refused.value).startswith(f"{path}: ") and said in str(refused.value)


def test_damaged_and_missing_files_are_named(tmp_path: Path) -> None:
    interchange.write(tmp_path, ours("f8").state_dict(), config=config("f8"), image=IMAGE)
    with pytest.raises(ValueError, match=r"config\.json is there already"):
        interchange.write(tmp_path, {}, config=config("f8"), image=IMAGE)
    weights = tmp_path / interchange.WEIGHTS
    whole = safetensors.torch.load_file(weights)
    name = next(iter(whole))
    for wrong in (whole[name] * torch.nan, whole[name].to(torch.int8)):
        safetensors.torch.save_file(whole | {name: wrong}, weights)
        with pytest.raises(ValueError, match=f"{re.escape(name)} .* holds what is no finite weight"):
            interchange.read(tmp_path, config=config("f8"), image=IMAGE)
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match=interchange.WEIGHTS):
        interchange.read(tmp_path, config=config("f8"), image=IMAGE)
    weights.rename(tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match="safetensors alone"):
        interchange.read(tmp_path, config=config("f8"), image=IMAGE)
    (tmp_path / interchange.CONFIG).write_text("[")
    with pytest.raises(ValueError, match=r"config\.json: not readable"):
        interchange.read(tmp_path, config=config("f8"), image=IMAGE)


# ---------------------------------------------------------------- with a run
def test_a_run_is_exported_and_another_begins_with_it(shipped: Path, tmp_path: Path) -> None:
    run, folder = shipped / "runs" / "kl_f8_256", tmp_path / "vae"
    words = ("export", str(run), "--to", "diffusers", "--out", str(folder))
    said = starts.tandem(tmp_path / "logs", *words).ok()
    assert "scaling_factor 0.18215, of the config, not measured" in said.out
    assert sorted(path.name for path in folder.iterdir()) == sorted([interchange.CONFIG, interchange.WEIGHTS])
    starts.tandem(tmp_path / "logs", *words).refused(f"{folder / interchange.CONFIG} is there already")
    starts.tandem(tmp_path / "logs", *words, "--overwrite").ok()
    newest = checkpoint.newest(run)
    assert newest is not None
    average = checkpoint.load(newest).tensors["autoencoder.ema"]
    for name, tensor in theirs(folder).state_dict().items():
        assert torch.equal(tensor, average[interchange.to_ours(name)])

    # an update whose rate is next to nothing, on two ranks
    begun = tmp_path / "begun"
    scale = "method.autoencoder.scaling_factor=0.5"
    again = (str(run / "config.yaml"), f"checkpoint.init_from={folder}", f"run={begun}", "images=64", "optim.lr=1e-12")
    more = (f"data.path={shipped / 'data' / 'fashion-mnist'}", "method.likelihood.learn_scale=true", scale)
    out = starts.train(tmp_path / "logs", *again, *more, world=2).wait().ok().out
    assert f"begins with the autoencoder of {folder}" in out
    assert "its scaling_factor is 0.18215, method.autoencoder.scaling_factor 0.5" in out
    newest = checkpoint.newest(begun)
    assert newest is not None
    for kind in ("autoencoder", "autoencoder.ema"):
        started = checkpoint.load(newest).tensors[kind]
        assert started.keys() - average.keys() == {"log_scale"}
        for name, tensor in average.items():
            close(started[name], tensor, 1e-9)

    refused = starts.train(
        tmp_path / "logs", *again, *more[:1], "method.autoencoder.latent=8", f"run={tmp_path / 'no'}"
    )
    refused.wait().refused("checkpoint.init_from", "latent_channels is 4, not 8")


def test_the_scaling_factor_can_be_measured(shipped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(shipped)
    words = ("export", "runs/kl_f8_256", "--to", "diffusers", "--out", str(tmp_path / "vae"), "--measure")
    starts.tandem(tmp_path / "logs", *words, "0", cwd=shipped).refused("--measure: 0")
    assert "measured on 40 images" in starts.tandem(tmp_path / "logs", *words, "40", cwd=shipped).ok().out
    stream = Stream(load(Path("runs/kl_f8_256")).config.data, split="train", batch=1, rank=0, world=1, seed=0)
    image = stream.first(40).data.permute(0, 3, 1, 2).float() / 127.5 - 1
    stream.close()
    network = theirs(tmp_path / "vae")
    posterior = network.encode(image).latent_dist
    deviation = (posterior.mean.var() + posterior.var.mean()).sqrt().item()
    # of 640 draws against their expectation: a standard error of 1 / sqrt(2 x 640), 2.8%
    assert 1 / network.config.scaling_factor == pytest.approx(deviation, rel=0.1)


def test_what_diffusers_has_no_network_for_is_refused(shipped: Path, tmp_path: Path) -> None:
    for name, said in (("gan_fashion", "method.kind: gan"), ("vae_fashion", "autoencoder.kind: conv")):
        words = ("export", f"runs/{name}", "--to", "diffusers", "--out", str(tmp_path / "no"))
        starts.tandem(tmp_path / "logs", *words, cwd=shipped).refused(said, "method.autoencoder.kind: kl")
    assert not (tmp_path / "no").exists()
