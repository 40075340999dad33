"""Measuring runs: models whose figures are known, a feature network made once, a table that compares like with like."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from tools import quality
from tools.quality_figures import Quality, table
from trainer.data import Batch, RawBatch, to_float
from trainer.losses.reconstruction import Bernoulli, Gaussian, bits_per_dim
from trainer.metrics import fashion_cnn, psnr
from trainer.metrics.fashion_cnn import Facts, FashionCNN

FACTS = Facts(sha256="0" * 64, data="d", seed=0, accuracy=0.9, floor=0.07, floor_samples=10, reference=10, seconds=1.0)


def images(n: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (n, 28, 28, 1), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


class FakeSplit:
    """A split in memory whose last batch is padded, as a stream pads it."""

    def __init__(self, data: Tensor, *, padding: int = 3, fingerprint: str = "d") -> None:
        self.data, self.padding, self.fingerprint = data, padding, fingerprint

    def evaluation(self, batch: int) -> Iterator[RawBatch]:
        n = len(self.data)
        index = torch.cat([torch.arange(n), torch.zeros(self.padding, dtype=torch.int64)])
        weight = torch.cat([torch.ones(n), torch.zeros(self.padding)])
        for i, w in zip(index.split(batch), weight.split(batch), strict=True):
            yield RawBatch(self.data[i], i % 10, i, i, w)


class FakeModel:
    """Samples are `drawn`; reconstructions are the images through `rebuild`."""

    device = torch.device("cpu")

    def __init__(self, drawn: Tensor, rebuild=None, nats: tuple[float, float] | None = None) -> None:
        self.drawn, self.rebuild, self.nats = drawn, rebuild, nats

    def sample(self, count: int, *, seed: int = 0, batch: int = 250) -> Iterator[Tensor]:
        yield from self.drawn[:count].split(batch)

    def reconstruct(self, batch: Batch) -> Tensor | None:
        as_bytes = ((batch.image + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)
        return None if self.rebuild is None else self.rebuild(as_bytes)

    def elbo(self, batch: Batch) -> tuple[Tensor, Tensor] | None:
        if self.nats is None:
            return None
        return torch.full((len(batch.image),), self.nats[0]), torch.full((len(batch.image),), self.nats[1])


@pytest.fixture(scope="module")
def network() -> FashionCNN:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return FashionCNN().eval()


def figures(model: FakeModel, network: FashionCNN, data: Tensor, *, samples: int, likelihood=None) -> Quality:
    split = FakeSplit(data)
    real = quality.real_pictures(network, split)
    return quality.measure(
        model, network=network, facts=FACTS, real=real, test=split, samples=samples, seed=0, likelihood=likelihood
    )


def test_a_model_that_is_the_data_has_no_distance_and_loses_nothing(network: FashionCNN) -> None:
    data = images(300)
    found = figures(FakeModel(data, lambda x: x, (200.0, 10.0)), network, data, samples=300, likelihood=Bernoulli())
    assert abs(found.fd_samples) < 1e-6 and abs(found.fd_reconstructions or 0.0) < 1e-6
    assert found.texture_samples == pytest.approx((1.0, 1.0, 1.0, 1.0))
    assert (found.samples, found.reference) == (300, 300)  # padding counts nowhere
    assert found.psnr == 100.0 and found.same_class == 1.0
    assert found.elbo == pytest.approx(-210.0) and found.kl == pytest.approx(10.0)
    assert found.bits_per_dim == pytest.approx(bits_per_dim(210.0, dims=784, discrete=True))
    assert sum(found.class_shares) == pytest.approx(1.0) and len(found.class_shares) == 10
    assert found.fd_floor == FACTS.floor


def test_a_density_is_reported_with_its_offset_and_name(network: FashionCNN) -> None:
    data = images(100)
    found = figures(FakeModel(data, lambda x: x, (5.0, 1.0)), network, data, samples=100, likelihood=Gaussian())
    assert found.bits_per_dim == pytest.approx(bits_per_dim(6.0, dims=784, discrete=False))
    assert found.likelihood == Gaussian().name


def test_blurred_reconstructions_lose_sharpness_and_psnr_is_a_mean_over_images(network: FashionCNN) -> None:
    data = images(300)
    found = figures(FakeModel(images(300, seed=1), lambda x: x // 2, None), network, data, samples=300)
    assert found.texture_reconstructions is not None
    assert found.texture_reconstructions.high < 0.3 < 0.9 < found.texture_samples.high
    expected = psnr(to_float(data // 2), to_float(data)).double().mean().item()
    assert found.psnr == pytest.approx(expected, rel=1e-9)
    assert (found.fd_reconstructions or 0.0) > 10 * found.fd_samples > 0
    assert found.elbo is None and found.bits_per_dim is None and found.likelihood is None


def test_a_method_without_an_encoder_has_gaps_and_no_zeros(network: FashionCNN) -> None:
    found = figures(FakeModel(images(100, seed=1)), network, images(100), samples=100)
    assert (found.psnr, found.same_class, found.fd_reconstructions, found.elbo) == (None, None, None, None)
    assert "| - |" in table({"gan": found})


def test_the_table_has_a_column_a_run_and_the_sample_counts(network: FashionCNN) -> None:
    one = figures(
        FakeModel(images(100, seed=1), lambda x: x, (5.0, 1.0)),
        network,
        images(100),
        samples=100,
        likelihood=Bernoulli(),
    )
    rows = table({"a/x": one, "b/x": replace(one, fd_samples=1234.5)}).splitlines()
    assert rows[0] == "|  | a/x | b/x |"
    assert rows[2].startswith("| fd_fashion_cnn, 100 samples | ") and rows[2].endswith("| 1234.50 |")
    assert "FID" not in "\n".join(rows).upper().replace("FD_FASHION", "")
    assert len({row.count("|") for row in rows}) == 1


def test_distances_of_different_counts_are_not_put_side_by_side(network: FashionCNN) -> None:
    one = figures(FakeModel(images(100, seed=1)), network, images(100), samples=100)
    with pytest.raises(ValueError, match="do not compare"):
        table({"a": one, "b": replace(one, samples=50)})


def test_the_feature_network_is_trained_once_and_again_for_other_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = []

    def train(given: Tensor, labels: Tensor, *, seed: int) -> FashionCNN:
        trained.append((len(given), len(labels), seed))
        return FashionCNN().eval()

    monkeypatch.setattr(fashion_cnn, "train", train)
    split, test = FakeSplit(images(120)), FakeSplit(images(80, seed=1))
    first, facts = quality.classifier(tmp_path, train=split, test=test)
    again, same = quality.classifier(tmp_path, train=split, test=test)
    assert trained == [(120, 120, 0)] and facts == same
    assert torch.equal(first.head.weight, again.head.weight)
    assert (facts.floor_samples, facts.reference, facts.data) == (120, 80, "d")
    assert facts.floor > 0 and 0 <= facts.accuracy <= 1
    capsys.readouterr()
    _, other = quality.classifier(tmp_path, train=FakeSplit(images(120), fingerprint="e"), test=test)
    assert len(trained) == 2 and other.data == "e" and "other data" in capsys.readouterr().out


def test_a_run_is_measured_from_the_command_line_into_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, network: FashionCNN, capsys: pytest.CaptureFixture[str]
) -> None:
    run, data = tmp_path / "vae", images(100)
    (run / "checkpoints" / "000000000100").mkdir(parents=True)
    model = FakeModel(images(90, seed=1), lambda x: x, (5.0, 1.0))
    model.path, model.images = run / "checkpoints" / "000000000100", 100
    model.config = SimpleNamespace(data=SimpleNamespace(shape=(28, 28, 1)))
    model.method = SimpleNamespace(likelihood=Bernoulli())
    split = FakeSplit(data)
    split.close = lambda: None
    monkeypatch.setattr(quality.generate, "load", lambda path: model)
    monkeypatch.setattr(quality, "Stream", lambda *_, **__: split)
    facts = fashion_cnn.save(tmp_path, network, FACTS)
    assert quality.main([str(run), "--data", str(tmp_path), "--samples", "90"]) == 0
    found = json.loads((run / "quality.json").read_text())
    assert found["network"] == "fd_fashion_cnn" and found["network_sha256"] == facts.sha256
    assert (found["samples"], found["reference"], found["images"], found["seed"]) == (90, 100, 100, 0)
    assert found["texture_samples"].keys() == {"gradient", "high", "check", "phase"}
    out = capsys.readouterr().out
    assert f"{found['fd_samples']:.2f}" in out and str(run) in out
    assert [path.name for path in run.iterdir() if path.name.startswith(".")] == []


def test_runs_of_other_images_and_too_few_samples_are_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = SimpleNamespace(config=SimpleNamespace(data=SimpleNamespace(shape=(64, 64, 3))))
    monkeypatch.setattr(quality.generate, "load", lambda path: model)
    with pytest.raises(ValueError, match=r"faces: makes images of \(64, 64, 3\)"):
        quality.main(["faces", "--data", str(tmp_path)])
    with pytest.raises(ValueError, match="samples: 1 "):
        quality.main(["faces", "--data", str(tmp_path), "--samples", "1"])
