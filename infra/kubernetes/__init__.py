"""Kubernetes: the manifests that kubectl and Terraform apply (``manifests``), images without a Docker engine (:mod:`.oci`) and a cluster
on one machine (:mod:`.cluster`)."""
