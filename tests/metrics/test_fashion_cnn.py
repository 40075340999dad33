"""The feature network: learns, is the same from the same seed, and is loaded strictly or not at all."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

from trainer import durable
from trainer.metrics import fashion_cnn
from trainer.metrics.fashion_cnn import Facts, FashionCNN

FACTS = Facts(sha256="", data="abc", seed=0, accuracy=0.9, floor=0.1, floor_samples=10, reference=10, seconds=1.0)


def stripes(n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Ten classes that anyone can tell apart: a bright band at one of ten heights, on noise."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 10, (n,), generator=rng)
    images = torch.randint(0, 60, (n, 28, 28, 1), generator=rng, dtype=torch.uint8)
    rows = torch.arange(28).view(1, 28, 1, 1)
    band = (rows >= 2 * labels.view(-1, 1, 1, 1) + 3) & (rows < 2 * labels.view(-1, 1, 1, 1) + 6)
    return torch.where(band, torch.tensor(230, dtype=torch.uint8), images), labels


def test_it_learns_what_can_be_learned_and_gives_its_features() -> None:
    images, labels = stripes(1024)
    network = fashion_cnn.train(images, labels, seed=0, epochs=3, batch=32)
    others, truth = stripes(200, seed=1)
    features, classes = fashion_cnn.describe(network, others)
    assert features.shape == (200, fashion_cnn.DIMS) and features.dtype == torch.float32
    assert (classes == truth).float().mean() > 0.9
    assert not network.training and not any(p.requires_grad for p in network.parameters())


def test_a_seed_is_one_network_and_the_global_generator_is_left_alone() -> None:
    images, labels = stripes(64)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    one, same, other = (fashion_cnn.train(images, labels, seed=s, epochs=1, batch=32).state_dict() for s in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert not torch.equal(one["head.weight"], other["head.weight"])


def test_features_of_an_image_do_not_depend_on_the_batch_around_it() -> None:
    images, _ = stripes(8)
    network = FashionCNN().eval()
    alone = torch.cat([fashion_cnn.describe(network, image)[0] for image in images.split(1)])
    torch.testing.assert_close(fashion_cnn.describe(network, images)[0], alone)


def test_too_few_images_are_refused() -> None:
    images, labels = stripes(20)
    with pytest.raises(ValueError, match="20 training images do not fill one batch of 128"):
        fashion_cnn.train(images, labels, seed=0)


def test_what_was_saved_is_loaded_with_its_facts(tmp_path: Path) -> None:
    network = FashionCNN().eval()
    written = fashion_cnn.save(tmp_path / "new", network, FACTS)
    found, facts = fashion_cnn.load(tmp_path / "new")
    assert facts == written and len(facts.sha256) == 64 and facts.floor == FACTS.floor
    images, _ = stripes(4)
    assert torch.equal(fashion_cnn.describe(found, images)[0], fashion_cnn.describe(network, images)[0])
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "fd_fashion_cnn.json",
        "fd_fashion_cnn.safetensors",
    ]


def test_other_weights_under_the_same_name_are_refused(tmp_path: Path) -> None:
    fashion_cnn.save(tmp_path, FashionCNN(), FACTS)
    weights = tmp_path / "fd_fashion_cnn.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(ValueError, match=r"fd_fashion_cnn\.safetensors: its sha256"):
        fashion_cnn.load(tmp_path)


def test_loading_is_strict(tmp_path: Path) -> None:
    fashion_cnn.save(tmp_path, FashionCNN(), FACTS)
    weights = tmp_path / "fd_fashion_cnn.safetensors"
    tensors = safetensors.torch.load_file(weights)
    del tensors["head.bias"]
    safetensors.torch.save_file(tensors, weights)
    text = tmp_path / "fd_fashion_cnn.json"
    facts = json.loads(text.read_text())
    text.write_text(json.dumps({**facts, "sha256": durable.sha256(weights)}))
    with pytest.raises(ValueError, match="other tensors"):
        fashion_cnn.load(tmp_path)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"sha256": 1, "more": 2}'])
def test_facts_that_cannot_be_read_are_named(tmp_path: Path, text: str) -> None:
    fashion_cnn.save(tmp_path, FashionCNN(), FACTS)
    (tmp_path / "fd_fashion_cnn.json").write_text(text)
    with pytest.raises(ValueError, match=r"fd_fashion_cnn\.json: not readable; delete"):
        fashion_cnn.load(tmp_path)


def test_what_was_never_made_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        fashion_cnn.load(tmp_path)
