"""Everything that TensorBoard shows. A step is an image seen, so runs of any batch size can be laid over each other.

Tags: `loss/<phase>/<name>`, `logits/real`, `logits/fake`, `accuracy/real`, `accuracy/fake`, `accuracy/pairs`,
`gradient_norm/<network>`, `lr/<network>`, `weight/<loss>`, `latent/kl`, `test/active_units`,
`throughput/images_per_s`, `throughput/waiting`. LAYOUT draws those that belong together in one chart.

The rule after a resume at N images: records beyond N are cut out of the old event files, and from then on a tag takes
each step once; the record that is there first stays. So each curve is the one of a run that was never interrupted. We
cut rather than ask the reader to purge (`purge_step`): readers differ in what they purge (tensorboard#3732,
pytorch#42379).
"""

import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.compat.proto.types_pb2 import DT_STRING
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.custom_scalar import metadata as layout_metadata
from tensorboard.plugins.histogram.summary_v2 import histogram_pb
from tensorboard.plugins.hparams import metadata as hparams_metadata
from tensorboard.plugins.hparams.api_pb2 import Status
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionEndInfo
from tensorboard.plugins.hparams.summary_v2 import HParam, Metric, hparams_config_pb, hparams_pb
from tensorboard.plugins.scalar.summary_v2 import scalar_pb
from tensorboard.plugins.text.summary_v2 import text_pb
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import Tensor

from trainer.events import cut, new_name, set_aside
from trainer.pictures import Picture, png

LAYOUT: dict[str, dict[str, list[str]]] = {  # category -> chart -> regular expressions of tags, matched from the start
    "losses": {
        "discriminator": ["loss/(discriminator|critic)/.*"],
        "reconstruction": ["loss/(autoencoder|encoder|decoder)/(nll|perceptual|similarity)$"],
        "KL": ["loss/(autoencoder|encoder)/kl$"],
        "generator, decoder": ["loss/(autoencoder|decoder|generator)/adversarial.*"],
    },
    "discriminator": {"logits": ["logits/(real|fake)$"], "accuracy": ["accuracy/.*"]},
    "optimisation": {
        "gradient norm of the discriminator": ["gradient_norm/discriminator$"],
        "gradient norms of the others": ["gradient_norm/(autoencoder|encoder|decoder|generator)$"],
        "learning rates": ["lr/.*"],
        "loss weights": ["weight/.*"],
    },
    "latent": {"KL in nats an image": ["latent/kl$"], "active units": ["test/active_units$"]},
    "throughput": {
        "images/s": ["throughput/images_per_s$"],
        "share of time waiting for data": ["throughput/waiting$"],
    },
}
FLUSH_SECONDS = 10.0
BUCKETS = 30  # TensorBoard's own default for histograms


class Board:
    """Writes one run's event file in `folder`; see `open_board`. Numbers may be NaN; the pictures are shown unchanged.

    Steps of a tag must grow; a step that the tag already has is left as it is. OSError names the file.
    """

    def __init__(self, folder: Path, *, resume_images: int | None, log: Callable[[str], None] = print) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._start = resume_images or 0
        if not resume_images:
            set_aside(folder, log=log)
            self._last: dict[str, int] = {}
        else:
            self._last = cut(folder, images=resume_images, log=log)
        self._images = self._start
        self.path = folder / new_name(folder)
        self._file = self.path.open("xb")
        self._records = RecordWriter(self._file)
        self._flushed = time.monotonic()
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))
        # A TensorBoard that is running drops what it has read from this step on, at every START but the first.
        begin = SessionLog(status=SessionLog.START)
        self._write(Event(wall_time=time.time(), step=self._start + 1 if self._start else 0, session_log=begin))
        self.flush()

    def scalars(self, images: int, values: Mapping[str, float]) -> None:
        """Numbers by tag at `images` images seen."""
        self._add(images, [value for tag, number in values.items() for value in scalar_pb(tag, float(number)).value])

    def picture(self, images: int, tag: str, picture: Picture) -> None:
        """A picture (H, W, C) uint8, C 1 or 3; TensorBoard shows exactly these pixels."""
        height, width, channels = picture.shape
        encoded = Summary.Image(height=height, width=width, colorspace=channels, encoded_image_string=png(picture))
        self._add(images, [Summary.Value(tag=tag, image=encoded)])

    def histogram(self, images: int, tag: str, values: Tensor) -> None:
        """The distribution of a tensor's finite elements, of any shape."""
        array = values.detach().float().cpu().flatten().numpy().astype(np.float64)
        self._add(images, list(histogram_pb(tag, array[np.isfinite(array)], buckets=BUCKETS).value))

    def text(self, tag: str, markdown: str, images: int | None = None) -> None:
        """Text in Markdown; by default at the images where this start of the run began."""
        self._add(self._start if images is None else images, list(text_pb(tag, markdown).value))

    def hparams(
        self, config: Mapping[str, Any], metrics: Mapping[str, float], *, columns: Collection[str] = ()
    ) -> None:
        """This run's line in the HPARAMS tab: a flat configuration and its final metrics, which become scalars too.

        columns: tags of metrics that other runs may have; TensorBoard takes the columns of all from any one of them."""
        assert metrics, "without a metric TensorBoard shows no hparams (accelerate#521)"
        plain = {key: v if isinstance(v, (bool, int, float, str)) else str(v) for key, v in config.items()}
        end = SessionEndInfo(status=Status.STATUS_SUCCESS, end_time_secs=time.time())
        experiment = hparams_config_pb(
            [HParam(key) for key in plain], [Metric(tag) for tag in sorted({*metrics, *columns})]
        )
        session_end = Summary.Value(
            tag=hparams_metadata.SESSION_END_INFO_TAG,
            tensor=hparams_metadata.NULL_TENSOR,
            metadata=hparams_metadata.create_summary_metadata(HParamsPluginData(session_end_info=end)),
        )
        folder = self.path.parent
        start = hparams_pb(
            plain, trial_id=f"{folder.parent.name}, {folder}"
        )  # the page cuts it off after a few letters
        self._add(self._images, [*experiment.value, *start.value, session_end])
        self.scalars(self._images, metrics)
        self.flush()

    def layout(self) -> None:
        """The CUSTOM SCALARS tab: LAYOUT."""
        categories = [
            layout_pb2.Category(
                title=category,
                chart=[
                    layout_pb2.Chart(title=chart, multiline=layout_pb2.MultilineChartContent(tag=tags))
                    for chart, tags in charts.items()
                ],
            )
            for category, charts in LAYOUT.items()
        ]
        content = layout_pb2.Layout(category=categories).SerializeToString()
        value = Summary.Value(
            tag=layout_metadata.CONFIG_SUMMARY_TAG,
            tensor=TensorProto(dtype=DT_STRING, string_val=[content], tensor_shape=TensorShapeProto()),
            metadata=layout_metadata.create_summary_metadata(),
        )
        self._add(self._start, [value])

    def flush(self) -> None:
        """Hands all records to the operating system; call it before a checkpoint is saved, which promises them."""
        try:
            self._file.flush()
        except OSError as error:
            raise self._unwritable(error) from error
        self._flushed = time.monotonic()

    def close(self) -> None:
        self.flush()
        self._file.close()

    def _add(self, images: int, values: list[Any]) -> None:
        """Writes the values whose tag has no record at `images` yet."""
        fresh = [value for value in values if self._takes(value.tag, images)]
        if fresh:
            self._images = max(self._images, images)
            self._write(Event(wall_time=time.time(), step=images, summary=Summary(value=fresh)))
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self.flush()

    def _takes(self, tag: str, images: int) -> bool:
        last = self._last.get(tag, -1)
        assert images >= last or images <= self._start, f"{tag}: {images} images after {last}"
        self._last[tag] = max(last, images)
        return images > last

    def _write(self, event: Any) -> None:
        try:
            self._records.write(event.SerializeToString())
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> OSError:
        return OSError(error.errno, f"TensorBoard's file cannot be written ({error.strerror})", str(self.path))


class NoBoard:
    """Takes what Board takes and writes nothing: for ranks other than 0, so that no caller asks which rank it is."""

    def scalars(self, images: int, values: Mapping[str, float]) -> None: ...

    def picture(self, images: int, tag: str, picture: Picture) -> None: ...

    def histogram(self, images: int, tag: str, values: Tensor) -> None: ...

    def text(self, tag: str, markdown: str, images: int | None = None) -> None: ...

    def hparams(
        self, config: Mapping[str, Any], metrics: Mapping[str, float], *, columns: Collection[str] = ()
    ) -> None: ...

    def layout(self) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


def open_board(
    folder: Path, *, resume_images: int | None, enabled: bool = True, log: Callable[[str], None] = print
) -> Board | NoBoard:
    """The board of a run's folder. `resume_images`: of the checkpoint that the run goes on from, None or 0 for a start.

    A start in a folder with event files (a run that died before its first checkpoint) renames them so that
    TensorBoard does not read them. `enabled` is false on all ranks but 0.
    """
    return Board(folder, resume_images=resume_images, log=log) if enabled else NoBoard()
