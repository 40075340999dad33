"""tandem export RUN --to diffusers: the autoencoder of a run, as another library loads it."""

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from trainer import build, interchange
from trainer.data import Stream, Transform, to_device
from trainer.generate import Trained, home, load
from trainer.kernels import noise
from trainer.kernels.reparameterize import reparameterize_kl
from trainer.methods.vae import VAEConfig
from trainer.methods.vaegan import VAEGANConfig
from trainer.networks import Autoencoder, KLAutoencoderConfig

IMAGES = ("laplace", "gaussian")  # likelihoods whose parameters are the image itself
PART = 8  # images that are encoded at a time


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="tandem export",
        description="Writes the autoencoder of a run, by its averaged weights, as another library loads it: "
        "config.json and diffusion_pytorch_model.safetensors for AutoencoderKL.from_pretrained of diffusers.",
        epilog="example:\n  tandem export runs/kl_f8_256 --to diffusers --measure 256",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run, or of one of its checkpoints")
    parser.add_argument("--to", choices=["diffusers"], required=True, help="whose form")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where to (default: RUN/diffusers)")
    parser.add_argument(
        "--measure",
        type=int,
        metavar="N",
        help="make scaling_factor 1 / the deviation of the latents of the first N training images, in the order of the "
        "shards (default: what the run's config says)",
    )
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
    scale, source = method.autoencoder.scaling_factor, "of the config, not measured"
    if options.measure is not None:
        scale, count = measured(run, options.measure)
        source = f"measured on {count} images"
    folder = options.out or home(run.path) / "diffusers"
    interchange.write(
        folder,
        run.networks["autoencoder"].state_dict(),
        config=replace(method.autoencoder, scaling_factor=scale),
        image=build.image_shape(run.config),
        # the newest export takes the place of the one before, as the newest drawing does
        overwrite=options.overwrite or options.out is None,
    )
    print(
        f"{folder}: AutoencoderKL for diffusers, by {run.path} ({run.images:,} images seen); "
        f"scaling_factor {scale:g}, {source}"
    )
    return 0


def measured(run: Trained, count: int) -> tuple[float, int]:
    """1 / the deviation of posterior samples, to six digits, and the number of images; LDM takes one batch."""
    if count < 1:
        raise ValueError(f"--measure: {count} images measure nothing; 1 or more")
    data = run.config.data
    stream = Stream(data, split="train", batch=1, rank=0, world=1, seed=0)
    batch = to_device(stream.first(count), device=run.device, transform=Transform.plain(data))
    stream.close()
    latents = []
    network = run.networks["autoencoder"]
    assert isinstance(network, Autoencoder)
    with torch.no_grad():
        for image, index in zip(batch.image.split(PART), batch.index.split(PART), strict=True):
            z, _ = reparameterize_kl(network.encoder.moments(image), noise.address(0, "export", index))
            latents.append(z.double().cpu())
    return float(f"{1 / float(torch.cat(latents).std()):.6g}"), len(batch.image)
