"""What TensorBoard reads back: each tag has each step once, however often the run was resumed (F4-6)."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.data.provider import RunTagFilter
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams import backend_context, list_session_groups
from tensorboard.plugins.hparams.api_pb2 import ListSessionGroupsRequest, Status
from tensorboard.util.tensor_util import make_ndarray

from trainer.board import Board, NoBoard, open_board

ALL = dict.fromkeys(("scalars", "images", "histograms", "text", "custom_scalars", "hparams"), 0)  # no sampling
TAGS = ("loss/generator/adversarial", "logits/real")


def quiet(line: str) -> None: ...


def everything(board: Board | NoBoard, start: int, end: int, *, second: bool) -> None:
    """What a run writes at 1..end images after it went on from `start`; the values tell which start wrote them."""
    board.layout()
    board.text("config", f"second: {second}")
    for images in range(start + 1, end + 1):
        value = images + 0.5 * second
        board.scalars(images, dict.fromkeys(TAGS, value))  # two tags in one event: readers purge those differently
        if images % 10 == 0:
            board.picture(images, "samples", np.full((2, 3, 3), images + second, dtype=np.uint8))
            board.histogram(images, "weights", torch.full((8,), float(value)))
            board.text("note", f"{value}", images=images)


def tensors(folder: Path, tag: str) -> list[tuple[int, object]]:
    """(step, value) of every record of a tag, as TensorBoard's own loader gives them."""
    accumulator = EventAccumulator(str(folder), tensor_size_guidance=ALL)
    accumulator.Reload()
    return [(event.step, make_ndarray(event.tensor_proto)) for event in accumulator.Tensors(tag)]


def steps(folder: Path, tag: str) -> list[int]:
    return [step for step, _ in tensors(folder, tag)]


def crash_and_resume(folder: Path, *, at: int = 100, crash: int = 150, end: int = 200) -> None:
    first = open_board(folder, resume_images=None)
    everything(first, 0, crash, second=False)
    first.close()
    second = open_board(folder, resume_images=at, log=quiet)
    everything(second, at, end, second=True)
    second.close()


def test_after_a_resume_each_tag_has_each_step_once_with_the_second_runs_values(tmp_path: Path) -> None:
    crash_and_resume(tmp_path)
    for tag in TAGS:
        found = tensors(tmp_path, tag)
        assert [step for step, _ in found] == list(range(1, 201))
        assert [float(value) for _, value in found] == [i + 0.5 * (i > 100) for i in range(1, 201)]  # type: ignore[arg-type]
    pictures = tensors(tmp_path, "samples")
    assert [step for step, _ in pictures] == list(range(10, 201, 10))
    for step, record in pictures:
        width, height, png = record.tolist()[:3]  # type: ignore[attr-defined]
        assert (int(width), int(height)) == (3, 2)
        assert np.array(Image.open(io.BytesIO(png))).tolist() == [[[step + (step > 100)] * 3] * 3] * 2
    histograms = tensors(tmp_path, "weights")
    assert [step for step, _ in histograms] == list(range(10, 201, 10))
    for step, buckets in histograms:
        assert buckets.sum(0)[2] == 8  # type: ignore[attr-defined]
        assert buckets[:, 0].min() <= step + 0.5 * (step > 100) <= buckets[:, 1].max()  # type: ignore[index]
    notes = tensors(tmp_path, "note")
    assert [(step, text.item().decode()) for step, text in notes] == [  # type: ignore[attr-defined]
        (i, f"{i + 0.5 * (i > 100)}") for i in range(10, 201, 10)
    ]
    assert steps(tmp_path, "config") == [0, 100]
    assert steps(tmp_path, "custom_scalars__config__") == [100]


def test_the_data_provider_of_the_web_pages_shows_the_same(tmp_path: Path) -> None:
    crash_and_resume(tmp_path / "run")
    multiplexer = EventMultiplexer(tensor_size_guidance=ALL).AddRunsFromDirectory(str(tmp_path))
    multiplexer.Reload()
    found = MultiplexerDataProvider(multiplexer, str(tmp_path)).read_scalars(
        RequestContext(),
        experiment_id="",
        plugin_name="scalars",
        downsample=10_000,
        run_tag_filter=RunTagFilter(runs=["run"], tags=list(TAGS)),
    )
    for tag in TAGS:
        assert [point.step for point in found["run"][tag]] == list(range(1, 201))
        assert [point.value for point in found["run"][tag]][99:101] == [100.0, 101.5]


def test_a_tensorboard_that_stays_open_sees_each_step_once(tmp_path: Path) -> None:
    first = open_board(tmp_path, resume_images=None)
    everything(first, 0, 15, second=False)
    first.close()
    accumulator = EventAccumulator(str(tmp_path), tensor_size_guidance=ALL)
    accumulator.Reload()
    assert [event.step for event in accumulator.Tensors(TAGS[0])] == list(range(1, 16))
    second = open_board(tmp_path, resume_images=10, log=quiet)
    everything(second, 10, 20, second=True)
    second.close()
    accumulator.Reload()
    for tag in TAGS:
        assert [event.step for event in accumulator.Tensors(tag)] == list(range(1, 21))


def test_the_step_of_the_checkpoint_itself_is_not_logged_twice(tmp_path: Path) -> None:
    board = open_board(tmp_path, resume_images=None)
    board.scalars(64, {"a": 1.0})
    board.close()
    board = open_board(tmp_path, resume_images=64, log=quiet)
    board.scalars(64, {"a": 2.0, "b": 2.0})
    board.scalars(128, {"a": 3.0})
    board.close()
    assert tensors(tmp_path, "a") == [(64, 1.0), (128, 3.0)]
    assert tensors(tmp_path, "b") == [(64, 2.0)]


def test_a_run_that_is_resumed_many_times_back_and_forth_has_one_curve(tmp_path: Path) -> None:
    start = 0
    for attempt, (start, end) in enumerate([(0, 7), (4, 12), (12, 13), (2, 9), (9, 20)]):
        board = open_board(tmp_path, resume_images=start, log=quiet)
        for images in range(start + 1, end + 1):
            board.scalars(images, {"attempt": attempt})
        board.close()
    assert [(step, int(value)) for step, value in tensors(tmp_path, "attempt")] == [  # type: ignore[call-overload]
        *[(i, 0) for i in (1, 2)], *[(i, 3) for i in range(3, 10)], *[(i, 4) for i in range(10, 21)],
    ]  # fmt: skip


def test_a_record_that_a_kill_cut_short_hides_nothing_that_comes_after(tmp_path: Path) -> None:
    board = open_board(tmp_path, resume_images=None)
    assert isinstance(board, Board)
    for images in range(1, 6):
        board.scalars(images, {"a": 1.0})
    board.close()
    with board.path.open("r+b") as file:
        file.truncate(board.path.stat().st_size - 5)
    board = open_board(tmp_path, resume_images=5, log=quiet)
    board.scalars(5, {"a": 2.0})
    board.scalars(6, {"a": 2.0})
    board.close()
    assert [(step, float(v)) for step, v in tensors(tmp_path, "a")] == [  # type: ignore[arg-type]
        (1, 1.0), (2, 1.0), (3, 1.0), (4, 1.0), (5, 2.0), (6, 2.0),
    ]  # fmt: skip


def test_steps_that_are_doubled_already_become_single_on_resume(tmp_path: Path) -> None:
    board = open_board(tmp_path, resume_images=None)
    assert isinstance(board, Board)
    board.scalars(1, {"a": 1.0})
    board.scalars(2, {"a": 2.0, "b": 2.0})
    board.close()
    later = board.path.with_name("events.out.tfevents.9999999999.000000.other.1")
    other = open_board(tmp_path / "other", resume_images=None)
    assert isinstance(other, Board)
    other.scalars(2, {"a": 7.0, "c": 7.0})
    other.close()
    other.path.rename(later)
    open_board(tmp_path, resume_images=2, log=quiet).close()
    assert [tensors(tmp_path, tag) for tag in "abc"] == [[(1, 1.0), (2, 2.0)], [(2, 2.0)], [(2, 7.0)]]


def test_files_with_nothing_to_cut_are_left_as_they_are(tmp_path: Path) -> None:
    board = open_board(tmp_path, resume_images=None)
    board.scalars(1, {"a": 1.0})
    board.close()
    before = {path: (path.stat().st_ino, path.read_bytes()) for path in tmp_path.iterdir()}
    open_board(tmp_path, resume_images=1, log=quiet).close()
    assert {path: (path.stat().st_ino, path.read_bytes()) for path in before} == before
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("resume_images", [None, 0])
def test_a_start_that_died_before_its_first_checkpoint_is_kept_out_of_sight(
    tmp_path: Path, resume_images: int | None
) -> None:
    first = open_board(tmp_path, resume_images=None)
    assert isinstance(first, Board)
    first.scalars(1, {"a": 1.0})
    first.close()
    content = first.path.read_bytes()
    lines: list[str] = []
    second = open_board(tmp_path, resume_images=resume_images, log=lines.append)
    second.scalars(2, {"a": 2.0})
    second.close()
    assert tensors(tmp_path, "a") == [(2, 2.0)]
    assert [path.read_bytes() for path in tmp_path.glob("events.superseded.*")] == [content]
    assert len(lines) == 1 and first.path.name in lines[0]


def test_a_new_file_sorts_last_even_if_the_clock_went_back(tmp_path: Path) -> None:
    future = tmp_path / "events.out.tfevents.9999999999.000000.other.1"
    future.write_bytes(b"")
    board = open_board(tmp_path, resume_images=1, log=quiet)
    assert isinstance(board, Board)
    board.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == [future.name, board.path.name]


def test_a_step_that_goes_back_is_a_bug(tmp_path: Path) -> None:
    board = open_board(tmp_path, resume_images=None)
    board.scalars(2, {"a": 1.0})
    with pytest.raises(AssertionError, match="a: 1 images after 2"):
        board.scalars(1, {"a": 1.0})
    board.close()


def test_every_level_of_a_picture_reaches_tensorboard_unchanged(tmp_path: Path) -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)
    board = open_board(tmp_path, resume_images=None)
    board.picture(1, "grey", levels)
    board.picture(1, "colour", levels.repeat(3, axis=2))
    board.close()
    for tag, expected in (("grey", levels[:, :, 0]), ("colour", levels.repeat(3, axis=2))):
        ((_, record),) = tensors(tmp_path, tag)
        assert np.array_equal(np.array(Image.open(io.BytesIO(record.tolist()[2]))), expected)  # type: ignore[attr-defined]


def test_numbers_that_are_not_finite_are_shown(tmp_path: Path) -> None:
    board = open_board(tmp_path, resume_images=None)
    board.scalars(1, {"a": float("nan"), "b": float("inf")})
    board.histogram(1, "h", torch.tensor([1.0, float("nan"), float("inf")]))
    board.histogram(1, "none", torch.tensor([float("nan")]))
    board.close()
    assert np.isnan(tensors(tmp_path, "a")[0][1]) and np.isinf(tensors(tmp_path, "b")[0][1])  # type: ignore[call-overload]
    assert tensors(tmp_path, "h")[0][1].sum(0)[2] == 1  # type: ignore[attr-defined]


def test_the_hparams_page_shows_the_last_start_with_its_final_metrics(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for start, lr, psnr in ((0, 0.1, 20.0), (64, 0.2, 30.0)):
        board = open_board(run, resume_images=start, log=quiet)
        board.scalars(start + 64, {"loss": 1.0})
        board.hparams({"optim.lr": lr, "flip": True, "run": run, "ema": None}, {"test/psnr": psnr})
        board.close()
    multiplexer = EventMultiplexer().AddRunsFromDirectory(str(tmp_path))
    multiplexer.Reload()
    provider = MultiplexerDataProvider(multiplexer, str(tmp_path))
    context = backend_context.Context(TBContext(data_provider=provider))
    metadata = context.hparams_metadata(RequestContext(), "")
    experiment = context.experiment_from_metadata(
        RequestContext(), "", include_metrics=True, hparams_run_to_tag_to_content=metadata, data_provider_hparams=[]
    )
    request = ListSessionGroupsRequest(
        start_index=0, slice_size=10, include_metrics=True, allowed_statuses=[Status.STATUS_SUCCESS]
    )
    handler = list_session_groups.Handler(RequestContext(), context, "", request)
    (group,) = handler.run().session_groups
    assert {key: value.WhichOneof("kind") for key, value in group.hparams.items()} == {
        "optim.lr": "number_value",
        "flip": "bool_value",
        "run": "string_value",
        "ema": "string_value",
    }
    assert group.hparams["optim.lr"].number_value == 0.2
    assert [(m.name.tag, m.value, m.training_step) for m in group.metric_values] == [("test/psnr", 30.0, 128)]
    assert [info.name.tag for info in experiment.metric_infos] == ["test/psnr"]
    assert steps(run, "test/psnr") == [64, 128]


def test_hparams_without_a_metric_would_show_nothing(tmp_path: Path) -> None:
    board = open_board(tmp_path, resume_images=None)
    with pytest.raises(AssertionError, match="accelerate#521"):
        board.hparams({"a": 1}, {})
    board.close()


def test_the_layout_is_one_that_tensorboard_parses(tmp_path: Path) -> None:
    board = open_board(tmp_path, resume_images=None)
    board.layout()
    board.close()
    ((_, record),) = tensors(tmp_path, "custom_scalars__config__")
    layout = Layout.FromString(record.item())  # type: ignore[attr-defined]
    charts = {chart.title: list(chart.multiline.tag) for category in layout.category for chart in category.chart}
    assert charts["logits"] == ["logits/(real|fake)$"]
    assert "generator, decoder" in charts and "images/s" in charts and all(charts.values())


def test_a_disabled_board_writes_nothing_and_takes_everything(tmp_path: Path) -> None:
    board = open_board(tmp_path / "run", resume_images=None, enabled=False)
    everything(board, 0, 20, second=False)
    board.hparams({}, {})
    board.flush()
    board.close()
    assert list(tmp_path.iterdir()) == []
    methods = {name for name in vars(Board) if not name.startswith("_")}
    assert methods == {name for name in vars(NoBoard) if not name.startswith("_")}


def test_a_full_disk_is_told_with_the_files_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    board = open_board(tmp_path, resume_images=None)
    assert isinstance(board, Board)
    board.close()
    full = open("/dev/full", "wb")  # noqa: PTH123, SIM115
    monkeypatch.setattr(board, "_file", full)
    monkeypatch.setattr(board._records, "_writer", full)
    with pytest.raises(OSError, match="TensorBoard's file cannot be written") as caught:
        for images in range(1, 1000):
            board.scalars(images, {"a": 1.0})
        board.flush()
    assert caught.value.filename == str(board.path)
    with pytest.raises(OSError):
        full.close()
