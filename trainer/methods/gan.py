"""GAN: Goodfellow et al. 2014, and the losses since; relativistic pairs with R1 and R2: Huang et al. 2024 (R3GAN)."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from trainer.data import Batch
from trainer.losses.balance import Balance, BalanceConfig, Term
from trainer.methods.critic import Critic, CriticConfig
from trainer.networks import AnyDiscriminatorConfig, GeneratorConfig, GlobalDiscriminatorConfig, ImageShape
from trainer.phase import Run


@dataclass(frozen=True)
class GANConfig:
    """Generator from noise against a discriminator."""

    kind: Literal["gan"] = "gan"
    """Goodfellow et al. 2014."""
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    """Noise to image."""
    discriminator: Annotated[AnyDiscriminatorConfig, Field(discriminator="kind")] = field(
        default_factory=GlobalDiscriminatorConfig
    )
    """Image to logits."""
    critic: CriticConfig = field(default_factory=lambda: CriticConfig(loss="relativistic", r1=0.2, r2=0.2))
    """The game."""

    def build(self, *, image: ImageShape, batch: int, device: torch.device) -> "GAN":
        """batch: the global one, which turns penalty_interval into updates; device: of frozen feature networks."""
        return GAN(self, image=image, batch=batch)


class GAN:
    averaged = ("generator",)

    def __init__(self, config: GANConfig, *, image: ImageShape, batch: int) -> None:
        self.config, self.image = config, image
        self.critic = Critic(config.critic, batch=batch)
        self.balance = Balance(BalanceConfig(kind="none"))

    def networks(self) -> dict[str, nn.Module]:
        return {
            "generator": self.config.generator.build(image=self.image, parameters=self.image.channels),
            "discriminator": self.config.discriminator.build(image=self.image),
        }

    def phases(self, images: int) -> tuple[str, ...]:
        return ("discriminator", "generator")

    def discriminator(self, batch: Batch, run: Run) -> dict[str, Term]:
        z = run.normal("latent", self.latent_size)
        fake = torch.tanh(run.shared("generator", z).output)  # the graph waits for its own phase
        return self.critic.discriminate(run, batch.image, [fake])

    def generator(self, batch: Batch, run: Run) -> dict[str, Term]:
        z = run.normal("latent", self.latent_size)
        fake = torch.tanh(run("generator", z).output)
        (adversarial,) = self.critic.fool(run, batch.image, [fake])
        return {"adversarial": Term(adversarial)}

    # ------------------------------------------------------------------ what a trained model does
    @property
    def latent_size(self) -> tuple[int, ...]:
        return self.config.generator.latent_size(self.image)

    def decode(self, networks: Mapping[str, nn.Module], z: Tensor) -> Tensor:
        """(B, *latent_size) -> images (B, C, H, W) in [-1, 1]."""
        return torch.tanh(networks["generator"](z).float())
