# GPU image. Build: docker build -t finetune-gptj .
# Run: docker run --gpus all --shm-size=16g -v $PWD/runs:/app/runs finetune-gptj deepspeed launch/train.py recipe=quickstart
# CUDA 13.0 is what torch's wheels on PyPI are built for; the devel image has nvcc, for ops that DeepSpeed compiles at first use.
# Not built yet where this was written: there was no Docker.
FROM nvidia/cuda:13.0.1-cudnn-devel-ubuntu24.04
RUN apt-get update && apt-get install -y --no-install-recommends \
      python3 python3-venv python3-dev g++ ninja-build libaio-dev pdsh openssh-client && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /venv
ENV PATH=/venv/bin:$PATH PIP_NO_CACHE_DIR=1
WORKDIR /app
COPY pyproject.toml README.md LICENSE ./
COPY finetune finetune
COPY conf conf
COPY recipes recipes
COPY launch launch
COPY docs docs
RUN pip install -e '.[sweep]'
CMD ["python", "launch/doctor.py"]
