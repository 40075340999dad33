"""The configuration: what YAML makes of a value, what a mistake answers, and that what was used can be fed back in."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from trainer import config as configuration
from trainer import config_yaml
from trainer.__main__ import arguments, main
from trainer.config import Config, load, to_text, to_tree
from trainer.errors import boundary
from trainer.methods import MethodConfig

ROOT = Path(__file__).resolve().parents[1]
METHODS = {config.kind: config for config in get_args(get_args(MethodConfig)[0])}
SHIPPED = sorted((ROOT / "configs").rglob("*.yaml"))
MINIMAL = """\
run: runs/a
images: 6400
batch: 64
data: {kind: shards, path: data/x, size: 28, channels: 1}
method: {kind: vaegan}
"""

Loader = Callable[..., Config]


@pytest.fixture(params=["file", "command line"])
def setting(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Callable[[str, str], Config]]:
    """(where, load a config in which YAML `value` stands for "key" or "block.key" there)."""
    path = tmp_path / "a.yaml"

    def from_file(key: str, value: str) -> Config:
        tree = yaml.safe_load(MINIMAL)
        block, _, leaf = key.rpartition(".")
        held = tree.pop(block, {}) if block else {}
        tree.pop(leaf, None)
        lines = [f"{block}:"] if block else []
        lines += [f"  {name}: {other}" for name, other in held.items()]
        path.write_text("\n".join([yaml.safe_dump(tree), *lines, f"{'  ' if block else ''}{leaf}: {value}", ""]))
        return load(path)

    def from_command_line(key: str, value: str) -> Config:
        path.write_text(MINIMAL)
        return load(path, [f"{key}={value}"])

    return (str(path), from_file) if request.param == "file" else ("command line", from_command_line)


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    path = tmp_path / "a.yaml"
    path.write_text(MINIMAL)
    return path


def refused(call: Callable[[], Any]) -> str:
    with pytest.raises(ValueError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text, "one line"
    return text


# ---------------------------------------------------------------- what YAML makes of a value
@pytest.mark.parametrize(
    ("text", "value"), [("1e-4", 1e-4), ("1.5e-3", 1.5e-3), ("2E-4", 2e-4), (".5", 0.5), ("1", 1.0), ("1_0.5", 10.5)]
)
def test_a_number_is_a_number_however_it_is_written(setting: Any, text: str, value: float) -> None:
    _, put = setting
    assert put("optim.lr", text).optim.lr == value


@pytest.mark.parametrize("text", ["6400", "6_400", "+6400"])
def test_whole_numbers_may_be_grouped(setting: Any, text: str) -> None:
    _, put = setting
    assert put("images", text).images == 6400


def test_a_leading_zero_is_no_octal(setting: Any) -> None:
    _, put = setting
    assert put("seed", "010").seed == 10


@pytest.mark.parametrize("text", ["on", "off", "yes", "no", "y", "N", "2001-01-01", "12:30:45"])
def test_words_stay_text(setting: Any, text: str) -> None:
    """YAML 1.1 makes true, a date and a base-60 number of these."""
    _, put = setting
    assert put("run", text).run == Path(text)
    assert put("checkpoint.resume", text).checkpoint.resume == text


@pytest.mark.parametrize("text", ["on", "yes", "1", "'true'", "null"])
def test_a_switch_takes_true_or_false_alone(setting: Any, text: str) -> None:
    where, put = setting
    message = refused(lambda: put("compile", text))
    assert message.startswith(f"{where}: compile: ")


def test_a_switch_takes_true(setting: Any) -> None:
    _, put = setting
    assert put("compile", "true").compile is True


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("images", "6400.5"),
        ("images", "'6400'"),
        ("images", "true"),
        ("images", "[1]"),
        ("optim.lr", "fast"),
        ("optim.lr", "'1e-4'"),
        ("optim.lr", "true"),
        ("optim.lr", ".inf"),
        ("optim.lr", ".nan"),
        ("optim.betas", "0.9"),
        ("optim.betas", "[0.9, 0.99, 0.999]"),
        ("precision", "fp16"),
        ("checkpoint.resume", "3"),
    ],
)
def test_a_value_of_another_kind_is_refused_with_its_key_and_never_converted(setting: Any, key: str, text: str) -> None:
    where, put = setting
    message = refused(lambda: put(key, text))
    assert message.startswith(f"{where}: {key}")


def test_file_and_command_line_read_a_value_alike(minimal: Path, tmp_path: Path) -> None:
    texts = ["1e-4", "0.001", "3", "1_000", ".5"]
    for text in texts:
        other = tmp_path / "b.yaml"
        other.write_text(f"{MINIMAL}optim:\n  lr: {text}\n")
        assert load(other) == load(minimal, [f"optim.lr={text}"]) == load(minimal, [f"--optim.lr={text}"])


# ---------------------------------------------------------------- unknown keys
@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("learning_rate", "optim.lr"),
        ("lr", "optim.lr"),
        ("num_epochs", "images"),
        ("batchsize", "batch"),
        ("batch_size", "batch"),
        ("sede", "seed"),
        ("optim.learning_rate", "optim.lr"),
        ("optim.beta", "optim.betas"),
        ("checkpoint.keep_lst", "checkpoint.keep_last"),
        ("method.adversarial_form", "method.adversarial_from"),
        ("mixed_precision", "precision"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_and_where_it_belongs(setting: Any, key: str, nearest: str) -> None:
    where, put = setting
    assert refused(lambda: put(key, "1")) == f"{where}: unknown key {key}; did you mean {nearest}?"


def test_a_key_with_a_dash_is_found(minimal: Path, tmp_path: Path) -> None:
    other = tmp_path / "b.yaml"
    other.write_text(f"{MINIMAL}num-epochs: 10\n")
    assert refused(lambda: load(other)) == f"{other}: unknown key num-epochs; did you mean images?"
    assert "num-epochs" in refused(lambda: load(minimal, ["num-epochs=10"]))


def test_a_key_of_another_method_is_no_key_of_this_one(minimal: Path) -> None:
    message = refused(lambda: load(minimal, ["method.kind=vae", "method.adversarial_weight=0.5"]))
    assert "unknown key method.adversarial_weight" in message


def test_an_unknown_key_stops_before_anything_is_made(minimal: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(minimal.parent)
    said: list[str] = []
    assert boundary(main, [str(minimal), "learning_rate=1e-4"], report=said.append) == 2
    assert said == ["tandem: error: command line: unknown key learning_rate; did you mean optim.lr?"]
    assert sorted(path.name for path in minimal.parent.iterdir()) == ["a.yaml"]


def test_all_mistakes_are_told_at_once(minimal: Path) -> None:
    message = refused(lambda: load(minimal, ["sed=1", "optim.lr=fast"]))
    assert "unknown key sed" in message and "optim.lr" in message


@pytest.mark.parametrize("key", ["run", "images", "batch", "data", "method"])
def test_a_missing_key_is_named(tmp_path: Path, key: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in yaml.safe_load(MINIMAL).items() if k != key}))
    assert refused(lambda: load(path)) == f"{path}: key {key} is missing"


# ---------------------------------------------------------------- kinds
def test_every_method_is_found_by_its_kind(minimal: Path) -> None:
    for kind, cls in METHODS.items():
        assert type(load(minimal, [f"method.kind={kind}"]).method) is cls


def test_an_unknown_kind_is_told_what_there_is_and_the_nearest(minimal: Path) -> None:
    message = refused(lambda: load(minimal, ["method.kind=vaegn"]))
    assert message.startswith("command line: method.kind: no 'vaegn' here")
    assert all(kind in message for kind in METHODS)
    assert message.endswith("did you mean vaegan?")


def test_a_union_without_its_kind_asks_for_it(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(MINIMAL.replace("method: {kind: vaegan}", "method: {adversarial_weight: 0.5}"))
    message = refused(lambda: load(path))
    assert message.startswith(f"{path}: method.kind is missing: one of")
    assert all(kind in message for kind in METHODS)


def test_an_autoencoder_that_names_no_kind_is_the_convolutional_one(minimal: Path) -> None:
    assert load(minimal, ["method.autoencoder.width=8"]).method.autoencoder.kind == "conv"
    assert load(minimal, ["method.autoencoder={kind: kl, latent: 8}"]).method.autoencoder.latent == 8
    message = refused(lambda: load(minimal, ["method.autoencoder={kind: kl, latent_shape: map}"]))
    assert "unknown key method.autoencoder.latent_shape; another kind of method.autoencoder has it" in message


def test_a_nested_kind_is_named_with_its_whole_path(minimal: Path) -> None:
    message = refused(lambda: load(minimal, ["method.likelihood={kind: bernouli}"]))
    assert message.startswith("command line: method.likelihood.kind: no 'bernouli' here")
    assert message.endswith("did you mean bernoulli?")


# ---------------------------------------------------------------- files that do not parse
@pytest.mark.parametrize(
    ("text", "line", "column"),
    [
        ("run: a\n  images: 3\n", 2, 9),  # a bad indent
        ("run: a\nimages: 3\nimages: 4\n", 3, 1),
        ("run: a\noptim:\n  lr: 1\n  lr: 2\n", 4, 3),
        ("run: [1, 2\nimages: 3\n", 2, 7),
        ("run: a\n\timages: 3\n", 2, 1),
        ("run: a\n3: b\n", 2, 1),
        ("run: !!python/object:os.system a\n", 1, 6),
    ],
)
def test_what_does_not_parse_is_told_with_file_line_and_column(
    tmp_path: Path, text: str, line: int, column: int
) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(text)
    assert refused(lambda: load(path)).startswith(f"{path}:{line}:{column}: ")


def test_a_key_that_stands_twice_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(MINIMAL + "batch: 32\n")
    assert refused(lambda: load(path)) == f"{path}:6:1: key 'batch' stands twice"


def test_a_file_that_is_not_there_or_holds_no_mapping_is_named(tmp_path: Path) -> None:
    assert refused(lambda: load(tmp_path / "none.yaml")) == f"{tmp_path / 'none.yaml'}: no such config file"
    path = tmp_path / "list.yaml"
    path.write_text("- a\n- b\n")
    assert refused(lambda: load(path)) == f"{path}: a config is a mapping of keys to values, not list"


def test_a_file_that_is_no_text_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes(b"run: \xff\xfe\x00")
    assert str(path) in refused(lambda: load(path))


# ---------------------------------------------------------------- overrides
def test_the_command_line_overrides_the_file_which_overrides_the_default(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(f"{MINIMAL}optim: {{lr: 3e-4}}\n")
    assert load(path).optim.lr == 3e-4
    assert load(path).optim.eps == dataclasses.fields(configuration.OptimConfig)[3].default
    assert load(path, ["optim.lr=1e-4"]).optim.lr == 1e-4
    assert load(path, ["optim.lr=1e-4", "optim.lr=2e-4"]).optim.lr == 2e-4  # the last one holds
    assert load(path, ["optim.eps=1e-6"]).optim == dataclasses.replace(load(path).optim, eps=1e-6)


@pytest.mark.parametrize("text", ["optim.lr", "=3", "optim..lr=3", ".lr=3", "optim.=3", "a b=3", "3=4"])
def test_an_override_that_is_no_assignment_is_refused(minimal: Path, text: str) -> None:
    assert refused(lambda: load(minimal, [text])).startswith(f"command line: {text!r} is no key=value")


def test_an_override_through_a_plain_value_says_where(minimal: Path) -> None:
    assert refused(lambda: load(minimal, ["images.x=3"])) == "command line: images.x: images holds a value, not keys"


def test_an_override_may_hold_a_mapping_or_a_list(minimal: Path) -> None:
    found = load(minimal, ["method.likelihood={kind: gaussian, scale: 0.5}", "optim.betas=[0, 0.9]"])
    assert found.method.likelihood.scale == 0.5  # type: ignore[union-attr]
    assert found.optim.betas == (0.0, 0.9)


def test_the_values_of_one_file_do_not_leak_into_the_next_load(minimal: Path) -> None:
    assert load(minimal, ["optim.lr=1"]) != load(minimal)
    assert load(minimal).optim.lr == configuration.OptimConfig().lr


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["c.yaml", "a.b=1"], (Path("c.yaml"), ["a.b=1"])),
        (["c.yaml", "--a.b=1"], (Path("c.yaml"), ["a.b=1"])),
        (["c.yaml", "--a.b", "1"], (Path("c.yaml"), ["a.b=1"])),
        (["c.yaml", "--micro-batch", "8", "x=y"], (Path("c.yaml"), ["micro_batch=8", "x=y"])),
        (["c.yaml", "--optim.lr", "-1"], (Path("c.yaml"), ["optim.lr=-1"])),
        (["a.b=1"], (None, ["a.b=1"])),
        ([], (None, [])),
    ],
)
def test_the_command_line_is_a_file_and_assignments(words: list[str], expected: tuple[Path | None, list[str]]) -> None:
    path, overrides, wants_help = arguments(words)
    assert (path, overrides) == expected
    assert not wants_help


# ---------------------------------------------------------------- derived sizes
def test_the_share_of_a_rank_and_the_micro_batches_are_derived(minimal: Path) -> None:
    config = load(minimal, ["batch=96", "micro_batch=8"])
    assert [config.share(world) for world in (1, 2, 4)] == [96, 48, 24]
    assert [config.micro_batches(world) for world in (1, 2, 4)] == [12, 6, 3]
    assert load(minimal).micro_batches(2) == 1


@pytest.mark.parametrize(("batch", "world", "nearest"), [(64, 3, 63), (10, 4, 8), (2, 3, 3), (1, 8, 8), (100, 8, 96)])
def test_a_batch_that_ranks_do_not_divide_is_refused_with_the_nearest(
    minimal: Path, batch: int, world: int, nearest: int
) -> None:
    message = refused(lambda: load(minimal, [f"batch={batch}"]).share(world))
    assert message == f"batch: {batch} does not divide among {world} ranks; nearest: {nearest}"
    assert nearest % world == 0 and nearest > 0


@pytest.mark.parametrize("micro", [0, -8, 7, 64, 128])
def test_a_micro_batch_that_does_not_divide_the_share_is_refused(minimal: Path, micro: int) -> None:
    message = refused(lambda: load(minimal, [f"micro_batch={micro}"]).micro_batches(2))
    assert message.startswith(f"micro_batch: {micro} does not divide a rank's share of 32 images (batch 64 / 2 ranks)")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("batch=0", "batch: 0 must be at least 1"),
        ("images=-1", "images: -1 must be at least 1"),
        ("optim.lr=0", "optim.lr: 0.0 must be above 0"),
        ("optim.hold=1", "optim.hold: 1.0 is a share of the budget, 0 <= hold < 1"),
        ("optim.clip=0", "optim.clip: 0.0 must be above 0; null switches clipping off"),
        ("checkpoint.keep_last=0", "checkpoint.keep_last: 0 would keep no checkpoint; at least 1"),
        ("method.balance={smoothing: 1.0}", "method.balance.smoothing: 1.0 is a share"),
        ("parallel.processes=0", "parallel.processes: 0 must be at least 1"),
    ],
)
def test_a_value_out_of_range_is_refused_with_its_whole_key(minimal: Path, override: str, said: str) -> None:
    assert refused(lambda: load(minimal, [override])).startswith(f"command line: {said}")


# ---------------------------------------------------------------- what was used
@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_shipped_config_loads_and_feeds_back_in(path: Path, tmp_path: Path) -> None:
    if path.relative_to(ROOT).parts[1] in ("accelerate", "deepspeed", "cluster"):
        pytest.skip("not a run's config")
    config = load(path)
    saved = tmp_path / "config.yaml"
    saved.write_text(to_text(config))
    assert load(saved) == config
    assert to_text(load(saved)) == to_text(config)
    assert config.micro_batches(1) >= 1
    assert config.images % config.batch == 0


def test_configs_are_shipped() -> None:
    assert len(SHIPPED) >= 3


@pytest.mark.parametrize("kind", METHODS)
def test_a_resolved_config_holds_every_key(minimal: Path, kind: str) -> None:
    config = load(minimal, [f"method.kind={kind}"])
    tree = to_tree(config)
    assert tree["optim"]["lr"] == 2e-4 and tree["method"]["kind"] == kind
    names = {field.name for field in dataclasses.fields(config.method)}
    assert set(tree["method"]) == names


numbers = st.floats(1e-12, 1e12, allow_nan=False)
shares = st.floats(0, 1, exclude_max=True)
words = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12)


@settings(max_examples=150, deadline=None)
@given(lr=numbers, eps=numbers, seed=st.integers(-(2**62), 2**62), run=words, resume=words, switch=st.booleans(),
       clip=st.none() | numbers, betas=st.tuples(shares, shares))  # fmt: skip
def test_any_values_survive_the_round_trip_through_a_saved_config(
    lr: float,
    eps: float,
    seed: int,
    run: str,
    resume: str,
    switch: bool,
    clip: float | None,
    betas: tuple[float, float],
) -> None:
    tree = yaml.safe_load(MINIMAL) | {
        "run": run,
        "seed": seed,
        "compile": switch,
        "optim": {"lr": lr, "eps": eps, "clip": clip, "betas": list(betas)},
        "checkpoint": {"resume": resume},
    }
    config = configuration.parse(tree, source="test")
    assert config.optim.lr == lr and config.checkpoint.resume == resume  # bit for bit, nothing reinterpreted
    again = configuration.parse(config_yaml.loads(to_text(config), source="saved"), source="saved")
    assert again == config


@settings(max_examples=200, deadline=None)
@given(
    value=st.floats(allow_nan=False, allow_infinity=False)
    | st.integers()
    | st.booleans()
    | st.none()
    | st.text(max_size=20)
)
@example(value="a\x85b")
@example(value=" \u2028\u2029")
def test_yaml_takes_back_the_value_that_it_wrote(value: Any) -> None:
    text = config_yaml.write({"key": value})
    try:
        found = config_yaml.loads(text, source="test")["key"]
    except ValueError:
        assert isinstance(value, str) and not value.isprintable()
        return
    assert found == value and type(found) is type(value)
    if isinstance(value, float):
        assert math.copysign(1, found) == math.copysign(1, value)


# ---------------------------------------------------------------- help
def test_help_shows_every_key_with_the_values_of_the_file(minimal: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(minimal), "optim.lr=0.0123", "--help"]) == 0
    text = capsys.readouterr().out
    assert "0.0123" in text and "6400" in text
    assert "tandem train configs/vaegan_fashion.yaml" in text  # an example
    for key in ("--optim.lr", "--batch", "--checkpoint.keep-last", "--method.adversarial-weight", "--data.path"):
        assert key in text
    assert "Learning rate after warm-up" in text


def test_help_without_a_file_and_no_arguments_at_all_explain_themselves(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "--optim.lr" in capsys.readouterr().out
    assert main([]) == 2
    assert "usage: tandem train CONFIG" in capsys.readouterr().out


def test_overrides_without_a_file_say_what_comes_first() -> None:
    said: list[str] = []
    assert boundary(main, ["optim.lr=1"], report=said.append) == 2
    assert "a config file comes first" in said[0] and "\n" not in said[0]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["parallel.stage=0", "parallel.offload=cpu"], "parallel.offload: cpu needs ZeRO for both networks; stage: 0"),
        (
            ["precision=bf16", "parallel.weights=bf16", "parallel.discriminator=0"],
            "parallel.weights: bf16 needs ZeRO for both networks; discriminator: 0",
        ),
        (["parallel.weights=bf16"], "parallel.weights: bf16 needs precision: bf16, not fp32"),
        (["precision=fp16"], "precision: fp16 loses small gradients unless losses are scaled"),
        (["compile=true", "parallel.stage=3"], "compile: true does not go with parallel.stage: 3"),
        (["parallel.stage=4"], "parallel.stage: "),
    ],
)
def test_what_does_not_go_together_under_deepspeed_is_refused(minimal: Path, words: list[str], said: str) -> None:
    assert said in refused(lambda: load(minimal, ["parallel.kind=deepspeed", *words]))
