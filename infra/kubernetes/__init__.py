"""Kubernetes: images without a Docker engine (:mod:`.oci`) and a cluster on one machine (:mod:`.cluster`)."""
