"""``thaw apply`` on documents that are wrong: one line, exit code 2, and the broker is not even asked. The table of ``thaw get``."""

from __future__ import annotations

import io

import pytest
from click.testing import CliRunner
from rich.console import Console
from scaler_harness import Harness, function, prepares

from infra.settings import ScalerSettings, Settings
from thaw.functions import Known, _table, apply, delete

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


@pytest.mark.parametrize(
    ("command", "words", "instead"),
    [(apply, ["-f", "one.yaml", "-f", "-"], "kubectl apply -f one.yaml -f -"), (delete, ["shop"], "kubectl delete function shop")],
)
def test_where_functions_are_the_clusters_kubectl_changes_them(command, words, instead):
    result = CliRunner().invoke(command, words, obj=Settings(scaler=ScalerSettings(functions="kubernetes")))
    assert result.exit_code == 2
    assert f"use `{instead}`" in result.output


def test_the_table_shows_standbys_and_how_many_are_wanted():
    harness = Harness()
    harness.node()
    document = function(standby=3)
    for command in prepares([item for fetch in harness.apply(document) for item in harness.fetched(fetch, checkpoint="cp")])[:2]:
        harness.prepared(command)
    text = io.StringIO()
    Console(file=text, width=160).print(_table({"f": Known(document, 0, harness.planner.explain("f")), "g": Known(function("g"), 0)}))
    header, row, unseen = text.getvalue().splitlines()
    column = header.split().index("STANDBYS")
    assert row.split()[column] == "2/3"
    assert row.split()[1] == "standby"
    assert unseen.split()[column] == "-"
