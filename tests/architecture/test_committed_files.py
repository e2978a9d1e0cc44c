"""No file knows the machine it was written on, or where packages come from on it."""

from __future__ import annotations

import re

# Put together here, so that this file does not contain what it forbids. Ray's images have their home in /home/ray.
HOME = re.compile(r"(?<![\w.$}])/" + r"(?:(?:home|Users)/(?!ray/)[A-Za-z0-9._-]+|root)" + r"/")
REGISTRY = re.compile("|".join(["pypi" + r"\.org", "pythonhosted" + r"\.org", r"download\.py" + r"torch\.org"]))
INDEX_OPTION = re.compile("--(?:extra-)?index" + "-url|--find" + "-links")
FORBIDDEN = (HOME, REGISTRY, INDEX_OPTION)


def offences(text: str) -> list[str]:
    return [match.group() for pattern in FORBIDDEN for match in pattern.finditer(text)]


def test_no_home_folders_and_no_package_registries(root, files):
    assert "pyproject.toml" in files
    texts = {name: (root / name).read_text(encoding="utf-8", errors="replace") for name in files}
    assert {name: found for name, text in texts.items() if (found := offences(text))} == {}


def test_what_is_forbidden_is_found():
    assert offences("see /" + "home/ann/ftlaunch and /" + "root/x")
    assert offences("https://pypi" + ".org/simple")
    assert not offences("https://example.com/home/page/x, /home/ray/anaconda3, ~/.cache, ./root/x")
