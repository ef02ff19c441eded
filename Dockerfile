# The web page of a model (docs/guides/serving.md), on a CPU.
#
#   docker build --tag segformer .
#   docker run --rm --publish 127.0.0.1:7860:7860 --volume "$PWD/outputs/shapes_b0:/model:ro" segformer
#
# With the model inside the image:
#
#   docker build --tag segformer-shapes --target baked --build-arg MODEL=outputs/shapes_b0 .

FROM python:3.12-slim AS page
ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
# PyTorch first, in a layer of its own: it is the largest, and changes the least. Its build for CPUs, 2.x.y+cpu, counts as
# newer than 2.x.y, so that pip prefers it.
COPY constraints.txt /tmp/
RUN pip install --constraint /tmp/constraints.txt --extra-index-url https://download.pytorch.org/whl/cpu torch
WORKDIR /src
COPY pyproject.toml setup.py README.md LICENSE model_card.md segformer_command.py ./
COPY configuration ./configuration
COPY hf_segformer ./hf_segformer
RUN pip install --constraint /tmp/constraints.txt '.[app]' && rm -r /src
RUN useradd --create-home --uid 1000 segformer
USER segformer
WORKDIR /home/segformer
EXPOSE 7860
HEALTHCHECK --start-period=60s --timeout=10s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:7860/', timeout=5)"]
ENTRYPOINT ["segformer"]
CMD ["app", "/model", "--host", "0.0.0.0", "--port", "7860", "--device", "cpu"]

FROM page AS baked
ARG MODEL
COPY ${MODEL} /model

# Without --target the model is mounted.
FROM page
