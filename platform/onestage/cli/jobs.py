"""``onestage submit|status|logs|stop|list``: jobs on a Ray cluster that is reached over http, or in Slurm."""

import argparse
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from onestage.cli.terminal import age, plain
from onestage.errors import DONE, InputError

if TYPE_CHECKING:
    from onestage.cluster.queue import JobInfo


class Verb(NamedTuple):
    """What stands behind a verb: names in one of the ``forms``, settings of a training, and its ``own`` KEY=VALUE."""

    forms: tuple[str, ...] = ("",)
    own: tuple[str, ...] = ()

    def takes(self, names: Sequence[str]) -> bool:
        """Words in capitals stand for any; the others for themselves."""
        forms = [form.split() for form in self.forms]
        fitting = [form for form in forms if len(form) == len(names)]
        return any(all(w.isupper() or w == n for w, n in zip(form, names, strict=True)) for form in fitting)


VERBS: Final = {
    "train": Verb(),
    "evaluate": Verb(("RUN",), own=("split",)),
    "sweep": Verb(("", "resume NAME")),
}


def add(verbs: Any) -> None:
    """The verbs' parsers, for the command line."""
    submit = verbs.add_parser("submit", help="send a training or an evaluation to a cluster, as a job")
    submit.add_argument("verb", choices=VERBS, help="what the job is to do")
    submit.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as of the verb; an evaluation has its RUN")
    submit.add_argument("--follow", action="store_true", help="show what the job writes, to its end")
    submit.add_argument("--render", action="store_true", help="print what Slurm would be sent, and send nothing")
    _address(submit)
    _json(submit)
    submit.set_defaults(run=_submit)
    status = verbs.add_parser("status", help="how a job is")
    _of_a_job(status)
    _json(status)
    status.set_defaults(run=_status)
    logs = verbs.add_parser("logs", help="what a job has written")
    _of_a_job(logs)
    logs.add_argument("-f", "--follow", action="store_true", help="go on to its end; exits with the job's code")
    logs.set_defaults(run=_logs)
    stop = verbs.add_parser("stop", help="end a job, which saves a checkpoint first")
    _of_a_job(stop)
    _json(stop)
    stop.set_defaults(run=_stop)
    listed = verbs.add_parser("list", help="my jobs on a cluster")
    listed.add_argument("--all", action="store_true", help="everybody's")
    _address(listed)
    _json(listed)
    listed.set_defaults(run=_list)


def _of_a_job(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("job", metavar="ID", help="as onestage submit printed it")
    _address(verb)


def _address(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--address",
        metavar="URL",
        help="http://HOST:8265, or slurm (default: RAY_API_SERVER_ADDRESS, or the local cluster)",
    )


def _json(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--json", action="store_true", help="one JSON object on stdout")


def _submit(options: argparse.Namespace) -> int:
    from onestage.cluster import queue
    from onestage.config import compose

    verb = VERBS[options.verb]
    settings = [one for one in options.overrides if "=" in one or one.startswith("~")]
    names = [one for one in options.overrides if one not in settings]
    if not verb.takes(names):
        wanted = " or ".join(f"{form} KEY=VALUE …".strip() for form in verb.forms)
        raise InputError(f"submit {options.verb} takes {wanted}, not {' '.join(names) or 'KEY=VALUE alone'}")
    composed = [one for one in settings if one.partition("=")[0] not in verb.own]
    if options.verb == "sweep":
        from onestage.config.space import fixed

        composed = fixed(composed)
    if not any(one.startswith("cluster=") for one in composed):
        composed.append("cluster=slurm" if options.address == "slurm" else "cluster=ray")
    config = compose("train", composed)
    if options.render:
        print(queue.rendered(options.verb, settings, names=names, config=config), end="")
        return DONE
    to = queue.at(options.address) if options.address else queue.of_config(config["cluster"])
    job = to.submit(options.verb, settings, names=names, config=config)
    print(json.dumps({"job": job, "address": to.address}) if options.json else job, flush=True)
    return to.follow(job) if options.follow else DONE


def _status(options: argparse.Namespace) -> int:
    from onestage.cluster import queue

    return _show(queue.at(options.address).get(options.job), as_json=options.json)


def _stop(options: argparse.Namespace) -> int:
    from onestage.cluster import queue

    return _show(queue.at(options.address).stop(options.job), as_json=options.json)


def _show(info: "JobInfo", *, as_json: bool) -> int:
    from onestage.cluster.queue import links

    described = _described(info, links([info]))
    if as_json:
        print(json.dumps(described))
    else:
        for name, value in described.items():
            if value not in (None, ""):
                print(f"{name:10} {plain(str(value))}")
    return DONE


def _logs(options: argparse.Namespace) -> int:
    from onestage.cluster import queue

    jobs = queue.at(options.address)
    if options.follow:
        return jobs.follow(options.job)
    print(jobs.logs(options.job), end="")
    return DONE


def _list(options: argparse.Namespace) -> int:
    from onestage.cluster import queue

    infos = queue.at(options.address).listed(everybodys=options.all)
    found = queue.links(infos)
    described = [_described(info, found) for info in infos]
    if options.json:
        print(json.dumps({"jobs": described}))
        return DONE
    for one in described:
        user = f"{one['user'] or '-':10} " if options.all else ""
        told = (
            f"{one['job']:28} {one['state']:10} {one['age']:>8} {user}{one['mlflow'] or '-'}  {one['command'] or '-'}"
        )
        print(plain(told))
    return DONE


def _described(info: "JobInfo", links: dict[str, str]) -> dict[str, Any]:
    return {
        "job": info.id,
        "state": info.state,
        "exit_code": info.exit_code,
        "reason": info.reason,
        "age": age(info.age_s),
        "age_s": round(info.age_s, 1),
        "user": info.user,
        "verb": info.verb,
        "command": info.command,
        "mlflow": links.get(info.id),
    }
