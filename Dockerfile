# GPU image. Build: docker build -t finetune-gptj .
# Run: docker run --gpus all --shm-size=16g -v $PWD/runs:/app/runs finetune-gptj deepspeed launch/train.py recipe=quickstart
# The devel image has nvcc: DeepSpeed compiles its CPU Adam (optimizer offload) at first use.
FROM nvidia/cuda:12.8.1-cudnn-devel-ubuntu24.04
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
