"""Images of scaler and agent: the two ways to make them agree, and the same content gives the same bytes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

import infra
from infra import settings as settings_module
from infra.errors import ImageError
from infra.images import build, content, runtime
from infra.kubernetes import pods
from infra.settings import Settings

HERE = Path(infra.__file__).parent
DOCKERFILE = (HERE / "images" / "Dockerfile").read_text()


def test_the_dockerfile_and_the_way_without_one_agree() -> None:
    stages = dict(re.findall(r"FROM \S+ AS (\w+)\n(.*?)(?=\nFROM|\Z)", DOCKERFILE, re.DOTALL))
    environment = dict(re.findall(r"(?:ENV\s+|^\s+)([A-Z]+)=(\S+)", stages["base"], re.MULTILINE))
    assert environment == build._ENVIRONMENT
    for kind, user in build._USERS.items():
        assert re.findall(r"^USER (\S+)$", stages[kind], re.MULTILINE) == [user]
        assert f"COPY --from=build /stage/{kind}/ /" in stages[kind]
        assert f"infra.images.content {kind} /stage/{kind}" in stages["build"]
    assert 'ENTRYPOINT ["/usr/local/bin/thaw"]' in stages["base"]
    # No base but one named by its content.
    assert set(re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE)) == {"${PYTHON}@${PYTHON_DIGEST}", "base"}
    assert "ARG PYTHON_DIGEST\n" in DOCKERFILE


def test_manifests_name_the_images_and_what_is_in_them() -> None:
    documents = [
        item for path in sorted((HERE / "kubernetes" / "manifests").glob("*.yaml")) for item in yaml.safe_load_all(path.read_text())
    ]
    workloads = {
        item["metadata"]["name"]: item["spec"]["template"]["spec"] for item in documents if item["kind"] in ("DaemonSet", "Deployment")
    }
    for kind, reference in build.REFERENCES.items():
        [container] = workloads[f"thaw-{kind}"]["containers"]
        assert reference == f"docker.io/library/{container['image']}"
        assert container["command"][0] == "thaw"
    assert workloads["thaw-scaler"]["securityContext"]["runAsUser"] == int(build._USERS["scaler"].partition(":")[0])
    [settings] = [item for item in documents if item["kind"] == "ConfigMap"]
    assert f'cache_dir = "/{content.HOME}"' in settings["data"]["thaw.toml"]
    assert f"/{content.HOME}/{content._PLACEHOLDER.stem}" == pods.INIT_SOURCE


def test_what_is_left_out_is_in_the_lock() -> None:
    locked = {name for name, _ in content._LOCKED.findall(content._LOCK.read_text())}
    assert locked >= content._LEFT_OUT


def test_modules_are_compiled_to_the_same_bytes(tmp_path: Path) -> None:
    made = []
    for name in ("one", "another"):
        root = tmp_path / name
        (root / "opt/x").mkdir(parents=True)
        (root / "opt/x/a.py").write_text("import os\n\n\ndef f(x: int) -> str:\n    return f'{x}{os.sep}'\n")
        runtime.compile_modules(root / "opt", root, root / "log")
        [compiled] = root.rglob("*.pyc")
        made.append(compiled.read_bytes())
        assert str(tmp_path).encode() not in made[-1]
    assert made[0] == made[1]


def test_broken_modules_and_unknown_programs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="thaw-no-such-program is missing"):
        runtime.programs(_settings(tmp_path), ["thaw-no-such-program"], [])


def test_content_is_of_agent_or_scaler(capsys: pytest.CaptureFixture[str]) -> None:
    assert content.main(["planner", "/nowhere"]) == 2
    assert "not of planner" in capsys.readouterr().err


def _settings(folder: Path) -> Settings:
    return settings_module.load(environment={}, flags={"paths.cache_dir": folder, "paths.state_dir": folder})
