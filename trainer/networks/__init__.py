"""Networks and their configs, by kind. A new network is one file, and its line here; see README.md."""

from trainer.networks.autoencoder import Autoencoder, AutoencoderConfig, Decoder, Encoder, EncoderConfig
from trainer.networks.blocks import clamped_share, reparameterize
from trainer.networks.discriminator import (
    GlobalDiscriminator,
    GlobalDiscriminatorConfig,
    PatchDiscriminator,
    PatchDiscriminatorConfig,
)
from trainer.networks.generator import Generator, GeneratorConfig
from trainer.networks.shapes import ImageShape

AnyDiscriminatorConfig = GlobalDiscriminatorConfig | PatchDiscriminatorConfig
AnyDiscriminator = GlobalDiscriminator | PatchDiscriminator

AUTOENCODERS = {"conv": AutoencoderConfig}
ENCODERS = {"conv": EncoderConfig}
GENERATORS = {"conv": GeneratorConfig}
DISCRIMINATORS: dict[str, type[AnyDiscriminatorConfig]] = {
    "global": GlobalDiscriminatorConfig,
    "patch": PatchDiscriminatorConfig,
}

__all__ = [
    "AUTOENCODERS",
    "DISCRIMINATORS",
    "ENCODERS",
    "GENERATORS",
    "AnyDiscriminator",
    "AnyDiscriminatorConfig",
    "Autoencoder",
    "AutoencoderConfig",
    "Decoder",
    "Encoder",
    "EncoderConfig",
    "Generator",
    "GeneratorConfig",
    "GlobalDiscriminator",
    "GlobalDiscriminatorConfig",
    "ImageShape",
    "PatchDiscriminator",
    "PatchDiscriminatorConfig",
    "clamped_share",
    "reparameterize",
]
