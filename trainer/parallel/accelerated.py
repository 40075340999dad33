"""What is asked of Accelerate: the process group, DistributedDataParallel, and DeepSpeed's engines.

Accelerate 1.15 is made for one network. What it gets wrong for two is bypassed here and nowhere else:

- its `backward` and `step` are those of the engine that was prepared first, so engines are called directly;
- it clips at 1.0 where a plugin has no `gradient_clipping`, so every plugin has one;
- DeepSpeedPlugin imports transformers to tell it about ZeRO-3, so ours does not tell it;
- without a GPU, each rank under DeepSpeed believes to be rank 0 of 1, unless the group's backend is named;
- under DeepSpeed `prepare_model` does not wrap, so a network under DDP beside one under ZeRO is wrapped here.
"""

import importlib.util
import logging
import os
import socket
import warnings
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin, DistributedType, InitProcessGroupKwargs
from pydantic import ValidationError
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from trainer.parallel import zero_config
from trainer.parallel.config import DeepSpeedConfig, ParallelConfig

if TYPE_CHECKING:
    from trainer.parallel.ranks import Ranks

_SAID = ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_DEEPSPEED_", "ACCELERATE_CONFIG_DS_FIELDS", "ACCELERATE_GRADIENT_")


def start(config: ParallelConfig) -> Accelerator:
    """Accelerate's view of the process group that `rendezvous.join` has formed, or of one process.

    What the launcher asked for has become `config` (resolve.py): Accelerate is not to hear it a second time."""
    for name in list(os.environ):
        if name.startswith(_SAID):
            del os.environ[name]
    if isinstance(config, DeepSpeedConfig):
        return _with_deepspeed()
    found = Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision="no",  # autocast is the step's own: Accelerate would patch forward() of the bare networks too
        dynamo_backend="no",
    )
    known = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
    assert found.distributed_type in known, found.distributed_type
    return found


def _with_deepspeed() -> Accelerator:
    deepspeed = _load()
    if deepspeed is None:
        raise ValueError("parallel.kind: deepspeed is not installed; pip install 'tandem[deepspeed]', or take ddp")
    cuda = torch.cuda.is_available()
    if not cuda:  # an optimisation of gloo on one machine, which takes minutes and a compiler to build
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = InitProcessGroupKwargs(backend="nccl" if cuda else "gloo")
    first = _Plugin(hf_ds_config=zero_config.settings(DeepSpeedConfig(), "", clip=None))
    _variables(cuda)
    return Accelerator(
        deepspeed_plugins={"": first}, mixed_precision="no", dynamo_backend="no", kwargs_handlers=[backend]
    )


def _load() -> Any:
    """The package, which says little from here on; None where it is not installed."""
    if importlib.util.find_spec("deepspeed") is None:
        return None
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # it calls torch's collectives by their old names, and torch says so on every rank
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    return deepspeed


def judge(config: DeepSpeedConfig) -> None:
    """ValueError, naming file and key, for what DeepSpeed will not take of the user's own settings."""
    if config.file is None or _load() is None:
        return
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    held = zero_config.read(config.file).get("zero_optimization", {})
    fields = DeepSpeedZeroConfig.model_fields
    zero_config.known(config.file, held, {*fields, *(field.alias for field in fields.values())}, "zero_optimization.")
    try:
        DeepSpeedZeroConfig(**held)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(["zero_optimization", *map(str, first["loc"])])
        raise ValueError(f"parallel.file: {config.file}: {key}: {first['msg']}, not {first['input']!r}") from None


def _variables(cuda: bool) -> None:
    """What Accelerate and DeepSpeed read, where no launcher has set it."""
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    if not cuda:
        os.environ.pop("ACCELERATE_USE_CPU", None)  # which excludes DeepSpeed; without a GPU it is the CPU anyway
    if "RANK" not in os.environ:  # one process: a world of its own
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in alone.items()})


class _Plugin(DeepSpeedPlugin):  # type: ignore[misc]
    def set_deepspeed_weakref(self) -> None:
        self.dschf = None  # of transformers, which is not there and need not know


def prepare(
    name: str,
    network: nn.Module,
    base: torch.optim.Optimizer,
    *,
    config: DeepSpeedConfig,
    clip: float | None,
    ranks: "Ranks",
) -> Any:
    """DeepSpeed's engine of a network and its optimiser."""
    accelerator: Accelerator = ranks.accelerator
    elements = sum(parameter.numel() for parameter in network.parameters())
    plugin = _Plugin(hf_ds_config=zero_config.settings(config, name, clip=clip, elements=elements))
    plugin.set_mixed_precision("no")
    accelerator.state.deepspeed_plugins[name] = plugin
    accelerator.state.select_deepspeed_plugin(name)
    accelerator.deepspeed_engine_wrapped = None  # it warns of a second one, whose backward nobody calls
    if numbers := [key for key, parameter in network.named_parameters() if parameter.dim() == 0]:
        raise ValueError(  # it sends weights as bytes, and torch has no such view of them
            f"parallel.kind: DeepSpeed cannot hold {name}.{numbers[0]}, a 0-d tensor; give it a dimension, or take ddp"
        )
    engine, _ = accelerator.prepare(network, base)
    assert engine.dp_world_size == ranks.world, f"DeepSpeed sees {engine.dp_world_size} ranks of {ranks.world}"
    return engine


def wrap(network: nn.Module, ranks: "Ranks") -> Any:
    """Under DistributedDataParallel, where there are several ranks."""
    accelerator: Accelerator = ranks.accelerator
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        wrapped = accelerator.prepare_model(network)
    elif ranks.world == 1:
        return network
    else:
        cuda = ranks.device.type == "cuda"
        wrapped = DistributedDataParallel(network, device_ids=[ranks.device] if cuda else None)
    if isinstance(wrapped, DistributedDataParallel):
        _settle_buckets(wrapped)
    return wrapped


def _settle_buckets(wrapped: DistributedDataParallel) -> None:
    """Lets DDP build its buckets before the first update, in an order that depends on the parameters alone.

    It would build them after the first backward, in the order in which gradients became ready there. Where an element
    lies in its bucket decides in which order the ranks' parts of it are added, and of more than two the sum depends on
    that: the first update after a restart, and what came after it, would differ in a bit from the run that had none.
    """
    parameters = [parameter for parameter in wrapped.module.parameters() if parameter.requires_grad]
    nothing = torch.zeros((), device=parameters[0].device)
    for parameter in parameters:  # the last is ready first, as in most networks
        nothing = nothing + 0.0 * parameter.flatten()[0]
    wrapped.reducer.prepare_for_forward()
    wrapped.reducer.prepare_for_backward([])
    nothing.backward()  # type: ignore[no-untyped-call]
    wrapped.reducer._rebuild_buckets()
    wrapped.zero_grad()
