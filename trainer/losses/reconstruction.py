"""Likelihoods p(x|z): what a decoder's output means, its negative log-likelihood in nats, its mean and its samples.

Images are Tandem's, (B, C, H, W) in [-1, 1]. `nll` is float32 (float64 stays), (B,), summed over C, H and W.
A density's nats refer to the scale [-1, 1]; a discrete likelihood's to the levels themselves (see `bits_per_dim`).
"""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, TypeVar

from pydantic import Field
from torch import Tensor

from trainer.kernels.logistic_mixture import HALF_RANGE, logistic_mixture_nll, split
from trainer.kernels.reconstruction import bernoulli_nll, charbonnier_nll, full, gaussian_nll, laplace_nll

Number = TypeVar("Number", float, Tensor)


@dataclass(frozen=True)
class Bernoulli:
    """Each value as the probability of white, by a cross entropy: for drawings and for grey values near black or white.

    The decoder gives logits. x in [-1, 1] is (x + 1) / 2 in [0, 1]; a grey value counts as a probability, so this is no
    likelihood of 8-bit images and its bits per dimension compare with other Bernoulli figures only."""

    kind: Literal["bernoulli"] = "bernoulli"
    """Cross entropy with logits (Kingma and Welling 2014, appendix C.1)."""
    discrete: ClassVar[bool] = True
    learn_scale: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """For the board: what the nats are nats of."""
        return "bernoulli, grey values as probabilities"

    def parameters(self, channels: int) -> int:
        """Channels that the decoder's last layer has."""
        return channels

    def nll(self, parameters: Tensor, image: Tensor, log_scale: Tensor | None = None) -> Tensor:
        """Logits and images (B, C, H, W) -> nats (B,), never negative.

        ValueError where an image on the CPU leaves [-1, 1]; on a GPU that would wait for the device, so there it is
        `check_targets`, called once by whoever starts a run."""
        if image.device.type == "cpu":
            check_targets(image)
        return bernoulli_nll(parameters, image)

    def mean(self, parameters: Tensor) -> Tensor:
        """(B, C, H, W) in [-1, 1]."""
        return full(parameters).sigmoid() * 2.0 - 1.0  # = tanh(l / 2), in a fraction of its time on CPU

    def hint(self, channels: int) -> str | None:
        """One line where another likelihood suits the images better."""
        if channels == 1:
            return None
        return "likelihood: bernoulli suits drawings; for colour photographs try laplace or logistic_mixture"


@dataclass(frozen=True)
class _Location:
    """Gaussian, Laplace and Charbonnier: the decoder gives the mean itself, one scale serves all elements."""

    kind: Literal["gaussian", "laplace", "charbonnier"]
    discrete: ClassVar[bool] = False
    scale: float = 1.0
    """Scale of the density on [-1, 1], where one 8-bit level is 1 / 127.5; the start where it is learned."""
    learn_scale: bool = False
    """Learns one log-scale for all elements (Rybkin et al. 2021), from log(scale) on."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise ValueError(f"scale: {self.scale} is no scale of a density; give a number above 0, such as 0.1")

    def parameters(self, channels: int) -> int:
        """Channels that the decoder's last layer has."""
        return channels

    def mean(self, parameters: Tensor) -> Tensor:
        """The decoder's output as it is: near [-1, 1], not clamped, so that no gradient is lost (to_uint8 clamps)."""
        return full(parameters)

    def hint(self, channels: int) -> str | None:
        """One line where another likelihood suits the images better."""
        return None

    def _check(self, log_scale: Tensor | None) -> None:
        assert (log_scale is not None) == self.learn_scale, "a learned scale comes from the network"


@dataclass(frozen=True)
class Gaussian(_Location):
    """Normal density of one scale: squared error in nats."""

    kind: Literal["gaussian"] = "gaussian"
    """Normal density around the decoder's output."""

    @property
    def name(self) -> str:
        """For the board: what the nats are nats of."""
        return "gaussian density on [-1, 1]"

    def nll(self, parameters: Tensor, image: Tensor, log_scale: Tensor | None = None) -> Tensor:
        """Means and images (B, C, H, W), log_scale (B,) where it is learned -> nats (B,), of either sign."""
        self._check(log_scale)
        return gaussian_nll(parameters, image, log_scale, scale=self.scale)


@dataclass(frozen=True)
class Laplace(_Location):
    """Double exponential density of one scale: L1 in nats. With a learned scale it is the nll of latent diffusion
    (rec / exp(logvar) + logvar, Rombach et al. 2022) plus log 2 an element."""

    kind: Literal["laplace"] = "laplace"
    """Double exponential density around the decoder's output."""

    @property
    def name(self) -> str:
        """For the board: what the nats are nats of."""
        return "laplace density on [-1, 1]"

    def nll(self, parameters: Tensor, image: Tensor, log_scale: Tensor | None = None) -> Tensor:
        """Medians and images (B, C, H, W), log_scale (B,) where it is learned -> nats (B,), of either sign."""
        self._check(log_scale)
        return laplace_nll(parameters, image, log_scale, scale=self.scale)


@dataclass(frozen=True)
class Charbonnier(_Location):
    """Softened L1: p(x) proportional to exp(-sqrt(u^2 + softness^2)), u = (x - m) / scale. Squares where errors are
    well below softness * scale, absolute values beyond, so the gradient has no jump where an error changes its sign.

    The penalty is that of Charbonnier et al. 1994; as a density it is the symmetric hyperbolic distribution of
    Barndorff-Nielsen 1977, whose normaliser is 2 scale softness K1(softness), with K1 the modified Bessel function.
    So the scale can be learned, and towards softness 0 it becomes laplace."""

    kind: Literal["charbonnier"] = "charbonnier"
    """Softened double exponential density around the decoder's output."""
    softness: float = 1e-3
    """In units of the scale, 1e-6 to 10; 1e-3 at scale 1 is the penalty of super-resolution (Lai et al. 2017)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1e-6 <= self.softness <= 10.0:
            raise ValueError(
                f"softness: {self.softness} is not from 1e-6 to 10; take laplace for a softer one's limit at 0, "
                "gaussian for that at infinity"
            )

    @property
    def name(self) -> str:
        """For the board: what the nats are nats of."""
        return "charbonnier density on [-1, 1]"

    def nll(self, parameters: Tensor, image: Tensor, log_scale: Tensor | None = None) -> Tensor:
        """Centres and images (B, C, H, W), log_scale (B,) where it is learned -> nats (B,), of either sign."""
        self._check(log_scale)
        return charbonnier_nll(parameters, image, log_scale, scale=self.scale, softness=self.softness)


@dataclass(frozen=True)
class LogisticMixture:
    """Discretised mixture of logistics over the 256 levels (Salimans et al. 2017, PixelCNN++, section 2.1).

    One mixture a pixel, shared by its channels; given the component, channels are independent (the paper also lets
    green depend on red, and blue on both). Decoder's channels: K logits, then K means for each channel, then K
    log-scales for each channel."""

    kind: Literal["logistic_mixture"] = "logistic_mixture"
    """Mixture of logistics, integrated over each of 256 bins."""
    components: int = 10
    """Logistics in the mixture; 10 in Salimans et al. 2017 (5 suffice there)."""
    discrete: ClassVar[bool] = True
    learn_scale: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.components < 1:
            raise ValueError(f"components: {self.components} make no mixture; 1 or more")

    @property
    def name(self) -> str:
        """For the board: what the nats are nats of."""
        return f"8-bit levels, mixture of {self.components} logistics"

    def parameters(self, channels: int) -> int:
        """Channels that the decoder's last layer has."""
        return self.components * (1 + 2 * channels)

    def nll(self, parameters: Tensor, image: Tensor, log_scale: Tensor | None = None) -> Tensor:
        """Parameters (B, P, H, W), images (B, C, H, W) -> nats (B,), never negative; each value counts as its level."""
        return logistic_mixture_nll(parameters, image, components=self.components)

    def mean(self, parameters: Tensor) -> Tensor:
        """(B, C, H, W) in [-1, 1]: the weighted mean of the components, each clamped to the range."""
        weights, means, _ = split(parameters, self.components)
        return (weights.exp() * means.clamp(-1.0, 1.0)).sum(1)

    def hint(self, channels: int) -> str | None:
        """One line where another likelihood suits the images better."""
        return None


Likelihood = Annotated[Bernoulli | Gaussian | Laplace | Charbonnier | LogisticMixture, Field(discriminator="kind")]


def bits_per_dim(nats: Number, *, dims: int, discrete: bool) -> Number:
    """Nats an image -> bits a dimension (C*H*W of them), for 8-bit levels.

    discrete: the nats are of the levels themselves. A density on [-1, 1] adds log2(127.5), the change of scale to
    levels; its figure is a bound for 8-bit data only where the input was dequantised (`dequantize`)."""
    return nats / (dims * math.log(2.0)) + (0.0 if discrete else math.log2(HALF_RANGE))


def dequantize(image: Tensor, uniform: Tensor) -> Tensor:
    """Adds noise of one level, uniform around it, to images on the 256 levels (Theis et al. 2016, section 3.1).

    image (B, C, H, W) in [-1, 1], uniform the same shape in [0, 1) -> within half a level of [-1, 1]."""
    return image + (uniform - 0.5) / HALF_RANGE


def check_targets(image: Tensor) -> None:
    """ValueError where an image leaves [-1, 1], naming what was found; waits for the device."""
    low, high = (float(v) for v in image.detach().aminmax())
    if not (low >= -1.0 and high <= 1.0):
        raise ValueError(
            f"likelihood: bernoulli takes images in [-1, 1] and maps them to [0, 1] itself; these run from {low:.4g} "
            f"to {high:.4g}; scale them first"
        )
