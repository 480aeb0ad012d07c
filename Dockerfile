# The CPU default on systems other than Linux on x86-64: the environments and the tiny loop in a container.
#
#   docker build --platform linux/amd64 -t online-rlhf .
#   docker run --platform linux/amd64 --rm -it -v "$PWD/runs:/project/runs" online-rlhf bash run_loop.sh configs/loop_tiny.yaml
#
# Not built by its authors: their machines have no Docker engine.
FROM python:3.11-bookworm

WORKDIR /project
COPY envs.sh requirements-*.txt ./
RUN bash -c 'set -euo pipefail; source envs.sh; make_envs vllm rlhflow'
COPY . .
CMD ["bash", "run_loop.sh", "configs/loop_tiny.yaml"]
