"""Data sets whose content says which sample it is."""

import random

import numpy as np
import torch
from torch.utils.data import Dataset, default_collate

import helios


class IndexDataset(Dataset):
    """Item i is i."""

    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return index


class AugmentedDataset(Dataset):
    """Two features and a label, changed by all three global generators."""

    def __init__(self, length):
        generator = torch.Generator().manual_seed(5)
        self.inputs = torch.randn(length, 4, generator=generator)

    def __len__(self):
        return len(self.inputs)

    def __getitem__(self, index):
        noise = torch.randn(4) * random.uniform(0.1, 0.2) + np.random.normal(0, 0.1)
        inputs = (self.inputs[index] + noise).float()
        return index, inputs, self.inputs[index].sum().sign()


def random_collate(items):
    """Collate, and draw from all three global generators on the way."""
    indices, inputs, targets = default_collate(items)
    scale = 1 + 0.1 * (random.random() + np.random.random() + torch.rand(1).item())
    return indices, inputs * scale, targets


class IndexData(helios.DataModule):
    """Training, validation and test data whose item i is i."""

    def __init__(self, length=12, valid=4, **params):
        super().__init__()
        self.length, self.valid, self.params = length, valid, params

    def setup(self):
        self._add_train_phase(IndexDataset(self.length), self.params)
        if self.valid:
            self._add_valid_dataset(IndexDataset(self.valid), {"batch_size": 2})
            self._add_test_dataset(IndexDataset(self.valid), {"batch_size": 2})


class RandomData(helios.DataModule):
    """Random augmentation everywhere: in the items and in the collate function."""

    def __init__(self, length=20, phases=1, **params):
        super().__init__()
        self.length, self.phases = length, phases
        self.params = {"batch_size": 4, "shuffle": True, **params}

    def setup(self):
        for phase in range(self.phases):
            self._add_train_phase(
                AugmentedDataset(self.length + 4 * phase),
                {"collate_fn": random_collate, **self.params},
            )
        self._add_valid_dataset(
            AugmentedDataset(6), {"batch_size": 3, "collate_fn": random_collate}
        )
