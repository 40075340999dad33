"""Methods, by kind: one file each, and each phase trains the network of its name. A new method joins MethodConfig."""

from collections.abc import Mapping
from typing import Annotated, Protocol

from pydantic import Field
from torch import Tensor, nn

from trainer.losses.balance import Balance
from trainer.methods.gan import GANConfig
from trainer.methods.vae import VAEConfig
from trainer.methods.vaegan import VAEGANConfig
from trainer.methods.vaegan_larsen import VAEGANLarsenConfig

MethodConfig = Annotated[VAEConfig | GANConfig | VAEGANConfig | VAEGANLarsenConfig, Field(discriminator="kind")]


class Method(Protocol):
    """What step and loop ask of a method; a method also has one function a phase, (batch, run) -> dict of `Term`.

    Methods that can also have `encode(networks, image) -> (mean, logvar)` and `elbo(networks, image, noise) -> (nll,
    kl)`."""

    @property
    def averaged(self) -> tuple[str, ...]:
        """Networks whose moving average is kept, sampled and evaluated."""

    @property
    def balance(self) -> Balance:
        """What weighs the balanced terms; it does nothing where there are none."""

    @property
    def latent_size(self) -> tuple[int, ...]:
        """Shape of one latent; the prior is a standard normal."""

    def networks(self) -> dict[str, nn.Module]:
        """New networks by name, initialised from torch's global generator."""

    def phases(self, images: int) -> tuple[str, ...]:
        """The networks that the update at `images` images seen trains, in this order."""

    def decode(self, networks: Mapping[str, nn.Module], z: Tensor) -> Tensor:
        """(B, *latent_size) -> images (B, C, H, W) in [-1, 1]."""
