"""The generator: a decoder that is trained from noise alone."""

from dataclasses import dataclass

from trainer.networks.autoencoder import Decoder, Pyramid
from trainer.networks.shapes import ImageShape

Generator = Decoder


@dataclass(frozen=True)
class GeneratorConfig(Pyramid):
    """Noise to image; also the decoder where encoder and decoder are two networks (Larsen et al. 2016)."""

    latent: int = 32
    """Latent dimensions (vector) or latent channels (map)."""

    def build(self, *, image: ImageShape, parameters: int) -> Generator:
        """`parameters`: channels that the likelihood, or the image, needs."""
        return Generator(self, image=image, parameters=parameters)
