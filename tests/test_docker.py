"""The container files, without a Docker engine: linted, held against the Compose schema, and against the code they start."""

import re
import shlex
import ssl
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import trustme
import yaml

from app.local_triton import Ports, command
from app.settings import Settings
from tests.app.api.test_fetch import serve
from tests.gateway import environment as environment_of_tests

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
COMPOSE_FILES = ("docker-compose.yml", "deploy/gpu.yml")
TARGETS = ("gateway", "export", "triton")
OBSERVERS = ("prometheus", "grafana")
LOCAL_PORT = re.compile(r"127\.0\.0\.1:\$\{\w*PORT:-(\d+)\}:(\d+)")


@pytest.fixture(scope="module")
def stages() -> dict[str, list[tuple[str, str]]]:
    """The instructions of each stage of the Dockerfile, continuation lines joined."""
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    found: dict[str, list[tuple[str, str]]] = {"": []}
    name = ""
    for line in filter(None, map(str.strip, text.splitlines())):
        instruction, _, rest = line.partition(" ")
        if instruction == "FROM":
            name = rest.rpartition(" AS ")[2]
            found[name] = []
        found[name].append((instruction, rest.strip()))
    return found


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]


def values(stage: list[tuple[str, str]], instruction: str) -> list[str]:
    return [rest for name, rest in stage if name == instruction]


def environment(stage: list[tuple[str, str]]) -> dict[str, str]:
    return dict(pair.split("=", 1) for line in values(stage, "ENV") for pair in shlex.split(line))


def test_dockerfile_passes_its_linter() -> None:
    done = subprocess.run([BIN / "hadolint", "--no-color", ROOT / "Dockerfile"], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@pytest.mark.parametrize("name", COMPOSE_FILES)
def test_compose_files_follow_their_schema(name: str) -> None:
    schema = ["--builtin-schema", "vendor.compose-spec"]
    done = subprocess.run([BIN / "check-jsonschema", *schema, ROOT / name], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_targets_are_the_documented_ones(stages: dict[str, Any], services: dict[str, Any]) -> None:
    assert set(stages) - {""} == set(TARGETS)
    built = {name: service["build"]["target"] for name, service in services.items() if "build" in service}
    assert built == {name: name for name in TARGETS}
    assert set(services) - set(built) == set(OBSERVERS)


@pytest.mark.parametrize("target", TARGETS)
def test_no_image_runs_as_root_or_without_a_word_on_health(stages: dict[str, Any], target: str) -> None:
    users = values(stages[target], "USER")
    assert users
    assert users[-1] not in ("0", "root")
    assert len(values(stages[target], "HEALTHCHECK")) == 1


@pytest.mark.parametrize("target", TARGETS)
def test_everything_copied_exists_and_is_let_through(stages: dict[str, Any], target: str) -> None:
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for line in values(stages[target], "COPY"):
        for source in line.split()[:-1]:
            assert (ROOT / source).exists(), source
            assert Path(source).parts[0] in allowed, source


def test_the_images_of_nvidia_are_of_one_release(stages: dict[str, Any]) -> None:
    """A TensorRT engine loads only in the TensorRT that built it."""
    tags = {name: values(stages[name], "FROM")[0].split()[0].rpartition(":")[2] for name in ("export", "triton")}
    assert tags == {"export": "${NVIDIA_RELEASE}-py3", "triton": "${NVIDIA_RELEASE}-py3"}


def test_every_vitrine_variable_is_a_setting(
    stages: dict[str, Any], services: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    variables = environment(stages["gateway"]) | services["gateway"]["environment"]
    ours = {name: value for name, value in variables.items() if name.startswith("VITRINE_")}
    assert ours.keys() <= {f"VITRINE_{name.upper()}" for name in Settings.model_fields}
    for name, value in ours.items():
        monkeypatch.setenv(name, value)
    settings = Settings(_env_file=None)
    assert (settings.backend, settings.triton_url, settings.host) == ("triton", "triton:8001", "0.0.0.0")


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_the_health_check_of_the_gateway_asks_readyz(stages: dict[str, Any], scheme: str, tmp_path: Path) -> None:
    check = values(stages["gateway"], "HEALTHCHECK")[0]
    _, *arguments = yaml.safe_load(check.partition("CMD ")[2])
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("gateway.example").configure_cert(tls)
    variables = {"tls_certfile": "cert.pem"} if scheme == "https" else {}
    with serve(tls=tls if scheme == "https" else None) as site:
        command = [sys.executable, *arguments]
        subprocess.run(command, env=environment_of_tests(port=site.server_port, **variables), check=True, timeout=30)
        assert site.asked == ["/readyz"]
    done = subprocess.run(command, env=environment_of_tests(port=site.server_port), capture_output=True, check=False, timeout=30)
    assert done.returncode != 0


@pytest.mark.parametrize("name", [*TARGETS, *OBSERVERS])
def test_no_service_has_more_rights_than_it_needs(services: dict[str, Any], name: str) -> None:
    assert services[name]["cap_drop"] == ["ALL"]
    assert services[name]["security_opt"] == ["no-new-privileges:true"]
    assert not {"privileged", "cap_add", "pid", "ipc", "network_mode", "devices"} & services[name].keys()


@pytest.mark.parametrize(
    ("name", "writable"),
    [("gateway", ["/tmp"]), ("prometheus", []), ("grafana", ["/tmp", "/var/lib/grafana", "/var/log/grafana"])],
)
def test_what_listens_has_a_file_system_that_is_read_only(services: dict[str, Any], name: str, writable: list[str]) -> None:
    """The metrics of several workers lie in /dev/shm, which every container has in memory."""
    assert services[name]["read_only"] is True
    assert services[name].get("tmpfs", []) == writable


def test_the_container_starts_triton_as_the_local_one_is_started(stages: dict[str, Any], tmp_path: Path) -> None:
    ours = set(yaml.safe_load(values(stages["triton"], "CMD")[0]))
    local = set(command(tmp_path, tmp_path, Ports(), "any"))
    assert {"--model-control-mode=explicit", "--load-model=*", "--exit-on-error=false", "--strict-readiness=false"} <= ours & local


def test_the_gateway_waits_for_triton_and_both_read_one_repository(stages: dict[str, Any], services: dict[str, Any]) -> None:
    assert services["gateway"]["depends_on"]["triton"]["condition"] == "service_healthy"
    mounted = {name: services[name]["volumes"] for name in ("gateway", "triton")}
    assert mounted["gateway"] == mounted["triton"] == ["./model_repository:/models:ro"]
    assert environment(stages["gateway"])["VITRINE_REPOSITORY"] == "/models"
    assert services["gateway"]["read_only"] is True


def mounts(service: dict[str, Any]) -> dict[str, Path]:
    """The folders of the repository that a service sees, by where it sees them; each is read-only."""
    parts = [volume.split(":") for volume in service["volumes"] if volume.startswith("./")]
    assert all(mode == ["ro"] for _, _, *mode in parts)
    return {target: ROOT / source for source, target, *_ in parts}


def test_every_published_port_is_of_this_machine_alone(services: dict[str, Any]) -> None:
    published = [port for service in services.values() for port in service.get("ports", ())]
    assert len(published) == 3
    assert all(LOCAL_PORT.fullmatch(port) for port in published)
    assert len({port.split(":-")[1] for port in published}) == 3


@pytest.mark.parametrize("name", OBSERVERS)
def test_observers_start_only_when_asked_for_and_in_a_fixed_version(services: dict[str, Any], name: str) -> None:
    assert services[name]["profiles"] == ["observe"]
    assert re.fullmatch(r"[a-z]+/[a-z]+:v?\d+\.\d+\.\d+", services[name]["image"])
    assert services[name]["cap_drop"] == ["ALL"]


def test_prometheus_reads_its_files_and_scrapes_the_services_where_they_listen(
    stages: dict[str, Any], services: dict[str, Any]
) -> None:
    (folder,) = mounts(services["prometheus"]).values()
    written = yaml.safe_load((folder / "prometheus.yml").read_text())
    targets = {job["job_name"]: job["static_configs"] for job in written["scrape_configs"]}
    port = environment(stages["gateway"])["VITRINE_PORT"]
    assert targets == {
        "vitrine": [{"targets": [f"gateway:{port}"]}],
        "triton": [{"targets": ["triton:8002"]}],
    }
    assert "8002" in services["triton"]["expose"]


def test_grafana_finds_its_data_source_and_its_dashboards(services: dict[str, Any]) -> None:
    mounted = mounts(services["grafana"])
    provisioning = mounted["/etc/grafana/provisioning"]
    (source,) = yaml.safe_load((provisioning / "datasources/prometheus.yml").read_text())["datasources"]
    (provider,) = yaml.safe_load((provisioning / "dashboards/vitrine.yml").read_text())["providers"]
    assert source["url"] == f"http://prometheus:{services['prometheus']['ports'][0].rpartition(':')[2]}"
    assert list(mounted[provider["options"]["path"]].glob("*.json"))
    release = services["grafana"]["image"].partition(":")[2]
    assert f"!{release}" in (ROOT / "pyproject.toml").read_text(), "the SDK that renders the dashboards is of another release"
    home = services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert (mounted[str(Path(home).parent)] / Path(home).name).is_file()
