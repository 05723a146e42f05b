# The worker. PyTorch's wheels carry the CUDA libraries and the NVIDIA container runtime brings the driver,
# so a slim Python image is enough.
FROM python:3.12-slim AS build

WORKDIR /src
COPY constraints.txt ./
# PyTorch first and alone: the layer of several GB is rebuilt only when the constraints change.
RUN python -m venv /opt/overnight \
    && /opt/overnight/bin/pip install --no-cache-dir -c constraints.txt torch
COPY pyproject.toml README.md LICENSE ./
COPY cli cli
COPY engine engine
COPY storage storage
COPY worker worker
COPY examples/reviews examples/reviews
RUN /opt/overnight/bin/pip install --no-cache-dir -c constraints.txt ".[postgres]"

FROM python:3.12-slim

# A fixed number, so that files on a mounted volume keep their owner from image to image.
RUN groupadd --gid 10001 overnight \
    && useradd --uid 10001 --gid overnight --no-create-home --home-dir /var/lib/overnight overnight \
    && install --directory --owner=overnight --group=overnight --mode=0700 /var/lib/overnight /var/lib/overnight/models
COPY --from=build /opt/overnight /opt/overnight
ENV PATH=/opt/overnight/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    OVERNIGHT_HOME=/var/lib/overnight \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER overnight
WORKDIR /var/lib/overnight
VOLUME /var/lib/overnight

# Alive is not enough: the worker must hold a lease, which its heartbeat prolongs only while its work goes on.
HEALTHCHECK --interval=30s --timeout=15s --start-period=60s --retries=3 \
    CMD ["python", "-P", "-m", "worker.health"]

ENTRYPOINT ["overnight"]
CMD ["worker"]
