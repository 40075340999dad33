"""Networks and their configs, by kind. A new one is one file, and a member of its union; see README.md."""

from trainer.networks.autoencoder import Autoencoder, AutoencoderConfig, Decoder, Encoder, EncoderConfig
from trainer.networks.discriminator import (
    GlobalDiscriminator,
    GlobalDiscriminatorConfig,
    PatchDiscriminator,
    PatchDiscriminatorConfig,
)
from trainer.networks.generator import Generator, GeneratorConfig
from trainer.networks.kl_autoencoder import KLAutoencoderConfig
from trainer.networks.shapes import ImageShape

AnyAutoencoderConfig = AutoencoderConfig | KLAutoencoderConfig
AnyDiscriminatorConfig = GlobalDiscriminatorConfig | PatchDiscriminatorConfig
AnyDiscriminator = GlobalDiscriminator | PatchDiscriminator

__all__ = [
    "AnyAutoencoderConfig",
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
    "KLAutoencoderConfig",
    "PatchDiscriminator",
    "PatchDiscriminatorConfig",
]
