"""Small models: one records ids, one is random in every way, one traces hooks."""

import random

import numpy as np
import torch
from torch import nn

import helios


class IdModel(helios.Model):
    """Trains one weight, and records the samples of each batch."""

    def __init__(self, save_name="ids"):
        super().__init__(save_name)
        self.batches = []
        self.validated = []

    def setup(self, for_inference=False):
        self.net = nn.Linear(1, 1)
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.01)

    def train_step(self, batch, state):
        self.batches.append(batch.tolist())
        loss = self.net(batch.float()[:, None]).square().mean()
        self.backward(loss)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._loss_items["loss"] = loss
        self.log("loss", loss)

    def valid_step(self, batch, step):
        self.validated.append(batch.tolist())

    def test_step(self, batch, step):
        self.validated.append(batch.tolist())


class RandomModel(helios.Model):
    """Dropout, two optimizers, schedulers, generators of its own, random validation."""

    norm = nn.BatchNorm1d

    def __init__(self, save_name="random"):
        super().__init__(save_name)
        self.best = -1.0
        self.history = []
        self.ids = []

    def setup(self, for_inference=False):
        self.net = nn.Sequential(
            nn.Linear(4, 8), self.norm(8), nn.ReLU(), nn.Dropout(0.3)
        )
        self.heads = {"a": nn.Linear(8, 1), "b": [nn.Linear(8, 1)]}
        self.temperature = nn.Parameter(torch.ones(()))
        self.criterion = nn.MSELoss()
        body = [*self.net.parameters(), self.temperature]
        head = [*self.heads["a"].parameters(), *self.heads["b"][0].parameters()]
        self.optimizers = (
            torch.optim.AdamW(body, lr=0.02),
            torch.optim.SGD(head, lr=0.05, momentum=0.9),
        )
        self.schedulers = [
            torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizers[0], 30),
            torch.optim.lr_scheduler.StepLR(self.optimizers[1], 3, gamma=0.8),
        ]
        self.generator = torch.Generator().manual_seed(1)
        self.numpy_generator = np.random.default_rng(2)
        self.python_generator = random.Random(3)

    def _noise(self):
        own = self.python_generator.random() + self.numpy_generator.random()
        shared = random.random() + np.random.random() + torch.rand(1).item()
        return own + shared + torch.rand(1, generator=self.generator).item()

    def train_step(self, batch, state):
        ids, inputs, targets = batch
        self.ids.append(ids.tolist())
        hidden = self.net(inputs)
        output = self.heads["a"](hidden) + self.heads["b"][0](hidden)
        output = output * self.temperature + 0.01 * self._noise()
        loss = self.criterion(output[:, 0].float(), targets)
        self.backward(loss)
        self.clip_gradients(self.net.parameters(), self.optimizers[0], 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        for scheduler in self.schedulers:
            scheduler.step()
        self._loss_items["loss"] = loss
        self.log("loss", loss)

    def valid_step(self, batch, step):
        _, inputs, targets = batch
        output = self.heads["a"](self.net(inputs))[:, 0] + 0.01 * self._noise()
        score = -self.criterion(output, targets)
        self._val_scores["score"] = self._val_scores.get("score", 0.0) + score
        self.log("score", score)

    def on_validation_end(self, validation_cycle):
        self.log_dict({f"running_{k}": v for k, v in self._running_losses.items()})
        super().on_validation_end(validation_cycle)

    def have_metrics_improved(self):
        score = float(self._val_scores["score"])
        self.history.append(score)
        has_improved = score > self.best
        self.best = max(self.best, score)
        return has_improved

    def user_state_dict(self):
        return {"best": self.best, "history": list(self.history)}

    def load_user_state_dict(self, state, for_inference):
        self.best, self.history = state["best"], list(state["history"])


def _traced(name):
    def hook(self, *args, **kwargs):
        shown = [a for a in args if isinstance(a, int)]
        self.trace.append(" ".join([name, *map(str, shown)]))
        return getattr(IdModel, name)(self, *args, **kwargs)

    return hook


_HOOKS = [
    name
    for name in vars(helios.Model)
    if name.startswith(("on_", "should_", "have_")) or name.endswith("_step")
]


class TraceModel(IdModel):
    """Writes down every hook that is called."""

    def __init__(self, save_name="trace", trace=None):
        super().__init__(save_name)
        self.trace = [] if trace is None else trace

    def setup(self, for_inference=False):
        self.trace.append(f"setup {for_inference}")
        super().setup(for_inference)

    def load_for_testing(self):
        self.trace.append("load_for_testing")


for _name in _HOOKS:
    setattr(TraceModel, _name, _traced(_name))
