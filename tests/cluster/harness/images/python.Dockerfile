# What stands in for a public Python image where none can be pulled: Debian's Python.
ARG SYSTEM
FROM ${SYSTEM}
RUN apt-get update \
 && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
    ca-certificates python3 python3-venv \
 && rm -rf /var/lib/apt/lists/*
# The authorities that this machine trusts, as what it reaches may stand behind one of its own.
COPY certificates.crt /etc/ssl/certs/ca-certificates.crt
ENV PIP_CERT=/etc/ssl/certs/ca-certificates.crt SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt
