"""The perceptual distance: what it ranks, what it refuses, and that it agrees with independent code."""

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from trainer.losses import efficientnet, vgg
from trainer.losses.perceptual import (
    EfficientNetLite0Config,
    LPIPSVGGConfig,
    NoPerceptualConfig,
    Perceptual,
)


@pytest.fixture(scope="module")
def lite0() -> Perceptual:
    try:
        efficientnet.weights_file()
    except ValueError as missing:
        pytest.skip(str(missing))
    return EfficientNetLite0Config().build("cpu")


def random_vgg(seed: int = 0) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    state, channels = {}, 3
    for number, out in (pair for stage in vgg.STAGES for pair in stage):
        gain = (2 / (9 * channels)) ** 0.5
        state[f"features.{number}.weight"] = torch.randn(out, channels, 3, 3, generator=draw) * gain
        state[f"features.{number}.bias"] = torch.randn(out, generator=draw) * 0.1
        channels = out
    for index, stage in enumerate(vgg.STAGES):
        state[f"lin{index}.model.1.weight"] = torch.rand(1, stage[-1][1], 1, 1, generator=draw)
    return state


@pytest.fixture(scope="module")
def vgg_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vgg") / "vgg.safetensors"
    save_file(random_vgg(), path)
    return path


@pytest.fixture(scope="module")
def lpips(vgg_file: Path) -> Perceptual:
    return LPIPSVGGConfig(path=vgg_file).build("cpu")


def picture(size: int = 96, channels: int = 3) -> Tensor:
    """Smooth shapes with edges, (1, channels, size, size) in [-0.8, 0.8]."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, size), torch.linspace(-1, 1, size), indexing="ij")
    discs = torch.stack(
        [((x - a).square() + (y - b).square() < r).float() for a, b, r in ((-0.3, 0, 0.3), (0.4, 0.3, 0.1))]
    )
    waves = torch.stack([(9 * x + 4 * y).sin(), (7 * y - 3 * x).cos(), (5 * x * y).sin()])[:channels]
    return (0.4 * waves + 0.8 * discs.sum(0) - 0.4).clamp(-0.8, 0.8).unsqueeze(0)


def blurred(image: Tensor, sigma: float) -> Tensor:
    offsets = torch.arange(-6, 7, dtype=torch.float32)
    line = torch.softmax(-offsets.square() / (2 * sigma**2), 0)
    kernel = (line[:, None] * line[None]).expand(image.shape[1], 1, 13, 13)
    return functional.conv2d(functional.pad(image, (6, 6, 6, 6), mode="reflect"), kernel, groups=image.shape[1])


def test_blur_counts_for_more_than_brightness_though_its_squared_error_is_smaller(lite0: Perceptual) -> None:
    image = picture()
    brighter, blurry = image + 40 / 255, blurred(image, 2.0)
    assert (blurry - image).square().mean() < (brighter - image).square().mean()
    with torch.no_grad():
        assert lite0.distance(blurry, image) > 1.5 * lite0.distance(brighter, image)


def test_the_distance_grows_with_blur_and_with_noise(lite0: Perceptual) -> None:
    image, noise = picture(), torch.randn(1, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        blur = [float(lite0.distance(blurred(image, s), image)) for s in (0.7, 1.5, 3.0)]
        noisy = [float(lite0.distance(image + s * noise, image)) for s in (0.02, 0.08, 0.3)]
    assert 0 < blur[0] < blur[1] < blur[2]
    assert 0 < noisy[0] < noisy[1] < noisy[2]


def test_efficientnet_has_the_features_of_the_package_that_publishes_the_weights(lite0: Perceptual) -> None:
    reference = pytest.importorskip("efficientnet_lite_pytorch").EfficientNet.from_name("efficientnet-lite0").eval()
    reference.load_state_dict(efficientnet.read_weights(efficientnet.weights_file()))
    image = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))  # its paddings are for 224 px
    with torch.no_grad():
        taps = lite0.network(image)
        x = reference._swish(reference._bn0(reference._conv_stem(image)))
        for number in range(11):
            x = reference._blocks[number](x)
            if number in efficientnet.TAPS:
                ours = taps[efficientnet.TAPS.index(number)]
                # folding the norms reorders float32 sums: rounding of some 20 layers, relative to the largest value
                torch.testing.assert_close(ours, x, rtol=0, atol=float(x.abs().max()) * 2e-5)


def test_lpips_equals_its_definition_written_out(lpips: Perceptual) -> None:
    state = random_vgg()
    draw = torch.Generator().manual_seed(2)
    x, y = (torch.rand(2, 3, 64, 64, generator=draw) * 2 - 1 for _ in range(2))

    def layers(image: Tensor) -> list[Tensor]:
        h = (image.double() - torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1)) / torch.tensor(
            [0.458, 0.448, 0.450]
        ).view(3, 1, 1)
        out, number = [], 0
        for convolutions in (2, 2, 3, 3, 3):
            for _ in range(convolutions):
                h = functional.conv2d(
                    h, state[f"features.{number}.weight"].double(), state[f"features.{number}.bias"].double(), padding=1
                )
                h, number = h.clamp(min=0), number + 2
            out.append(h)
            h, number = functional.max_pool2d(h, 2), number + 1
        return out

    expected = torch.zeros(2, dtype=torch.float64)
    for index, (a, b) in enumerate(zip(layers(x), layers(y), strict=True)):
        u, v = (f / (f.square().sum(1, keepdim=True).sqrt() + 1e-10) for f in (a, b))
        weight = state[f"lin{index}.model.1.weight"].double()
        expected += functional.conv2d((u - v).square(), weight).mean((1, 2, 3))
    # float32 against float64; F5-3 asks for 1e-4
    torch.testing.assert_close(lpips.distance(x, y), expected.float(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("size", [28, 64, 65])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", ["lite0", "lpips"])
def test_identical_images_are_at_distance_zero_and_others_are_not(
    kind: str, size: int, channels: int, request: pytest.FixtureRequest
) -> None:
    distance = request.getfixturevalue(kind).distance
    images = torch.cat([picture(size, channels), -picture(size, channels)])
    assert distance(images, images.clone()).tolist() == [0.0, 0.0]
    other = distance(images, images.flip(0))
    assert other.shape == (2,) and other.dtype == torch.float32 and bool((other > 0).all())


@pytest.mark.parametrize("kind", ["lite0", "lpips"])
def test_one_channel_means_three_equal_ones(kind: str, request: pytest.FixtureRequest) -> None:
    network = request.getfixturevalue(kind)
    x, y = picture(channels=1), blurred(picture(channels=1), 1.0)
    torch.testing.assert_close(network.distance(x, y), network.distance(x.repeat(1, 3, 1, 1), y.repeat(1, 3, 1, 1)))


@pytest.mark.parametrize("kind", ["lite0", "lpips"])
def test_the_gradient_is_the_slope_and_reaches_the_image_only(kind: str, request: pytest.FixtureRequest) -> None:
    network = request.getfixturevalue(kind).double()
    try:
        x, y = picture(64).double().requires_grad_(), blurred(picture(64), 1.0).double()
        (gradient,) = torch.autograd.grad(network.distance(x, y).sum(), x)
        assert gradient.isfinite().all() and gradient.abs().sum() > 0
        # along the gradient itself the slope is its length; central difference in float64, over few kinks
        step = 1e-6 * gradient / gradient.norm()
        with torch.no_grad():
            slope = (network.distance(x + step, y) - network.distance(x - step, y)) / 2e-6
        assert float(slope) == pytest.approx(float(gradient.norm()), rel=1e-3)
        assert all(not p.requires_grad and p.grad is None for p in network.parameters())
    finally:
        network.float()


def test_an_image_without_any_feature_has_gradient_zero(lpips: Perceptual) -> None:
    state = {k: torch.zeros_like(v) for k, v in random_vgg().items()}
    network = vgg.VGG16(state, path=Path("zero"))
    dead = Perceptual(network, mean=[0.0] * 3, std=[1.0] * 3, heads=None)
    x = picture(64).requires_grad_()
    (gradient,) = torch.autograd.grad(dead.distance(x, -picture(64)).sum(), x)
    assert not gradient.count_nonzero()


def test_autocast_changes_nothing(lite0: Perceptual) -> None:
    x, y = picture(64), blurred(picture(64), 1.0)
    plain = lite0.distance(x, y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(lite0.distance(x, y), plain)


def test_published_files_may_be_two_and_pth(tmp_path: Path, lpips: Perceptual) -> None:
    state = random_vgg()
    torch.save({k: v for k, v in state.items() if k.startswith("features")}, tmp_path / "vgg16.pth")
    torch.save({k: v for k, v in state.items() if k.startswith("lin")}, tmp_path / "vgg.pth")
    two = LPIPSVGGConfig(path=tmp_path / "vgg16.pth", heads=tmp_path / "vgg.pth").build("cpu")
    x, y = picture(64), -picture(64)
    assert torch.equal(two.distance(x, y), lpips.distance(x, y))


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("code of a weights file ran",)


def test_weights_files_that_are_missing_or_wrong_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = random_vgg()
    del state["lin3.model.1.weight"]
    save_file(state, tmp_path / "headless.safetensors")
    state["features.5.weight"] = torch.zeros(128, 64, 1, 1)
    save_file(state, tmp_path / "shapes.safetensors")
    (tmp_path / "text.pth").write_text("no weights")
    (tmp_path / "text.safetensors").write_text("no weights")
    torch.save(Evil(), tmp_path / "evil.pth")
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    for name, text in {
        "absent.pth": "no such file",
        "headless.safetensors": "nothing under lin3.model.1.weight",
        "text.pth": "cannot be read",
        "text.safetensors": "cannot be read",
        "evil.pth": "more than tensors",
        "list.pth": "a list, not a table",
    }.items():
        with pytest.raises(ValueError, match=text) as refused:
            LPIPSVGGConfig(path=tmp_path / name).build("cpu")
        assert name in str(refused.value) and "\n" not in str(refused.value)
    assert "ran" not in capsys.readouterr().out
    save_file(random_vgg(), tmp_path / "heads.safetensors")
    with pytest.raises(ValueError, match=r"\(128, 64, 1, 1\) under features.5.weight"):
        LPIPSVGGConfig(path=tmp_path / "shapes.safetensors", heads=tmp_path / "heads.safetensors").build("cpu")


def test_a_missing_package_names_the_extra_and_an_altered_file_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    altered = tmp_path / "weights.pth"
    altered.write_bytes(b"x")
    with pytest.raises(ValueError, match=hashlib.sha256(b"x").hexdigest()[:12]):
        efficientnet.read_weights(altered)
    monkeypatch.setattr(efficientnet, "PACKAGE", "a_package_that_nobody_installs")
    with pytest.raises(ValueError, match=r"tandem\[perceptual\]"):
        EfficientNetLite0Config().build("cpu")


def test_bytes_never_reach_the_network(lite0: Perceptual) -> None:
    with pytest.raises(ValueError, match="uint8"):
        lite0.distance(torch.zeros(1, 3, 64, 64, dtype=torch.uint8), torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
    with pytest.raises(ValueError, match="cannot be compared"):
        lite0.distance(picture(64), picture(65))


def test_no_perceptual_loss_builds_nothing() -> None:
    assert NoPerceptualConfig().build("cpu") is None  # type: ignore[func-returns-value]
