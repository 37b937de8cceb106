# Helios on a slim Python base. Build from the root of the clone:
#
#   docker build -t helios .
#   docker run --rm helios                                  # `helios env`
#   docker run --rm -v "$PWD:/work" helios python train.py
#
# Give commands in exec form, as above: a shell between the init and Python
# would keep SIGTERM for itself.
ARG BASE_IMAGE=python:3.12-slim
FROM ${BASE_IMAGE}

RUN apt-get update \
    && apt-get install --yes --no-install-recommends tini \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 helios \
    && install --directory --owner helios --group helios /work

# A virtual environment: Debian's own Python accepts packages nowhere else.
ENV PATH=/opt/helios/bin:$PATH \
    PYTHONUNBUFFERED=1

# More of pip's arguments, for example an index with torch builds for the CPU.
ARG PIP_ARGS=""

# torch is large and seldom changes: a layer of its own.
COPY constraints.txt /usr/src/helios/
RUN python3 -m venv /opt/helios \
    && pip install --no-cache-dir --constraint /usr/src/helios/constraints.txt \
        ${PIP_ARGS} torch

COPY pyproject.toml README.md LICENSE /usr/src/helios/
COPY helios /usr/src/helios/helios
RUN pip install --no-cache-dir --constraint /usr/src/helios/constraints.txt \
        ${PIP_ARGS} /usr/src/helios

USER helios
WORKDIR /work

# tini is process 1: it forwards signals and reaps orphans. Without -g they go to
# the command alone, which is meant: with it, SIGTERM would reach the data
# loader's workers too, and kill them while Helios is still saving.
ENTRYPOINT ["/usr/bin/tini", "--"]
CMD ["helios", "env"]
