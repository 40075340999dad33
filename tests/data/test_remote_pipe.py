"""Shards that a program gives."""

import hashlib
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from trainer.data import ShardsConfig
from trainer.data.config import RemoteConfig
from trainer.data.index import Shard
from trainer.data.store import Store, open_store

DATA = bytes(range(256)) * 500
SHARD = Shard("0.tar", 3, len(DATA), hashlib.sha256(DATA).hexdigest(), "")
SECRET = "s3cr3tT0ken"


@pytest.fixture
def pipe(tmp_path: Path) -> Callable[..., Store]:
    (tmp_path / "set" / "train").mkdir(parents=True)
    (tmp_path / "set" / "train" / "0.tar").write_bytes(DATA)
    (tmp_path / "set" / "train" / "index.json").write_text("{}")

    def open_pipe(command: str, *, allow: bool = True) -> Store:
        path = f"pipe:{command}"
        remote = RemoteConfig(cache=tmp_path / "cache", timeout=0.3, retries=1)
        config = ShardsConfig(path=path, size=8, allow_pipe=allow, remote=remote)
        return open_store(config, path, "train")

    return open_pipe


def python(code: str, *arguments: str) -> str:
    """A command that runs `code`; {name} is sys.argv[1]."""
    return shlex.join([sys.executable, "-c", code, "{name}", *arguments])


def test_a_program_gives_shards_and_small_files(pipe: Callable[..., Store], tmp_path: Path) -> None:
    store = pipe(f"cat {tmp_path}/set/{{name}}")
    found = store.open(SHARD)
    assert os.pread(found.fd, found.bytes + 1, 0) == DATA
    assert store.file("index.json").read_text() == "{}"
    assert store.name == "pipe:cat:train"
    (tmp_path / "set" / "train" / "0.tar").unlink()
    assert store.open(SHARD).bytes == len(DATA)  # from the cache


def test_a_pipe_that_is_not_allowed_starts_nothing(pipe: Callable[..., Store], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.path: pipe: starts a program.*data\.allow_pipe: true in the YAML"):
        pipe(f"touch {tmp_path}/started {{name}}", allow=False).open(SHARD)
    assert not (tmp_path / "started").exists()


def test_no_shell_reads_the_command(pipe: Callable[..., Store], tmp_path: Path) -> None:
    store = pipe(f"cat {tmp_path}/set/{{name}} ';' touch {tmp_path}/started $(touch {tmp_path}/started)")
    with pytest.raises(OSError, match=r"0\.tar: cat ended with exit code 1"):
        store.open(SHARD)
    assert not (tmp_path / "started").exists()


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("cat 'x {name}", "is not a command"),
        ("cat train.tar", "needs an argument with {name} in it"),
        ("", "needs an argument"),
    ],
)
def test_a_command_that_cannot_be_one_is_named(pipe: Callable[..., Store], command: str, words: str) -> None:
    with pytest.raises(ValueError, match=rf"^data\.path: pipe: {words}"):
        pipe(command)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import sys; sys.exit(f'no access with {sys.argv[2]}')", r"ended with exit code 1: no access with \.\.\."),
        ("import time; print('x', flush=True); time.sleep(60)", r"gave no byte for 0\.3 s"),
        (
            "import time; [print('x', end='', flush=True) or time.sleep(0.05) for _ in range(999)]",
            r"gave \d+ bytes in 0\.3 s, fewer than 65,536",
        ),
        ("import os, time; os.close(1); time.sleep(60)", r"did not end"),
    ],
    ids=["fails", "stalls", "drips", "stays"],
)
def test_a_program_that_fails_is_tried_again_and_named(
    pipe: Callable[..., Store], tmp_path: Path, code: str, words: str
) -> None:
    counted = f"import sys; open({str(tmp_path / 'started')!r}, 'a').write('x'); {code}"
    with pytest.raises(OSError, match=rf"pipe:python[\d.]*:train/0\.tar: (python[\d.]* )?{words}, 2 times") as caught:
        pipe(python(counted, SECRET)).open(SHARD)
    assert (tmp_path / "started").read_text() == "xx"
    assert SECRET not in str(caught.value)


def test_a_program_that_gives_other_bytes_is_named(pipe: Callable[..., Store]) -> None:
    with pytest.raises(ValueError, match=r"0\.tar: has the sha256 .*changed since its index was made"):
        pipe(python(f"import os; os.write(1, bytes({len(DATA)}))")).open(SHARD)
    with pytest.raises(ValueError, match=r"0\.tar: gives more than the 128,000 bytes of its index"):
        pipe(python("import sys; [sys.stdout.write('x' * 100000) for _ in range(100)]")).open(SHARD)
    with pytest.raises(ValueError, match=r"0\.tar: has 3 bytes, its index says 128,000"):
        pipe(python("print('ab')")).open(SHARD)


def test_a_program_that_is_missing_is_named(pipe: Callable[..., Store]) -> None:
    with pytest.raises(ValueError, match=r"no-such-program: No such file or directory"):
        pipe("no-such-program {name}").open(SHARD)


def test_a_program_cannot_list_its_shards(pipe: Callable[..., Store]) -> None:
    with pytest.raises(ValueError, match=r"a program cannot list its shards; make an index with `tandem data index`"):
        pipe("cat {name}").shards()


@pytest.mark.parametrize(
    "words",
    [
        f"--token={SECRET}", f"--api-key {SECRET}", f"-H 'Authorization: Bearer {SECRET}'", f"PASSWORD={SECRET}",
        f"https://user:{SECRET}@host/{{name}}", f"https://host/{{name}}?X-Amz-Signature={SECRET}",
        f"https://{SECRET}@host/{{name}}", f"--aws-secret-access-key={SECRET}", f"--passwd={SECRET}",
    ],
)  # fmt: skip
def test_what_looks_like_a_secret_is_refused_and_not_repeated(pipe: Callable[..., Store], words: str) -> None:
    """The command stands in the config of the run, in its checkpoints and on its board."""
    with pytest.raises(ValueError, match=r"^data\.path: ") as caught:
        pipe(f"give {words} {{name}}")
    assert SECRET not in str(caught.value) + repr(caught.value)


@pytest.mark.parametrize(
    "words",
    ["--token-file=/run/token", "--password-env=PW", "--config ~/.give.conf", "https://host/{name}", "s3://a/{name}"],
)
def test_where_a_secret_lies_is_none(pipe: Callable[..., Store], words: str) -> None:
    pipe(f"give {words} {{name}}")


def test_no_part_of_an_argument_comes_back_from_the_program(pipe: Callable[..., Store]) -> None:
    with pytest.raises(OSError, match=r"ended with exit code 1: denied for \.\.\.") as caught:
        pipe(python("import sys; sys.exit('denied for ' + sys.argv[2].split('=')[1])", f"--user={SECRET}")).open(SHARD)
    assert SECRET not in str(caught.value)
