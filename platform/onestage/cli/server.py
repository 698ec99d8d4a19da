"""``onestage server`` and ``onestage dashboard``: the store's runs and models in a browser."""

import argparse
import json
import os
import signal
import socket
import sys
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any

from onestage.errors import DONE, FAILED, InputError

if TYPE_CHECKING:
    from onestage.tracking.server import Server, Settings

BACKEND = "MLFLOW_BACKEND_STORE_URI"
BACKEND_HELP = f"postgresql://USER@HOST/DATABASE, say (default: {BACKEND}, else the store of trainings started here)"


class Stopped(BaseException):
    """Somebody asked this process to end."""


def add(verbs: Any) -> None:
    """The verbs' parsers, for the command line."""
    server = verbs.add_parser("server", help="an MLflow server for the store, until Ctrl-C")
    server.add_argument("--backend", help=BACKEND_HELP)
    server.add_argument("--artifacts", help="folder or address for artifacts (default: mlartifacts beside the store)")
    server.add_argument("--host", default="127.0.0.1", help="to listen on (default: this machine's own 127.0.0.1)")
    server.add_argument("--port", type=int, default=5000, help="default: 5000; 0 for any free one")
    server.add_argument("--workers", type=int, default=2, help="processes that answer (default: 2)")
    server.add_argument("--auth", action="store_true", help="ask for user and password")
    server.add_argument("--allowed-hosts", metavar="NAMES", help="by which others call it, as mlflow.example.org:5000")
    server.add_argument("--json", action="store_true", help="one JSON object on stdout, when the server answers")
    server.set_defaults(run=_server)

    dashboard = verbs.add_parser("dashboard", help="the store's server in a browser; starts one where there is none")
    dashboard.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="tracking.uri=…")
    dashboard.set_defaults(run=_dashboard)


def _server(options: argparse.Namespace) -> int:
    from onestage.tracking.client import tracking_uri
    from onestage.tracking.server import Server, has_password, settings_of

    if (
        options.backend is not None
        and has_password(options.backend)
        and any(options.backend in one for one in sys.argv)
    ):
        _begin_again(options.backend)
    settings = settings_of(
        tracking_uri(options.backend or os.environ.get(BACKEND)),
        options.artifacts,
        host=options.host,
        port=options.port,
        workers=options.workers,
        auth=options.auth,
        allowed_hosts=options.allowed_hosts,
    )
    return _serve(Server(settings), as_json=options.json)


def _begin_again(backend: str) -> None:
    """The same, without the password among the arguments, where `ps` shows it to everybody."""
    at = next(place for place, one in enumerate(sys.argv) if backend in one)
    rest = sys.argv[1 : at - 1 if sys.argv[at] == backend else at] + sys.argv[at + 1 :]  # --backend URI, --backend=URI
    os.execve(sys.executable, [sys.executable, "-m", "onestage.cli", *rest], {**os.environ, BACKEND: backend})


def _serve(server: "Server", *, as_json: bool = False, browse: Callable[[str], None] | None = None) -> int:
    """Until somebody stops it."""
    settings = server.settings
    if settings.is_public:
        _warn(settings)
    before = {number: signal.signal(number, _stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        server.start()
        _announce(server, as_json=as_json)
        if browse is not None:
            browse(server.address)
        code = server.wait()
    except Stopped:
        return DONE
    finally:
        server.stop()
        for number, handler in before.items():
            signal.signal(number, handler)
    print(f"onestage: MLflow's server ended by itself with {code}: {server.last_words()}", file=sys.stderr)
    return FAILED


def _stop(number: int, frame: FrameType | None) -> None:
    for one in (signal.SIGTERM, signal.SIGINT):
        signal.signal(one, signal.SIG_IGN)  # to end the server whole, once
    raise Stopped


def _warn(settings: "Settings") -> None:
    told = "reads and deletes runs" if not settings.auth else "sees passwords under way, unless there is TLS before it"
    print(f"onestage: whoever reaches {settings.host}:{settings.port} {told}", file=sys.stderr)
    if not settings.auth:
        print("onestage: --auth asks for a password", file=sys.stderr)


def _announce(server: "Server", *, as_json: bool) -> None:
    from onestage.tracking.server import shown
    from onestage.tracking.server_auth import USER, password_file

    settings = server.settings
    password = password_file(settings.folder) if settings.auth else None
    if as_json:
        who = {"user": USER, "password_file": str(password)} if password is not None else {}
        print(json.dumps({"address": server.address, "pid": os.getpid(), **shown(settings), **who}), flush=True)
        return
    print(f"MLflow answers at {server.address}")
    for name, value in shown(settings).items():
        print(f"{name:10} {value}")
    if settings.is_public:
        print(f"others     http://{socket.gethostname()}:{server.address.rpartition(':')[2]}")
    print(f"use it     export MLFLOW_TRACKING_URI={server.address}")
    if password is not None:
        print(f"           export MLFLOW_TRACKING_USERNAME={USER} MLFLOW_TRACKING_PASSWORD=$(cat {password})")
    print("Ctrl-C ends it", flush=True)


def _dashboard(options: argparse.Namespace) -> int:
    from onestage.config import compose
    from onestage.tracking.client import check, is_server
    from onestage.tracking.dashboard import home
    from onestage.tracking.redaction import without_user
    from onestage.tracking.server import PORT, Server, running, settings_of
    from onestage.tracking.tracker import store_uri

    config = compose("train", options.overrides)
    uri = store_uri(config)
    if uri is None:
        raise InputError("tracking=none keeps no runs to look at")

    def browse(address: str) -> None:
        _open(home(uri, address, config["tracking"]["experiment"]))

    if is_server(uri):
        check(uri)
        browse(without_user(uri))
        return DONE
    if (address := running(uri)) is not None:
        browse(address)
        return DONE
    return _serve(Server(settings_of(uri, None, port=_free_or_any(PORT))), browse=browse)


def _free_or_any(port: int) -> int:
    with socket.socket() as probe:
        return port if probe.connect_ex(("127.0.0.1", port)) else 0


def _open(address: str) -> None:
    """In the browser of whoever sits before a screen; else the address is all that one can have."""
    import webbrowser

    screen = sys.platform != "linux" or any(name in os.environ for name in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER"))
    if screen and webbrowser.open(address):
        print(f"opened {address}")
    else:
        print(f"no browser here: open {address}")
    sys.stdout.flush()
