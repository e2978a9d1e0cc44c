"""Which storage errors the user can mend, and how; the rest is passing trouble.

fsspec's backends raise OSErrors where they can and their client's own exceptions otherwise. Those clients are
optional packages, so their exceptions are known here by name.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable, Mapping
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
    "http": "~/.netrc, with storage_options: {client_kwargs: {trust_env: true}}",
    "https": "~/.netrc, with storage_options: {client_kwargs: {trust_env: true}}",
    "az": "AZURE_STORAGE_CONNECTION_STRING, or AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
    "abfs": "AZURE_STORAGE_CONNECTION_STRING, or AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
    "hf": "HF_TOKEN",
}

NO_CREDENTIALS = {"NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "DefaultCredentialsError"}
FULL = {errno.ENOSPC, errno.EDQUOT}
RETRIED_STATUS = {408, 425, 429}
THROTTLED_STATUS = {429, 503}

UNREACHABLE = {"EndpointConnectionError", "ClientConnectorError", "gaierror", "ConnectionRefusedError"}
"""Nobody answers at all, or there is no such name."""

CUT_OFF = {"ClientPayloadError", "IncompleteReadError", "IncompleteRead", "ResponseStreamingError", "ShortReadError"}

_EXPIRED = "the credentials have expired ({}). Renew them and run the same command again: it goes on where it was."
_WRONG_KEY = "the store does not accept the key ({}). Check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, or the profile."
_ELSEWHERE = (
    "the bucket lies in another region, or at another endpoint ({}). Set AWS_DEFAULT_REGION, or the source's "
    "storage_options: {{client_kwargs: {{region_name: REGION}}}}."
)
CHANGED_REMEDY = (
    "Bring the old one back, go on with the data as it is now with --accept-changed-data (the epoch begins again), or "
    "begin a new run with --fresh."
)
_SHORTER = f"the file is shorter than when it was listed ({{}}): it was changed. {CHANGED_REMEDY}"
S3_CODES = {
    "ExpiredToken": _EXPIRED,
    "TokenRefreshRequired": _EXPIRED,
    "InvalidToken": _EXPIRED,
    "InvalidAccessKeyId": _WRONG_KEY,
    "SignatureDoesNotMatch": _WRONG_KEY,
    "AuthorizationHeaderMalformed": _ELSEWHERE,
    "PermanentRedirect": _ELSEWHERE,
    "IllegalLocationConstraintException": _ELSEWHERE,
    "301": _ELSEWHERE,
    "NoSuchBucket": "there is no such bucket at this endpoint ({}). Check its name, AWS_ENDPOINT_URL and endpoint_url.",
    "InvalidObjectState": "the object is archived ({}). Restore it from Glacier first.",
    "InvalidRange": _SHORTER,
    "416": _SHORTER,
}
"""What S3's error codes (Amazon S3 API reference, "Error responses") mean for whoever started the run."""


def protocol(url: str) -> str:
    """`s3` of `s3://bucket/key`; `file` of a plain path."""
    return url.partition("://")[0] if "://" in url else "file"


def _denied(url: str, error: Exception) -> FtlaunchError:
    name = protocol(url)
    if name == "file":
        return UserError(f"{url}: access denied ({error}). Check the permissions of the file and its folders.")
    if known := _s3_code(url, error):
        return known
    remedy = CREDENTIALS.get(name, "what the server asks for")
    return UserError(
        f"{url}: access denied ({error}). {name} credentials come from the environment; check {remedy}. They "
        "must allow to list and to read; files can also be named one by one, which needs no listing."
    )


def _no_credentials(url: str, error: Exception) -> UserError:
    remedy = CREDENTIALS.get(protocol(url), "what the store asks for")
    public = ", or for public data storage_options: {anon: true}" if protocol(url) in ("s3", "s3a") else ""
    return UserError(f"{url}: no credentials ({error}). They come from the environment: set {remedy}{public}.")


def _s3_code(url: str, error: Exception) -> FtlaunchError | None:
    """What S3 says, where it says so in its own words; s3fs keeps them as the cause of its OSErrors."""
    response = _response(error)
    code, status = response.get("Error", {}).get("Code"), response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    if code == "RequestTimeTooSkewed":
        return InfrastructureError(
            f"{url}: the clock of {socket.gethostname()} is wrong, so the store refuses its signatures ({error}). Set "
            "it (timedatectl set-ntp true)."
        )
    if code in S3_CODES:
        return UserError(f"{url}: {S3_CODES[code].format(error)}")
    if 400 <= status < 500 and status not in RETRIED_STATUS | {401, 403, 404, 409}:
        return UserError(
            f"{url}: the store refuses the request ({code}: {error}). Check region, endpoint and credentials."
        )
    return None


def _response(error: BaseException) -> dict[str, Any]:
    """The answer that botocore's ClientError holds, itself or as the cause of s3fs's error."""
    for one in (error, error.__cause__):
        if one is not None and "ClientError" in _names(one) and "response" in vars(one):
            found: dict[str, Any] = vars(one)["response"]
            return found
    return {}


def _names(error: BaseException) -> set[str]:
    return {cls.__name__ for cls in type(error).__mro__}


def response_headers(error: Exception) -> Mapping[str, Any]:
    """HTTP headers of the answer that an error was made of; none where there was no answer."""
    if "ClientResponseError" in _names(error):
        return vars(error).get("headers") or {}
    headers: Mapping[str, Any] = _response(error).get("ResponseMetadata", {}).get("HTTPHeaders", {})
    return headers


def _status(error: Exception) -> int:
    found: int = vars(error).get("status") or _response(error).get("ResponseMetadata", {}).get("HTTPStatusCode") or 0
    return found


def is_throttling(error: Exception) -> bool:
    """Whether the store refuses to be asked so often."""
    return _status(error) in THROTTLED_STATUS


def kind_of_trouble(error: Exception) -> str:
    """Passing trouble in a word, for counting."""
    if is_throttling(error):
        return "throttled"
    if _status(error):
        return "server_error"
    if _names(error) & CUT_OFF:
        return "cut_off"
    return "timeout" if any("Timeout" in name for name in _names(error)) else "connection"


def unreachable(error: Exception) -> str:
    """What to check when nobody answers; empty when somebody did."""
    causes = (error, error.__cause__, error.__context__)
    if not any(_names(one) & UNREACHABLE for one in causes if one is not None):
        return ""
    return (
        f"Nobody answers there. Check the address (endpoint_url in storage_options, AWS_ENDPOINT_URL), and the name "
        f"service and network of {socket.gethostname()}."
    )


def _not_found(url: str, error: Exception) -> FtlaunchError:
    known = _s3_code(url, error)
    return known or UserError(f"{url}: not found ({name_of(url)}: {error or type(error).__name__}). Check the path.")


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
    if status == 416:
        return UserError(f"{url}: {S3_CODES['416'].format(error)}")
    if 400 <= status < 500 and status not in RETRIED_STATUS:
        return UserError(f"{url}: the server refuses the request: {error}")
    return None


def _operating_system(url: str, error: OSError) -> FtlaunchError | None:
    if known := _s3_code(url, error):
        return known
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


def _untrusted(url: str, error: Exception) -> FtlaunchError | None:
    if "CERTIFICATE_VERIFY_FAILED" not in str(error):
        return None  # a handshake that broke off passes
    remedy = "Set AWS_CA_BUNDLE" if protocol(url) in ("s3", "s3a") else "Set SSL_CERT_FILE"
    return UserError(f"{url}: the certificate is not trusted ({error}). {remedy} to a file with its authority.")


def _refused(url: str, error: Exception) -> UserError:
    return UserError(f"{url}: not a request that the store understands: {error}. Check the path and storage_options.")


def _bug(url: str, error: Exception) -> FtlaunchError:
    raise error


_RULES: tuple[tuple[set[str], Callable[[str, Any], FtlaunchError | None]], ...] = (
    ({"FtlaunchError"}, lambda url, error: error),
    ({"FileNotFoundError"}, _not_found),
    (NO_CREDENTIALS, _no_credentials),
    ({"PermissionError"}, _denied),
    ({"IsADirectoryError", "NotADirectoryError"}, _kind),
    ({"ClientResponseError"}, _http_status),
    ({"ClientConnectorCertificateError", "SSLError"}, _untrusted),
    ({"ParamValidationError", "InvalidURL", "InvalidRegionError"}, _refused),
    ({"ClientError"}, _s3_code),
    ({"OSError"}, _operating_system),
    ({"ImportError", "ValueError"}, _package_or_protocol),
    ({"TypeError", "AttributeError", "AssertionError", "LookupError", "NameError"}, _bug),
)


def definite_error(url: str, error: Exception) -> FtlaunchError | None:
    """The error to show for one that trying again cannot mend; None for passing trouble. What is no storage error
    at all is raised again as it is."""
    names = _names(error)
    for kinds, rule in _RULES:
        if names & kinds:
            return rule(url, error)
    return None
