# An image for a rented machine with an NVIDIA GPU. docs/install.md says how to build and use it. It was never built.
FROM python:3.12-slim
# git names the version; a compiler is needed by torch_compile.
RUN apt-get update && apt-get install --yes --no-install-recommends git gcc g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/sdxl_finetune
COPY . .
RUN bash scripts/setup.sh
ENV PATH=/opt/sdxl_finetune/.venv/bin:$PATH
WORKDIR /data
CMD ["sdxl-check", "--help"]
