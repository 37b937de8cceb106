"""A GAN on handwritten digits, with Accelerate and a Session of Helios.

    accelerate launch examples/porting/gan_session.py runs/port

On CPUs this is one rank, and `helios launch --cpu --num_processes 2 ...` starts two.

Two networks with an optimizer each: one makes digits, the other tells them from real.
"""

import argparse

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import softplus
from torch.utils.data import DataLoader, TensorDataset

import helios

LATENT = 16


def main(args):
    config = DataLoaderConfiguration(use_seedable_sampler=True)
    accelerator = Accelerator(cpu=args.cpu, dataloader_config=config)
    set_seed(args.seed)

    images = torch.tensor(load_digits().data / 8 - 1, dtype=torch.float32)
    loader = DataLoader(TensorDataset(images), batch_size=64, shuffle=True)

    generator = nn.Sequential(
        nn.Linear(LATENT, 128),
        nn.LeakyReLU(0.2),
        nn.Linear(128, 128),
        nn.LeakyReLU(0.2),
        nn.Linear(128, 64),
        nn.Tanh(),
    )
    discriminator = nn.Sequential(
        nn.Linear(64, 128),
        nn.LeakyReLU(0.2),
        nn.Dropout(0.3),
        nn.Linear(128, 128),
        nn.LeakyReLU(0.2),
        nn.Dropout(0.3),
        nn.Linear(128, 1),
    )
    optimizer_g = torch.optim.Adam(generator.parameters(), 1e-3, betas=(0.5, 0.999))
    optimizer_d = torch.optim.Adam(discriminator.parameters(), 5e-4, betas=(0.5, 0.999))
    generator, discriminator, optimizer_g, optimizer_d, loader = accelerator.prepare(
        generator, discriminator, optimizer_g, optimizer_d, loader
    )
    fixed_latent = torch.randn(100, LATENT, device=accelerator.device)
    set_seed(args.seed, device_specific=True)  # each rank draws latents of its own

    session = helios.Session(accelerator, args.folder, loader)
    for epoch in session.epochs(args.epochs):
        discriminator.train()
        for (real,) in session.batches(loader):
            latent = torch.randn(len(real), LATENT, device=accelerator.device)
            fake = generator(latent)

            optimizer_d.zero_grad()
            loss_real = softplus(-discriminator(real)).mean()
            loss_fake = softplus(discriminator(fake.detach())).mean()
            accelerator.backward(loss_real + loss_fake)
            optimizer_d.step()

            optimizer_g.zero_grad()
            loss = softplus(-discriminator(fake)).mean()
            accelerator.backward(loss)
            optimizer_g.step()

        discriminator.eval()
        with torch.no_grad():
            share = discriminator(generator(fixed_latent)).sigmoid().mean()
        accelerator.print(f"epoch {epoch}: digits pass for real with {share:.0%}")

    accelerator.save_model(generator, f"{args.folder}/final/generator")
    accelerator.save_model(discriminator, f"{args.folder}/final/discriminator")
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--cpu", action="store_true")
    main(parser.parse_args())
