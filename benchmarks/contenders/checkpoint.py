"""Helios in the comparison of checkpoints: what saving and loading a state costs.

A comparison calls ``helios(state)``; ``state.model`` and ``state.optimizer`` are to be
saved. It returns ``save(folder)``, ``load(folder)``, and ``wait()`` for the end of
what is written behind the training. These are the parts that a run puts together.
"""

NOTE = "verified when it is loaded"


def helios(state, verify=True):
    # Imported here: only the process that runs this contender can import Helios.
    from pathlib import Path

    from helios.checkpoint import (
        BackgroundWriter,
        CheckpointStore,
        Encoder,
        read_checkpoint,
    )

    writer = BackgroundWriter()

    def encode():
        encoder = Encoder()
        trees = {
            "model": encoder.encode(state.model.state_dict(), file="model"),
            "training": encoder.encode(state.optimizer.state_dict(), file="training"),
        }
        return encoder, trees

    # A run does so after its first step.
    writer.prepare(encode()[0].files)
    writer.wait()

    def save(folder):
        encoder, trees = encode()
        files = writer.snapshot(encoder.files)
        store = CheckpointStore(Path(folder))

        def write():
            part = store.begin("state")
            entries = {}
            for file, tensors in files.items():
                entries |= store.write_group(part, file, tensors)
            record = {"progress": {}, "trees": trees, "files": entries}
            store.commit(part, "state", record)

        writer.submit(write)

    def load(folder):
        checkpoint = read_checkpoint(Path(folder) / "state", verify=verify)
        state.model.load_state_dict(checkpoint.tree("model"))
        state.optimizer.load_state_dict(checkpoint.tree("training", own=True))

    def wait():
        writer.wait()
        writer.check()

    return save, load, wait
