"""What watches a run: skipped updates that go on for too long, and signals that ask it to stop."""

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from trainer.health import Collapse, NonFinite, Signals, check_finite

ROOT = Path(__file__).resolve().parents[1]


def notes(*skipped: int, phase: str = "generator") -> dict[str, list[torch.Tensor]]:
    return {f"skipped/{phase}": [torch.tensor(float(value)) for value in skipped], "loss/a": [torch.zeros(3)]}


# ---------------------------------------------------------------- skipped updates
def test_skipped_updates_are_counted_a_network() -> None:
    watch = NonFinite(patience=10)
    watch.look(notes(0, 1, 0, 1, 1), images=64)
    watch.look(notes(1, 0, phase="discriminator"), images=128)
    watch.look(notes(0, 1), images=192)
    assert watch.export() == {"generator": 4, "discriminator": 1}


def test_patience_ends_after_so_many_in_a_row_even_across_looks() -> None:
    watch = NonFinite(patience=4)
    watch.look(notes(0, 1, 1), images=64)
    with pytest.raises(ValueError, match=r"generator: the gradients of 4 updates in a row .* at 128 images"):
        watch.look(notes(1, 1), images=128)


def test_one_update_that_is_taken_begins_the_row_anew() -> None:
    watch = NonFinite(patience=3)
    for images in range(64, 640, 64):
        watch.look(notes(1, 1, 0), images=images)
    assert watch.export() == {"generator": 18}


def scaled(*pairs: tuple[int, float]) -> dict[str, list[torch.Tensor]]:
    """(skipped, fp16's loss scale over its floor) an update."""
    scales = [torch.tensor(scale) for _, scale in pairs]
    return notes(*(skipped for skipped, _ in pairs)) | {"loss_scale/generator": scales}


def test_skips_above_the_floor_of_the_loss_scale_count_and_wear_out_no_patience() -> None:
    watch = NonFinite(patience=2)
    watch.look(scaled((1, 16.0), (1, 8.0), (1, 4.0), (1, 2.0), (1, 1.0)), images=64)
    assert watch.export() == {"generator": 5}
    with pytest.raises(ValueError, match=r"^generator: the gradients of 2 updates in a row"):
        watch.look(scaled((1, 1.0)), images=128)


def test_a_search_within_a_row_does_not_begin_it_anew() -> None:
    watch = NonFinite(patience=2)
    with pytest.raises(ValueError, match=r"^generator: "):
        watch.look(scaled((1, 1.0), (1, 2.0), (1, 1.0)), images=64)


def test_networks_do_not_share_a_row() -> None:
    watch = NonFinite(patience=3)
    watch.look(notes(1, 1) | notes(1, 1, phase="discriminator"), images=64)
    with pytest.raises(ValueError, match=r"^discriminator: "):
        watch.look(notes(1, phase="discriminator"), images=128)


def test_the_count_goes_on_after_a_resume() -> None:
    watch = NonFinite(patience=5)
    watch.look(notes(1), images=64)
    again = NonFinite(patience=5)
    again.load(watch.export())
    again.look(notes(1), images=128)
    assert again.export() == {"generator": 2}


def test_no_notes_are_no_news() -> None:
    watch = NonFinite(patience=1)
    watch.look({}, images=0)
    assert watch.export() == {}


# ---------------------------------------------------------------- signals
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_is_noted_and_nothing_else_happens(number: int, code: int) -> None:
    before = signal.getsignal(number)
    with Signals() as signals:
        assert signals.code == 0
        os.kill(os.getpid(), number)
        assert signals.code == code
    assert signal.getsignal(number) is before


def test_handlers_are_given_back_after_an_error_too() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(RuntimeError), Signals():
        raise RuntimeError
    assert signal.getsignal(signal.SIGINT) is before


def test_several_sigterms_still_wait_for_the_save() -> None:
    with Signals() as signals:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
        assert signals.code == 143


LOOP = """
import sys, time
from trainer.health import Signals
with Signals() as signals:
    print("ready", flush=True)
    while not signals.code:
        time.sleep(0.01)
    print("saving", flush=True)
    time.sleep(float(sys.argv[1]))
    print("saved", flush=True)
sys.exit(signals.code)
"""


def looping(*, save: float) -> "subprocess.Popen[str]":
    process = subprocess.Popen(
        [sys.executable, "-c", LOOP, str(save)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "saving\n"
    return process


def test_one_interrupt_saves_and_ends_with_130() -> None:
    process = looping(save=0.2)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (130, "saved\n", "")


def test_a_second_interrupt_ends_at_once_without_the_save() -> None:
    process = looping(save=60)
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (130, "", "")
    assert time.monotonic() - began < 10


# ---------------------------------------------------------------- posterior collapse
def test_a_collapse_is_said_once_after_three_reports_at_full_weight() -> None:
    watch = Collapse()
    for images in range(6400, 12800, 640):  # a warm-up
        assert watch.look({"latent/kl": 0.01}, full_weight=False, images=images, batch=64) is None
    said = [
        watch.look({"latent/kl": nats}, full_weight=True, images=12800 + 640 * i, batch=64)
        for i, nats in enumerate((0.2, 0.2, 12.0, 0.2, 0.21, 0.22, 0.2))
    ]
    assert [line is not None for line in said] == [False] * 5 + [True, False]
    assert said[5] is not None and "16,000 images" in said[5] and "0.22 nats" in said[5]


def test_an_untrained_encoder_a_nan_and_a_method_without_kl_are_no_collapse() -> None:
    watch = Collapse()
    for update in range(1, 100):
        assert watch.look({"latent/kl": 0.2}, full_weight=True, images=update * 64, batch=64) is None
    for update in range(100, 110):
        assert watch.look({"latent/kl": math.nan}, full_weight=True, images=update * 64, batch=64) is None
        assert watch.look({"loss/generator/adversarial": 0.1}, full_weight=True, images=update * 64, batch=64) is None


def test_an_evaluation_that_is_not_finite_ends_the_run_by_name() -> None:
    check_finite({"psnr": 20.0, "nelbo": 240.0}, images=64)
    with pytest.raises(ValueError, match=r"at 128 images is not finite \(kl, nelbo\)"):
        check_finite({"psnr": 20.0, "kl": math.nan, "nelbo": math.inf}, images=128)
