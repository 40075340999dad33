"""Tar as tar(1), Python and webdataset write it, and as nobody should."""

import contextlib
import hashlib
import io
import subprocess
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data import tar

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "pax": tarfile.PAX_FORMAT, "gnu": tarfile.GNU_FORMAT}
PARTS = st.text(st.sampled_from("aZ0_-é ü雪"), min_size=1, max_size=40).map(lambda text: f"k{text}")
NAMES = st.builds(
    lambda folders, stem, field: "/".join([*folders, f"{stem}.{field}"]),
    st.lists(PARTS, max_size=4),
    PARTS,
    st.sampled_from(["jpg", "left.png", "JPG", "cls", "json"]),
)
FILES = st.dictionaries(NAMES, st.integers(0, 1500), min_size=1, max_size=6)


def scan(path: Path) -> list[tar.Member]:
    with path.open("rb") as file:
        return tar.scan(file.fileno(), path.name)


def passed(path: Path) -> list[tar.Member]:
    """The same by one pass in blocks."""
    with path.open("rb") as file:
        passing = tar.Pass(file.fileno(), hashlib.sha256())
        return list(tar.members(passing.at, path.name, total=path.stat().st_size))


def python_tar(path: Path, files: dict[str, int], form: int) -> Path:
    with tarfile.open(path, "w", format=form) as file:
        for name, size in files.items():
            info = tarfile.TarInfo(name)
            info.size = size
            file.addfile(info, io.BytesIO(bytes(size)))
    return path


def listed(path: Path) -> list[tuple[str, int, int]]:
    """(name, offset, size) of the files, as Python reads them."""
    with tarfile.open(path) as file:
        return [(m.name.removeprefix("./"), m.offset_data, m.size) for m in file if m.isfile()]


def lowered(name: str) -> str:
    """With its field in lower case."""
    dot = name.index(".", name.rfind("/") + 1)
    return name[:dot] + name[dot:].lower()


def agree(path: Path) -> int:
    found, expected = scan(path), listed(path)
    assert passed(path) == found
    assert [(f"{m.key}.{m.field}", m.offset, m.size) for m in found] == [
        (lowered(n), at, size) for n, at, size in expected
    ]
    data = path.read_bytes()
    for member in found:  # what is between begin and end is the member, whole
        (alone,) = tar.inside(data[member.begin : member.end], path.name)
        assert (alone.key, alone.field, alone.size) == (member.key, member.field, member.size)
        assert alone.offset == member.offset - member.begin
    return len(found)


# ------------------------------------------------------------------ what others write
@settings(max_examples=40, deadline=None)
@given(files=FILES, form=st.sampled_from(list(FORMATS.values())))
def test_what_python_writes_is_found(
    files: dict[str, int], form: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("tar") / "a.tar"
    try:
        python_tar(path, files, form)
    except ValueError:
        return  # a name that ustar cannot hold
    assert agree(path) == len(files)


@settings(max_examples=12, deadline=None)
@given(files=FILES, form=st.sampled_from(list(FORMATS)), folders=st.booleans())
def test_what_tar_writes_is_found_with_folders_and_dots_before_the_names(
    files: dict[str, int], form: str, folders: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("tar")
    for name, size in files.items():
        path = folder / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(size))
    names = ["."] if folders else sorted(files)
    made = subprocess.run(
        ["tar", f"--format={form}", "--sort=name", "-C", folder / "in", "-cf", folder / "a.tar", *names],
        capture_output=True,
    )
    if made.returncode == 0:  # else ustar cannot hold a name
        assert agree(folder / "a.tar") == len(files)


def test_long_names_of_all_formats_are_found(tmp_path: Path) -> None:
    files = {f"{'d' * 90}/{'n' * 90}.npy": 700, f"{'e' * 99}/{'f' * 120}/{'g' * 100}.cls": 1}
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        assert agree(python_tar(tmp_path / "a.tar", files, form)) == 2


@settings(max_examples=15, deadline=None)
@given(
    samples=st.lists(
        st.dictionaries(st.sampled_from(["txt", "left.jpg", "json", "bin"]), st.binary(max_size=1200), min_size=1),
        min_size=1,
        max_size=5,
    )
)
def test_what_webdatasets_writer_writes_is_found(
    samples: list[dict[str, bytes]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("tar") / "a.tar"
    with webdataset.TarWriter(str(path), encoder=False) as writer:
        for number, sample in enumerate(samples):
            writer.write({"__key__": f"{number:04d}", **sample})
    assert agree(path) == sum(map(len, samples))
    data = path.read_bytes()
    found = {(m.key, m.field): data[m.offset : m.offset + m.size] for m in scan(path)}
    assert found == {(f"{n:04d}", field): value for n, sample in enumerate(samples) for field, value in sample.items()}


def test_a_pass_in_blocks_finds_members_larger_than_a_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tar, "READ", 1000)
    path = python_tar(tmp_path / "a.tar", {"a.jpg": 5000, "b.jpg": 0, "c.jpg": 511, "d.jpg": 1025}, tarfile.PAX_FORMAT)
    assert agree(path) == 4


def test_names_that_webdataset_passes_over_have_no_field(tmp_path: Path) -> None:
    names = ["README", "__meta__/a.jpg", "__meta__", "._a.jpg", "v1.0/readme", "a.jpg"]
    path = python_tar(tmp_path / "a.tar", dict.fromkeys(names, 3), tarfile.USTAR_FORMAT)
    assert [member.field for member in scan(path)] == ["", "", "", "", "", "jpg"]


# ------------------------------------------------------------------ what a shard must not hold
@pytest.mark.parametrize(
    ("kind", "what"),
    [
        (tarfile.LNKTYPE, "a hard link"),
        (tarfile.SYMTYPE, "a symbolic link"),
        (tarfile.CHRTYPE, "a character device"),
        (tarfile.BLKTYPE, "a block device"),
        (tarfile.FIFOTYPE, "a fifo"),
        (b"V", "a member of the kind b'V'"),
        (b"M", "a member of the kind b'M'"),
    ],
)
def test_what_is_no_plain_file_is_refused_by_name(tmp_path: Path, kind: bytes, what: str) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as file:
        for name, of in (("good.jpg", tarfile.REGTYPE), ("d/evil.jpg", kind)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = of, "/etc/passwd"
            file.addfile(info)
    with pytest.raises(ValueError, match=rf"^a\.tar: d/evil\.jpg is {what}, at byte 512; pack it again"):
        scan(tmp_path / "a.tar")


@pytest.mark.parametrize("form", ["gnu", "pax"])
def test_a_sparse_file_is_refused(tmp_path: Path, form: str) -> None:
    with (tmp_path / "holes.bin").open("wb") as file:
        file.truncate(1 << 20)
        file.seek(1 << 19)
        file.write(b"x")
    subprocess.run(
        ["tar", "--sparse", f"--format={form}", "-C", tmp_path, "-cf", tmp_path / "a.tar", "holes.bin"], check=True
    )
    with pytest.raises(ValueError, match=r"^a\.tar: .*a sparse file.* pack it again"):
        scan(tmp_path / "a.tar")


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("/etc/a.jpg", "an absolute name"),
        ("../a.jpg", r"\.\. in its name"),
        ("a/../../b.jpg", r"\.\. in its name"),
        ("./../b.jpg", r"\.\. in its name"),
        (".//b.jpg", "an absolute name"),
        ("a\x1b[2Jb.jpg", "control characters in its name"),
        ("a\nb.jpg", "control characters in its name"),
    ],
)
def test_a_name_that_is_no_plain_one_is_refused(tmp_path: Path, name: str, what: str) -> None:
    path = python_tar(tmp_path / "a.tar", {"good.jpg": 1, name: 1}, tarfile.PAX_FORMAT)
    with pytest.raises(ValueError, match=rf"has {what}, at byte \d+; pack it again") as caught:
        scan(path)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", ["..a.jpg", "a..jpg", "a/..b/c.jpg"])
def test_two_dots_inside_a_name_are_no_step_up(tmp_path: Path, name: str) -> None:
    assert len(scan(python_tar(tmp_path / "a.tar", {name: 1}, tarfile.PAX_FORMAT))) == 1


def test_a_header_for_all_members_may_hold_a_comment_but_no_name(tmp_path: Path) -> None:
    for headers, good in (({"comment": "3f2a"}, True), ({"path": "../../x.jpg"}, False), ({"size": "9"}, False)):
        with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT, pax_headers=headers) as file:
            file.addfile(tarfile.TarInfo("a.jpg"))
        if good:
            assert scan(tmp_path / "a.tar")[0].key == "a"
        else:
            with pytest.raises(ValueError, match="a name or a size for all members"):
                scan(tmp_path / "a.tar")


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"\x1f\x8b\x08" + bytes(600), "is compressed: unpack it"),
        (b"PK\x03\x04" + bytes(600), "is no tar file"),
        (bytes([255]) * 600, "is no tar file"),
    ],
)
def test_what_is_no_tar_is_named(tmp_path: Path, data: bytes, what: str) -> None:
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(ValueError, match=rf"^a\.tar: {what}"):
        scan(tmp_path / "a.tar")


def header(name: str = "a.jpg", *, size: bytes = b"0", kind: bytes = b"0") -> bytes:
    block = bytearray(tarfile.TarInfo(name).tobuf(tarfile.USTAR_FORMAT))
    block[124:136] = size.ljust(12, b"\0")
    block[156:157] = kind
    block[148:156] = b"%06o\0 " % (sum(block) - sum(block[148:156]) + 256)
    return bytes(block)


@pytest.mark.parametrize(
    "size", [b"\x80" + (1 << 60).to_bytes(11, "big"), b"\x80" + b"\xff" * 11, b"77777777777", b"1001"]
)
def test_a_size_beyond_the_end_of_the_file_is_a_cut_shard(tmp_path: Path, size: bytes) -> None:
    (tmp_path / "a.tar").write_bytes(header(size=size) + bytes(2048)[:512])
    with pytest.raises(tar.ShardCut):
        scan(tmp_path / "a.tar")


@pytest.mark.parametrize("size", [b"-1", b"+1", b"0x9", b"1_0", b"99", b"\xff" * 12, "٣".encode()])
def test_a_size_that_is_no_octal_number_is_damage(tmp_path: Path, size: bytes) -> None:
    (tmp_path / "a.tar").write_bytes(header(size=size) + bytes(1024))
    with pytest.raises(ValueError, match=r"^a\.tar: is damaged at byte 0"):
        scan(tmp_path / "a.tar")


@pytest.mark.parametrize(
    "record",
    [b"0 path=a\n", b"path=a\n", b"-5 path=a\n", b"99999999999 size=5\n", b"12 size=-999\n", b"12 size=abcd\n"],
)
def test_a_damaged_pax_record_is_named_or_harmless(tmp_path: Path, record: bytes) -> None:
    data = header(kind=b"x", size=b"%o" % len(record)) + record.ljust(512, b"\0") + header() + bytes(1024)
    (tmp_path / "a.tar").write_bytes(data)
    try:
        assert [member.size for member in scan(tmp_path / "a.tar")] == [0]
    except ValueError as error:
        assert "damaged at byte 0" in str(error)
    except tar.ShardCut:
        assert b"size=5" in record


@pytest.mark.parametrize("kind", [b"x", b"L", b"g"])
def test_an_extended_header_without_bounds_is_refused(tmp_path: Path, kind: bytes) -> None:
    (tmp_path / "a.tar").write_bytes(header(kind=kind, size=b"%o" % (1 << 30)) + bytes(2048))
    with pytest.raises(ValueError, match="an extended header of 1073741824 bytes"):
        scan(tmp_path / "a.tar")


def test_headers_that_were_summed_with_signed_bytes_are_right_too(tmp_path: Path) -> None:
    block = bytearray(header("ü.jpg"))
    signed = sum(byte - 256 * (byte > 127) for byte in block) - sum(block[148:156]) + 256
    block[148:156] = b"%06o\0 " % signed
    (tmp_path / "a.tar").write_bytes(bytes(block) + bytes(1024))
    assert scan(tmp_path / "a.tar")[0].key == "ü"


# ------------------------------------------------------------------ damage
@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("whole") / "a.tar"
    python_tar(path, {"k1.jpg": 700, f"{'n' * 120}.jpg": 3, "k2.cls": 1}, tarfile.PAX_FORMAT)
    return path.read_bytes()


@settings(max_examples=150, deadline=None)
@given(at=st.integers(0, 511), bit=st.integers(0, 7), block=st.sampled_from(["first", "last"]))
def test_no_flipped_bit_of_a_header_goes_unseen(
    whole: bytes, at: int, bit: int, block: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "flipped.tar"
    path.write_bytes(whole)
    before = scan(path)
    data = bytearray(whole)
    data[(before[0] if block == "first" else before[-1]).begin + at] ^= 1 << bit
    path.write_bytes(data)
    try:
        assert scan(path) == before  # a blank that became another blank
    except ValueError as error:
        assert "is damaged" in str(error) or "is no tar" in str(error)


@settings(max_examples=60, deadline=None)
@given(share=st.floats(0, 1))
def test_a_tar_that_is_cut_anywhere_before_its_end_mark_says_so(
    whole: bytes, share: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "cut.tar"
    path.write_bytes(whole)
    before = scan(path)
    path.write_bytes(whole[: int(share * before[-1].end)])
    with pytest.raises(tar.ShardCut) as caught:
        scan(path)
    assert caught.value.found == [member for member in before if member.offset + member.size <= path.stat().st_size]


@settings(max_examples=40, deadline=None)
@given(data=st.binary(max_size=3000))
def test_no_bytes_make_the_reader_fail_otherwise(data: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "noise.tar"
    path.write_bytes(data)
    with contextlib.suppress(ValueError, tar.ShardCut):
        assert scan(path) == []


def test_a_slice_that_is_cut_is_damage(whole: bytes) -> None:
    with pytest.raises(ValueError, match=r"^a\.tar: k7: ends before its last member"):
        tar.inside(whole[:900], "a.tar: k7")


def test_what_we_write_is_what_we_read(
    tmp_path: Path, writes: Callable[[Path, Sequence[tuple[str, bytes]]], None]
) -> None:
    writes(tmp_path / "a.tar", [("1.jpg", b"x" * 512), ("1.cls", b"")])
    assert agree(tmp_path / "a.tar") == 2
    assert (tmp_path / "a.tar").stat().st_size % tar.RECORD == 0


@pytest.fixture
def writes() -> Callable[[Path, Sequence[tuple[str, bytes]]], None]:
    def write(path: Path, members: Sequence[tuple[str, bytes]]) -> None:
        body = b"".join(tar.member(name, data) for name, data in members)
        path.write_bytes(body + tar.end(len(body)))

    return write
