# Everything for GPUs in one image: CUDA builds of torch and vLLM, this package with its C++ extension.
#
#   docker build -t tropd .                    --build-arg TE=1 compiles Transformer Engine's extension, too (an hour)
#   docker run --gpus all --shm-size=64g --ulimit memlock=-1 -v "$PWD/runs:/srv/tropd/runs" tropd tropd health
#
# The shared memory is for weights that are published to servers on the same host: two copies of the student.
# Resolved, never built: see docs/gpu.md.
FROM nvidia/cuda:13.0.2-cudnn-devel-ubuntu24.04

ARG TE=
RUN apt-get update && apt-get install -y --no-install-recommends build-essential git python3 python3-dev python3-venv \
  && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/megatron_tropd
COPY . .
RUN make install-gpu TE="$TE"

ENV PATH=/opt/megatron_tropd/.venv-gpu/bin:$PATH
WORKDIR /srv/tropd
CMD ["tropd", "health"]
