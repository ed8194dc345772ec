# Three images: `docker build --target gateway|export|triton .`
#
# export and triton come from one release of NVIDIA's containers, so that a TensorRT engine built by the first loads in the second.
ARG NVIDIA_RELEASE=25.12

# ---- gateway: FastAPI and onnxruntime, no torch ----------------------------------------------------------------------
FROM python:3.12-slim AS gateway
ENV PIP_NO_CACHE_DIR=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    VITRINE_HOST=0.0.0.0 \
    VITRINE_PORT=8000 \
    VITRINE_REPOSITORY=/models
RUN useradd --system --uid 10001 --no-create-home --shell /usr/sbin/nologin vitrine
WORKDIR /vitrine
# The dependencies change seldom: their layer needs the project's metadata alone. EXTRAS=[heic] adds HEIC.
COPY pyproject.toml README.md LICENSE ./
COPY app/__init__.py app/
COPY export/__init__.py export/
ARG EXTRAS=
RUN pip install --editable ".${EXTRAS}"
COPY app app
# Compiled here, because the file system is meant to be read-only when it runs.
RUN python -m compileall -q app
COPY model_repository /models
USER 10001
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=20s --retries=3 \
    CMD ["python", "-c", "import os, ssl, urllib.request as http; \
        scheme = 'https' if os.environ.get('VITRINE_TLS_CERTFILE') else 'http'; \
        address = f'{scheme}://127.0.0.1:{os.environ[\"VITRINE_PORT\"]}/readyz'; \
        http.urlopen(address, timeout=4, context=ssl._create_unverified_context())"]
ENTRYPOINT ["vitrine"]
CMD ["serve"]

# ---- export: torch, CUDA and TensorRT --------------------------------------------------------------------------------
FROM nvcr.io/nvidia/pytorch:${NVIDIA_RELEASE}-py3 AS export
ENV PIP_NO_CACHE_DIR=1 \
    PYTHONUNBUFFERED=1
WORKDIR /vitrine
COPY pyproject.toml README.md LICENSE ./
COPY app/__init__.py app/
COPY export/__init__.py export/
# NVIDIA's own torch, torchvision and tensorrt stay: the image's constraint file pins them.
RUN pip install --editable ".[export]" && python -c "import tensorrt, torch, torchvision"
COPY app app
COPY export export
# Mount the directory that holds the model repository: a model is staged beside the repository and renamed into it.
WORKDIR /work
ENV HOME=/tmp
USER 10001
# It reads files and writes a repository; nothing listens.
HEALTHCHECK NONE
ENTRYPOINT ["python", "-m", "export"]

# ---- triton: NVIDIA's server on the model repository -----------------------------------------------------------------
FROM nvcr.io/nvidia/tritonserver:${NVIDIA_RELEASE}-py3 AS triton
# A chat model's Python model runs its engines itself.
RUN pip install --no-cache-dir "onnxruntime-gpu>=1.20" "numpy>=1.26"
COPY model_repository /models
USER 1000
EXPOSE 8000 8001 8002
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python3", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/v2/health/ready', timeout=4)"]
# One model that cannot load keeps neither the others nor the server from being ready; the gateway judges per model.
CMD ["tritonserver", "--model-repository=/models", "--model-control-mode=explicit", "--load-model=*", \
    "--exit-on-error=false", "--strict-readiness=false", "--exit-timeout-secs=10"]
