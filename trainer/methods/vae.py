"""VAE: Kingma and Welling 2014, "Auto-Encoding Variational Bayes"; beta: Higgins et al. 2017."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from trainer import bounds, progress
from trainer.data import Batch
from trainer.kernels.reparameterize import posterior
from trainer.losses.balance import Balance, BalanceConfig, Term
from trainer.losses.divergence import free_bits, kl_per_dimension
from trainer.losses.reconstruction import Bernoulli, Likelihood
from trainer.networks import AnyAutoencoderConfig, Autoencoder, AutoencoderConfig, ImageShape
from trainer.phase import Run

if TYPE_CHECKING:
    from trainer.methods.vaegan import VAEGANConfig


@dataclass(frozen=True)
class KLConfig:
    """The divergence's part in the loss."""

    weight: float = 1.0
    """beta: 1 is the ELBO. A sum over latent dimensions in nats against a sum over pixels in nats
    (losses/README.md)."""
    warmup: int = 0
    """Images over which the weight rises from 0; 0 starts in full."""
    schedule: Literal["linear", "cyclic"] = "linear"
    """linear: once, over `warmup`. cyclic: again and again with period `warmup`, rising in its first half (Fu et al.
    2019)."""
    free_bits: float = 0.0
    """Nats a latent dimension that cost nothing (Kingma et al. 2016)."""

    def __post_init__(self) -> None:
        bounds.at_least(0, self, "weight", "warmup", "free_bits")

    def weight_at(self, images: int) -> float:
        """beta at `images` images seen."""
        if self.warmup == 0:
            return self.weight
        if self.schedule == "cyclic":
            return self.weight * progress.cyclic(images, period=self.warmup)
        return self.weight * progress.ramp(images, start=0, length=self.warmup)

    @property
    def by_dimension(self) -> bool:
        """Whether `term` needs the posterior's moments."""
        return self.free_bits > 0

    def term(self, run: Run, kl: Tensor, moments: Tensor | None = None) -> Term:
        """The KL's term at the run's clock; notes the plain `kl` (B,), in nats."""
        run.note("latent/kl", kl)
        if self.by_dimension:
            assert moments is not None
            kl = free_bits(kl_per_dimension(*posterior(moments)), self.free_bits)
        return Term(kl, weight=self.weight_at(run.images))


@dataclass(frozen=True)
class VAEConfig:
    """Encoder, decoder, evidence lower bound."""

    kind: Literal["vae"] = "vae"
    """Kingma and Welling 2014."""
    autoencoder: Annotated[AnyAutoencoderConfig, Field(discriminator="kind")] = field(default_factory=AutoencoderConfig)
    """The network."""
    likelihood: Likelihood = field(default_factory=Bernoulli)
    """p(x|z)."""
    kl: KLConfig = field(default_factory=KLConfig)
    """KL(q(z|x) || p(z)) and its weight."""

    def build(self, *, image: ImageShape, batch: int, device: torch.device) -> "VAE":
        """batch: the global one; device: where frozen feature networks go. A plain VAE has neither."""
        return VAE(self, image=image)


class VAE:
    """Also what a VAE-GAN is without its discriminator."""

    averaged = ("autoencoder",)

    def __init__(self, config: "VAEConfig | VAEGANConfig", *, image: ImageShape) -> None:
        self.config, self.likelihood, self.image = config, config.likelihood, image
        self.balance = Balance(BalanceConfig(kind="none"))

    def networks(self) -> dict[str, nn.Module]:
        parameters = self.likelihood.parameters(self.image.channels)
        network = self.config.autoencoder.build(
            image=self.image, parameters=parameters, learn_scale=self.likelihood.learn_scale
        )
        return {"autoencoder": network}

    def phases(self, images: int) -> tuple[str, ...]:
        return ("autoencoder",)

    def autoencoder(self, batch: Batch, run: Run) -> dict[str, Term]:
        noise = run.noise("posterior", self.latent_size)
        out = run("autoencoder", batch.image, noise, None, False, self.config.kl.by_dimension)
        nll = self.likelihood.nll(out.reconstruction, batch.image, getattr(out, "log_scale", None))
        return {"nll": Term(nll), "kl": self._kl(run, out)}  # eq. 10: minus the ELBO

    def _kl(self, run: Run, out: Any) -> Term:
        return self.config.kl.term(run, out.kl, getattr(out, "moments", None))

    # ------------------------------------------------------------------ what a trained model does
    @property
    def latent_size(self) -> tuple[int, ...]:
        return self.config.autoencoder.latent_size(self.image)

    def decode(self, networks: Mapping[str, nn.Module], z: Tensor) -> Tensor:
        """(B, *latent_size) -> the likelihood's mean, images (B, C, H, W) in [-1, 1]."""
        return self.likelihood.mean(_autoencoder(networks).decode(z))

    def encode(self, networks: Mapping[str, nn.Module], image: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and logvar of the posterior, (B, *latent_size) each."""
        return _autoencoder(networks).encode(image)

    def elbo(self, networks: Mapping[str, nn.Module], image: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """(nll, kl) in nats an image, (B,) each, at one posterior sample, by its noise (see `Autoencoder`): the ELBO is
        minus their sum."""
        out = networks["autoencoder"](image, noise)
        return self.likelihood.nll(out["reconstruction"], image, out.get("log_scale")), out["kl"]


def _autoencoder(networks: Mapping[str, nn.Module]) -> Autoencoder:
    network = networks["autoencoder"]
    assert isinstance(network, Autoencoder)
    return network
