"""Which storage errors the user can mend, and how; the rest is passing trouble.

fsspec's backends raise OSErrors where they can and their client's own exceptions otherwise. Those clients are
optional packages, so their exceptions are known here by name.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

from ..recipes.errors import FtlaunchError, InfrastructureError, UserError

EXTRAS = {
    "s3": "pip install 'ftlaunch[s3]'",
    "s3a": "pip install 'ftlaunch[s3]'",
    "gs": "pip install 'ftlaunch[gcs]'",
    "gcs": "pip install 'ftlaunch[gcs]'",
    "http": "pip install aiohttp",
    "https": "pip install aiohttp",
    "az": "pip install adlfs",
    "abfs": "pip install adlfs",
    "hf": "pip install huggingface_hub",
}

CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or AWS_PROFILE); AWS_ENDPOINT_URL for another endpoint",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "gcs": "GOOGLE_APPLICATION_CREDENTIALS",
}

NO_CREDENTIALS = {"NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "DefaultCredentialsError"}
FULL = {errno.ENOSPC, errno.EDQUOT}
RETRIED_STATUS = {408, 425, 429}


def protocol(url: str) -> str:
    """`s3` of `s3://bucket/key`; `file` of a plain path."""
    return url.partition("://")[0] if "://" in url else "file"


def _denied(url: str, error: Exception) -> UserError:
    name = protocol(url)
    if name == "file":
        return UserError(f"{url}: access denied ({error}). Check the permissions of the file and its folders.")
    remedy = CREDENTIALS.get(name, "what the server asks for")
    return UserError(f"{url}: access denied ({error}). {name} credentials come from the environment; check {remedy}.")


def _not_found(url: str, error: Exception) -> UserError:
    return UserError(f"{url}: not found ({name_of(url)}: {error or type(error).__name__}). Check the path.")


def name_of(url: str) -> str:
    """What kind of place a URL is, in words."""
    return {"file": "local disk"}.get(protocol(url), protocol(url))


def _missing_package(url: str, error: Exception) -> UserError:
    name = protocol(url)
    remedy = f"Install it with: {EXTRAS[name]}" if name in EXTRAS else "Known: file, " + ", ".join(EXTRAS)
    return UserError(f"{url}: cannot open {name}:// ({error}). {remedy}")


def _http_status(url: str, error: Exception) -> FtlaunchError | None:
    status: int = vars(error).get("status", 0)
    if status in (401, 403):
        return _denied(url, error)
    if 400 <= status < 500 and status not in RETRIED_STATUS:
        return UserError(f"{url}: the server refuses the request: {error}")
    return None


def _operating_system(url: str, error: OSError) -> FtlaunchError | None:
    if error.errno in FULL:
        return InfrastructureError(f"{url}: no space left ({error})")
    if error.errno == errno.EROFS:
        return UserError(f"{url}: the file system is read-only")
    if error.errno in (errno.ENOTSUP, errno.ENAMETOOLONG, errno.ELOOP):
        return InfrastructureError(f"{url}: {error}")
    return None


def _package_or_protocol(url: str, error: Exception) -> FtlaunchError | None:
    is_about_it = isinstance(error, ImportError) or "rotocol" in str(error)
    return _missing_package(url, error) if is_about_it else None


def _kind(url: str, error: OSError) -> UserError:
    return UserError(f"{url}: {error.strerror or 'a folder where a file is expected, or the reverse'}")


def _bug(url: str, error: Exception) -> FtlaunchError:
    raise error


_RULES: tuple[tuple[set[str], Callable[[str, Any], FtlaunchError | None]], ...] = (
    ({"FtlaunchError"}, lambda url, error: error),
    ({"FileNotFoundError"}, _not_found),
    ({"PermissionError"} | NO_CREDENTIALS, _denied),
    ({"IsADirectoryError", "NotADirectoryError"}, _kind),
    ({"ClientResponseError"}, _http_status),
    ({"OSError"}, _operating_system),
    ({"ImportError", "ValueError"}, _package_or_protocol),
    ({"TypeError", "AttributeError", "AssertionError", "LookupError", "NameError"}, _bug),
)


def definite_error(url: str, error: Exception) -> FtlaunchError | None:
    """The error to show for one that trying again cannot mend; None for passing trouble. What is no storage error
    at all is raised again as it is."""
    names = {cls.__name__ for cls in type(error).__mro__}
    for kinds, rule in _RULES:
        if names & kinds:
            return rule(url, error)
    return None
