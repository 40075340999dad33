"""Networks and their configs, by kind. A new one is one file, and a member of its union; see README.md."""

from trainer.networks.autoencoder import Autoencoder, AutoencoderConfig, Decoder, Encoder, EncoderConfig
from trainer.networks.blocks import reparameterize
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

__all__ = [
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
    "reparameterize",
]
