# The conductor: flows, data stages and a Prefect worker, with torch for CPUs.
#   docker build -f infra/docker/pipeline.Dockerfile -t gigagan-pipeline .
# A digest instead of a tag: --build-arg RUN_IMAGE=python@sha256:… (and BUILD_IMAGE).
ARG BUILD_IMAGE=python:3.11.14-bookworm
ARG RUN_IMAGE=python:3.11.14-slim-bookworm

FROM ${BUILD_IMAGE} AS build
# PyPI's torch for Linux is the one for CUDA; the same version without it has an index of its own.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
COPY infra/docker/pipeline.txt /tmp/
RUN grep -E '^torch(vision)?==' /tmp/pipeline.txt > /tmp/torch.txt \
    && grep -vE '^torch(vision)?==' /tmp/pipeline.txt > /tmp/others.txt \
    && python -m venv /opt/venv \
    && /opt/venv/bin/pip install --no-cache-dir --no-deps --index-url "${TORCH_INDEX}" -r /tmp/torch.txt \
    && /opt/venv/bin/pip install --no-cache-dir --no-deps -r /tmp/others.txt
COPY pyproject.toml README.md LICENSE /src/
COPY gigagan /src/gigagan
COPY data /src/data
COPY flows /src/flows
RUN /opt/venv/bin/pip install --no-cache-dir --no-deps /src

FROM ${RUN_IMAGE}
# Letters of scripts that are written to the left are ordered and joined by it.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends libfribidi0 \
    && rm -rf /var/lib/apt/lists/*
RUN groupadd --gid 10001 app && useradd --uid 10001 --gid 10001 --create-home app \
    && mkdir -p /app/runs && chown app:app /app/runs
COPY --from=build /opt/venv /opt/venv
COPY infra/docker/with-secrets /usr/local/bin/
# The root is mounted read-only: caches of libraries go where there is room.
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HOME=/tmp \
    PREFECT_HOME=/tmp/prefect
USER 10001:10001
WORKDIR /app
# The store, MLflow's file database if there is no server, and logs.
VOLUME /app/runs
ENTRYPOINT ["with-secrets"]
# A worker answers on 8080 when it is started with --with-healthcheck; other commands do not.
HEALTHCHECK NONE
CMD ["python", "-m", "flows", "worker"]
