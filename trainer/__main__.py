"""accelerate launch -m trainer CONFIG [key=value ...]

Trains one run. Started by `tandem train`, `accelerate launch`, torchrun, or plain `python -m trainer`.
"""

import re
import sys
from pathlib import Path

from trainer import signals
from trainer.errors import boundary, leave

USAGE = """\
usage: tandem train CONFIG [key=value ...]
       accelerate launch -m trainer, torchrun -m trainer and python -m trainer take the same

example:
  tandem train configs/vaegan_fashion.yaml optim.lr=2e-4 run=runs/try

A key=value overrides the file's value, which overrides the default; --key=value and --key value do too. With CONFIG
before --help the values below are the file's.
"""


def arguments(argv: list[str]) -> tuple[Path | None, list[str], bool]:
    """(config file, overrides as key=value, whether help is wanted)."""
    wants_help = bool({"-h", "--help"} & set(argv))
    words = [word for word in argv if word not in ("-h", "--help")]
    path = Path(words[0]) if words and _is_file(words[0]) else None
    rest, overrides = words[1:] if path is not None else words, []
    while rest:
        word = rest.pop(0)
        if word.startswith("--") and "=" not in word and rest and not rest[0].startswith("--"):
            word = f"{word}={rest.pop(0)}"
        key, equals, value = word.partition("=")
        overrides.append(f"{key.removeprefix('--').replace('-', '_')}{equals}{value}")
    return path, overrides, wants_help


def _is_file(word: str) -> bool:
    """Whether a command's first word is the config's file, which may lie in a folder such as lr=1e-3."""
    if word.startswith("--"):
        return False
    key, equals, _ = word.partition("=")
    if not equals or Path(word).is_file():
        return True
    return word.endswith((".yaml", ".yml")) and not re.fullmatch(r"[\w.-]+", key)


def main(argv: list[str]) -> int:
    path, overrides, wants_help = arguments(argv)
    if not argv:
        print(USAGE, end="")
        return 2
    from trainer import config as configuration

    if wants_help:
        default = configuration.load(path, overrides) if path is not None else None
        print(configuration.help_text(default, program="tandem train", usage=USAGE))
        return 0
    if path is None:
        raise ValueError(f"command line: a config file comes first, not {argv[0]!r}; see `tandem train --help`")
    config = configuration.load(path, overrides)
    from trainer.loop import train

    return train(config)


if __name__ == "__main__":
    signals.install()  # before torch's imports, in which a notice would kill and an interrupt show their tracebacks
    leave(boundary(main, sys.argv[1:]))
