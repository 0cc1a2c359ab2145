"""The shipped bucket module with the real hashicorp/aws: on the embedded store, and, for what only AWS has, on moto's server."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.exceptions import ClientError
from moto.server import ThreadedMotoServer

from infra.errors import ObjectMissing, StoreError
from infra.local import objectstore, ports
from infra.local.terraform import Terraform
from infra.s3 import ObjectStore
from infra.settings import S3Settings, Settings
from tests.terraform_workspace import NO_AWS, Workspace, running_aws

pytestmark = [pytest.mark.stack, pytest.mark.timeout(600)]

#: Anything but AWS: no accounts, no metadata, no names of buckets in host names.
PROVIDER = """
provider "aws" {{
  region                      = "us-east-1"
  access_key                  = "{access_key}"
  secret_key                  = "{secret_key}"
  s3_use_path_style           = true
  skip_credentials_validation = true
  skip_metadata_api_check     = true
  skip_region_validation      = true
  skip_requesting_account_id  = true
  endpoints {{
    iam = "{endpoint}"
    s3  = "{endpoint}"
    sts = "{endpoint}"
  }}
}}
"""


@dataclass(frozen=True)
class Store:
    """An S3 server and its administrator."""

    endpoint: str
    access_key: str
    secret_key: str

    def client(self, service: str = "s3", key: str = "", secret: str = "") -> Any:
        return boto3.client(
            service,
            endpoint_url=self.endpoint,
            region_name="us-east-1",
            aws_access_key_id=key or self.access_key,
            aws_secret_access_key=secret or self.secret_key,
        )


@pytest.fixture(scope="module")
def aws(terraform_tools: Terraform, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Variables for a provider that runs."""
    if terraform_tools.aws is None:
        pytest.skip(NO_AWS)
    with running_aws(terraform_tools, tmp_path_factory.mktemp("aws")) as variables:
        yield variables


def module(tools: Terraform, aws: dict[str, str], home: Path, store: Store) -> Workspace:
    made = Workspace(tools, home / "terraform", "modules/s3", **aws)
    made.write("provider.tf", PROVIDER.format(**vars(store)))
    made.init()
    return made


@pytest.fixture(scope="module")
def versitygw(stack_settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """The embedded store, with a place for versions."""
    home = tmp_path_factory.mktemp("versitygw")
    for name in ("objects", "users", "versions"):
        (home / name).mkdir()
    [port] = ports.free(1)
    store = Store(f"http://127.0.0.1:{port}", "admin", "administrator")
    program = objectstore.folder(stack_settings) / "versitygw"
    command = [
        *(program, "--port", f"127.0.0.1:{port}", "--quiet", "--iam-dir", home / "users"),
        *("posix", "--versioning-dir", home / "versions", home / "objects"),
    ]
    environment = {"ROOT_ACCESS_KEY": store.access_key, "ROOT_SECRET_KEY": store.secret_key, "HOME": str(home)}
    server = subprocess.Popen(command, env=environment)
    try:
        while not ports.answers("127.0.0.1", port):
            assert server.poll() is None
            time.sleep(0.05)
        administration = ["admin", "--access", store.access_key, "--secret", store.secret_key, "--endpoint-url", store.endpoint]
        for user in ("agent", "stranger"):
            words = ["create-user", "--access", user, "--secret", f"{user}-secret", "--role", "user"]
            subprocess.run([program, *administration, *words], check=True, env=environment, stdout=subprocess.DEVNULL)
        yield store
    finally:
        server.kill()
        server.wait()


def bucket_of(store: Store, bucket: str, user: str) -> ObjectStore:
    return ObjectStore(S3Settings(store.endpoint, bucket, access_key=user, secret_key=f"{user}-secret", attempts=1))


def test_on_the_embedded_store(terraform_tools: Terraform, aws: dict[str, str], tmp_path: Path, versitygw: Store) -> None:
    made = module(terraform_tools, aws, tmp_path, versitygw)
    given = {"bucket": "thaw-made", "compatible_store": True, "endpoint_url": versitygw.endpoint, "force_destroy": True}
    made.variables(**given, agent_principals=["agent"])
    made.apply()
    client = versitygw.client()
    assert client.get_bucket_versioning(Bucket="thaw-made")["Status"] == "Enabled"
    assert made.outputs()["settings"]["s3"]["bucket"] == "thaw-made"

    agent, stranger = bucket_of(versitygw, "thaw-made", "agent"), bucket_of(versitygw, "thaw-made", "stranger")
    for key in ("functions/f/current", "functions/f/chunks/aa/aabb", "functions/f/suspects/aabb"):
        agent.put(key, b"one")
        assert agent.get(key, size_max=10) == b"one"
        with pytest.raises(StoreError, match="refuses the credentials"):
            stranger.get(key, size_max=10)
    assert sorted(agent.list("")) == ["functions/f/chunks/aa/aabb", "functions/f/current", "functions/f/suspects/aabb"]
    assert not agent.exists("functions/f/chunks/aa/none")
    with pytest.raises(ObjectMissing):
        agent.get("functions/f/none", size_max=10)
    with pytest.raises(StoreError, match="refuses the credentials"):
        agent.put("elsewhere", b"one")
    with pytest.raises(ClientError, match="AccessDenied"):
        versitygw.client(key="agent", secret="agent-secret").delete_bucket_policy(Bucket="thaw-made")
    agent.put("functions/f/current", b"two")
    agent.delete("functions/f/chunks/aa/aabb")
    versions = client.list_object_versions(Bucket="thaw-made", Prefix="functions/f/current")["Versions"]
    assert [version["IsLatest"] for version in versions] == [True, False]

    made.variables(**given, agent_principals=["agent"], functions=["g"])
    made.apply()
    agent.put("functions/g/current", b"one")
    for key in ("functions/f/current", "functions/gg/current"):
        with pytest.raises(StoreError, match="refuses the credentials"):
            agent.put(key, b"three")

    made.variables(**given)
    assert "0 to add, 0 to change, 1 to destroy" in made.apply()
    with pytest.raises(StoreError, match="refuses the credentials"):
        agent.get("functions/f/current", size_max=10)

    made.destroy()
    assert client.list_buckets()["Buckets"] == []


def test_a_bucket_with_checkpoints_is_not_removed(
    terraform_tools: Terraform, aws: dict[str, str], tmp_path: Path, versitygw: Store
) -> None:
    made = module(terraform_tools, aws, tmp_path, versitygw)
    made.variables(bucket="thaw-kept", compatible_store=True, versioning=False)
    made("apply", "-auto-approve")
    client = versitygw.client()
    client.put_object(Bucket="thaw-kept", Key="functions/f/current", Body=b"one")
    said = made("destroy", "-auto-approve", codes=(1,))
    assert "BucketNotEmpty" in said or "not empty" in said
    assert client.get_object(Bucket="thaw-kept", Key="functions/f/current")["Body"].read() == b"one"
    client.delete_object(Bucket="thaw-kept", Key="functions/f/current")
    made.destroy()
    assert client.list_buckets()["Buckets"] == []


@pytest.fixture(scope="module")
def moto() -> Iterator[Store]:
    [port] = ports.free(1)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
    server.start()
    try:
        yield Store(f"http://127.0.0.1:{port}", "admin", "administrator")
    finally:
        server.stop()


def test_what_only_aws_has(terraform_tools: Terraform, aws: dict[str, str], tmp_path: Path, moto: Store) -> None:
    made = module(terraform_tools, aws, tmp_path, moto)
    made.variables(bucket="thaw-aws", policy_name="thaw-agent", tags={"team": "functions"})
    made.apply()
    client, iam = moto.client(), moto.client("iam")

    block = client.get_public_access_block(Bucket="thaw-aws")["PublicAccessBlockConfiguration"]
    assert block == dict.fromkeys(("BlockPublicAcls", "BlockPublicPolicy", "IgnorePublicAcls", "RestrictPublicBuckets"), True)
    [rule] = client.get_bucket_encryption(Bucket="thaw-aws")["ServerSideEncryptionConfiguration"]["Rules"]
    assert rule["ApplyServerSideEncryptionByDefault"]["SSEAlgorithm"] == "AES256"
    [rule] = client.get_bucket_lifecycle_configuration(Bucket="thaw-aws")["Rules"]
    assert rule["NoncurrentVersionExpiration"]["NoncurrentDays"] == 7
    assert rule["AbortIncompleteMultipartUpload"]["DaysAfterInitiation"] == 1
    assert client.get_bucket_versioning(Bucket="thaw-aws")["Status"] == "Enabled"
    assert client.get_bucket_ownership_controls(Bucket="thaw-aws")["OwnershipControls"]["Rules"] == [
        {"ObjectOwnership": "BucketOwnerEnforced"}
    ]
    assert client.get_bucket_tagging(Bucket="thaw-aws")["TagSet"] == [{"Key": "team", "Value": "functions"}]
    [refusal] = json.loads(client.get_bucket_policy(Bucket="thaw-aws")["Policy"])["Statement"]
    assert (refusal["Effect"], refusal["Condition"]) == ("Deny", {"Bool": {"aws:SecureTransport": "false"}})
    [policy] = iam.list_policies(Scope="Local")["Policies"]
    assert policy["Arn"] == made.outputs()["agent_policy_arn"]
    document = iam.get_policy_version(PolicyArn=policy["Arn"], VersionId=policy["DefaultVersionId"])["PolicyVersion"]["Document"]
    assert document == json.loads(made.outputs()["agent_policy"])

    key = "arn:aws:kms:us-east-1:123456789012:key/11111111-2222-3333-4444-555555555555"
    made.variables(bucket="thaw-aws", policy_name="thaw-agent", tags={"team": "functions"}, kms_key_arn=key)
    assert "0 to add, 2 to change, 0 to destroy" in made("apply", "-auto-approve")
    [rule] = client.get_bucket_encryption(Bucket="thaw-aws")["ServerSideEncryptionConfiguration"]["Rules"]
    assert rule["ApplyServerSideEncryptionByDefault"] == {"SSEAlgorithm": "aws:kms", "KMSMasterKeyID": key}

    made.destroy()
    assert client.list_buckets()["Buckets"] == []
    assert iam.list_policies(Scope="Local")["Policies"] == []
