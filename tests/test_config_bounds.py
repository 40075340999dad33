"""Numbers that would train wrongly without a word are refused with their key and range, before anything starts."""

from pathlib import Path
from typing import Any

import pytest

from trainer.config import Config, parse

METHOD_KEYS = {
    "vae": {"kl.weight": -5, "kl.warmup": -100, "kl.free_bits": -0.5},
    "gan": {"critic.r1": -1, "critic.r2": -1, "critic.gradient_penalty": -1, "critic.penalty_interval": -64},
    "vaegan": {
        "perceptual_weight": -1,
        "adversarial_weight": -1,
        "prior_weight": -1,
        "discriminator_learns_from": -64,
        "adversarial_from": -1,
        "adversarial_ramp": -1,
        "kl.weight": -1,
        "critic.r1": -1,
    },
    "vaegan_larsen": {"gamma": -0.1, "layer": -1, "kl.warmup": -1, "critic.r2": -1},
}
NOT_NEGATIVE = {
    "optim.warmup": -5,
    "optim.weight_decay": -0.1,
    "optim.ema_half_life": -4,
    "checkpoint.every": -1,
    "log.pictures_every": -1,
    "log.evaluate_every": -1,
}
POSITIVE = {"log.every": 0, "log.evaluate_images": 0, "log.patience": 0}
SHARES = {"optim.floor": [-1, 1.5], "optim.betas": [[1.5, 2], [-0.1, 0.9], [0.9, 1.0]],
          "optim.discriminator.betas": [[0.0, 1.0]], "optim.discriminator.lr": [0, -1e-4],
          "optim.discriminator.clip": [0, -1], "seed": [99999999999999999999, -(2**63) - 1]}  # fmt: skip


def config(*overrides: str, method: str = "vae") -> Config:
    tree: dict[str, Any] = {
        "run": "runs/a",
        "images": 6400,
        "batch": 64,
        "data": {"path": "data/x", "size": 28, "channels": 1},
        "method": {"kind": method},
    }
    return parse(tree, list(overrides), source="a.yaml")


def refusal(*overrides: str, method: str = "vae") -> str:
    with pytest.raises(ValueError) as caught:
        config(*overrides, method=method)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("method", "key", "value"),
    [(method, key, value) for method, keys in METHOD_KEYS.items() for key, value in keys.items()],
)
def test_a_negative_number_of_a_method_is_refused_and_zero_is_not(method: str, key: str, value: float) -> None:
    said = refusal(f"method.{key}={value}", method=method)
    assert said.startswith(f"command line: method.{key}: {value}") and "0" in said.rpartition(":")[2]
    config(f"method.{key}=0", method=method)


@pytest.mark.parametrize(("key", "value"), NOT_NEGATIVE.items())
def test_a_negative_number_of_a_run_is_refused_and_zero_is_not(key: str, value: float) -> None:
    assert refusal(f"{key}={value}") == f"command line: {key}: {value} must be at least 0"
    config(f"{key}=0")


@pytest.mark.parametrize(("key", "value"), POSITIVE.items())
def test_an_interval_that_ends_a_run_or_fills_the_memory_is_refused(key: str, value: int) -> None:
    for wrong in (value, -3):
        assert refusal(f"{key}={wrong}") == f"command line: {key}: {wrong} must be at least 1"
    config(f"{key}=1")


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in SHARES.items() for value in values])
def test_a_number_out_of_its_range_is_refused_with_its_key(key: str, value: Any) -> None:
    assert refusal(f"{key}={value}").startswith(f"command line: {key}: ")


def test_the_ends_of_a_range_are_in_it() -> None:
    config("optim.floor=0", "optim.betas=[0, 0.999]", f"seed={2**63 - 1}", "optim.discriminator={lr: 1e-9, clip: 1e-9}")
    config("optim.floor=1", f"seed={-(2**63)}")


def test_a_layer_that_the_discriminator_does_not_have_is_refused() -> None:
    assert refusal("method.layer=3", method="vaegan_larsen").startswith("command line: method.layer: 3 ")
    config("method.layer=2", method="vaegan_larsen")
    patch = "method.discriminator={kind: patch, layers: 2}"
    assert "method.layer: 3 " in refusal("method.layer=3", patch, method="vaegan_larsen")
    config("method.layer=2", patch, method="vaegan_larsen")


@pytest.mark.parametrize("method", ["gan", "vaegan", "vaegan_larsen"])
def test_a_wasserstein_loss_without_a_penalty_is_refused(method: str) -> None:
    said = refusal("method.critic={loss: wasserstein}", method=method)
    assert said.startswith("command line: method.critic.loss: wasserstein ") and "gradient_penalty" in said
    for penalty in ("gradient_penalty: 10", "r1: 0.2", "r2: 0.2"):
        config(f"method.critic={{loss: wasserstein, {penalty}}}", method=method)


# ---------------------------------------------------------------- how a mistake is told
@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("data.size=28.5", "data.size: input should be a valid integer or input should be a valid array, not 28.5"),
        ("data.size=big", "data.size: input should be a valid integer or input should be a valid array, not 'big'"),
        ("data.size=[28, 2.5]", "data.size.1: input should be a valid integer, not 2.5"),
        ("images=1e3", "images: input should be a valid integer, not 1000.0; write 1000"),
        ("data.size=[28, 28.0]", "data.size.1: input should be a valid integer, not 28.0; write 28"),
        ("images=1e3.5", "images: input should be a valid integer, not '1e3.5'"),
    ],
)
def test_a_wrong_number_is_told_once_under_a_key_that_exists(override: str, said: str) -> None:
    assert refusal(override) == f"command line: {said}"


def test_a_config_in_a_folder_with_an_equals_sign_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trainer.__main__ import arguments

    monkeypatch.chdir(tmp_path)
    Path("lr=1").write_text("")
    for word in ("runs/lr=1e-3/config.yaml", "/abs/a.b=1/c.yml", "lr=1"):
        assert arguments([word, "a.b=1"]) == (Path(word), ["a.b=1"], False)
    for word in ("checkpoint.init_from=a.yaml", "run=runs/lr=1/x"):
        assert arguments([word]) == (None, [word], False)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("readers", 257), ("remote.ahead", 257), ("remote.retries", 1001), ("remote.timeout", 86_401),
        ("remote.cache_gb", 1e300), ("limits.member_mb", 1e300), ("limits.megapixels", 5_001), ("size", 65_536),
        ("size", 1_000_000_000), ("size", [1, 65_536]), ("size", 8_001), ("size", [65_535, 1_000]),
    ],
)  # fmt: skip
def test_what_no_machine_has_is_refused_by_its_key(key: str, value: object) -> None:
    assert refusal(f"data.{key}={value}").startswith(f"command line: data.{key}: ")


def test_a_larger_size_needs_a_larger_limit() -> None:
    assert config("data.size=8000").data.shape == (8000, 8000, 1)
    assert "limits.megapixels" in refusal("data.size=8001")
    assert config("data.size=8001", "data.limits.megapixels=65").data.shape == (8001, 8001, 1)


@pytest.mark.parametrize("key", ["data.path", "data.remote.cache"])
def test_a_home_of_nobody_is_refused_by_its_key(key: str) -> None:
    assert refusal(f"{key}=~nosuchuser/x").startswith(f"command line: {key}: ~nosuchuser/x begins with the home of")
    assert "zero byte" in refusal(f'{key}="a\\0b"')


def mixture(*sets: str) -> str:
    return f"data={{kind: mixture, size: 28, sets: [{', '.join(sets)}]}}"


@pytest.mark.parametrize("other", ["data/x", "data/x/", "./data/x", "data/y/../x"])
def test_a_set_that_stands_twice_in_a_mixture_is_refused(other: str) -> None:
    said = refusal(mixture("{path: data/x}", f"{{path: {other}}}"))
    assert "data.sets: " in said and "stands there twice" in said
    assert len(config(mixture("{path: s3://a/x}", "{path: s3://b/x}")).data.sets) == 2


def test_the_field_of_a_set_is_named() -> None:
    assert "data.sets.1.weight: " in refusal(mixture("{path: a}", "{path: b, weight: .nan}"))
    assert "data.sets.0.weight: " in refusal(mixture("{path: a, weight: -1}", "{path: b}"))
    assert "unknown key data.sets.1.wieght" in refusal(mixture("{path: a}", "{path: b, wieght: 1}"))


def test_text_that_yaml_takes_for_a_mapping_is_told_so() -> None:
    assert "data.label: " in (said := refusal("data.label=json:")) and "quotes" in said
