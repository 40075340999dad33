"""VAE-GAN in the lineage of latent diffusion's autoencoder: Esser et al. 2021 (VQGAN), Rombach et al. 2022 (LDM).

Reconstruction + perceptual distance + KL, and a discriminator that sees reconstructions, prior samples, or both.
"""

from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from trainer import bounds, progress
from trainer.data import Batch
from trainer.losses.balance import Balance, BalanceConfig, Term
from trainer.losses.perceptual import AnyPerceptualConfig, NoPerceptualConfig
from trainer.losses.reconstruction import Laplace, Likelihood
from trainer.methods.critic import Critic, CriticConfig
from trainer.methods.vae import VAE, KLConfig
from trainer.networks import (
    AnyAutoencoderConfig,
    AnyDiscriminatorConfig,
    AutoencoderConfig,
    ImageShape,
    PatchDiscriminatorConfig,
)
from trainer.phase import Run


@dataclass(frozen=True)
class VAEGANConfig:
    """Autoencoder with a discriminator on its images."""

    kind: Literal["vaegan"] = "vaegan"
    """Esser et al. 2021, Rombach et al. 2022."""
    autoencoder: Annotated[AnyAutoencoderConfig, Field(discriminator="kind")] = field(default_factory=AutoencoderConfig)
    """The network that is kept."""
    discriminator: Annotated[AnyDiscriminatorConfig, Field(discriminator="kind")] = field(
        default_factory=PatchDiscriminatorConfig
    )
    """Image to logits."""
    likelihood: Likelihood = field(default_factory=Laplace)
    """p(x|z): the reconstruction loss in nats."""
    perceptual: Annotated[AnyPerceptualConfig, Field(discriminator="kind")] = field(default_factory=NoPerceptualConfig)
    """Distance on the features of a pretrained network, part of the reconstruction loss that the balance refers to."""
    perceptual_weight: float = 1.0
    """Weight of that distance, which is a mean over the image, against the nll, which is a sum."""
    kl: KLConfig = field(default_factory=lambda: KLConfig(weight=1e-6))
    """KL(q(z|x) || p(z)); 1e-6 in Rombach et al. 2022."""
    critic: CriticConfig = field(default_factory=lambda: CriticConfig(loss="hinge"))
    """The game."""
    balance: BalanceConfig = field(default_factory=lambda: BalanceConfig(kind="last_layer", smoothing=0.0))
    """How the adversarial loss is brought to the scale of the reconstruction loss."""
    adversarial_weight: float = 0.5
    """Weight of the adversarial loss at reconstructions, after the balance."""
    prior_weight: float = 0.0
    """The same at samples from the prior, as a multiple of adversarial_weight; 0: the discriminator sees
    reconstructions."""
    discriminator_learns_from: int = 0
    """Images seen before the discriminator's first update."""
    adversarial_from: int = 0
    """Images seen before the autoencoder feels the discriminator."""
    adversarial_ramp: int = 0
    """Images over which adversarial_weight then rises from 0."""

    def __post_init__(self) -> None:
        bounds.at_least(0, self, "perceptual_weight", "adversarial_weight", "prior_weight")
        bounds.at_least(0, self, "discriminator_learns_from", "adversarial_from", "adversarial_ramp")
        if self.adversarial_from < self.discriminator_learns_from:
            raise ValueError(
                f"adversarial_from: at {self.adversarial_from} images the autoencoder would feel a discriminator that "
                f"learns from {self.discriminator_learns_from} on; let it learn first"
            )

    def build(self, *, image: ImageShape, batch: int, device: torch.device) -> "VAEGAN":
        """batch: the global one, which turns penalty_interval into updates; device: of frozen feature networks."""
        return VAEGAN(self, image=image, batch=batch, device=device)


class VAEGAN(VAE):
    """A VAE whose decoder also plays against a discriminator."""

    def __init__(self, config: VAEGANConfig, *, image: ImageShape, batch: int, device: torch.device) -> None:
        super().__init__(config, image=image)
        self.settings = config
        self.critic = Critic(config.critic, batch=batch)
        self.balance = Balance(config.balance)
        self.perceptual = config.perceptual.build(device)

    def networks(self) -> dict[str, nn.Module]:
        return {
            **super().networks(),
            "discriminator": self.settings.discriminator.build(image=self.image),
        }

    def phases(self, images: int) -> tuple[str, ...]:
        learns = images >= self.settings.discriminator_learns_from
        return ("discriminator", "autoencoder") if learns else ("autoencoder",)

    def discriminator(self, batch: Batch, run: Run) -> dict[str, Term]:
        out = run.shared("autoencoder", *self._inputs(batch, run))  # the graph waits for its own phase
        return self.critic.discriminate(run, batch.image, self._images(out))

    def autoencoder(self, batch: Batch, run: Run) -> dict[str, Term]:
        out = run("autoencoder", *self._inputs(batch, run))
        nll = self.likelihood.nll(out.reconstruction, batch.image, getattr(out, "log_scale", None))
        terms = {"nll": Term(nll), "kl": self._kl(run, out)}
        fakes = self._images(out)
        if self.perceptual is not None:
            terms["perceptual"] = Term(
                self.perceptual.distance(fakes[0], batch.image), weight=self.settings.perceptual_weight
            )
        scale = self._adversarial_scale(run.images)
        if scale is not None:
            at = self.critic.fool(run, batch.image, fakes)
            terms["adversarial"] = Term(at[0], group="adversarial", scale=scale)
            if len(at) > 1:
                prior = self.settings.prior_weight
                terms["adversarial_prior"] = Term(at[1], weight=prior, group="adversarial", scale=scale)
        return terms

    def _adversarial_scale(self, images: int) -> float | None:
        """What the autoencoder feels of the discriminator; None: nothing, and there is nothing to measure either.

        The update before the start takes part with scale 0: the balance's ratio comes from the update before."""
        settings = self.settings
        soon = images + self.critic.batch if self.balance.active else images
        if settings.adversarial_weight == 0 or soon < settings.adversarial_from:
            return None
        level = progress.ramp(images, start=settings.adversarial_from, length=settings.adversarial_ramp)
        return level * settings.adversarial_weight

    def _inputs(self, batch: Batch, run: Run) -> tuple[Tensor, Tensor, Tensor | None, bool, bool]:
        noise = run.noise("posterior", self.latent_size)
        prior = run.normal("prior", self.latent_size) if self.settings.prior_weight > 0 else None
        return batch.image, noise, prior, self.settings.balance.kind == "last_layer", self.settings.kl.by_dimension

    def _images(self, out: object) -> list[Tensor]:
        """What the discriminator sees: reconstructions, then prior samples where they are drawn."""
        names = ("reconstruction", "sample") if self.settings.prior_weight > 0 else ("reconstruction",)
        return [self.likelihood.mean(getattr(out, name)) for name in names]
