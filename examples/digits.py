"""Handwritten digits: a small convolutional network, trained with Helios.

    python examples/digits.py
    accelerate launch examples/digits.py

Stop it whenever and however you like: the same command goes on where it was.
"""

import argparse
import logging
import random

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import Dataset, TensorDataset, random_split

import helios


class Augmented(Dataset):  # moved, dimmed and speckled; any generator will do
    def __init__(self, samples):
        self.samples = samples

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        image, label = self.samples[index]
        top, left = random.randint(0, 2), random.randint(0, 2)
        image = nn.functional.pad(image, (1, 1, 1, 1))[:, top:, left:][:, :8, :8]
        return image * np.random.uniform(0.8, 1.2) + 0.05 * torch.randn(8, 8), label


class DigitsData(helios.DataModule):
    def setup(self):
        images, labels = load_digits(return_X_y=True)
        images = torch.tensor(images / 16, dtype=torch.float32).view(-1, 1, 8, 8)
        samples = TensorDataset(images, torch.tensor(labels))
        split = torch.Generator().manual_seed(0)
        train, valid, test = random_split(samples, [1257, 180, 360], split)
        self._add_train_phase(Augmented(train), {"batch_size": 64, "shuffle": True})
        self._add_valid_dataset(valid, {"batch_size": 180})
        self._add_test_dataset(test, {"batch_size": 360})


class DigitsModel(helios.Model):
    def setup(self, for_inference=False):
        self.net = nn.Sequential(
            *(nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
            *(nn.Conv2d(32, 64, 3, padding=1, stride=2), nn.BatchNorm2d(64), nn.ReLU()),
            *(nn.Flatten(), nn.Dropout(0.4), nn.Linear(64 * 4 * 4, 128), nn.ReLU()),
            *(nn.Dropout(0.4), nn.Linear(128, 10)),
        )
        self.loss = nn.CrossEntropyLoss(label_smoothing=0.05)
        self.optimizer = torch.optim.AdamW(self.net.parameters())
        steps = self.trainer.total_steps * self.get_train_steps_per_epoch()
        # Warm-up, then cosine decay.
        self.scheduler = OneCycleLR(self.optimizer, 3e-3, steps, pct_start=0.1)
        self.best_accuracy = 0.0

    def train_step(self, batch, state):
        images, labels = batch
        loss = self.loss(self.net(images), labels)
        self.optimizer.zero_grad()
        self.backward(loss)
        self.optimizer.step()
        self.scheduler.step()
        self.log("train/loss", loss)

    def valid_step(self, batch, step, phase="valid"):
        scores, labels = self.gather_for_metrics((self.net(batch[0]), batch[1]))
        self.accuracy = (scores.argmax(1) == labels).float().mean().item()
        self.log(f"{phase}/loss", self.loss(scores, labels))
        self.log(f"{phase}/accuracy", self.accuracy)

    def test_step(self, batch, step):
        self.valid_step(batch, step, phase="test")

    def on_testing_end(self):
        logging.getLogger("helios").info("test accuracy: %.1f %%", 100 * self.accuracy)

    def have_metrics_improved(self):  # asked after each validation, for early stopping
        has_improved = self.accuracy > self.best_accuracy
        self.best_accuracy = max(self.accuracy, self.best_accuracy)
        return has_improved

    def user_state_dict(self):  # networks, optimizers and schedulers are saved anyway
        return {"best_accuracy": self.best_accuracy}

    def load_user_state_dict(self, state, for_inference):
        self.best_accuracy = state["best_accuracy"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", default="runs", help="folder of checkpoints and logs")
    parser.add_argument("--epochs", type=int, default=30)
    args = parser.parse_args()
    trainer = helios.Trainer(
        run_name="digits",
        total_steps=args.epochs,
        valid_frequency=1,
        early_stop_cycles=12,
        print_frequency=10,
        random_seed=1,
        enable_deterministic=True,
        enable_tensorboard=True,
        enable_file_logging=True,
        log_root=f"{args.runs}/logs",
        chkpt_root=f"{args.runs}/checkpoints",
        chkpt_frequency=1,
        keep_last=3,
    )
    model, data = DigitsModel("digits"), DigitsData()
    if trainer.fit(model, data):
        trainer.test(model, data)
