"""Basic auth for an MLflow server: an administrator with a random password, in files that only their owner reads."""

import os
import secrets
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from onestage.errors import InputError

FOLDER: Final = "mlflow-auth"
USER: Final = "admin"
PASSWORD_BYTES: Final = 24


def password_file(folder: Path) -> Path:
    """Where the administrator's password lies, for a store whose things are kept in ``folder``."""
    return folder / FOLDER / "admin_password"


def prepare(folder: Path) -> Path:
    """MLflow's configuration file; the password is made at the first call, and kept. Raises InputError."""
    if find_spec("flask_wtf") is None:
        raise InputError("--auth needs packages that are not installed: pip install 'onestage[auth]'")
    own = folder / FOLDER
    own.mkdir(mode=0o700, parents=True, exist_ok=True)
    own.chmod(0o700)
    password, users = password_file(folder), own / "users.db"
    if not password.exists():
        if users.exists():
            raise InputError(f"{password} is gone, but {users} has its user: bring it back, or delete {own}")
        _write(password, secrets.token_urlsafe(PASSWORD_BYTES) + "\n")
    password.chmod(0o600)
    settings = {
        "default_permission": "READ",
        "database_uri": f"sqlite:///{users}",
        "admin_username": USER,
        "admin_password": password.read_text().strip(),
        "authorization_function": "mlflow.server.auth:authenticate_request_basic_auth",
    }
    config = own / "basic_auth.ini"
    # Its reader takes % for the start of a name.
    lines = [f"{key} = {value.replace('%', '%%')}" for key, value in settings.items()]
    config.unlink(missing_ok=True)
    _write(config, "\n".join(["[mlflow]", *lines]) + "\n")
    return config


def _write(path: Path, text: str) -> None:
    """A new file that nobody else can read, not even while it is written."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
