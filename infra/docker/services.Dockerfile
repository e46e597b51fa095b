# The Prefect server and the MLflow server, at the versions of requirements.lock; no torch.
#   docker build -f infra/docker/services.Dockerfile -t gigagan-services .
# A digest instead of a tag: --build-arg RUN_IMAGE=python@sha256:… (and BUILD_IMAGE).
ARG BUILD_IMAGE=python:3.11.14-bookworm
ARG RUN_IMAGE=python:3.11.14-slim-bookworm

FROM ${BUILD_IMAGE} AS build
COPY infra/docker/services.txt /tmp/
RUN python -m venv /opt/venv \
    && /opt/venv/bin/pip install --no-cache-dir --no-deps -r /tmp/services.txt

FROM ${RUN_IMAGE}
RUN groupadd --gid 10001 app && useradd --uid 10001 --gid 10001 --create-home app
COPY --from=build /opt/venv /opt/venv
COPY infra/docker/with-secrets infra/docker/make-databases infra/docker/make-buckets \
     infra/docker/migrate /usr/local/bin/
COPY infra/docker/mlflow-auth.ini /etc/
# The root is mounted read-only: caches of libraries go where there is room.
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HOME=/tmp \
    PREFECT_HOME=/tmp/prefect \
    PREFECT_SERVER_ANALYTICS_ENABLED=false \
    DO_NOT_TRACK=true \
    MLFLOW_DISABLE_TELEMETRY=true \
    MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false
USER 10001:10001
WORKDIR /home/app
ENTRYPOINT ["with-secrets"]
# Which of the two servers it is, and so how to ask for its health, its command says.
HEALTHCHECK NONE
CMD ["prefect", "server", "start", "--host", "0.0.0.0"]
