"""The same loops inside other frameworks, each as its own documentation writes them. Imported only when asked for.

A framework's loop runs in a thread of its own that stops at the door of its data set when its turn is over. Images come
one by one through a DataLoader without workers, as in the frameworks' examples.
"""

import importlib.util
import tempfile
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tools.bench.bare import Loop, VAELoop, loop_of
from trainer.config import Config
from trainer.data import to_float

MODULES = {"accelerate": "accelerate", "lightning": "lightning", "pythae": "pythae"}


class Door:
    """Lets the loop of a framework through for so many updates at a time."""

    def __init__(self, run: Callable[["Door"], None]) -> None:
        self.run, self.left, self.entered = run, 0, False
        self.go, self.done = threading.Semaphore(0), threading.Semaphore(0)
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._thread, daemon=True)  # ends with the process

    def steps(self, count: int) -> None:
        """Takes `count` updates; raises what the framework raised."""
        self.count = count
        if not self.thread.is_alive():
            self.thread.start()
        self.go.release()
        self.done.acquire()
        if self.error is not None:
            raise self.error

    def enter(self) -> None:
        """Called from the loop before it reads a batch."""
        if self.left == 0:
            if self.entered:
                self.done.release()
            self.entered = True
            self.go.acquire()
            self.left = self.count
        self.left -= 1

    def _thread(self) -> None:
        torch.set_num_threads(1)
        try:
            self.run(self)
        except BaseException as error:  # noqa: BLE001  raised in `steps`
            self.error = error
        self.done.release()


class Items(Dataset[Any]):
    """One image an item, float32 (C, H, W) in [-1, 1]; `wrap` makes of it what a framework wants."""

    def __init__(self, pixels: Tensor, batch: int, door: Door, wrap: Callable[[Tensor], Any] = lambda x: x) -> None:
        self.pixels, self.batch, self.door, self.wrap = pixels, batch, door, wrap
        self.read = 0

    def __len__(self) -> int:
        return len(self.pixels) // self.batch * self.batch

    def __getitem__(self, index: int) -> Any:
        if self.read % self.batch == 0:
            self.door.enter()
        self.read += 1
        return self.wrap(to_float(self.pixels[index : index + 1])[0])


def steps_of(name: str, config: Config, pixels: Tensor) -> Callable[[int], None] | None:
    """A function that takes `count` updates in the framework `name`; None where it does not fit or is not installed."""
    if importlib.util.find_spec(MODULES[name]) is None:
        print(f"{name}: not installed, left out")
        return None
    if name == "pythae" and config.method.kind != "vae":
        return None  # its VAE-GAN has losses of its own, a GAN it has not
    start = {"accelerate": _accelerate, "lightning": _lightning, "pythae": _pythae}[name]
    return Door(lambda door: start(loop_of(config), pixels, door)).steps


def _accelerate(loop: Loop, pixels: Tensor, door: Door) -> None:
    """huggingface/accelerate, examples/nlp_example.py: prepare, loop, accelerator.backward."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    for name in loop.networks:
        loop.networks[name], loop.optimizers[name] = accelerator.prepare(loop.networks[name], loop.optimizers[name])
    batch = loop.config.batch
    loader = accelerator.prepare(DataLoader(Items(pixels, batch, door), batch_size=batch, shuffle=True, drop_last=True))
    while True:
        for image in loader:
            loop.update(_layout(image), accelerator.backward)


def _lightning(loop: Loop, pixels: Tensor, door: Door) -> None:
    """Automatic optimisation for one network, manual for two, as its documentation has them."""
    import lightning

    names = list(loop.networks)

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.networks = torch.nn.ModuleDict(loop.networks)
            self.automatic_optimization = isinstance(loop, VAELoop)

        def configure_optimizers(self) -> Any:
            return [loop.optimizers[name] for name in names]

        def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:
            if self.automatic_optimization:
                loop.schedule()

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
            if isinstance(loop, VAELoop):
                return loop.loss(_layout(batch))
            loop.optimizers = dict(zip(names, self.optimizers(), strict=True))  # type: ignore[arg-type]
            return loop.update(_layout(batch), self.manual_backward)

        def on_train_batch_end(self, outputs: Any, batch: Tensor, batch_idx: int) -> None:
            if self.automatic_optimization:
                loop.follow()

    batch = loop.config.batch
    loader = DataLoader(Items(pixels, batch, door), batch_size=batch, shuffle=True, drop_last=True)
    trainer = lightning.Trainer(
        accelerator="cpu", devices=1, max_epochs=-1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Module(), loader)


def _pythae(loop: Loop, pixels: Tensor, door: Door) -> None:
    """Its BaseTrainer around the same network and loss, without a moving average, which it has no place for."""
    from pythae.data.datasets import DatasetOutput
    from pythae.models import BaseAE, BaseAEConfig
    from pythae.models.base.base_utils import ModelOutput
    from pythae.trainers import BaseTrainer, BaseTrainerConfig

    assert isinstance(loop, VAELoop)
    config = loop.config

    class Model(BaseAE):  # type: ignore[misc]
        def __init__(self) -> None:
            torch.nn.Module.__init__(self)
            self.model_name, self.model_config = "bench", BaseAEConfig(input_dim=(1, 28, 28), latent_dim=16)
            self.network = loop.networks["autoencoder"]

        def forward(self, inputs: Any, **_: Any) -> Any:
            return ModelOutput(loss=loop.loss(_layout(inputs["data"])))

    class Quiet(BaseTrainer):  # type: ignore[misc]
        def _setup_callbacks(self) -> None:
            super()._setup_callbacks()
            self.callback_handler.callbacks = []  # a progress bar and a printer

    items = Items(pixels, config.batch, door, wrap=lambda image: DatasetOutput(data=image))
    with tempfile.TemporaryDirectory() as folder:
        settings = BaseTrainerConfig(
            output_dir=folder, num_epochs=10**6, learning_rate=config.optim.lr, no_cuda=True,
            per_device_train_batch_size=config.batch, per_device_eval_batch_size=config.batch,
            optimizer_cls="Adam", optimizer_params={"betas": list(config.optim.betas), "fused": True},
        )  # fmt: skip
        Quiet(model=Model(), train_dataset=items, training_config=settings).train()


def _layout(image: Tensor) -> Tensor:
    return image.contiguous(memory_format=torch.channels_last)
