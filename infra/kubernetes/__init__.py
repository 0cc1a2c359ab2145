"""Kubernetes: the manifests that kubectl and Terraform apply."""
