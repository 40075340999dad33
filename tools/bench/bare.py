"""The same training in plain PyTorch, as somebody writes it who wants speed and nothing else: the mark for Tandem.

Fused Adam, channels_last, gradients set to None, moving average by one foreach, one forward of the generator a step,
one backward for both penalties, no value read back, nothing logged. Noise is torch.randn.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, softplus

from tools.bench.recipes import CLOCK, PERIOD
from trainer import build, optimizer
from trainer.config import Config
from trainer.data import to_float
from trainer.methods.gan import GANConfig
from trainer.methods.vae import VAEConfig
from trainer.methods.vaegan import VAEGANConfig

Backward = Callable[[Tensor], None]


@dataclass
class Batches:
    """A uint8 tensor in memory, (N, H, W, C), in a new order each epoch."""

    pixels: Tensor
    batch: int

    def __iter__(self) -> Iterator[Tensor]:
        while True:
            order = torch.randperm(len(self.pixels))
            for rows in order[: len(order) // self.batch * self.batch].view(-1, self.batch):
                yield self.pixels[rows]


class Loop(ABC):
    """Networks, optimisers and one update of them. `networks` may be replaced by a framework's wrappers of them."""

    averaged: str

    def __init__(self, config: Config, *, layout: torch.memory_format) -> None:
        self.config = config
        self.method = build.build_method(config, device=torch.device("cpu"))
        self.networks = build.build_networks(self.method, seed=config.seed)
        for network in self.networks.values():
            network.to(memory_format=layout)
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        self.rates: dict[str, float] = {}
        for name, network in self.networks.items():
            optim = optimizer.resolve(config.optim, network=name, total=config.images)
            self.optimizers[name] = torch.optim.Adam(network.parameters(), optim.lr, optim.betas, fused=True)
            self.rates[name] = optim.lr
        self.live = list(self.networks[self.averaged].parameters())
        self.average = list(copy.deepcopy(self.networks[self.averaged]).requires_grad_(False).parameters())
        self.updates = CLOCK // config.batch

    @abstractmethod
    def update(self, image: Tensor, backward: Backward = Tensor.backward) -> None:
        """One update of every network. image: float32 (B, C, H, W) in [-1, 1]."""

    def apply(self, name: str, loss: Tensor, backward: Backward) -> None:
        self.optimizers[name].zero_grad()
        backward(loss)
        self.optimizers[name].step()

    def schedule(self) -> None:
        """Learning rates of this update."""
        warm = min(1.0, (self.updates + 1) * self.config.batch / self.config.optim.warmup)
        for name, found in self.optimizers.items():
            found.param_groups[0]["lr"] = self.rates[name] * warm
        self.updates += 1

    @torch.no_grad()
    def follow(self) -> None:
        """The moving average."""
        keep = 0.5 ** (self.config.batch / self.config.optim.ema_half_life)
        torch._foreach_lerp_(self.average, self.live, 1.0 - keep)


class VAELoop(Loop):
    averaged = "autoencoder"

    def loss(self, image: Tensor) -> Tensor:
        noise = torch.randn(len(image), *self.method.latent_size)
        out = self.networks["autoencoder"](image, noise)
        return (_nll(out["reconstruction"], image) + out["kl"].sum()) / len(image)

    def update(self, image: Tensor, backward: Backward = Tensor.backward) -> None:
        self.schedule()
        self.apply("autoencoder", self.loss(image), backward)
        self.follow()


class _Adversarial(Loop):
    """Relativistic pairs with lazy R1 and R2."""

    gamma: float

    def train_discriminator(self, real: Tensor, fakes: Tensor, backward: Backward) -> None:
        """fakes: (k*B, C, H, W), detached, in k blocks that `real` is paired with."""
        network, lazy = self.networks["discriminator"], self.updates % PERIOD == 0
        seen = torch.cat([real, fakes])
        if lazy:
            seen.requires_grad_()
        logits = network(seen)
        loss = softplus(logits[len(real) :].view(-1, len(real)) - logits[: len(real)]).mean()
        if lazy:
            (gradient,) = torch.autograd.grad(logits.sum(), seen, create_graph=True)
            squares = gradient.square().sum((1, 2, 3))
            penalty = squares[: len(real)].mean() + squares[len(real) :].mean()
            loss = loss + 0.5 * self.gamma * PERIOD * penalty
        self.apply("discriminator", loss, backward)

    def verdict(self, real: Tensor, fakes: Tensor) -> Tensor:
        """The generator's loss of each block of `fakes`, (k,), summed over its images."""
        network = self.networks["discriminator"]
        with torch.no_grad():
            true = network(real)
        return softplus(true - network(fakes).view(-1, len(real))).sum(1)


class GANLoop(_Adversarial):
    averaged = "generator"

    def update(self, image: Tensor, backward: Backward = Tensor.backward) -> None:
        assert isinstance(self.config.method, GANConfig)
        self.gamma = self.config.method.critic.r1
        self.schedule()
        fake = self.networks["generator"](torch.randn(len(image), *self.method.latent_size)).tanh()
        self.train_discriminator(image, fake.detach(), backward)
        self.networks["discriminator"].requires_grad_(False)
        self.apply("generator", self.verdict(image, fake).sum() / len(image), backward)
        self.networks["discriminator"].requires_grad_(True)
        self.follow()


class VAEGANLoop(_Adversarial):
    """As fast as it goes by hand: one forward of the autoencoder, the balance taken at its outputs, one backward."""

    averaged = "autoencoder"

    def __init__(self, config: Config, *, layout: torch.memory_format) -> None:
        super().__init__(config, layout=layout)
        assert isinstance(config.method, VAEGANConfig)
        self.settings = config.method
        self.gamma = self.settings.critic.r1
        self.pull, self.push = torch.ones(()), torch.ones(())

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        noise, prior = torch.randn(2, len(image), *self.method.latent_size).unbind()
        return self.networks["autoencoder"](image, noise, prior)  # type: ignore[no-any-return]

    def update(self, image: Tensor, backward: Backward = Tensor.backward) -> None:
        self.schedule()
        out = self.forward(image)
        leaf = torch.cat([out["reconstruction"], out["sample"]]).detach().requires_grad_()
        fakes = _shown(leaf)
        self.train_discriminator(image, fakes.detach(), backward)
        self.networks["discriminator"].requires_grad_(False)
        near, far = self.verdict(image, fakes).unbind()
        adversarial = (near + self.settings.prior_weight * far) / len(image)
        (push,) = torch.autograd.grad(adversarial, leaf)
        self.networks["discriminator"].requires_grad_(True)
        rows = len(image)
        (pull,) = torch.autograd.grad(_nll(leaf[:rows], image) / rows, leaf)
        smoothing = self.settings.balance.smoothing
        gradient = pull.add(push * (self.settings.adversarial_weight * self.pull / (self.push + 1e-12)))
        self.pull = smoothing * self.pull + (1 - smoothing) * pull.norm()
        self.push = smoothing * self.push + (1 - smoothing) * push[:rows].norm()
        found = self.optimizers["autoencoder"]
        found.zero_grad()
        kl = out["kl"].sum() / rows
        outputs = (out["reconstruction"], out["sample"], kl)
        torch.autograd.backward(outputs, (gradient[:rows], gradient[rows:], torch.ones_like(kl)))
        found.step()
        self.follow()


class ConventionalLoop(VAEGANLoop):
    """As taming-transformers and latent-diffusion do it: the adaptive weight from two more backward passes to the last
    layer, and the autoencoder run again for the discriminator. Losses, penalties and samples as above."""

    def update(self, image: Tensor, backward: Backward = Tensor.backward) -> None:
        self.schedule()
        out = self.forward(image)
        nll = _nll(out["reconstruction"], image) / len(image)
        self.networks["discriminator"].requires_grad_(False)
        near, far = self.verdict(image, _shown(torch.cat([out["reconstruction"], out["sample"]]))).unbind()
        adversarial = (near + self.settings.prior_weight * far) / len(image)
        last = self.networks["autoencoder"].last_layer
        assert isinstance(last, nn.Parameter)
        (pull,) = torch.autograd.grad(nll, last, retain_graph=True)
        (push,) = torch.autograd.grad(adversarial, last, retain_graph=True)
        weight = (pull.norm() / (push.norm() + 1e-4)).clamp(0.0, 1e4).detach()
        kl = out["kl"].sum() / len(image)
        loss = nll + kl + weight * self.settings.adversarial_weight * adversarial
        self.apply("autoencoder", loss, backward)
        self.networks["discriminator"].requires_grad_(True)
        with torch.no_grad():
            again = self.forward(image)
            fakes = _shown(torch.cat([again["reconstruction"], again["sample"]]))
        self.train_discriminator(image, fakes, backward)
        self.follow()


def loop_of(config: Config, *, layout: torch.memory_format = torch.channels_last) -> Loop:
    """The bare loop of a recipe."""
    kinds: dict[type, type[Loop]] = {VAEConfig: VAELoop, GANConfig: GANLoop, VAEGANConfig: VAEGANLoop}
    return kinds[type(config.method)](config, layout=layout)


def steps_of(loop: Loop, pixels: Tensor, *, layout: torch.memory_format = torch.channels_last) -> Callable[[int], None]:
    """A function that takes `count` updates of `loop` on `pixels`, uint8 (N, H, W, C)."""
    batches = iter(Batches(pixels, loop.config.batch))

    def steps(count: int) -> None:
        for _ in range(count):
            loop.update(to_float(next(batches)).contiguous(memory_format=layout))

    return steps


def _nll(logits: Tensor, image: Tensor) -> Tensor:
    return binary_cross_entropy_with_logits(logits, image * 0.5 + 0.5, reduction="sum")


def _shown(logits: Tensor) -> Tensor:
    return logits.sigmoid() * 2.0 - 1.0
