"""A run from its config to its last line: build, restore, then step, log, evaluate, save until the budget is spent."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from trainer import build, checkpoint, config as configuration, progress, resume
from trainer.board import Board, open_board
from trainer.config import Config
from trainer.data import Stream, to_device
from trainer.evaluate import evaluate
from trainer.health import NonFinite, Signals
from trainer.parallel.ranks import Ranks, start
from trainer.phase import Run
from trainer.runlock import RunLock
from trainer.show import show
from trainer.step import means, train_step
from trainer.terminal import Terminal, open_terminal


def train(config: Config) -> int:
    """Runs `config` to its end or until a signal; returns the exit code: 0, or 128 + the signal after saving."""
    ranks = start(config.parallel)
    try:
        with _locked(config.run, ranks), Signals() as signals:
            return _train(config, ranks, signals)
    finally:
        ranks.close()


def _train(config: Config, ranks: Ranks, signals: Signals) -> int:
    # ---------------------------------------------------------------- build
    micro_batches = config.micro_batches(ranks.world)
    stream = Stream(config.data, split="train", batch=config.batch, rank=ranks.rank, world=ranks.world, seed=config.seed)
    test = Stream(config.data, split="test", batch=config.batch, rank=ranks.rank, world=ranks.world, seed=config.seed)
    image = build.image_shape(config)
    method = build.build_method(config, device=ranks.device)
    engines = build.build_engines(config, method, build.build_networks(method, seed=config.seed), ranks)
    run = Run(engines, seed=config.seed, balance=method.balance, precision=config.precision)
    nonfinite = NonFinite(patience=config.log.patience)

    # ---------------------------------------------------------------- restore
    saver = Saver(config, ranks=ranks, engines=engines, run=run, nonfinite=nonfinite, stream=stream)
    images = saver.restore()
    board = open_board(config.run, resume_images=images, enabled=ranks.rank == 0)
    terminal = open_terminal(total=config.images, start=images, enabled=ranks.rank == 0)
    for line in saver.said:
        terminal.note(line)
    show.begin(board, config, ranks, resumed=images)

    # ---------------------------------------------------------------- train
    began, waited, seen = time.perf_counter(), stream.waited, images
    result: dict[str, float] = {}
    batches = stream.batches(images)
    while images < config.images:
        given = to_device(next(batches), device=ranks.device, flip=config.data.flip, seed=config.seed)
        parts = build.split(given, micro_batches)
        train_step(method, engines, parts, run, images=images, batch=config.batch, ranks=ranks)
        images += config.batch
        stopping, ending = ranks.any(signals.stop), images >= config.images

        if progress.due(images, every=config.log.every, batch=config.batch) or ending or stopping:
            nonfinite.look(run.kept, images=images)
            now = time.perf_counter()
            scalars = means(run.kept, ranks)
            run.kept.clear()
            scalars |= {f"learning_rate/{name}": engine.rate(images - config.batch) for name, engine in engines.items()}
            scalars["speed/images_per_second"] = (images - seen) / (now - began)
            scalars["speed/waiting_for_data"] = (stream.waited - waited) / (now - began)
            began, waited, seen = now, stream.waited, images
            board.scalars(images, scalars)
            terminal.report(images, scalars)
        ...
    return 0
