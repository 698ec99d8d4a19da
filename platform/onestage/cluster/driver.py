"""The process that talks to Ray for a training on a cluster, apart from the one that the user started.

Ray ends a process whose node or head is lost, without asking; the parent (``supervisor``) outlives that. Reads the job
from stdin, whose end is the parent's, and writes messages as JSON lines to the file descriptor in ``MESSAGES``.
"""

import importlib
import json
import os
import sys
import threading
import traceback
from contextlib import suppress
from typing import Any, TextIO

from onestage.cluster import connection, ray_train
from onestage.cluster.job import Job
from onestage.cluster.resources import TooFewResources
from onestage.cluster.stop import Preempted, Stop
from onestage.cluster.supervisor import MESSAGES
from onestage.errors import InputError
from onestage.training.endings import Diverged


def main() -> None:
    """Trains, and says as the last message how that ended."""
    # Ray reads its token when it is imported; an address that is no use is told when the job asks for it.
    with suppress(InputError):
        connection.quiet()
        connection.show_token(connection.resolved(sys.argv[1]))
    importlib.import_module("ray.train.torch")  # takes seconds, in which the parent gets the job ready
    line = sys.stdin.readline()
    if not line:  # there was none
        return
    job: Job = json.loads(line)
    threading.Thread(target=_end_with_parent, name="parent-watch", daemon=True).start()
    stop = Stop()
    descriptor = int(os.environ.pop(MESSAGES))
    os.set_inheritable(descriptor, False)  # what this process starts must not hold it open
    with os.fdopen(descriptor, "w", buffering=1) as messages:
        try:
            with stop.signals():
                result = ray_train.on_cluster(job, show=lambda message: _tell(messages, message), stop=stop)
            _tell(messages, {"result": result})
        except BaseException as error:
            _tell(messages, {"error": {"kind": kind_of(error), "message": _words(error), "story": _story(error)}})


def kind_of(error: BaseException) -> str:
    """What the parent makes of it; ``lost`` is what another try may mend."""
    kinds: dict[type[BaseException], str] = {
        InputError: "input",
        Diverged: "diverged",
        TooFewResources: "few",
        KeyboardInterrupt: "interrupted",
        Preempted: "preempted",
        ray_train.GaveUp: "failed",
    }
    return next((kind for known, kind in kinds.items() if isinstance(error, known)), "lost")


def _words(error: BaseException) -> str:
    """Ray's own about its connections name numbers of actors and ports, and no cause."""
    from ray.exceptions import GetTimeoutError, RayActorError, RpcError

    if isinstance(error, GetTimeoutError | RayActorError | RpcError):
        return f"its node or the head of the cluster is away ({type(error).__name__})"
    return str(error)


def _story(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))


def _tell(messages: TextIO, message: dict[str, Any]) -> None:
    messages.write(json.dumps(message) + "\n")


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(1)


if __name__ == "__main__":
    main()
