"""What a cloud's machine does when it starts, and before a run: who may log in, what ends it, what is installed."""

from __future__ import annotations

import json
import shlex
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..recipes.schema_cloud import CloudCluster
from .ssh_facts import requirements

WATCHDOG = Path(__file__).with_name("cloud_watchdog.py")
PLACE = "/opt/ftlaunch/watchdog"
UNIT_PLACE = "/etc/systemd/system/ftlaunch-watchdog.service"
UNIT = f"""[Unit]
Description=Ends this machine when nothing of an ftlaunch run happens on it

[Service]
ExecStart=/usr/bin/env python3 {PLACE}
Restart=on-failure
OOMScoreAdjust=-1000

[Install]
WantedBy=multi-user.target
"""

BEGIN_S = 3600.0
"""For a launcher to get a run under way on a machine."""

LINGER_S = 60.0
"""Between the end of a job and that of its machines, in which its last words are read."""

ARM = 'if [ "$(id -u)" = 0 ]; then exec python3 -; else exec sudo -n python3 -; fi'
"""Line of a login's shell that takes the watchdog's text; a machine has one watchdog, however it was started."""

HOLD = "exec env FTLAUNCH_JOB=starting cat"
"""Line of a login's shell that shows the watchdog that a launcher is there, as long as it is."""

RUN_SCRIPT = "exec bash -s"


def watchdog(config: CloudCluster, *, detached: bool) -> str:
    """The program that ends a machine. `detached`: it goes on without whoever starts it."""
    settings = {
        "provider": config.provider,
        "idle_s": config.idle_minutes * 60,
        "linger_s": LINGER_S,
        "begin_s": BEGIN_S,
        "max_s": None if config.max_hours is None else config.max_hours * 3600,
        "lock": "/run/ftlaunch-watchdog.lock",
        "detached": detached,
        "metadata": "http://metadata.google.internal" if config.provider == "gcp" else "http://169.254.169.254",
        "api": "https://management.azure.com" if config.provider == "azure" else "https://compute.googleapis.com",
    }
    return f"{WATCHDOG.read_text()}\n\nmain({settings!r})\n"


def cloud_config(config: CloudCluster, public_key: str, *, watched: bool) -> str:
    """For cloud-init, which images of AWS and Azure have: whose key logs in, and the watchdog as a service, which is
    there again when the machine starts anew."""
    values: dict[str, Any] = {"ssh_authorized_keys": [public_key]}
    if watched:
        values["write_files"] = [
            {"path": PLACE, "permissions": "0700", "content": watchdog(config, detached=False)},
            {"path": UNIT_PLACE, "permissions": "0644", "content": UNIT},
        ]
        values["runcmd"] = [["systemctl", "daemon-reload"], ["systemctl", "enable", "--now", Path(UNIT_PLACE).name]]
    return f"#cloud-config\n{json.dumps(values)}\n"


def metadata(config: CloudCluster, public_key: str, *, watched: bool) -> list[dict[str, str]]:
    """For Google's guest agent: the same, the watchdog as what is run whenever the machine starts."""
    items = {"ssh-keys": f"{config.user}:{public_key}", "enable-oslogin": "FALSE"}
    if watched:
        items["startup-script"] = f"#!/usr/bin/env python3\n{watchdog(config, detached=True)}"
    return [{"key": key, "value": value} for key, value in items.items()]


def python_of(config: CloudCluster) -> str:
    """Python on the machines."""
    return f"{environment_of(config)}/bin/python" if config.python is None else config.python


def environment_of(config: CloudCluster) -> str:
    """The virtual environment that is made where the image has none."""
    home = "/root" if config.user == "root" else f"/home/{config.user}"
    return f"{home}/.ftlaunch"


def setup_lines(config: CloudCluster) -> list[str]:
    """Of bash, run on each machine: the user's own, then what makes the virtual environment."""
    if config.python is not None:
        return list(config.setup)
    place = environment_of(config)
    install = [f"{place}/bin/python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    return [
        *config.setup,
        shlex.join(["python3", "-m", "venv", place]),
        shlex.join([*install, *pinned()]),
    ]


def setup_script(config: CloudCluster) -> str:
    """The same as a program on standard input. The first line that fails ends it."""
    return "\n".join(["set -e", *setup_lines(config), ""])


def pinned() -> list[str]:
    """What ftlaunch needs, in the versions that are here: nodes of a run have the same."""
    found = []
    for name, need in requirements().items():
        extras = f"[{','.join(sorted(need.extras))}]" if need.extras else ""
        try:
            found.append(f"{name}{extras}=={version(name).partition('+')[0]}")
        except PackageNotFoundError:
            found.append(str(need))
    return found
