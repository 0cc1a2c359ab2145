"""The client on the real object store: whole objects, errors by name, restarts, TLS."""

from __future__ import annotations

import dataclasses
import datetime
import http.server
import json
import os
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from infra.errors import ObjectConflict, ObjectMissing, SettingsError, StoreError, StoreUnavailable
from infra.local import health, objectstore
from infra.s3 import ObjectStore
from infra.settings import S3Settings, Settings

pytestmark = pytest.mark.stack


@pytest.fixture
def store(stack_settings: Settings) -> Iterator[ObjectStore]:
    opened = ObjectStore(stack_settings.s3, warm=2)
    yield opened
    opened.close()


@contextmanager
def versitygw(
    settings: Settings, home: Path, port: int, *options: str | Path, access_key: str = "key", secret_key: str = "secret"
) -> Iterator[None]:
    """A server of the test's own."""
    for name in ("objects/thaw", "users"):
        (home / name).mkdir(parents=True, exist_ok=True)
    command = [objectstore.folder(settings) / "versitygw", "--port", f"127.0.0.1:{port}", "--keep-alive", "--quiet", *options]
    environment = {"ROOT_ACCESS_KEY": access_key, "ROOT_SECRET_KEY": secret_key, "HOME": str(home)}
    server = subprocess.Popen(
        [*command, "--iam-dir", home / "users", "posix", home / "objects"],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        give_up = time.monotonic() + 20
        while True:
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except OSError:
                assert server.poll() is None and time.monotonic() < give_up, "versitygw does not come up"
                time.sleep(0.05)
        yield
    finally:
        server.kill()
        server.wait()


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def own(port: int, scheme: str = "http") -> S3Settings:
    return S3Settings(endpoint_url=f"{scheme}://127.0.0.1:{port}", access_key="key", secret_key="secret", attempts=1)


@pytest.mark.parametrize("size", [0, 1, 4096, 3_000_001])
def test_objects_come_back_whole(store: ObjectStore, size: int) -> None:
    content = os.urandom(size)
    store.put(f"store-test/{size}", content)
    assert store.get(f"store-test/{size}", size_max=size) == content


@pytest.mark.parametrize("key", ["a b", "plus+and%25", "ü/ß", "~tilde", "a=b&c?d#e", "dots/..x/y"])
def test_any_key_is_signed_as_it_is(store: ObjectStore, key: str) -> None:
    store.put(f"store-test/{key}", key.encode())
    assert store._get is not None and store._get.get(f"store-test/{key}", 100) == key.encode()


def test_many_threads_share_connections(store: ObjectStore) -> None:
    contents = {f"store-test/many/{number}": os.urandom(50_000 + number) for number in range(20)}
    for key, content in contents.items():
        store.put(key, content)
    with ThreadPoolExecutor(16) as threads:
        keys = list(contents) * 20
        assert all(
            found == contents[key] for key, found in zip(keys, threads.map(lambda key: store.get(key, size_max=1 << 20), keys), strict=True)
        )


def test_what_is_missing_or_too_large_is_named(store: ObjectStore) -> None:
    with pytest.raises(ObjectMissing, match=rf"s3://{store.bucket}/store-test/none"):
        store.get("store-test/none", size_max=1)
    store.put("store-test/large", b"12345")
    with pytest.raises(StoreError, match=r"5 bytes, 4 at most .*store-test/large"):
        store.get("store-test/large", size_max=4)
    assert store.get("store-test/large", size_max=5) == b"12345"


def test_conditional_writes(store: ObjectStore) -> None:
    store.put("store-test/pointer", b"1")
    data, tag = store.get_with_tag("store-test/pointer", size_max=10)
    assert data == b"1"
    store.put("store-test/pointer", b"2", only_if_tag=tag)
    with pytest.raises(ObjectConflict):
        store.put("store-test/pointer", b"3", only_if_tag=tag)
    with pytest.raises(ObjectConflict):
        store.put("store-test/pointer", b"3", only_if_absent=True)


@pytest.mark.parametrize("wrong", [{"secret_key": "wrong"}, {"access_key": "nobody"}])
def test_wrong_credentials_are_told(stack_settings: Settings, store: ObjectStore, wrong: dict[str, str]) -> None:
    store.put("store-test/denied", b"x")
    other = ObjectStore(dataclasses.replace(stack_settings.s3, **wrong))
    with pytest.raises(StoreError, match=r"refuses the credentials .*store-test/denied"):
        other.get("store-test/denied", size_max=10)
    other.close()


def test_a_restarted_server_costs_no_error_and_no_pause(stack_settings: Settings, tmp_path: Path, port: int) -> None:
    store = ObjectStore(own(port))
    with versitygw(stack_settings, tmp_path, port):
        store.put("x", b"content")
        assert store.get("x", size_max=10) == b"content"
    with pytest.raises(StoreUnavailable, match=f"127.0.0.1:{port} does not answer"):
        store.get("x", size_max=10)
    with versitygw(stack_settings, tmp_path, port):
        assert store.get("x", size_max=10) == b"content"
    with versitygw(stack_settings, tmp_path, port):  # the connection kept is dead, and nothing has noticed yet
        assert store._get is not None
        before = time.monotonic()
        assert store._get.get("x", 10) == b"content"
        assert time.monotonic() - before < 1
    store.close()


def test_tls_is_verified(stack_settings: Settings, tmp_path: Path, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    subject = ("-subj", "/CN=test", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "1")
    curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    subprocess.run(["openssl", "req", "-x509", *curve, *subject, "-out", certificate, "-keyout", key], check=True, capture_output=True)
    with versitygw(stack_settings, tmp_path, port, "--cert", certificate, "--key", key):
        stranger = ObjectStore(own(port, "https"))
        with pytest.raises(StoreUnavailable, match=r"(?i)certificate"):
            stranger.get("x", size_max=10)
        monkeypatch.setenv("AWS_CA_BUNDLE", str(certificate))
        store = ObjectStore(own(port, "https"), warm=1)
        store.put("x", b"content")
        assert store._get is not None
        assert [store._get.get("x", 10) for _ in range(5)] == [b"content"] * 5
        store.close()
        stranger.close()


def test_the_authority_is_a_setting(stack_settings: Settings, tmp_path: Path, port: int) -> None:
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    subject = ("-subj", "/CN=test", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "1")
    curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    subprocess.run(["openssl", "req", "-x509", *curve, *subject, "-out", certificate, "-keyout", key], check=True, capture_output=True)
    with versitygw(stack_settings, tmp_path, port, "--cert", certificate, "--key", key):
        settings = dataclasses.replace(own(port, "https"), ca=str(certificate), bucket="checked")
        health.check_s3(settings)
        store = ObjectStore(settings)
        store.put("x", b"content")
        assert store._get is not None
        assert store._get.get("x", 10) == b"content"
        store.close()


def test_credentials_of_the_environment_are_renewed(
    stack_settings: Settings, tmp_path: Path, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """botocore's chain, here a program that tells credentials for a minute: they are asked for again before they end."""
    told = tmp_path / "told.json"
    configuration = tmp_path / "config"
    configuration.write_text(f"[default]\ncredential_process = /bin/cat {told}\n")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(configuration))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))

    def tell(access_key: str, secret_key: str, seconds: float) -> None:
        end = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=seconds)
        value = {"Version": 1, "AccessKeyId": access_key, "SecretAccessKey": secret_key, "Expiration": end.isoformat()}
        told.write_text(json.dumps(value))

    tell("key", "secret", 60)
    with versitygw(stack_settings, tmp_path, port):
        store = ObjectStore(dataclasses.replace(own(port), access_key="", secret_key=""))
        store.put("x", b"content")
        assert store._get is not None
        assert store._get.get("x", 10) == b"content"
    with versitygw(stack_settings, tmp_path, port, access_key="next", secret_key="other"):
        tell("next", "other", 60)
        assert store._get.get("x", 10) == b"content", "the way of starts is signed anew"
        assert store._client.get_object(Bucket="thaw", Key="x")["Body"].read() == b"content"
        tell("next", "other", -60)
        with pytest.raises(StoreError, match=r"no credentials for the object store .*expired.* set s3\.access_key"):
            store.get("x", size_max=10)
        told.unlink()
        with pytest.raises(StoreError, match="no credentials for the object store"):
            store.get("x", size_max=10)
    store.close()


def test_encryption_by_the_store_is_asked_for_with_every_put(port: int) -> None:
    """On a real server of our own that only listens: what boto3 sends."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            asked.append({name.lower(): value for name, value in self.headers.items() if name.lower().startswith("x-amz-server")})
            self.rfile.read(int(self.headers.get("content-length", 0)))
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", port), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for sse, key in (("", ""), ("AES256", ""), ("aws:kms", "key-1")):
            store = ObjectStore(dataclasses.replace(own(port), sse=sse, sse_kms_key_id=key))
            store.put("functions/f/current", b"one")
            store.close()
        server.shutdown()
    mode, key_id = "x-amz-server-side-encryption", "x-amz-server-side-encryption-aws-kms-key-id"
    assert asked == [{}, {mode: "AES256"}, {mode: "aws:kms", key_id: "key-1"}]


@pytest.mark.parametrize("wrong", [{"sse": "none"}, {"sse_kms_key_id": "key-1"}, {"sse": "AES256", "sse_kms_key_id": "key-1"}])
def test_encryption_that_is_not_there_is_named(wrong: dict[str, str]) -> None:
    with pytest.raises(SettingsError, match=r"s3\.sse"):
        ObjectStore(dataclasses.replace(own(1), **wrong))
