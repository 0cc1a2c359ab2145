"""Kubernetes: images without a Docker engine (:mod:`infra.kubernetes.oci`) and a cluster on one machine (:mod:`infra.kubernetes.cluster`)."""
