"""What YAML can do and a config cannot: other types, depth without end, a few bytes that become gigabytes."""

import math
import time
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from trainer import config_yaml

TYPES = ["!!binary aGk=", "!!timestamp 2020-01-01", "!!set {a}", "!!omap [a: 1]", "!!pairs [a: 1]", "!mine 3"]
MISTAGGED = ["!!int abc", "!!int [1]", "!!float abc", "!!bool 3", "!!null 3", "!!map [1]", "!!seq {a: 1}", "!!str [a]"]


def refusal(text: str) -> str:
    with pytest.raises(ValueError) as caught:
        config_yaml.loads(text, source="a.yaml")
    said = str(caught.value)
    assert "\n" not in said and len(said) < 300
    return said


@pytest.mark.parametrize("value", [*TYPES, *MISTAGGED])
def test_a_type_that_no_config_has_is_refused_with_its_place(value: str) -> None:
    assert refusal(f"run: a\nseed: {value}\n").startswith("a.yaml:2:7: ")


@pytest.mark.parametrize("key", ["!!binary aGk=", "[1, 2]", "{a: 1}", "3", "null"])
def test_a_key_that_is_no_text_is_refused_with_its_place(key: str) -> None:
    assert refusal(f"run: a\n? {key}\n: 1\n").startswith("a.yaml:2:3: ")


@pytest.mark.parametrize(
    ("value", "found"), [("!!str 3", "3"), ("!!int '3'", 3), ("!!float 3", 3.0), ("!!seq [1]", [1])]
)
def test_a_tag_of_a_type_that_a_config_has_is_taken(value: str, found: object) -> None:
    (got,) = config_yaml.loads(f"a: {value}", source="a.yaml").values()
    assert got == found and type(got) is type(found)


@pytest.mark.parametrize(
    "text", ["a: " + "[" * 3000, "a: " + "[" * 3000 + "]" * 3000, "{a: " * 3000 + "1" + "}" * 3000]
)
def test_a_file_nested_without_end_is_refused_with_its_place(text: str) -> None:
    assert refusal(text).startswith("a.yaml:1:")
    assert "nested" in refusal("a: " + "[" * 3000 + "]" * 3000)


def test_an_override_nested_without_end_is_refused() -> None:
    for text in (".".join(["a"] * 3000) + "=1", "a=" + "[" * 3000 + "]" * 3000):
        with pytest.raises(ValueError, match="nested"):
            config_yaml.merge({}, [text])


@pytest.mark.parametrize("value", [".inf", "-.Inf", ".INF", ".nan", ".NaN"])
def test_numbers_without_a_value_are_read_as_such(value: str) -> None:
    found = config_yaml.loads(f"a: {value}", source="a.yaml")["a"]
    assert not math.isfinite(found) and (found < 0) == value.startswith("-")


def test_an_alias_stands_for_its_value() -> None:
    text = "a: &one {x: 1}\nb: *one\nc: [*one, *one]\n"
    assert config_yaml.loads(text, source="a.yaml") == {"a": {"x": 1}, "b": {"x": 1}, "c": [{"x": 1}, {"x": 1}]}


def test_a_few_bytes_do_not_become_gigabytes() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    started = time.monotonic()
    assert "values" in refusal("\n".join(lines))
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("text", ["a: &a [*a]", "a: &a {b: *a}", "a: &a [[1], {b: [*a]}]"])
def test_a_value_within_itself_is_refused(text: str) -> None:
    assert "itself" in refusal(text)
    with pytest.raises(ValueError, match=r"command line: a.*itself"):
        config_yaml.merge({}, [f"a={text[3:]}"])


def test_a_number_of_more_digits_than_python_reads_is_refused_with_its_place() -> None:
    assert refusal("a: 1\nb: " + "9" * 5000).startswith("a.yaml:2:4: ")


@settings(max_examples=300, deadline=None)
@given(text=st.text(st.sampled_from("!!int [{]}&a*:,-?|>'\"#%@`~1.e+_\n\t <=\\x0u")) | st.text(max_size=30))
@example(text="a: !!bool 3")
@example(text="<<: 1")
@example(text='a: "\\ud800"')
def test_any_text_is_a_mapping_or_an_error_in_one_line(text: str) -> None:
    try:
        found = config_yaml.loads(text, source="a.yaml")
    except ValueError as error:
        assert str(error).startswith("a.yaml") and "\n" not in str(error)
    else:
        config_yaml.to_json(found)


def test_a_file_of_another_type_is_refused_by_the_loader_of_files_too(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("seed: !!set {a}\n")
    with pytest.raises(ValueError, match=r"a\.yaml:1:7: "):
        config_yaml.read(path)
