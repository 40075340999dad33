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
    penalty_interval: int = 0
    """Images from one penalty to the next (a multiple of the batch); each is then as many times as large, so the pull
    over time is the same (Karras et al. 2020). No learning rate is corrected: the penalty shares the loss's update. 0:
    always."""
    augment: tuple[Policy, ...] = ()
    """Differentiable augmentation of real and fake in both phases (Zhao et al. 2020): color, translation, cutout."""

    def __post_init__(self) -> None:
        bounds.at_least(0, self, "r1", "r2", "gradient_penalty", "penalty_interval")
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
        config = self.config
        now = run.images // self.batch % self.lazy == 0
        r1, r2, gp = (now and weight > 0 for weight in (config.r1, config.r2, config.gradient_penalty))

        def judge(network: Any) -> dict[str, Tensor]:
            images = torch.cat([real, *fakes]).detach().requires_grad_(r1 or r2)
            logits = network(self.augmented(run, images))
            out = {"real": logits[: len(real)], "fake": logits[len(real) :]}
            if r1 or r2:  # rows are independent: one pass gives R1 at the real ones and R2 at the others
                squares = penalties.r1(logits if r1 and r2 else out["real" if r1 else "fake"], images)
                out |= {"r1": squares[: len(real)]} if r1 else {}
                out |= {"r2": squares[len(real) :]} if r2 else {}
            if gp:
                mix = run.uniform("critic/mix", (len(fakes),)).T.flatten()  # a draw for each fake of a row
                out["gradient_penalty"] = penalties.wasserstein(
                    network, torch.cat([real] * len(fakes)), torch.cat(list(fakes)), mix
                )
            return out

        out = run("discriminator", judge, exact=r1 or r2 or gp)
        losses = self.loss.discriminator(out.real, out.fake)
        run.note("logits/real", out.real)
        run.note("logits/fake", out.fake)
        if self.loss.paired:  # only differences count: a logit's sign means nothing
            run.note("accuracy/pairs", (torch.cat([out.real] * len(fakes)) > out.fake).float())
        else:
            run.note("accuracy/real", (out.real > 0).float())
            run.note("accuracy/fake", (out.fake < 0).float())
        terms = {"adversarial": Term(_mean_over_fakes(losses, len(real)))}
        if r1:
            terms["r1"] = Term(out.r1, weight=0.5 * config.r1 * self.lazy)
        if r2:
            terms["r2"] = Term(_mean_over_fakes(out.r2, len(real)), weight=0.5 * config.r2 * self.lazy)
        if gp:
            values = _mean_over_fakes(out.gradient_penalty, len(real))
            terms["gradient_penalty"] = Term(values, weight=config.gradient_penalty * self.lazy)
        return terms

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


def _mean_over_fakes(values: Tensor, batch: int) -> Tensor:
    """(k*B,) in k blocks -> (B,)."""
    return values.view(-1, batch).mean(0)
