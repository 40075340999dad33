"""VAE/GAN: Larsen et al. 2016, "Autoencoding beyond pixels using a learned similarity metric"."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from trainer import bounds
from trainer.data import Batch
from trainer.kernels.reparameterize import posterior, reparameterize_kl
from trainer.losses.balance import Balance, BalanceConfig, Term
from trainer.methods.critic import Critic, CriticConfig
from trainer.methods.vae import KLConfig
from trainer.networks import (
    AnyDiscriminatorConfig,
    EncoderConfig,
    GeneratorConfig,
    GlobalDiscriminatorConfig,
    ImageShape,
)
from trainer.phase import Run


@dataclass(frozen=True)
class VAEGANLarsenConfig:
    """Encoder, decoder and discriminator as three networks, each with its own loss (algorithm 1 of the paper)."""

    kind: Literal["vaegan_larsen"] = "vaegan_larsen"
    """Larsen et al. 2016."""
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    """Image to posterior."""
    decoder: GeneratorConfig = field(default_factory=lambda: GeneratorConfig(latent=16))
    """Latent to image; the same latent as the encoder's."""
    discriminator: Annotated[AnyDiscriminatorConfig, Field(discriminator="kind")] = field(
        default_factory=GlobalDiscriminatorConfig
    )
    """Image to logits; one of its layers is the similarity."""
    critic: CriticConfig = field(default_factory=lambda: CriticConfig(loss="non_saturating", r1=0.2))
    """The game."""
    kl: KLConfig = field(default_factory=KLConfig)
    """L_prior."""
    layer: int = 1
    """Stage of the discriminator whose output is compared, 0 is the first."""
    gamma: float = 0.01
    """Weight of the similarity against the adversarial loss in the decoder's update; the sum over the layer's elements
    makes it small."""

    def __post_init__(self) -> None:
        bounds.at_least(0, self, "layer", "gamma")
        judge = self.discriminator
        stages = len(judge.multipliers) if isinstance(judge, GlobalDiscriminatorConfig) else judge.layers + 1
        if self.layer >= stages:
            raise ValueError(f"layer: {self.layer} is no stage of a discriminator of {stages}; 0 to {stages - 1}")
        mine, other = self.encoder, self.decoder
        same = (mine.latent, mine.latent_shape, mine.factor if mine.latent_shape == "map" else 0)
        if same != (other.latent, other.latent_shape, other.factor if other.latent_shape == "map" else 0):
            raise ValueError(
                f"decoder.latent: {other.latent} ({other.latent_shape}) is not the encoder's {mine.latent} "
                f"({mine.latent_shape})"
            )

    def build(self, *, image: ImageShape, batch: int, device: torch.device) -> "VAEGANLarsen":
        """batch: the global one, which turns penalty_interval into updates; device: of frozen feature networks."""
        return VAEGANLarsen(self, image=image, batch=batch)


class VAEGANLarsen:
    averaged = ("encoder", "decoder")

    def __init__(self, config: VAEGANLarsenConfig, *, image: ImageShape, batch: int) -> None:
        self.config, self.image = config, image
        self.critic = Critic(config.critic, batch=batch)
        self.balance = Balance(BalanceConfig(kind="none"))

    def networks(self) -> dict[str, nn.Module]:
        return {
            "encoder": self.config.encoder.build(image=self.image),
            "decoder": self.config.decoder.build(image=self.image, parameters=self.image.channels),
            "discriminator": self.config.discriminator.build(image=self.image),
        }

    def phases(self, images: int) -> tuple[str, ...]:
        # the encoder last: the decoder's update, run again with more micro-batches, must see the codes that it saw
        # before
        return ("discriminator", "decoder", "encoder")

    def discriminator(self, batch: Batch, run: Run) -> dict[str, Term]:
        images = torch.tanh(run.shared("decoder", self._codes(batch, run)).output)
        return self.critic.discriminate(run, batch.image, images.chunk(2))  # -L_GAN, reconstructions and prior samples

    def decoder(self, batch: Batch, run: Run) -> dict[str, Term]:
        images = torch.tanh(run("decoder", self._codes(batch, run)).output)
        reconstruction, sample = images.chunk(2)
        at = self.critic.fool(run, batch.image, [reconstruction, sample])
        return {
            "similarity": Term(self._similarity(run, reconstruction, batch.image), weight=self.config.gamma),
            "adversarial": Term(at[0], weight=0.5),
            "adversarial_prior": Term(at[1], weight=0.5),
        }

    def encoder(self, batch: Batch, run: Run) -> dict[str, Term]:
        moments = run("encoder", batch.image).moments
        z, kl = reparameterize_kl(moments, run.noise("posterior", self.latent_size))
        reconstruction = torch.tanh(run.frozen("decoder")(z).float())
        return {
            "kl": self.config.kl.term(run, kl, moments),
            "similarity": Term(self._similarity(run, reconstruction, batch.image)),
        }

    def _codes(self, batch: Batch, run: Run) -> Tensor:
        """Posterior samples, then prior samples: (2B, *latent_size), no gradient to the encoder."""
        moments = run.shared("encoder", batch.image).moments
        z, _ = reparameterize_kl(moments, run.noise("posterior", self.latent_size))
        return torch.cat([z, run.normal("prior", self.latent_size)])

    def _similarity(self, run: Run, reconstruction: Tensor, image: Tensor) -> Tensor:
        """eq. 7: minus log N(Dis_l(x) | Dis_l(reconstruction), I) without its constant, (B,)."""
        network: Any = run.frozen("discriminator")
        with torch.no_grad():
            wanted = network.features(image)[self.config.layer]
        found: Tensor = network.features(reconstruction)[self.config.layer]
        distance: Tensor = 0.5 * (found.float() - wanted.float()).square().flatten(1).sum(1)
        return distance

    # ------------------------------------------------------------------ what a trained model does
    @property
    def latent_size(self) -> tuple[int, ...]:
        return self.config.encoder.latent_size(self.image)

    def decode(self, networks: Mapping[str, nn.Module], z: Tensor) -> Tensor:
        """(B, *latent_size) -> images (B, C, H, W) in [-1, 1]."""
        output: Tensor = networks["decoder"](z)
        return torch.tanh(output.float())

    def encode(self, networks: Mapping[str, nn.Module], image: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and logvar of the posterior, (B, *latent_size) each."""
        return posterior(networks["encoder"](image)["moments"])
