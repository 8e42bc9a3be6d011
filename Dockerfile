# vcelltools on a CPU:
#   docker build -t vcelltools .
#   docker run --rm -v "$PWD":/data vcelltools inspect FILE.h5ad
FROM python:3.12-slim

COPY pyproject.toml README.md LICENSE /src/
COPY vcelltools /src/vcelltools
COPY cli /src/cli
RUN pip install --no-cache-dir '/src[zarr,filters,dask]' && rm -rf /src \
    && useradd --uid 1000 --create-home cells

# compiled kernels are kept here; mount a volume to keep them between runs
ENV NUMBA_CACHE_DIR=/home/cells/.cache/vcelltools
USER 1000
WORKDIR /data
ENTRYPOINT ["vcelltools"]
CMD ["--help"]
