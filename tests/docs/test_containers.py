"""What the container files name is there: files, flags, the dashboard, and the port that Prometheus scrapes."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tests.docs.blocks import ROOT
from tests.docs.test_pages import unknown_flags

COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text())
DOCKERFILE = (ROOT / "Dockerfile").read_text()


def test_every_file_that_is_mounted_or_copied_is_there() -> None:
    for service in COMPOSE["services"].values():
        for volume in service.get("volumes", ()):
            assert (ROOT / volume.split(":")[0]).exists(), volume
    copied = [word for line in re.findall(r"^COPY (.*)", DOCKERFILE, re.MULTILINE) for word in shlex.split(line)[:-1]]
    assert copied and all((ROOT / name).exists() for name in copied)
    # What the build sees at all.
    allowed = {line.removeprefix("!") for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert set(copied) <= allowed


def test_the_servers_command_is_one_that_there_is() -> None:
    assert not unknown_flags(shlex.join(["flowroll", *COMPOSE["services"]["flowroll"]["command"]]))
    command = re.search(r"^CMD \[(\"serve\".*)\]$", DOCKERFILE, re.MULTILINE)
    assert command and not unknown_flags("flowroll " + command[1].replace('"', "").replace(",", ""))


def test_prometheus_scrapes_the_server_and_grafana_shows_the_dashboard() -> None:
    scrape = yaml.safe_load((ROOT / "deploy/prometheus.yaml").read_text())["scrape_configs"][0]
    (target,) = scrape["static_configs"][0]["targets"]
    assert target == "flowroll:30000" and any(port.endswith(":30000") for port in COMPOSE["services"]["flowroll"]["ports"])
    provider = yaml.safe_load((ROOT / "deploy/grafana-dashboards.yaml").read_text())["providers"][0]
    mounted = dict(volume.split(":")[:2] for volume in COMPOSE["services"]["grafana"]["volumes"])
    assert mounted["./docs/grafana"] == provider["options"]["path"]
    home = Path(COMPOSE["services"]["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert (ROOT / "docs/grafana" / home.name).is_file()


def test_every_port_is_published_on_this_machine_alone() -> None:
    ports = [port for service in COMPOSE["services"].values() for port in service.get("ports", ())]
    assert ports and all(port.startswith("127.0.0.1:") for port in ports)


def test_the_dockerfile_passes_the_linter() -> None:
    linter = Path(sys.executable).with_name("hadolint")
    if not linter.exists():
        pytest.skip("hadolint is not installed")
    checked = subprocess.run([str(linter), "Dockerfile"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert checked.returncode == 0, checked.stdout
