"""What the API server's refusals become."""

from __future__ import annotations

import itertools

import pytest

from infra.errors import (
    ApiBusy,
    ApiConflict,
    ApiError,
    ApiExpired,
    ApiForbidden,
    ApiInvalid,
    ApiMissing,
    ApiUnavailable,
    SettingsError,
)
from infra.kubernetes.client import NAMESPACE_ENDS, connect, error_of
from infra.kubernetes.watch import pauses
from infra.settings import KubernetesSettings


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, ApiInvalid),
        (401, ApiForbidden),
        (403, ApiForbidden),
        (404, ApiMissing),
        (409, ApiConflict),
        (410, ApiExpired),
        (422, ApiInvalid),
        (429, ApiBusy),
        (500, ApiUnavailable),
        (504, ApiUnavailable),
        (418, ApiError),
    ],
)
def test_each_refusal_has_its_kind(status, kind):
    error = error_of(status, {"reason": "R", "message": "m"}, "GET /x")
    assert type(error) is kind
    assert str(error) == "GET /x: m"
    assert error.reason == "R"


def test_it_names_fields_and_when_to_come_back():
    causes = [{"field": "spec.dnsPolicy", "reason": "FieldValueNotSupported"}, {"reason": "x"}]
    assert error_of(422, {"details": {"causes": causes}}, "w").fields == ("spec.dnsPolicy",)
    busy = [error_of(429, {"details": {"retryAfterSeconds": 3}}, "w"), error_of(429, {}, "w", "7"), error_of(429, {}, "w", "soon")]
    assert [error.retry_after_s for error in busy if isinstance(error, ApiBusy)] == [3.0, 7.0, 1.0]
    ends = error_of(403, {"reason": "Forbidden", "details": {"causes": [{"reason": NAMESPACE_ENDS}]}}, "w")
    assert ends.reason == NAMESPACE_ENDS


def test_pauses_double_to_a_bound_and_are_scattered():
    found = list(itertools.islice(pauses(0.2, 3.0), 8))
    for pause_s, middle_s in zip(found, [0.2, 0.4, 0.8, 1.6, 3.0, 3.0, 3.0, 3.0], strict=True):
        assert middle_s / 2 <= pause_s <= middle_s * 1.5
    assert len(set(found)) == 8


async def test_no_credentials_are_a_wrong_setting(tmp_path):
    with pytest.raises(SettingsError, match="no way to the Kubernetes API server"):
        async with connect(KubernetesSettings(kubeconfig=str(tmp_path / "none"))):
            pass
