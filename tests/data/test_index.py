"""Shards as webdataset, tar(1) and interrupted copies leave them."""

import subprocess
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import webdataset

from trainer.data import ShardsConfig, Stream, tar

Tar = Callable[[Path, Sequence[tuple[str, bytes]]], Path]
PIXELS = np.arange(6, dtype=np.uint8).reshape(2, 3, 1)


def stream(path: Path, **options: object) -> Stream:
    settings = {"size": (2, 3), "channels": 1} | options
    return Stream(ShardsConfig(path=path, **settings), split="train", batch=1, rank=0, world=1, seed=0)  # type: ignore[arg-type]


def test_a_scan_finds_what_tarfile_finds(tmp_path: Path) -> None:
    (tmp_path / "in" / ("d" * 90)).mkdir(parents=True)
    names = ["a.jpg", "b.left.png", f"{'d' * 90}/{'n' * 90}.npy", f"{'d' * 90}/ü.cls"]
    for number, name in enumerate(names):
        (tmp_path / "in" / name).write_bytes(bytes([number]) * (700 * number))
    for form, number in (("ustar", 0), ("pax", 1), ("gnu", 2)):
        path = tmp_path / f"{number}.tar"
        subprocess.run(["tar", f"--format={form}", "-C", tmp_path / "in", "-cf", path, "."], check=True)
        with tarfile.open(path) as file:
            expected = {tar.split_name(m.name.removeprefix("./")): (m.offset_data, m.size) for m in file if m.isfile()}
        with path.open("rb") as file:
            found = tar.scan(file.fileno(), str(path))
        assert {(m.key, m.field): (m.offset, m.size) for m in found} == expected
        assert len(expected) == len(names)


@pytest.mark.parametrize("name", ["a.jpg", "x/y.left.png", "v1.0/0001.jpg", "a.b.jpg", "x.y/z.cls"])
def test_names_are_split_as_webdataset_splits_them(name: str) -> None:
    assert tar.split_name(name) == webdataset.tariterators.base_plus_ext(name) or "." in name.rpartition("/")[0]


def test_shards_of_webdatasets_own_writer_are_read(tmp_path: Path, number_of: Callable[[object], list[int]]) -> None:
    (tmp_path / "train").mkdir()
    with webdataset.ShardWriter(str(tmp_path / "train" / "s-%03d.tar"), maxcount=3, verbose=0) as writer:
        for number in range(7):
            image = np.full((4, 5, 3), number, np.uint8)
            image[0, 0, :2] = 0, number
            writer.write({"__key__": f"k{number}", "png": image, "cls": number % 2, "json": {"n": number}})
    found = stream(tmp_path, size=(4, 5), channels=3)
    assert (found.samples, found.classes) == (7, ("0", "1"))
    batch = found.first(7)
    assert number_of(batch.data) == list(range(7))
    assert batch.label.tolist() == [0, 1, 0, 1, 0, 1, 0]


def test_shards_of_tar_are_read_where_the_members_of_a_sample_stand_together(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    for number in range(4):
        with (tmp_path / f"{number}.npy").open("wb") as file:
            np.save(file, np.full((2, 3), number, np.uint8))
        (tmp_path / f"{number}.cls").write_text(f"{number}\n")
    names = [f"{n}.{field}" for n in range(4) for field in ("cls", "npy")[:: 1 - 2 * (n % 2)]]
    subprocess.run(["tar", "-C", tmp_path, "-cf", tmp_path / "train" / "a.tar", *names], check=True)
    batch = stream(tmp_path).first(4)
    assert batch.label.tolist() == [0, 1, 2, 3]
    assert batch.data[:, 0, 0, 0].tolist() == [0, 1, 2, 3]


def test_a_key_that_comes_back_is_named(tmp_path: Path, tar_of: Tar) -> None:
    tar_of(tmp_path / "train" / "a.tar", [("k1.npy", npy(PIXELS)), ("k2.npy", npy(PIXELS)), ("k1.cls", b"1")])
    with pytest.raises(ValueError, match=r"a\.tar: key k1 comes back after other samples; .* --sort=name"):
        stream(tmp_path)


def test_samples_without_a_class_are_labelled_minus_1(tmp_path: Path, tar_of: Tar) -> None:
    tar_of(tmp_path / "train" / "a.tar", [("a.npy", npy(PIXELS)), ("b.npy", npy(PIXELS)), ("b.cls", b"1")])
    found = stream(tmp_path)
    assert found.first(2).label.tolist() == [-1, 1]
    assert found.classes == ("0", "1")


def npy(image: np.ndarray) -> bytes:
    header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {image.shape}, }}".encode()
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + image.tobytes()


# ------------------------------------------------------------------ F1-6, F1-8: fields
def test_a_sample_without_the_image_field_is_named(tmp_path: Path, tar_of: Tar) -> None:
    tar_of(tmp_path / "train" / "a.tar", [("k1.npy", npy(PIXELS)), ("k2.txt", b"x"), ("k2.cls", b"0")])
    with pytest.raises(ValueError, match=r"a\.tar: key k2 has no image field \(found: txt, cls\)"):
        stream(tmp_path)
    with pytest.raises(ValueError, match=r"a\.tar: key k1 has no field left\.png \(found: npy\)"):
        stream(tmp_path, image="left.png")


def test_of_several_images_one_must_be_chosen(tmp_path: Path, tar_of: Tar) -> None:
    members = [("k.left.npy", npy(PIXELS)), ("k.right.npy", npy(PIXELS + 100))]
    tar_of(tmp_path / "train" / "a.tar", members)
    with pytest.raises(
        ValueError, match=r"several image fields \(found: left\.npy, right\.npy\); name one in data\.image"
    ):
        stream(tmp_path)
    assert stream(tmp_path, image="right.npy").first(1).data[0, 0, 0, 0] == 100


def test_dots_in_foreign_names_merge_into_one_sample_and_are_refused(tmp_path: Path, tar_of: Tar) -> None:
    tar_of(tmp_path / "train" / "a.tar", [("22.05.npy", npy(PIXELS)), ("22.06.npy", npy(PIXELS))])
    with pytest.raises(ValueError, match=r"key 22 has several image fields \(found: 05\.npy, 06\.npy\)"):
        stream(tmp_path)


def test_a_duplicate_names_shard_key_and_field(tmp_path: Path, tar_of: Tar) -> None:
    tar_of(tmp_path / "train" / "a.tar", [("001.npy", npy(PIXELS)), ("001.npy", npy(PIXELS))])
    with pytest.raises(ValueError, match=r"a\.tar: key 001 has the field npy twice"):
        stream(tmp_path)


def test_a_label_that_is_no_number_is_named(tmp_path: Path, tar_of: Tar) -> None:
    tar_of(tmp_path / "train" / "a.tar", [("001.npy", npy(PIXELS)), ("001.cls", b"cat")])
    with pytest.raises(ValueError, match=r"a\.tar: the \.cls of key 001 holds b'cat'"):
        stream(tmp_path)


@pytest.mark.parametrize(
    ("key", "what"), [("../../etc/k0", "\\.\\. in its"), ("/abs/k0", "an absolute"), ("a\x1bk", "control")]
)
def test_a_name_that_leaves_its_folder_or_steers_a_terminal_is_refused(
    tmp_path: Path, tar_of: Tar, key: str, what: str
) -> None:
    tar_of(tmp_path / "train" / "a.tar", [(f"{key}.npy", npy(PIXELS))])
    with pytest.raises(ValueError, match=rf"a\.tar: .*k0?\.npy has {what}.* name") as caught:
        stream(tmp_path)
    assert "\x1b" not in str(caught.value)
    assert [path.name for path in sorted(tmp_path.rglob("*"))] == ["train", "a.tar"]


# ------------------------------------------------------------------ F1-9: cut shards
@pytest.mark.parametrize("cut", [4 * (512 + 3072), 4 * (512 + 3072) + 100, 4 * (512 + 3072) + 600, 512, 0])
def test_a_foreign_shard_that_is_cut_is_named_with_what_is_there(tmp_path: Path, tar_of: Tar, cut: int) -> None:
    path = tar_of(tmp_path / "train" / "a.tar", [(f"{n}.npy", npy(np.zeros((54, 53), np.uint8))) for n in range(10)])
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ValueError, match=rf"a\.tar: is cut short: .*\({min(cut // 3584, 4)} samples are there\)"):
        stream(tmp_path)


def test_a_damaged_header_is_named(tmp_path: Path, tar_of: Tar) -> None:
    path = tar_of(tmp_path / "train" / "a.tar", [("0.npy", npy(PIXELS)), ("1.npy", npy(PIXELS))])
    data = bytearray(path.read_bytes())
    data[1024 + 3] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.tar: is damaged at byte 1024"):
        stream(tmp_path)


def test_what_is_no_tar_is_named(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "a.tar").write_bytes(b"something else entirely" * 100)
    with pytest.raises(ValueError, match=r"a\.tar: is no tar file"):
        stream(tmp_path)


def test_a_split_without_shards_is_named(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    with pytest.raises(ValueError, match=r"^data\.path: .*train holds no index\.json and no \.tar files"):
        stream(tmp_path)


def test_images_of_different_sizes_are_refused_before_the_first_step(tmp_path: Path, tar_of: Tar) -> None:
    members = [("0.npy", npy(PIXELS)), ("1.npy", npy(np.zeros((4, 3), np.uint8)))]
    tar_of(tmp_path / "train" / "a.tar", members)
    with pytest.raises(ValueError, match=r"^data\.fit: exact .* different sizes, as .* \(2 to 4 x 3, height x width\)"):
        stream(tmp_path)


def test_an_index_that_names_a_shard_elsewhere_is_refused(tmp_path: Path, tar_of: Tar) -> None:
    tar_of(tmp_path / "train" / "a.tar", [("0.npy", npy(PIXELS))])
    stream(tmp_path)
    path = tmp_path / "train" / "index.json"
    path.write_text(path.read_text().replace('"a.tar"', '"../secret.tar"'))
    with pytest.raises(ValueError, match=r"index\.json: \.\./secret\.tar is no name for a shard"):
        stream(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 99}', '{"format": 1, "shards": 3}', "\udcff"])
def test_an_index_that_is_not_readable_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "index.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=r"index\.json: is"):
        stream(tmp_path)
