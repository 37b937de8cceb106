"""Helios in the comparison of training loops: what a step costs beside its arithmetic.

A comparison calls ``helios(task)``: ``task.model`` is trained on ``task.dataset`` for
``task.steps`` steps of 32 samples, shuffled, with ``task.optimizer()``. With
``task.features`` there are a progress bar, the loss to TensorBoard every 50 steps,
and a checkpoint every 500 steps in the background, all below ``task.folder``.
"""

NOTE = "in-memory data are gathered a batch at a time"


def helios(task):
    # Imported here: only the process that runs this contender can import Helios.
    from torch.nn.functional import cross_entropy

    import helios as library

    class Data(library.DataModule):
        def setup(self):
            self._add_train_phase(task.dataset, {"batch_size": 32, "shuffle": True})

    class Model(library.Model):
        def setup(self, for_inference=False):
            self.net, self.optimizer = task.model, task.optimizer()

        def train_step(self, batch, state):
            x, y = batch
            self.optimizer.zero_grad()
            loss = cross_entropy(self.net(x), y)
            self.backward(loss)
            self.optimizer.step()
            if task.features:
                self.log("loss", loss)

    trainer = library.Trainer(
        train_unit="iteration",
        total_steps=task.steps,
        use_cpu=getattr(task, "use_cpu", True),
        print_banner=False,
        enable_progress_bar=task.features,
        enable_tensorboard=task.features,
        print_frequency=50 if task.features else None,
        chkpt_frequency=500 if task.features else None,
        chkpt_root=task.folder if task.features else None,
        log_root=task.folder if task.features else None,
    )
    assert trainer.fit(Model("bench"), Data())
