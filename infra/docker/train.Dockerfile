# Training on GPUs: torch with the CUDA libraries of requirements.lock, and a C compiler, which
# torch.compile needs. Also a conductor that trains in its own container (compose.gpu.yaml).
#   docker build -f infra/docker/train.Dockerfile -t gigagan-train .
# A digest instead of a tag: --build-arg IMAGE=python@sha256:…
ARG IMAGE=python:3.11.14-bookworm

FROM ${IMAGE} AS build
COPY infra/docker/train.txt /tmp/
RUN python -m venv /opt/venv \
    && /opt/venv/bin/pip install --no-cache-dir --no-deps -r /tmp/train.txt
COPY pyproject.toml README.md LICENSE /src/
COPY gigagan /src/gigagan
COPY data /src/data
COPY flows /src/flows
RUN /opt/venv/bin/pip install --no-cache-dir --no-deps /src

FROM ${IMAGE}
RUN groupadd --gid 10001 app && useradd --uid 10001 --gid 10001 --create-home app \
    && mkdir -p /app/runs && chown app:app /app/runs
COPY --from=build /opt/venv /opt/venv
COPY infra/docker/with-secrets /usr/local/bin/
# The root is mounted read-only: caches of libraries go where there is room.
# The driver comes from the node: these two tell NVIDIA's container runtime what to mount.
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HOME=/tmp \
    PREFECT_HOME=/tmp/prefect \
    TORCHINDUCTOR_CACHE_DIR=/tmp/inductor \
    TRITON_CACHE_DIR=/tmp/triton \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001:10001
WORKDIR /app
VOLUME /app/runs
ENTRYPOINT ["with-secrets"]
# A batch job: its health is its exit status.
HEALTHCHECK NONE
CMD ["python", "-m", "gigagan.training", "--help"]
