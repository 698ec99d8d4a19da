"""The one door to MLflow: which store, whether it answers, and a client that is imported on the first call (5 s)."""

import logging
import os
import ssl
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from onestage.errors import InputError
from onestage.tracking.redaction import redact, without_user

if TYPE_CHECKING:
    from mlflow import MlflowClient

SQLITE: Final = "sqlite:///"
DEFAULT_URI: Final = "sqlite:///mlflow.db"
REACH_TIMEOUT_S: Final = 5.0
DEFAULTS: Final = {
    # MLflow's own defaults keep one call to a dead server waiting for 247 s.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    # At a run's end it would print its address on stdout, with the password.
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_UV_AUTO_DETECT": "false",
}
_WAYS_OUT: Final = "start one (`onestage server`), set MLFLOW_TRACKING_URI to another store, or use tracking=none"


def set_defaults() -> None:
    """Settings that MLflow reads from the environment, where the user has not chosen; call before importing it."""
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    logging.getLogger("alembic").setLevel(logging.WARNING)  # else a first run prints its 60 migrations


@cache
def client(uri: str) -> "MlflowClient":
    """The client for an absolute tracking URI (`onestage.tracking.runs.tracking_uri`); the process keeps it."""
    set_defaults()
    from mlflow import MlflowClient

    if uri.startswith(SQLITE):
        Path(uri.removeprefix(SQLITE)).parent.mkdir(parents=True, exist_ok=True)
    return MlflowClient(tracking_uri=uri)


def refused(error: Exception) -> bool:
    """Whether the store will never take what it was sent, however often: a wrong name or value, not an outage."""
    return getattr(error, "error_code", "") == "INVALID_PARAMETER_VALUE"


def missing(error: Exception) -> bool:
    """Whether the store answered that there is no such thing."""
    return getattr(error, "error_code", "") in ("RESOURCE_DOES_NOT_EXIST", "NOT_FOUND")


def tracking_uri(configured: str | None) -> str:
    """The store to use: as configured, else MLFLOW_TRACKING_URI, else a SQLite file here; absolute where it's local.

    >>> tracking_uri("https://mlflow.example.org/")
    'https://mlflow.example.org/'
    """
    uri = with_user(configured or os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_URI)
    if uri.startswith(SQLITE):
        return SQLITE + str(Path(uri.removeprefix(SQLITE)).expanduser().resolve())
    return uri if ":" in uri or uri.startswith("databricks") else Path(uri).expanduser().resolve().as_uri()


def with_user(uri: str) -> str:
    """The URI with the user and password that MLFLOW_TRACKING_URI has for it: on disk it is kept without them."""
    named = os.environ.get("MLFLOW_TRACKING_URI", "")
    return named if uri == without_user(named) else uri


def is_server(uri: str) -> bool:
    """Whether the store is reached over HTTP."""
    return uri.startswith(("http://", "https://"))


def check(uri: str) -> None:
    """Raises InputError, within about 6 s (and MLflow's import), when no usable store is at ``uri``."""
    if is_server(uri):
        _reach(uri)
    try:
        client(uri).search_experiments(max_results=1)
    except Exception as error:
        if is_server(uri) and "401" in str(error):
            who = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD to those that it knows"
            raise InputError(f"{redact(uri)} asks for user and password: {who}") from error
        reason = redact(str(error).strip().splitlines()[0])
        raise InputError(f"MLflow can't use the store {redact(uri)}: {reason}; {_WAYS_OUT}") from error


def _reach(uri: str) -> None:
    """Ask the server for a sign of life without MLflow, which would take its time."""
    address = without_user(uri).rstrip("/") + "/health"
    try:
        urlopen(Request(address), timeout=REACH_TIMEOUT_S).close()
    except HTTPError:
        return  # It answers; whether it lets us in, MLflow's client finds out.
    except (OSError, ValueError) as error:
        reason = error.reason if isinstance(error, URLError) else error
        if isinstance(reason, ssl.SSLError):
            return  # MLflow has its own settings for certificates.
        raise InputError(f"no MLflow server answers at {redact(uri)} ({reason}): {_WAYS_OUT}") from None
