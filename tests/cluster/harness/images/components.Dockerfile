# The control plane's images, one stage for each. Pods name their commands, so PATH must find them.
ARG SYSTEM
FROM scratch AS program
ENV PATH=/usr/local/bin

FROM program AS kube-apiserver
COPY kube-apiserver /usr/local/bin/

FROM program AS kube-controller-manager
COPY kube-controller-manager /usr/local/bin/

FROM program AS kube-scheduler
COPY kube-scheduler /usr/local/bin/

FROM program AS etcd
COPY etcd /usr/local/bin/

FROM program AS coredns
COPY coredns /usr/local/bin/
ENTRYPOINT ["/usr/local/bin/coredns"]

FROM program AS pause
COPY pause /usr/local/bin/
USER 65535:65535
ENTRYPOINT ["/usr/local/bin/pause"]

FROM program AS local-path-provisioner
COPY local-path-provisioner /usr/local/bin/
ENTRYPOINT ["/usr/local/bin/local-path-provisioner"]

FROM ${SYSTEM} AS kube-proxy
RUN apt-get update \
 && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends conntrack iptables kmod \
 && rm -rf /var/lib/apt/lists/*
COPY kube-proxy /usr/local/bin/
