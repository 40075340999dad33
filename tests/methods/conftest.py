"""One process, for every test of this folder."""

from collections.abc import Iterator

import pytest

from trainer.parallel.config import DDPConfig
from trainer.parallel.ranks import Ranks, start


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    found = start(DDPConfig())
    assert found.world == 1
    yield found
    found.close()
