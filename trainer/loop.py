"""A run from its config to its last line: build, restore, then step, log, evaluate, save until the budget is spent."""

import contextlib
from collections.abc import Callable

from trainer import attempts, build, out_of_memory, progress, signals
from trainer.attempts import Attempt
from trainer.board import open_board
from trainer.config import Config
from trainer.data import Feed, Interrupted, Transform
from trainer.errors import TERMINATED, one_line
from trainer.evaluate import evaluate
from trainer.gallery import Gallery
from trainer.health import BadSamples, Collapse, NonFinite, check_finite
from trainer.heartbeat import Heartbeat
from trainer.kernels import choose
from trainer.parallel import place
from trainer.parallel.agreement import same_weights
from trainer.parallel.launcher import asked_processes
from trainer.parallel.ranks import Ranks
from trainer.phase import Run
from trainer.runlock import LEASE, RunLock
from trainer.saving import Saver
from trainer.signals import Signals
from trainer.speed import Speed
from trainer.step import means, train_step
from trainer.terminal import open_terminal

SHOWN = ("psnr", "nelbo")  # figures of the last line
UNREADABLE = 1 << 16  # what a rank says that has no next batch; above every signal's request


def train(config: Config) -> int:
    """Trains until the budget is spent or a signal comes; returns the exit code: 0, or the signal's (see signals)."""
    place.end_with_launcher()
    config, said = build.resolve(config)
    attempts.refuse_failed(config.run)
    if (line := attempts.finished(config)) is not None:
        if place.leads():
            print(f"nothing to do: {line}", flush=True)
        return 0
    build.check_world(config, world=(asked_processes() or (1, ""))[0])
    ranks = build.meet(config)
    with contextlib.ExitStack() as stack:
        stack.callback(ranks.close)
        patience = LEASE if place.restart() else 0.0  # the start before may have been on a node that is lost
        ranks.together(lambda: stack.enter_context(RunLock(config.run, patience=patience)) and None)
        noted = stack.enter_context(signals.taken())
        attempt = stack.enter_context(Attempt(config, ranks))
        heart = stack.enter_context(Heartbeat(config, ranks))
        stack.enter_context(out_of_memory.explained(config, ranks, where=heart.doing))
        request = _train(config, ranks, noted, attempt, heart, stack, said=said)
        heart.at("end")
        if request >= signals.AGAIN:
            why = f"{signals.name(request)} at {heart.images:,} images"
            ranks.together(lambda: attempts.ask_again(config.run, why))
        attempt.code = signals.exit_code(request)
        return attempt.code


def _train(
    config: Config,
    ranks: Ranks,
    noted: Signals,
    attempt: Attempt,
    heart: Heartbeat,
    stack: contextlib.ExitStack,
    *,
    said: list[str],
) -> int:
    """0, or the request that ended it, the same on all ranks."""
    # ---- build
    first = ranks.rank == 0
    if code := ranks.largest(noted.request):  # it came while they met
        if first:
            print("stopped before anything was built; the same command begins again", flush=True)
        return code
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
    saver.save_seconds = heart.save_seconds
    images = saver.restore()
    attempt.restored(images)
    heart.at("data", images)
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
        Feed(stream.batches(images, stop=lambda: noted.request > 0), device=ranks.device, transform=transform),
        Speed(stream, images),
    )
    code, stopping, fault = 0, False, None
    how = "the same command" if config.checkpoint.resume in ("auto", "must") else "checkpoint.resume=auto"

    def asked() -> bool:
        """Between two batches of an evaluation."""
        heart.beat()
        return noted.request > 0

    def look(images: int, *, measured: bool, drawn: bool) -> dict[str, float]:
        """Evaluation and pictures, on the board. Interrupted on all ranks where a signal comes to one meanwhile."""
        metrics: dict[str, float] = {}
        if measured:
            heart.at("evaluate")
            limit = config.log.evaluate_images
            averages = build.averages(engines)
            metrics = evaluate(method, averages, test, config=config, limit=limit, ranks=ranks, stop=asked)
            check_finite(metrics, images=images)
            board.scalars(images, {f"test/{name}": value for name, value in metrics.items()})
        if drawn:
            heart.at("pictures")
            gallery.draw(images, build.averages(engines))
        return metrics

    if images < config.images:
        feed.fetch()
        ranks.agree(feed.fault)
        if saver.owed:
            with contextlib.suppress(Interrupted):
                look(images, measured="evaluate" in saver.owed, drawn="pictures" in saver.owed)
        if code := ranks.largest(noted.request):
            terminal.finish(f"stopped at {images:,} images, before an update; {how} begins there again")
            return code
    while images < config.images and not stopping:
        parts = build.split(feed.take(), micro_batches)
        ending = images + config.batch >= config.images
        if not ending:
            heart.at("data")
            feed.fetch()
        heart.at("step")
        train_step(method, engines, parts, run, images=images, batch=config.batch, ranks=ranks)
        images += config.batch
        heart.at("step", images)
        code = 0 if ending else ranks.largest(noted.request if feed.fault is None else UNREADABLE)
        stopping = code > 0
        metrics: dict[str, float] = {}

        def now(every: int, *, images: int = images, always: bool = ending) -> bool:
            return always or progress.due(images, every=every, batch=config.batch)

        if now(config.log.every) or stopping:
            nonfinite.look(run.kept, images=images)
            scalars = means(run.kept, ranks) | speed.read(images)
            heart.speed = scalars["throughput/images_per_s"]
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
        measured, drawn = now(config.log.evaluate_every), now(config.log.pictures_every)
        owed = [name for name, due in (("evaluate", measured), ("pictures", drawn)) if due]
        if owed and not stopping:
            with contextlib.suppress(Interrupted):
                metrics = look(images, measured=measured, drawn=drawn)
                owed = []
            code = 0 if ending else ranks.largest(noted.request)
            stopping = code > 0
        if code == TERMINATED and saver.too_late(noted.seconds()):
            break
        saving = now(config.checkpoint.every) or stopping
        if config.log.compare_every and (saving or now(config.log.compare_every)):
            same_weights(engines, ranks, images=images)
        if saving:
            board.flush()
            heart.at("save")
            saver.save(images, metrics=metrics, seconds=speed.total, owed=owed)
            heart.save_seconds = saver.save_seconds
            if not (stopping or ending):  # one that came meanwhile need not wait for another update
                code = ranks.largest(noted.request)
                stopping = code > 0
        speed.resume()

    # ---- end
    if code == UNREADABLE:
        terminal.note(f"the data cannot be read further; saved {saver.path}")
        ranks.agree(fault)
    if code == TERMINATED and saver.images != images:
        terminal.finish(
            f"stopped at {images:,} images, unsaved: the last save took {saver.save_seconds:.1f} s, of "
            f"checkpoint.notice={config.checkpoint.notice:g} s {noted.seconds():.1f} are gone; {how} goes on from "
            f"{saver.path or 'the beginning'}"
        )
        return code
    if stopping:
        again = "; asks to be started again" if code >= signals.AGAIN else ""
        terminal.finish(f"stopped at {images:,} images; saved {saver.path}{again}; {how} goes on from there")
        return code
    heart.at("evaluate")
    try:
        final = evaluate(method, build.averages(engines), test, config=config, limit=None, ranks=ranks, stop=asked)
    except Interrupted:
        terminal.finish(f"stopped in the last evaluation; saved {saver.path}; {how} does it again")
        return ranks.largest(noted.request)
    gallery.conclude(images, final, seconds=saver.seconds + speed.total)
    figures = ", ".join(f"{name} {value:.4g}" for name, value in final.items() if name in SHOWN)
    line = f"trained on {images:,} images{f' ({figures})' if figures else ''}; everything is in {config.run}"
    ranks.together(lambda: attempts.conclude(config, images, line, final))
    terminal.finish(line)
    return 0


def _fault(call: Callable[[], object]) -> str | None:
    """What is wrong with the data, on one line, where `call` finds that."""
    try:
        call()
    except (ValueError, OSError) as error:
        return one_line(error)
    return None
