# A server for CPUs, or for GPUs with --build-arg BASE=nvidia/cuda:13.0.1-base-ubuntu24.04: docs/howto/containers.md.
ARG BASE=python:3.12-slim-trixie
# hadolint ignore=DL3006
FROM ${BASE}

SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
ENV DEBIAN_FRONTEND=noninteractive \
    PATH=/opt/flowroll/bin:$PATH \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PYTHONUNBUFFERED=1

# The image of CUDA has no Python; that of Python needs nothing.
# hadolint ignore=DL3008
RUN if ! command -v python3 > /dev/null; then \
      apt-get update \
      && apt-get install --yes --no-install-recommends python3 python3-venv \
      && rm -rf /var/lib/apt/lists/*; \
    fi \
    && python3 -m venv /opt/flowroll \
    && useradd --create-home --uid 10001 flowroll

# The libraries first: they are in a layer of their own, which a change of flowroll leaves as it is.
WORKDIR /src
COPY constraints.txt pyproject.toml README.md LICENSE ./
# For a CPU image of a fifth of the size: the index that PyTorch names for its CPU builds. The wheels of CUDA bring its libraries.
ARG TORCH_INDEX=
RUN mkdir -p src/flowroll && printf '__version__ = "0"\n' > src/flowroll/__init__.py \
    && pip install ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} --constraint constraints.txt ".[server,lora]" \
    && pip uninstall --yes flowroll

COPY src src
RUN pip install --no-deps .

USER 10001
WORKDIR /home/flowroll
EXPOSE 30000
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=6 \
  CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:30000/liveness', timeout=4)"]
ENTRYPOINT ["flowroll"]
CMD ["serve", "shapes-z_image", "--host", "0.0.0.0"]
