"""The container file and the manifests of a cluster fit the server that they run."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from deploykit.cli import app
from deploykit.server.routes import resolve
from deploykit.server.settings import Settings

SERVING = Path(__file__).parents[1] / "serving"
CONTAINERFILE = (SERVING / "Containerfile").read_text()


# the container


def instruction(name: str) -> str:
    (found,) = re.findall(rf"^{name} (.*)$", CONTAINERFILE, re.MULTILINE)
    return str(found)


def command_faults(words: list[str]) -> list[str]:
    """Return the options of a `deploykit serve` that the command line does not know."""
    assert words[:2] == ["deploykit", "serve"]
    known = {
        option
        for parameter in typer.main.get_command(app).commands["serve"].params
        for option in parameter.opts
    }
    return [word for word in words[2:] if word.startswith("--") and word not in known]


def entrypoint() -> list[str]:
    shell, flag, script, name = json.loads(instruction("ENTRYPOINT"))
    assert (shell, flag, name) == ("/bin/sh", "-c", "serve")
    word, *command = shlex.split(script)
    assert word == "exec", "the shell would keep SIGTERM for itself"
    return command


def test_container_runs_a_command_that_there_is() -> None:
    command = entrypoint()
    assert command_faults(command) == []
    assert "$@" in command
    assert command_faults(["deploykit", "serve", "--hosts", "::"]) == ["--hosts"]


def test_container_is_not_root_and_says_whether_it_lives() -> None:
    user = instruction("USER")
    assert all(number.isdecimal() and int(number) > 0 for number in user.split(":"))
    path = re.findall(r"'GET', '([^']+)'", instruction("HEALTHCHECK .* CMD"))[0]
    assert resolve(path.encode()).is_open
    assert instruction("EXPOSE") == str(Settings.port)


def test_container_is_made_of_files_that_exist() -> None:
    sources = re.findall(r"^COPY (?!--from)(.*) \S+$", CONTAINERFILE, re.MULTILINE)
    assert sources
    for source in " ".join(sources).split():
        assert (SERVING / source).exists(), source
    requirements = (SERVING / "requirements.txt").read_text()
    assert re.search("^onnxruntime==", requirements, re.MULTILINE)  # the build argument replaces it


# Kubernetes


def manifests(name: str) -> dict[str, Any]:
    found = yaml.safe_load_all((SERVING / "kubernetes" / name).read_text())
    return {one["kind"]: one for one in found}


def served_pod(name: str) -> tuple[dict[str, Any], dict[str, Any], int]:
    """Return the container and its pod's specification, and the pod's seconds to stop."""
    found = manifests(name)
    if "Deployment" in found:
        pod = found["Deployment"]["spec"]["template"]["spec"]
        return pod["containers"][0], pod, pod["terminationGracePeriodSeconds"]
    runtime, service = found["ServingRuntime"]["spec"], found["InferenceService"]["spec"]
    seconds = service["predictor"]["terminationGracePeriodSeconds"]
    return runtime["containers"][0], runtime, seconds


MANIFESTS = ["deployment.yaml", "kserve.yaml"]


def option(arguments: list[str], name: str) -> float:
    return float(arguments[arguments.index(name) + 1])


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifest_runs_a_command_that_there_is_and_gives_it_time_to_stop(name: str) -> None:
    container, _, seconds = served_pod(name)
    arguments = container["args"]
    assert command_faults([*container.get("command", ["deploykit", "serve"]), *arguments]) == []
    assert seconds > option(arguments, "--grace") + option(arguments, "--drain")
    assert option(arguments, "--grace") > option(arguments, "--drain") > 0
    assert option(arguments, "--port") == container["ports"][0]["containerPort"]


@pytest.mark.parametrize("name", MANIFESTS)
def test_probes_ask_routes_that_need_no_token(name: str) -> None:
    container, _, _ = served_pod(name)
    routes = {
        kind: resolve(container[f"{kind}Probe"]["httpGet"]["path"].encode())
        for kind in ("startup", "readiness", "liveness")
    }
    assert all(route.is_open and "GET" in route.methods for route in routes.values())
    assert [route.name for route in routes.values()] == ["ready", "ready", "live"]
    port = container["ports"][0]
    probed = {container[f"{kind}Probe"]["httpGet"]["port"] for kind in routes}
    assert probed <= {port.get("name"), port["containerPort"]}


@pytest.mark.parametrize("name", MANIFESTS)
def test_container_of_a_manifest_can_write_nowhere_but_in_tmp(name: str) -> None:
    container, pod, _ = served_pod(name)
    rights = {**pod.get("securityContext", {}), **container["securityContext"]}
    assert rights["readOnlyRootFilesystem"]
    assert rights["runAsNonRoot"]
    assert not rights["allowPrivilegeEscalation"]
    assert str(rights["runAsUser"]) == instruction("USER").split(":")[0]
    (mount,) = container["volumeMounts"]
    assert mount["mountPath"] == "/tmp"
    assert {volume["name"] for volume in pod["volumes"] if "emptyDir" in volume} == {mount["name"]}
    assert {"cpu", "memory"} <= container["resources"]["limits"].keys()


def test_all_of_the_deployment_is_about_the_same_pods() -> None:
    found = manifests("deployment.yaml")
    labels = found["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert found["Deployment"]["spec"]["selector"]["matchLabels"] == labels
    assert found["Service"]["spec"]["selector"] == labels
    assert found["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels
    scaled = found["HorizontalPodAutoscaler"]["spec"]
    assert scaled["scaleTargetRef"]["name"] == found["Deployment"]["metadata"]["name"]
    assert scaled["minReplicas"] > found["PodDisruptionBudget"]["spec"]["minAvailable"]
    notes = found["Deployment"]["spec"]["template"]["metadata"]["annotations"]
    assert resolve(notes["prometheus.io/path"].encode()).name == "metrics"


def test_kserve_runs_the_runtime_that_is_defined() -> None:
    found = manifests("kserve.yaml")
    runtime, predictor = found["ServingRuntime"], found["InferenceService"]["spec"]["predictor"]
    assert predictor["model"]["runtime"] == runtime["metadata"]["name"]
    assert (
        predictor["model"]["modelFormat"]["name"]
        == (runtime["spec"]["supportedModelFormats"][0]["name"])
    )
    assert predictor["model"]["protocolVersion"] in runtime["spec"]["protocolVersions"]
    assert "/mnt/models" in runtime["spec"]["containers"][0]["args"]
