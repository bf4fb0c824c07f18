"""What serve/deploy holds fits the service: options, routes, times, user. Linters read it, for no container engine runs here."""

import inspect
import json
import re
import subprocess
import sys
import threading
import tomllib
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import yaml
from fastapi import FastAPI

from clipdit import cli
from clipdit_serve.app import create_app
from clipdit_serve.batching import InProcessEngine
from clipdit_serve.commands import serve as command
from clipdit_serve.decoding import DecodePool
from clipdit_serve.guards import HEALTH
from clipdit_serve.server import Server, bind
from clipdit_serve.settings import ServeSettings, check_bind
from clipdit_serve.tracing import FLUSH_S

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "serve" / "deploy"
DOCKERFILE = (FOLDER / "Dockerfile").read_text()
MANIFEST = FOLDER / "kubernetes.yaml"
YAMLLINT = "{extends: default, rules: {line-length: {max: 130}}}"


def instruction(name: str) -> str:
    """The last instruction of this name, its lines joined."""
    return re.findall(rf"^{name} (.*)$", re.sub(r"\\\n\s*", "", DOCKERFILE), re.MULTILINE)[-1]


def documents() -> dict[str, dict]:
    return {document["kind"]: document for document in yaml.safe_load_all(MANIFEST.read_text())}


def pod() -> dict:
    return documents()["Deployment"]["spec"]["template"]["spec"]


def container() -> dict:
    (only,) = pod()["containers"]
    return only


def options() -> dict[str, object]:
    """What `clipdit serve` is started with in the cluster: the words of entry point and manifest, parsed as the command does."""
    name, verb, *words = json.loads(instruction("ENTRYPOINT"))
    assert (name, verb) == ("clipdit", "serve")
    call = cli.parse("clipdit serve", command.serve, [*words, *container()["args"]])
    bound = inspect.signature(command.serve).bind(**call.keywords)
    bound.apply_defaults()
    return bound.arguments


def routes() -> set[str]:
    settings = ServeSettings()
    app = create_app(InProcessEngine(lambda: pytest.fail("nobody asks"), settings), DecodePool(settings), settings)
    return set(app.openapi()["paths"])


def linter(*command: str) -> subprocess.CompletedProcess:
    program = Path(sys.executable).with_name(command[0])
    if not program.exists():
        pytest.skip(f"needs {command[0]}")
    return subprocess.run([program, *command[1:]], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize(
    "command",
    [
        ["hadolint", "--failure-threshold", "style", FOLDER / "Dockerfile"],
        ["yamllint", "--strict", "--config-data", YAMLLINT, MANIFEST],
        ["kubernetes-validate", "--strict", "--quiet", MANIFEST],  # not in [dev]: 108 MB of schemas
    ],
    ids=lambda command: command[0],
)
def test_linters_find_nothing(command: list):
    done = linter(*map(str, command))
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_manifest_holds_a_deployment_and_the_service_that_finds_its_pods():
    found = documents()
    assert set(found) == {"Deployment", "Service"}
    labels = found["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert found["Deployment"]["spec"]["selector"]["matchLabels"] == labels
    assert found["Service"]["spec"]["selector"] == labels
    assert container()["ports"] == [
        {"name": "http", "containerPort": options()["port"]}, {"name": "metrics", "containerPort": options()["metrics_port"]}
    ]  # fmt: skip
    assert [port["targetPort"] for port in found["Service"]["spec"]["ports"]] == ["http"]


def test_prometheus_finds_the_metrics_at_their_port():
    annotations = documents()["Deployment"]["spec"]["template"]["metadata"]["annotations"]
    assert annotations == {"prometheus.io/scrape": "true", "prometheus.io/port": str(options()["metrics_port"])}
    assert options()["metrics_host"] == "0.0.0.0"


def test_probes_ask_routes_that_are_there_and_need_no_key():
    probes = {name: probe["httpGet"] for name, probe in container().items() if name.endswith("Probe")}
    assert {name: get["path"] for name, get in probes.items()} == {
        "startupProbe": "/readyz", "readinessProbe": "/readyz", "livenessProbe": "/livez"
    }  # fmt: skip
    (path,) = re.findall(r"http://127\.0\.0\.1:8000(/\w+)", instruction("HEALTHCHECK"))
    assert path == "/readyz"
    assert {get["path"] for get in probes.values()} <= routes() & HEALTH
    assert {get["port"] for get in probes.values()} == {"http"}


def test_nobody_is_killed_who_would_still_have_been_answered():
    """Draining, then what uvicorn takes to send the last answers, and the last traces."""
    chosen = options()
    app, settings = FastAPI(), ServeSettings()
    app.state.jobs = app.state.reloads = None  # switched off
    engine, decoder = InProcessEngine(lambda: pytest.fail("nobody asks"), settings), DecodePool(settings)
    server = Server(
        app, engine, decoder, sockets=[bind("127.0.0.1", 0)], linger_s=0, drain_s=0, on_ready=lambda address: None
    )  # fmt: skip
    closing_s = server.config.timeout_graceful_shutdown
    assert closing_s is not None
    needed_s = float(str(chosen["drain_s"])) + closing_s + FLUSH_S
    assert pod()["terminationGracePeriodSeconds"] >= needed_s + 5
    (stop_s,) = re.findall(r"--stop-timeout (\d+)", DOCKERFILE)
    assert int(stop_s) >= command.serve.__kwdefaults__["drain_s"] + closing_s + 5


def test_the_port_stays_open_until_readiness_has_been_seen_to_end():
    readiness = container()["readinessProbe"]
    assert float(str(options()["linger_s"])) >= 2 * readiness["periodSeconds"] * readiness["failureThreshold"]
    assert float(str(options()["linger_s"])) < float(str(options()["drain_s"]))


def test_the_service_starts_with_a_key_and_not_without():
    host = str(options()["host"])
    with pytest.raises(ValueError, match="no key is set"):
        check_bind(host, ServeSettings(), insecure=bool(options()["insecure"]))
    (key,) = [variable for variable in container()["env"] if variable["name"] == command.KEY]
    assert "value" not in key and set(key["valueFrom"]) == {"secretKeyRef"}


def test_it_runs_as_nobody_in_particular_and_writes_nothing_but_tmp():
    user = int(instruction("USER"))
    assert user > 1000
    assert pod()["securityContext"]["runAsUser"] == user and pod()["securityContext"]["runAsNonRoot"] is True
    assert container()["securityContext"] == {
        "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}
    }  # fmt: skip
    assert [mount["mountPath"] for mount in container()["volumeMounts"]] == ["/tmp"]
    assert pod()["automountServiceAccountToken"] is False


def test_threads_are_as_many_as_the_cpus_and_memory_holds_what_uploads_may_take():
    resources, settings = container()["resources"], ServeSettings()
    (threads,) = [variable["value"] for variable in container()["env"] if variable["name"] == "OMP_NUM_THREADS"]
    assert threads == resources["limits"]["cpu"] == resources["requests"]["cpu"]
    uploads = settings.decode_processes * settings.decode_memory_bytes + settings.max_bodies_bytes
    assert int(resources["limits"]["memory"].removesuffix("Gi")) * 2**30 >= uploads + 2**31


def test_what_the_image_is_built_from_is_there():
    copied = [word for line in re.findall(r"^COPY (?!--from)(.*) \S+$", DOCKERFILE, re.MULTILINE) for word in line.split()]
    assert {"pyproject.toml", "constraints.txt", "serve"} <= set(copied)
    assert [name for name in copied if not (ROOT / name).exists()] == []
    ignored = (FOLDER / "Dockerfile.dockerignore").read_text().splitlines()
    assert {line[1:] for line in ignored if line.startswith("!")} == set(copied)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = re.findall(r"EXTRAS=([\w,]+)", DOCKERFILE)
    assert len(extras) == 2 and {name for line in extras for name in line.split(",")} <= set(project["optional-dependencies"])
    version = project["version"]
    assert container()["image"] == f"clipdit-serve:{version}" and f"--tag clipdit-serve:{version} " in DOCKERFILE


def test_the_health_check_of_the_image_passes_while_ready_and_fails_otherwise():
    command = json.loads(instruction("HEALTHCHECK").partition("CMD ")[2])
    assert command[:2] == ["python", "-c"]
    statuses = [503, 200]

    class Health(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(statuses.pop() if self.path == "/readyz" else 404)
            self.end_headers()

        def log_message(self, *words: object) -> None: ...

    def check(port: int) -> int:
        code = command[2].replace("8000", str(port))
        return subprocess.run([sys.executable, "-c", code], stderr=subprocess.DEVNULL).returncode

    with HTTPServer(("127.0.0.1", 0), Health) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert [check(server.server_port), check(server.server_port)] == [0, 1]
        server.shutdown()
    assert check(server.server_port) == 1  # nothing listens there any more
    assert statuses == []


class TestKubeRay:
    """serve/deploy/kuberay.yaml: the same promises, for the service on Ray."""

    manifest = FOLDER / "kuberay.yaml"

    def spec(self) -> dict:
        (document,) = yaml.safe_load_all(self.manifest.read_text())
        assert (document["apiVersion"], document["kind"]) == ("ray.io/v1", "RayService")
        return document["spec"]

    def config(self) -> dict:
        return yaml.safe_load(self.spec()["serveConfigV2"])

    def containers(self) -> list[dict]:
        cluster = self.spec()["rayClusterConfig"]
        groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
        return [container for group in groups for container in group["template"]["spec"]["containers"]]

    def test_yamllint_finds_nothing(self):
        done = linter("yamllint", "--strict", "--config-data", YAMLLINT, str(self.manifest))
        assert done.returncode == 0, done.stdout + done.stderr

    def test_ray_takes_the_config_and_its_arguments_build_the_application(self, monkeypatch: pytest.MonkeyPatch):
        schema = pytest.importorskip("ray.serve.schema")
        (application,) = schema.ServeDeploySchema.model_validate(self.config()).applications
        assert (application.route_prefix, application.name) == ("/", "clipdit")
        module, _, function = application.import_path.partition(":")
        # in a Python of its own, whose functions do not check the types of their arguments: Ray could not send those
        code = f"""
import json, sys
from {module} import Arguments, {function}
ingress = {function}(Arguments(**json.loads(sys.argv[1])))._bound_deployment
print(ingress.name, ingress.num_replicas)"""

        def built() -> subprocess.CompletedProcess:
            arguments = [sys.executable, "-P", "-c", code, json.dumps(application.args)]
            return subprocess.run(arguments, capture_output=True, text=True)

        monkeypatch.delenv(command.KEY, raising=False)
        assert built().stderr.splitlines()[-1].startswith("ValueError: no key is set; set CLIPDIT_API_KEY")
        monkeypatch.setenv(command.KEY, "k")
        assert built().stdout == f"Ingress {application.args['ingress_replicas']}\n"

    def test_the_key_is_a_secret_and_the_cluster_asks_for_a_token(self):
        assert self.spec()["rayClusterConfig"]["authOptions"] == {"mode": "token"}
        keys = [entry for container in self.containers() for entry in container["env"] if entry["name"] == command.KEY]
        (key,) = keys
        assert "value" not in key and set(key["valueFrom"]) == {"secretKeyRef"}
        assert "insecure" not in self.config()["applications"][0]["args"]

    def test_every_proxy_has_the_border_around_it(self):
        from clipdit_serve.cluster import border

        for container in self.containers():
            assert {"name": border.VARIABLE, "value": border.IMPORT_PATH} in container["env"]
            assert {"name": "serve", "containerPort": self.config()["http_options"]["port"]} in container["ports"]

    def test_replicas_fit_the_workers_and_end_before_they_are_killed(self):
        arguments = self.config()["applications"][0]["args"]
        (group,) = self.spec()["rayClusterConfig"]["workerGroupSpecs"]
        (worker,) = group["template"]["spec"]["containers"]
        cpus = group["replicas"] * int(worker["resources"]["limits"]["cpu"])
        assert cpus == arguments["replicas"] * arguments["cpus"] + arguments["ingress_replicas"]
        assert group["template"]["spec"]["terminationGracePeriodSeconds"] >= arguments["drain_s"] + 5
        assert self.spec()["rayClusterDeletionDelaySeconds"] >= arguments["drain_s"] + 5

    def test_it_runs_as_the_images_user_and_version(self):
        import importlib.metadata

        user = int(instruction("USER"))
        cluster = self.spec()["rayClusterConfig"]
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
            assert group["template"]["spec"]["securityContext"]["runAsUser"] == user
            assert group["template"]["spec"]["automountServiceAccountToken"] is False
        assert {c["image"] for c in self.containers()} == {container()["image"]}
        assert {c["securityContext"]["allowPrivilegeEscalation"] for c in self.containers()} == {False}
        try:
            assert cluster["rayVersion"] == importlib.metadata.version("ray")
        except importlib.metadata.PackageNotFoundError:
            pytest.skip("needs ray")
