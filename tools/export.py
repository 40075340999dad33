"""tandem export RUN --to diffusers: the autoencoder of a run, as another library loads it."""

import argparse
from pathlib import Path

from trainer import build, interchange
from trainer.generate import home, load
from trainer.methods.vae import VAEConfig
from trainer.methods.vaegan import VAEGANConfig
from trainer.networks import KLAutoencoderConfig

IMAGES = ("laplace", "gaussian")  # likelihoods whose parameters are the image itself


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="tandem export",
        description="Writes the autoencoder of a run, by its averaged weights, as another library loads it: "
        "config.json and diffusion_pytorch_model.safetensors for AutoencoderKL.from_pretrained of diffusers.",
        epilog="example:\n  tandem export runs/kl_f8_256 --to diffusers",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run, or of one of its checkpoints")
    parser.add_argument("--to", choices=["diffusers"], required=True, help="whose form")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where to (default: RUN/diffusers)")
    parser.add_argument("--overwrite", action="store_true", help="replace the two files where they exist")
    options = parser.parse_args(argv)
    run = load(options.run)
    method = run.config.method
    if not isinstance(method, (VAEConfig, VAEGANConfig)) or not isinstance(method.autoencoder, KLAutoencoderConfig):
        kind = getattr(getattr(method, "autoencoder", None), "kind", "none")
        raise ValueError(
            f"{options.run}: diffusers has no such network (method.kind: {method.kind}, autoencoder.kind: {kind}); "
            "train a vae or vaegan with method.autoencoder.kind: kl"
        )
    if method.likelihood.kind not in IMAGES:
        raise ValueError(
            f"{options.run}: the decoder gives the parameters of a {method.likelihood.kind} likelihood, which "
            f"diffusers would take for an image; train with method.likelihood.kind: {' or '.join(IMAGES)}"
        )
    folder = options.out or home(run.path) / "diffusers"
    interchange.write(
        folder,
        run.networks["autoencoder"].state_dict(),
        config=method.autoencoder,
        image=build.image_shape(run.config),
        # the newest export takes the place of the one before, as the newest drawing does
        overwrite=options.overwrite or options.out is None,
    )
    print(
        f"{folder}: AutoencoderKL for diffusers, by {run.path} ({run.images:,} images seen); "
        f"scaling_factor {method.autoencoder.scaling_factor:g} is method.autoencoder.scaling_factor, not measured"
    )
    return 0
