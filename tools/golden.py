"""python -m tools.golden [--compare]: the golden losses of the shipped configs, in tests/golden/.

100 updates of each config at a small batch on Fashion-MNIST, each loss after each update. `make golden` writes them
anew after a change that is meant to change them; --compare says how far this machine is from the files.
"""

import argparse
import json
import sys
from pathlib import Path

from trainer import build
from trainer import config as configuration
from trainer.data import Transform, to_device
from trainer.errors import boundary
from trainer.parallel.config import DDPConfig
from trainer.parallel.ranks import Ranks, start
from trainer.phase import Run
from trainer.step import means, train_step

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "tests" / "golden"
BATCH, UPDATES = 16, 100
COMMON = [f"batch={BATCH}", f"images={BATCH * UPDATES}", "optim.warmup=400", "data.cache_mb=0"]
# at the shipped rates two players amplify the last bit of a float32 to a tenth of a loss within these updates
SLOW = ["optim.lr=2e-4", "optim.discriminator.lr=1e-4"]
METHODS = {
    "vae": COMMON,
    "gan": [*COMMON, *SLOW],
    "vaegan": [*COMMON, *SLOW, "method.adversarial_from=160", "method.adversarial_ramp=320"],  # within these updates
}
Curves = dict[str, list[float | None]]


def losses(method: str, *, data: Path, ranks: Ranks, updates: int = UPDATES) -> Curves:
    """{tag: its value in each update}, None where the term took no part; the shipped config of `method` on `data`."""
    words = [*METHODS[method], f"data.path={data}"]
    config = configuration.load(ROOT / "configs" / f"{method}_fashion.yaml", words)
    trained = build.build_method(config, device=ranks.device)
    engines = build.build_engines(config, trained, build.build_networks(trained, seed=config.seed), ranks)
    run = Run(engines, seed=config.seed, balance=trained.balance, precision=config.precision)
    stream = build.build_stream(config, split="train", ranks=ranks)
    curves: Curves = {}
    batches, transform = stream.batches(0), Transform.training(config.data, seed=config.seed)
    for update in range(updates):
        given = to_device(next(batches), device=ranks.device, transform=transform)
        train_step(trained, engines, [given], run, images=update * BATCH, batch=BATCH, ranks=ranks)
        for tag, value in means(run.kept, ranks).items():
            if tag.startswith("loss/"):
                curves.setdefault(tag, [None] * updates)[update] = value
        run.kept.clear()
    stream.close()
    return curves


def read(method: str) -> Curves:
    found = json.loads((FOLDER / f"{method}.json").read_text(encoding="utf-8"))
    assert isinstance(found, dict)
    return found


def distance(found: Curves, golden: Curves) -> list[float]:
    """For each update the largest difference of a loss, as a share of the largest value of that loss's golden curve."""
    assert found.keys() == golden.keys(), f"other losses: {sorted(found)} instead of {sorted(golden)}"
    worst = [0.0] * max(map(len, found.values()))
    for tag, values in found.items():
        wanted = golden[tag][: len(values)]
        assert [value is None for value in values] == [value is None for value in wanted], f"{tag}: in other updates"
        scale = max(abs(value) for value in golden[tag] if value is not None)
        for update, (value, other) in enumerate(zip(values, wanted, strict=True)):
            if value is not None and other is not None:
                worst[update] = max(worst[update], abs(value - other) / scale)
    return worst


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.golden", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=ROOT / "data" / "fashion-mnist", metavar="FOLDER")
    parser.add_argument("--compare", action="store_true", help="say how far this machine is from the files")
    options = parser.parse_args(argv)
    ranks = start(DDPConfig(processes=1))
    for method in METHODS:
        found = losses(method, data=options.data, ranks=ranks)
        path = FOLDER / f"{method}.json"
        if options.compare:
            far = distance(found, read(method))
            told = ", ".join(f"{max(far[:update]):.1e} in {update}" for update in (15, 30, UPDATES))
            print(f"{path}: largest relative difference {told} updates", flush=True)
        else:
            path.parent.mkdir(exist_ok=True)
            rows = ",\n".join(f" {json.dumps(tag)}: {json.dumps(values)}" for tag, values in sorted(found.items()))
            path.write_text(f"{{\n{rows}\n}}\n", encoding="utf-8")
            print(f"{path}: {len(found)} losses of {UPDATES} updates", flush=True)
    ranks.close()
    return 0


if __name__ == "__main__":
    sys.exit(boundary(main, sys.argv[1:]))
