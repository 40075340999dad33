"""The game that GAN and both VAE-GANs play: what trains a discriminator, and what a generator feels of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from trainer import bounds
from trainer.losses import adversarial, penalties
from trainer.losses.augment import Policy, apply, draws
from trainer.losses.balance import Term
from trainer.phase import Run


@dataclass(frozen=True)
class CriticConfig:
    """The two-player game: its loss, its penalties, its augmentation."""

    loss: Literal["non_saturating", "hinge", "least_squares", "wasserstein", "relativistic"] = "relativistic"
    """non_saturating: Goodfellow et al. 2014. hinge: Lim and Ye 2017. least_squares: Mao et al. 2017. wasserstein:
    Arjovsky et al. 2017, with gradient_penalty, r1 or r2: without one nothing bounds it. relativistic: pairs, Huang et
    al. 2024 (R3GAN), with r1 and r2."""
    r1: float = 0.0
    """gamma of gamma/2 |grad D(real)|^2 (Mescheder et al. 2018), summed over the image's elements in [-1, 1]."""
    r2: float = 0.0
    """gamma of gamma/2 |grad D(fake)|^2."""
    gradient_penalty: float = 0.0
    """lambda of lambda (|grad D(mix)| - 1)^2 (Gulrajani et al. 2017); 10 in the paper. Mixes of each real image with
    every generated one of its row (reconstruction and prior sample count half each), before augmentation."""
    penalty: Literal["exact", "finite_difference"] = "exact"
    """How r1 and r2 are computed. exact: by differentiating the gradient. finite_difference: as |D(x + s n) - D(x)|^2 /
    s^2, n standard normal, s = `sigma`: an approximation (aR1 of Lin et al. 2025, without 1 / s^2 there) for networks
    without a second derivative; noisy and biased, and seldom faster (figures in trainer/losses/README.md)."""
    sigma: float = 0.01
    """Step of finite_difference, in units of [-1, 1]; 0.01 for images in Lin et al. Larger: more bias. Smaller: logits
    whose difference is rounding."""
    penalty_interval: int = 0
    """Images from one penalty to the next (a multiple of the batch); each is then as many times as large, so the pull
    over time is the same (Karras et al. 2020). Their correction of lr and betas by k / (k + 1) is for k + 1 optimiser
    steps in the place of k, their penalty having one of its own; here it shares the loss's, so there is none. 0:
    always."""
    augment: tuple[Policy, ...] = ()
    """Differentiable augmentation of real and fake in both phases (Zhao et al. 2020): color, translation, cutout."""

    def __post_init__(self) -> None:
        bounds.at_least(0, self, "r1", "r2", "gradient_penalty", "penalty_interval")
        if not 1e-4 <= self.sigma <= 1:
            raise ValueError(
                f"sigma: {self.sigma} is no step of an image in [-1, 1], whose change float32 could tell: 1e-4 to 1; "
                "0.01 is Lin et al.'s"
            )
        if self.gradient_penalty and self.penalty == "finite_difference":
            raise ValueError("penalty: finite_difference is of r1 and r2; gradient_penalty is always exact")
        if self.loss == "wasserstein" and not (self.r1 or self.r2 or self.gradient_penalty):
            raise ValueError(
                "loss: wasserstein has no bound without a penalty; set gradient_penalty (10 in Gulrajani et al. 2017), "
                "r1 or r2"
            )

    def check(self, *, batch: int) -> None:
        """ValueError where the interval is no multiple of the batch."""
        if self.penalty_interval % batch:
            raise ValueError(
                f"critic.penalty_interval: {self.penalty_interval} images are no multiple of the batch of {batch}; "
                f"nearest: {max(1, round(self.penalty_interval / batch)) * batch}"
            )


class Critic:
    """Losses of both players under one config."""

    def __init__(self, config: CriticConfig, *, batch: int) -> None:
        config.check(batch=batch)
        self.config, self.batch = config, batch
        self.lazy = max(1, config.penalty_interval // batch)  # updates from one penalty to the next
        self.loss = adversarial.LOSSES[config.loss]

    def discriminate(self, run: Run, real: Tensor, fakes: Sequence[Tensor]) -> dict[str, Term]:
        """The discriminator's terms, each real image against its own row of every tensor in `fakes`, (B, C, H, W) each.

        R1 and R2 differentiate the forward that the loss uses, augmentation included, at the images before it. The
        gradient penalty has a forward of its own, at mixes of the images before augmentation and not augmented."""
        config, batch = self.config, len(real)
        now = run.images // self.batch % self.lazy == 0
        r1, r2, gp = (now and weight > 0 for weight in (config.r1, config.r2, config.gradient_penalty))
        images = torch.cat([real, *fakes]).detach()
        # rows are independent: one pass gives R1 at the real ones and R2 at the others; what has none is spared it
        parts = [(images, r1)] if r1 == r2 else [(images[:batch], r1), (images[batch:], r2)]

        def judge(network: Any) -> dict[str, Tensor]:
            logits, squares = zip(*(self._judged(run, network, *part) for part in parts), strict=True)
            out = {"logits": _joined(logits)}
            if r1 and r2:
                out["r1"], out["r2"] = torch.split(squares[0], [batch, len(fakes) * batch])
            elif r1 or r2:
                out |= {"r1": squares[0]} if r1 else {"r2": squares[1]}
            if gp:
                mix = run.uniform("critic/mix", (len(fakes),)).T.flatten()  # a draw for each fake of a row
                out["gradient_penalty"] = penalties.wasserstein(
                    network, torch.cat([real] * len(fakes)), torch.cat(list(fakes)), mix
                )
            return out

        out = run("discriminator", judge, exact=r1 or r2 or gp)
        verdict = self.loss.discriminator(out.logits, batch)
        run.note("logits/real", out.logits[:batch])
        run.note("logits/fake", out.logits[batch:])
        for name, share in verdict.accuracy.items():
            run.note(f"accuracy/{name}", share)
        terms = {"adversarial": Term(verdict.loss)}
        if r1:
            terms["r1"] = Term(out.r1, weight=0.5 * config.r1 * self.lazy)
        if r2:
            terms["r2"] = Term(_mean_over_fakes(out.r2, batch), weight=0.5 * config.r2 * self.lazy)
        if gp:
            values = _mean_over_fakes(out.gradient_penalty, batch)
            terms["gradient_penalty"] = Term(values, weight=config.gradient_penalty * self.lazy)
        return terms

    def _judged(self, run: Run, network: Any, images: Tensor, penalised: bool) -> tuple[Tensor, Tensor]:
        """The logits of `images`, and where they are penalised |grad D|^2 of each."""
        if not penalised:
            return network(self.augmented(run, images)), images
        if self.config.penalty == "finite_difference":
            sigma = self.config.sigma
            groups = len(images) // len(run.batch.image)
            noise = run.normal(f"critic/step{groups}", (groups, *images.shape[1:])).transpose(0, 1).flatten(0, 1)
            both = self.augmented(run, torch.cat([images, images + sigma * noise]))
            logits, moved = network(both).chunk(2)
            return logits, penalties.finite_difference(logits, moved, sigma)
        images = images.requires_grad_()
        seen = self.augmented(run, images)
        return penalties.with_norms(network(seen), seen, images)

    def fool(self, run: Run, real: Tensor, fakes: Sequence[Tensor]) -> list[Tensor]:
        """The generator's loss at each tensor of `fakes`, (B,) each, through the frozen discriminator."""
        network = run.frozen("discriminator")
        true = None
        if self.loss.paired:
            with torch.no_grad():
                true = network(self.augmented(run, real))
        logits = network(self.augmented(run, torch.cat(list(fakes))))
        return [self.loss.generator(verdict, true) for verdict in logits.chunk(len(fakes))]

    def augmented(self, run: Run, images: Tensor) -> Tensor:
        """Every group of B images with the draws of their positions: real and fake of a position are changed alike."""
        if not self.config.augment:
            return images
        groups = len(images) // len(run.batch.image)
        drawn = draws(run.uniform, self.config.augment)
        return torch.cat([apply(part, self.config.augment, drawn) for part in images.chunk(groups)])


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _mean_over_fakes(values: Tensor, batch: int) -> Tensor:
    """(k*B,) in k blocks -> (B,)."""
    return values.view(-1, batch).mean(0)
