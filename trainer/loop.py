"""A run from its config to its last line: build, restore, then step, log, evaluate, save until the budget is spent."""

import contextlib
from collections.abc import Callable

from trainer import build, progress
from trainer.board import open_board
from trainer.config import Config
from trainer.data import Feed, Transform
from trainer.errors import one_line
from trainer.evaluate import evaluate
from trainer.gallery import Gallery
from trainer.health import BadSamples, Collapse, NonFinite, Signals, check_finite
from trainer.kernels import choose
from trainer.parallel.agreement import same_weights
from trainer.parallel.launcher import asked_processes
from trainer.parallel.ranks import Ranks
from trainer.phase import Run
from trainer.runlock import RunLock
from trainer.saving import Saver
from trainer.speed import Speed
from trainer.step import means, train_step
from trainer.terminal import open_terminal

SHOWN = ("psnr", "nelbo")  # figures of the last line
UNREADABLE = 1 << 16  # what a rank says that has no next batch; above every signal's code


def train(config: Config) -> int:
    """Trains until the budget is spent or a signal comes; returns the exit code: 0, or 128 + the signal once saved."""
    config, said = build.resolve(config)
    build.check_world(config, world=(asked_processes() or (1, ""))[0])
    ranks = build.meet(config)
    with contextlib.ExitStack() as stack:
        stack.callback(ranks.close)
        ranks.together(lambda: stack.enter_context(RunLock(config.run)) and None)  # two runs never share a folder
        return _train(config, ranks, stack.enter_context(Signals()), stack, said=said)


def _train(config: Config, ranks: Ranks, signals: Signals, stack: contextlib.ExitStack, *, said: list[str]) -> int:
    # ---- build
    first = ranks.rank == 0
    micro_batches = config.micro_batches(ranks.world)
    stream, test = (
        stack.enter_context(contextlib.closing(build.build_stream(config, split=split, ranks=ranks)))
        for split in ("train", "test")
    )
    build.check_splits(stream, test)
    method = build.build_method(config, device=ranks.device)
    engines = build.build_engines(config, method, build.build_networks(method, seed=config.seed), ranks)
    run = Run(engines, seed=config.seed, balance=method.balance, precision=config.precision)
    transform = Transform.training(config.data, seed=config.seed)
    # a small split is read as a whole here: what is wrong with it is found before anything is trained
    ranks.agree(_fault(lambda: test.first(1)))
    nonfinite, collapse = NonFinite(patience=config.log.patience), Collapse()

    # ---- restore
    saver = Saver(config, ranks=ranks, engines=engines, run=run, nonfinite=nonfinite, stream=stream)
    images = saver.restore()
    terminal = open_terminal(total=config.updates * config.batch, start=images, enabled=first)
    stack.enter_context(contextlib.closing(terminal))
    board = open_board(config.run / "board", resume_images=images or None, enabled=first, log=terminal.note)
    stack.enter_context(contextlib.closing(board))
    gallery = Gallery(config, method, test, board=board, ranks=ranks)
    gallery.describe()
    bad = [BadSamples(one, folder=config.run / "quarantine", ranks=ranks) for one in (stream, test)]
    for line in (*said, *saver.said):
        terminal.note(line)

    # ---- train
    feed, speed = (
        Feed(stream.batches(images, stop=lambda: signals.code > 0), device=ranks.device, transform=transform),
        Speed(stream, images),
    )
    code, stopping, fault = 0, False, None
    if images < config.images:
        feed.fetch()
        ranks.agree(feed.fault)
        if code := ranks.largest(signals.code):
            terminal.finish(f"stopped at {images:,} images, before an update; the same command begins there again")
            return code
    while images < config.images and not stopping:
        parts = build.split(feed.take(), micro_batches)
        ending = images + config.batch >= config.images
        if not ending:
            feed.fetch()
        train_step(method, engines, parts, run, images=images, batch=config.batch, ranks=ranks)
        images += config.batch
        code = 0 if ending else ranks.largest(signals.code if feed.fault is None else UNREADABLE)
        stopping = code > 0
        metrics: dict[str, float] = {}

        def now(every: int, *, images: int = images, always: bool = ending) -> bool:
            return always or progress.due(images, every=every, batch=config.batch)

        if now(config.log.every) or stopping:
            nonfinite.look(run.kept, images=images)
            scalars = means(run.kept, ranks) | speed.read(images)
            scalars |= {f"lr/{name}": engine.rate(images - config.batch) for name, engine in engines.items()}
            scalars["data/bad_samples"] = ranks.total(stream.bad)
            for line in (*choose.news(), *bad[0].look(), *bad[1].look()):
                terminal.note(line)
            run.kept.clear()
            board.scalars(images, scalars)
            terminal.report(images, scalars)
            alarm = collapse.look(
                scalars, full_weight=build.full_kl_weight(config, images), images=images, batch=config.batch
            )
            if alarm is not None:
                terminal.note(alarm)
                board.text("health", alarm, images)
        fault = next(filter(None, [feed.fault, *(one.fault for one in bad)]), None)
        if fault is not None and code == 0:  # too many bad samples over all ranks: known to each
            code, stopping = UNREADABLE, True
        terminal.advance(images)
        speed.pause()
        saving = now(config.checkpoint.every) or stopping
        if config.log.compare_every and (saving or now(config.log.compare_every)):
            same_weights(engines, ranks, images=images)
        if now(config.log.evaluate_every) and not stopping:
            limit = config.log.evaluate_images
            metrics = evaluate(method, build.averages(engines), test, config=config, limit=limit, ranks=ranks)
            check_finite(metrics, images=images)
            board.scalars(images, {f"test/{name}": value for name, value in metrics.items()})
        if now(config.log.pictures_every) and not stopping:
            gallery.draw(images, build.averages(engines))
        if saving:
            board.flush()
            saver.save(images, metrics=metrics, seconds=speed.total)
        speed.resume()

    # ---- end
    if code == UNREADABLE:
        terminal.note(f"the data cannot be read further; saved {saver.path}")
        ranks.agree(fault)
    if stopping:
        how = "the same command" if config.checkpoint.resume in ("auto", "must") else "checkpoint.resume=auto"
        terminal.finish(f"stopped at {images:,} images; saved {saver.path}; {how} goes on from there")
        return code
    final = evaluate(method, build.averages(engines), test, config=config, limit=None, ranks=ranks)
    gallery.conclude(images, final, seconds=saver.seconds + speed.total)
    figures = ", ".join(f"{name} {value:.4g}" for name, value in final.items() if name in SHOWN)
    terminal.finish(f"trained on {images:,} images{f' ({figures})' if figures else ''}; everything is in {config.run}")
    return 0


def _fault(call: Callable[[], object]) -> str | None:
    """What is wrong with the data, on one line, where `call` finds that."""
    try:
        call()
    except (ValueError, OSError) as error:
        return one_line(error)
    return None
