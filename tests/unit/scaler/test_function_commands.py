"""``thaw apply`` on documents that are wrong: one line, exit code 2, and the broker is not even asked."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from infra.settings import Settings
from thaw.functions import apply

GOOD = """
apiVersion: thaw.dev/v1
kind: Function
metadata: {name: good}
spec:
  command: [serve]
  port: 8080
"""


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("kind: [", "not valid YAML"),
        ("", "no document"),
        (GOOD.replace("8080", "99999"), ":7: spec.port"),
        (GOOD.replace("name: good", "name: Not_Good"), "metadata.name"),
        (GOOD + "  instances: {min: 5, max: 2}\n", "spec.instances"),
        (GOOD + "  colour: red\n", "colour"),
        (GOOD + "---" + GOOD, "given twice"),
    ],
    ids=["syntax", "empty", "port", "name", "bounds", "unknown field", "twice"],
)
def test_a_wrong_document(tmp_path, text, complaint):
    path = tmp_path / "function.yaml"
    path.write_text(text)
    result = CliRunner().invoke(apply, ["-f", str(path)], obj=Settings())
    assert result.exit_code == 2
    assert complaint in result.output
    assert len(result.output.strip().splitlines()) == 1


def test_a_file_that_is_not_there(tmp_path):
    result = CliRunner().invoke(apply, ["-f", str(tmp_path / "absent.yaml")], obj=Settings())
    assert result.exit_code == 2
    assert "No such file" in result.output
