"""Helios in the comparison of resumes: from the resume call to the first batch.

A comparison calls ``helios(job)``: it loads ``job.dataset`` shuffled, in batches of 64,
says ``job.resuming()`` before the call that resumes, seeks to ``job.position`` batches
where ``job.resume`` is true, and hands each batch to ``job.batch``, which ends it.
"""

NOTE = "loader.seek: a batch is computed from its position, whatever lies before"


def helios(job):
    # Imported here: only the process that runs this contender can import Helios.
    from helios.data import create_dataloader

    options = {"batch_size": 64, "shuffle": True}
    loader, _ = create_dataloader(job.dataset, options, seed=7)
    job.resuming()
    if job.resume:
        loader.seek(0, job.position)
    for batch in loader:
        job.batch(batch)
