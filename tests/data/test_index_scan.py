"""What a scan makes of members: samples, labels, sizes; and what it refuses by name."""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.conftest import npy, numbered, write_tar
from trainer.data import scan as scanning
from trainer.data import table, tar
from trainer.data.config import LimitsConfig
from trainer.data.scan import Scan, Wanted

Tar = Callable[[Path, Sequence[tuple[str, bytes]]], Path]
IMAGE = npy(numbered(7, (2, 3, 1)))


def scan(path: Path, **wanted: object) -> Scan:
    with path.open("rb") as file:
        return scanning.scan(file.fileno(), path.name, Wanted(**wanted))  # type: ignore[arg-type]


def labels(found: Scan) -> list[str | int | None]:
    """As text or numbers; None: no label."""
    numbers = found.rows["label"].tolist()
    return [None if n < 0 else found.texts[n] if found.texts else n for n in numbers]


# ------------------------------------------------------------------ rows
@settings(max_examples=25, deadline=None)
@given(
    samples=st.lists(
        st.tuples(st.integers(0, 900), st.lists(st.sampled_from(["txt", "left.txt", "bin"]), max_size=3, unique=True)),
        min_size=1,
        max_size=8,
    ),
    form=st.booleans(),
)
def test_rows_say_where_samples_and_their_images_lie(
    samples: list[tuple[int, list[str]]], form: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "rows.tar"
    prefix = "ü" * 60 if form else ""  # names beyond ustar: an extended header belongs to its sample
    members = []
    for number, (size, others) in enumerate(samples):
        image = npy(numbered(number, (3, 1 + size, 1)))
        members += [(f"{prefix}{number}.{field}", b"x" * size) for field in others[:1]]
        members += [(f"{prefix}{number}.npy", image), (f"{prefix}{number}.cls", b"%d" % number)]
        members += [(f"{prefix}{number}.{field}", b"y" * size) for field in others[1:]]
    write_tar(path, members)
    found, data = scan(path), path.read_bytes()
    assert (found.bytes, found.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert found.rows["label"].tolist() == list(range(len(samples)))
    assert found.rows["begin"].tolist() == [0, *found.rows["end"].tolist()[:-1]]
    for number, row in enumerate(found.rows):
        inside = {member.field: member for member in tar.inside(data[row["begin"] : row["end"]], "a.tar")}
        assert set(inside) == {"npy", "cls", *samples[number][1]}
        assert row["offset"] == row["begin"] + inside["npy"].offset
        assert data[row["offset"] : row["offset"] + row["size"]] == npy(
            numbered(number, (3, 1 + samples[number][0], 1))
        )
        assert row["key"] == table.key_hash(f"{prefix}{number}")
    widths = [1 + size for size, _ in samples]
    assert found.spans == table.Spans(table.Span(3, 3), table.Span(min(widths), max(widths)), table.Span(1, 1))


def test_key_hashes_are_those_of_blake2b() -> None:
    assert table.key_hash("ü/0") == int.from_bytes(hashlib.blake2b("ü/0".encode(), digest_size=8).digest(), "little")


def test_a_header_longer_than_the_first_look_still_gives_the_size(tmp_path: Path, tar_of: Tar) -> None:
    """A JPEG with a colour profile of 200 kB before its size."""
    import simplejpeg

    image = simplejpeg.encode_jpeg(np.zeros((24, 40, 3), np.uint8))
    profile = b"".join(b"\xff\xe2\xff\xff" + bytes(65_533) for _ in range(3))
    path = tar_of(tmp_path / "a.tar", [("0.jpg", image[:2] + profile + image[2:])])
    assert scan(path).spans == table.Spans(table.Span(24, 24), table.Span(40, 40), table.Span(3, 3))


def test_upper_case_extensions_are_the_same_field(tmp_path: Path, tar_of: Tar) -> None:
    members = [("1.NPY", IMAGE), ("1.CLS", b"1"), ("2.npy", IMAGE), ("2.cls", b"2")]
    assert scan(tar_of(tmp_path / "a.tar", members)).fields == ("npy",)
    with pytest.raises(ValueError, match="key 1 has the field npy twice"):
        scan(tar_of(tmp_path / "b.tar", [("1.NPY", IMAGE), ("1.npy", IMAGE)]))
    assert labels(scan(tmp_path / "a.tar", image="NPY", label="Cls")) == [1, 2]


def test_members_without_a_field_are_passed_over_and_counted(tmp_path: Path, tar_of: Tar) -> None:
    members = [("README", b"x"), ("0.npy", IMAGE), ("._0.npy", b"x"), ("0.cls", b"3"), ("__meta__/a.npy", b"x")]
    found = scan(tar_of(tmp_path / "a.tar", members))
    assert (len(found.rows), found.passed, labels(found)) == (1, 3, [3])
    with pytest.raises(ValueError, match=r"a\.tar: holds no sample \(passed over: README\); make it again"):
        scan(tar_of(tmp_path / "a.tar", [("README", b"x")]))


# ------------------------------------------------------------------ labels
@pytest.mark.parametrize(
    ("label", "values", "expected"),
    [
        ("auto", {"cls": [b"3", b" 0\n", None]}, [3, 0, None]),
        ("cls", {"cls": [b"cat", b"ant", None]}, ["cat", "ant", None]),
        ("txt", {"cls": [b"1"], "txt": [b"cat\n", "être".encode()]}, ["cat", "être"]),
        (
            "json:species",
            {"json": [b'{"species": "cat"}', b"{}", b'{"species": null}', b"[1]"]},
            ["cat", None, None, None],
        ),
        ("json:n", {"json": [b'{"n": 4}', b'{"n": 0}']}, [4, 0]),
        ("json:glasses", {"json": [b'{"glasses": true}', b'{"glasses": false}']}, ["true", "false"]),
        ("a.json:x:y", {"a.json": [b'{"x:y": "z"}']}, ["z"]),
    ],
)
def test_labels_come_from_the_field_that_is_named(
    tmp_path: Path, tar_of: Tar, label: str, values: dict[str, list[bytes | None]], expected: list[object]
) -> None:
    members: list[tuple[str, bytes]] = []
    for number in range(len(expected)):
        members.append((f"{number}.npy", IMAGE))
        for field, of in values.items():
            value = of[number] if number < len(of) else None
            members += [(f"{number}.{field}", value)] if value is not None else []
    assert labels(scan(tar_of(tmp_path / "a.tar", members), label=label)) == expected


@pytest.mark.parametrize(
    ("label", "member", "what"),
    [
        ("auto", ("0.cls", b"cat"), r"the \.cls of key 0 holds b'cat', not a class number; set data\.label to cls"),
        ("auto", ("0.cls", b"-1"), "not a class number"),
        ("auto", ("0.cls", b"1000000"), r"holds 1000000, not a class number below 1,000,000"),
        ("auto", ("0.cls", b"9" * 400), "not a class number"),
        ("cls", ("0.cls", b""), "no name of a class"),
        ("cls", ("0.cls", b"\xff\xfe"), "no name of a class"),
        ("cls", ("0.cls", b"a\x1b[2J"), "no name of a class"),
        ("cls", ("0.cls", b"x" * 300), "no name of a class"),
        ("json:n", ("0.json", b"{"), r"the \.json of key 0 is no JSON"),
        ("json:n", ("0.json", b"[" * 100_000), "is no JSON"),
        ("json:n", ("0.json", b'{"n": %s}' % (b"9" * 5000)), "is no JSON|not a class number"),
        ("json:n", ("0.json", b'{"n": 1.5}'), "holds '1.5' as n, not a number or text"),
        ("json:n", ("0.json", b'{"n": {"a": 1}}'), "as n, not a number or text of a class"),
        ("json:n", ("0.json", b'{"n": 1}'.ljust(1 << 20) + b" "), "has 1,048,577 bytes"),
    ],
)
def test_a_label_that_is_none_is_named(
    tmp_path: Path, tar_of: Tar, label: str, member: tuple[str, bytes], what: str
) -> None:
    with pytest.raises(ValueError, match=what) as caught:
        scan(tar_of(tmp_path / "a.tar", [("0.npy", IMAGE), member]), label=label)
    assert str(caught.value).startswith("a.tar: ")
    assert str(caught.value).isprintable()


def test_text_and_numbers_in_one_field_are_refused(tmp_path: Path, tar_of: Tar) -> None:
    members = [("0.npy", IMAGE), ("0.cls", b"3"), ("1.npy", IMAGE), ("1.cls", b"cat")]
    with pytest.raises(ValueError, match="key 1 holds text where others hold numbers"):
        scan(tar_of(tmp_path / "a.tar", members), label="cls")


# ------------------------------------------------------------------ what is refused
KINDS = [
    "pkl",
    "pickle",
    "pyd",
    "pth",
    "pt",
    "ten",
    "tb",
    "mp",
    "msg",
    "npz",
    "cbor",
    "gz",
    "bz2",
    "xz",
    "zst",
    "so",
    "py",
]


@pytest.mark.parametrize("kind", KINDS)
def test_what_runs_or_unpacks_is_refused_by_name_unless_it_is_ignored(tmp_path: Path, tar_of: Tar, kind: str) -> None:
    field = f"more.{kind}".upper()
    path = tar_of(tmp_path / "a.tar", [("0.npy", IMAGE), (f"0.{field}", b"cos\nsystem\n"), ("0.cls", b"1")])
    with pytest.raises(ValueError, match=rf"a\.tar: key 0 holds more\.{kind}, .* list it in data\.ignore"):
        scan(path)
    assert labels(scan(path, ignore=(f"more.{kind}",))) == [1]
    for name in ("image", "label"):
        with pytest.raises(ValueError, match=rf"^data\.{name}: {field} is of a kind that is never read"):
            scan(path, ignore=(field,), **{name: field})


def test_every_kind_that_webdataset_decodes_is_known() -> None:
    """A new version of webdataset may decode more: each kind is read here, harmless text, or refused."""
    from webdataset import autodecode

    text = {"txt", "text", "transcript", "cls", "cls2", "index", "inx", "id", "json", "jsn"}
    assert set(autodecode.decoders) <= text | scanning.REFUSED | set(scanning.IMAGE_FIELDS)


def test_other_members_are_harmless_and_stay_unread(tmp_path: Path, tar_of: Tar) -> None:
    members = [("0.npy", IMAGE), ("0.txt", b"\xff"), ("0.json", b"no json"), ("0.mp3", b"x"), ("0.unheard-of", b"")]
    assert len(scan(tar_of(tmp_path / "a.tar", members)).rows) == 1


def test_limits_are_named_with_the_key(tmp_path: Path, tar_of: Tar) -> None:
    path = tar_of(
        tmp_path / "a.tar", [("0.npy", IMAGE), *((f"0.{n}.txt", b"") for n in range(3)), ("0.big", b"x" * 2001)]
    )
    assert len(scan(path, limits=LimitsConfig(members=5)).rows) == 1
    with pytest.raises(ValueError, match=r"a\.tar: key 0 has more than 4 members \(data\.limits\.members\)"):
        scan(path, limits=LimitsConfig(members=4))
    with pytest.raises(ValueError, match=r"key 0 holds 2,001 bytes in big, data\.limits\.member_mb allows 2,000"):
        scan(path, limits=LimitsConfig(member_mb=0.002))
    assert len(scan(path, limits=LimitsConfig(member_mb=0.002), ignore=("big",)).rows) == 1


@pytest.mark.parametrize("label", ["cls:species", "txt:0", "auto:x"])
def test_a_key_is_asked_of_json_only(label: str) -> None:
    with pytest.raises(ValueError, match=r"^data\.label: .* is none of auto, FIELD, json:KEY"):
        Wanted(label=label)


def test_archives_that_were_joined_are_refused(tmp_path: Path, tar_of: Tar) -> None:
    path = tar_of(tmp_path / "a.tar", [("0.npy", IMAGE)])
    path.write_bytes(path.read_bytes() + tar_of(tmp_path / "b.tar", [("1.npy", IMAGE)]).read_bytes())
    with pytest.raises(ValueError, match=r"^a\.tar: goes on after its end mark"):
        scan(path)


def test_a_key_that_comes_back_in_another_shard_is_another_sample(tmp_path: Path, tar_of: Tar) -> None:
    for name in ("a.tar", "b.tar"):
        assert len(scan(tar_of(tmp_path / name, [("0.npy", IMAGE)])).rows) == 1


def test_json_of_a_sample_is_read_in_any_order_of_members(tmp_path: Path, tar_of: Tar) -> None:
    value = json.dumps({"species": "emu"}).encode()
    for number, members in enumerate(([("0.json", value), ("0.npy", IMAGE)], [("0.npy", IMAGE), ("0.json", value)])):
        assert labels(scan(tar_of(tmp_path / f"{number}.tar", members), label="json:species")) == ["emu"]
