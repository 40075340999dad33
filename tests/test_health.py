"""What watches a run's numbers: skipped updates that go on for too long, a posterior that collapses."""

import math

import pytest
import torch

from trainer.health import Collapse, NonFinite, check_finite


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
