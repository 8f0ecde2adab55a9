"""Files for many machines: commands that exist, and manifests that Kubernetes takes."""

import ast
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from reft_edge.cli import app

yaml = pytest.importorskip("yaml")
FLEET = Path(__file__).parents[2] / "examples/fleet"


def manifests():
    return list(yaml.safe_load_all((FLEET / "kubernetes.yaml").read_text("utf-8")))


def commands():
    """What every container runs, as arguments of reft-edge."""
    pod = manifests()[0]["spec"]["template"]["spec"]
    for container in (*pod["initContainers"], *pod["containers"]):
        if "command" in container:
            script = container["args"][0]
            yield shlex.split(re.search(r"reft-edge ([^;]+);", script)[1])
        else:
            yield container["args"]
    for service in yaml.safe_load((FLEET / "compose.yaml").read_text("utf-8"))["services"].values():
        yield service["command"]
    text = (FLEET / "Containerfile").read_text("utf-8")
    yield ast.literal_eval(re.search(r"^CMD (.+)$", text, re.MULTILINE)[1])


def test_commands_and_options_exist():
    found = [list(map(str, command)) for command in commands()]
    assert sorted({command[0] for command in found}) == ["pull", "serve"]
    assert len(found) == 6
    for command in found:
        shown = CliRunner().invoke(app, [command[0], "--help"], env={"COLUMNS": "300"}).output
        for part in command[1:]:
            if part.startswith("--"):
                assert part.partition("=")[0] in shown, part


def test_kubernetes_takes_the_manifests():
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    found = manifests()
    assert [manifest["kind"] for manifest in found] == [
        "Deployment",
        "Service",
        "PodDisruptionBudget",
        "HorizontalPodAutoscaler",
    ]
    for manifest in found:
        kubernetes_validate.validate(manifest, kubernetes_validate.latest_version(), strict=True)
    found[0]["spec"]["template"]["spec"]["containers"][0]["readinesProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(found[0], kubernetes_validate.latest_version(), strict=True)


def test_parts_of_the_manifests_fit_together():
    deployment, service, budget, scaler = manifests()
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert labels == service["spec"]["selector"] == budget["spec"]["selector"]["matchLabels"]
    assert scaler["spec"]["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    pod = deployment["spec"]["template"]["spec"]
    volumes = {volume["name"] for volume in pod["volumes"]}
    containers = {container["name"]: container for container in (*pod["initContainers"], *pod["containers"])}
    for container in containers.values():
        assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
        assert container["securityContext"]["readOnlyRootFilesystem"] is True
    [grace] = [part for part in containers["serve"]["args"] if part.startswith("--grace=")]
    assert pod["terminationGracePeriodSeconds"] > int(grace.partition("=")[2])
    metric = scaler["spec"]["metrics"][0]["containerResource"]
    assert metric["container"] in containers


def test_the_image_installs_extras_that_exist_and_runs_without_root():
    text = (FLEET / "Containerfile").read_text("utf-8")
    extras = re.search(r"reft-edge\[([a-z,]+)\]", text)[1].split(",")
    project = (FLEET.parents[1] / "pyproject.toml").read_text("utf-8")
    for extra in extras:
        assert re.search(rf"^{extra} = \[", project, re.MULTILINE), extra
    user = re.search(r"^USER (\d+):", text, re.MULTILINE)[1]
    assert int(user) == manifests()[0]["spec"]["template"]["spec"]["securityContext"]["runAsUser"]
    assert f"--uid {user}" in text
