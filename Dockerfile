# One image for all roles:
#
#   docker build -t esync .
#   docker build -t esync:cuda12 --build-arg 'EXTRAS=[cuda12]' .
#   docker run --network host -v "$PWD/runs:/home/esync/runs" esync \
#       state --workers 2 --dataset digits --duration 60 --run-dir runs/first
#   docker run --network host esync ps
#   docker run --network host esync worker --connect tcp://127.0.0.1:10010
#   docker run --network host --gpus all esync:cuda12 worker --connect tcp://head:10010 --device gpu:0
#
# The CUDA variant brings the CUDA libraries from PyPI; the host needs the driver and its container toolkit.

FROM python:3.12-slim

ARG EXTRAS=""
WORKDIR /opt/esync
COPY pyproject.toml setup.cfg README.md LICENSE ./
COPY esync ./esync
RUN pip install --no-cache-dir ".${EXTRAS}"

RUN useradd --create-home esync
USER esync
WORKDIR /home/esync
RUN mkdir -p .cache runs
# Data sets that are downloaded are kept here: mount a volume on it.
VOLUME /home/esync/.cache
STOPSIGNAL SIGINT
ENTRYPOINT ["esync"]
CMD ["--help"]
