"""``onestage submit|status|logs|stop|list``: jobs on a Ray cluster that is reached over http."""

import argparse
import json
from typing import TYPE_CHECKING, Any, Final

from onestage.cli.terminal import plain
from onestage.errors import DONE, InputError

if TYPE_CHECKING:
    from onestage.cluster.jobs import JobInfo

VERBS: Final = ("train", "evaluate")


def add(verbs: Any) -> None:
    """The verbs' parsers, for the command line."""
    submit = verbs.add_parser("submit", help="send a training or an evaluation to a cluster, as a job")
    submit.add_argument("verb", choices=VERBS, help="what the job is to do")
    submit.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as of the verb; an evaluation has its RUN")
    submit.add_argument("--follow", action="store_true", help="show what the job writes, to its end")
    _address_and_json(submit)
    submit.set_defaults(run=_submit)
    status = verbs.add_parser("status", help="how a job is")
    _job(status, _status)
    logs = verbs.add_parser("logs", help="what a job has written")
    logs.add_argument("-f", "--follow", action="store_true", help="go on to its end; exits with the job's code")
    logs.add_argument("job", metavar="ID", help="as onestage submit printed it")
    logs.add_argument("--address", metavar="URL", help="http://HOST:8265 (default: RAY_API_SERVER_ADDRESS)")
    logs.set_defaults(run=_logs)
    stop = verbs.add_parser("stop", help="end a job, which saves a checkpoint first")
    _job(stop, _stop)
    listed = verbs.add_parser("list", help="my jobs on a cluster")
    listed.add_argument("--all", action="store_true", help="everybody's")
    _address_and_json(listed)
    listed.set_defaults(run=_list)


def _job(verb: argparse.ArgumentParser, run: Any) -> None:
    verb.add_argument("job", metavar="ID", help="as onestage submit printed it")
    _address_and_json(verb)
    verb.set_defaults(run=run)


def _address_and_json(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--address", metavar="URL", help="http://HOST:8265 (default: RAY_API_SERVER_ADDRESS)")
    verb.add_argument("--json", action="store_true", help="one JSON object on stdout")


def _submit(options: argparse.Namespace) -> int:
    from onestage.cluster import jobs
    from onestage.config import compose

    settings = [one for one in options.overrides if "=" in one]
    runs = [one for one in options.overrides if "=" not in one]
    if len(runs) != (options.verb == "evaluate"):
        wanted = "evaluate has one RUN" if options.verb == "evaluate" else "write KEY=VALUE, as trainer.max_epochs=10"
        raise InputError(f"{' '.join(runs) or 'nothing'!r} stands where no override is: {wanted}")
    composed = [one for one in settings if not (options.verb == "evaluate" and one.startswith("split="))]
    if not any(one.startswith("cluster=") for one in composed):
        composed.append("cluster=ray")
    config = compose("train", composed)
    where = jobs.address_of(options.address or _overridden(settings), config["cluster"]["address"])
    job = jobs.submit(options.verb, options.overrides, address=where, config=config)
    if options.json:
        print(json.dumps({"job": job, "address": where}), flush=True)
    else:
        print(job, flush=True)
    return jobs.follow(job, address=where) if options.follow else DONE


def _overridden(settings: list[str]) -> str | None:
    addresses = [one.partition("=")[2] for one in settings if one.startswith("cluster.address=")]
    return addresses[-1] if addresses and addresses[-1] not in ("auto", "null") else None


def _status(options: argparse.Namespace) -> int:
    from onestage.cluster import jobs

    return _show(jobs.known(options.job, address=options.address), as_json=options.json)


def _stop(options: argparse.Namespace) -> int:
    from onestage.cluster import jobs

    return _show(jobs.stop(options.job, address=options.address), as_json=options.json)


def _show(info: "JobInfo", *, as_json: bool) -> int:
    from onestage.cluster import jobs

    described = _described(info, jobs.links([info]))
    if as_json:
        print(json.dumps(described))
    else:
        for name, value in described.items():
            if value not in (None, ""):
                print(f"{name:10} {plain(str(value))}")
    return DONE


def _logs(options: argparse.Namespace) -> int:
    from onestage.cluster import jobs

    if options.follow:
        return jobs.follow(options.job, address=options.address)
    print(jobs.logs(options.job, address=options.address), end="")
    return DONE


def _list(options: argparse.Namespace) -> int:
    from onestage.cluster import jobs

    infos = jobs.jobs(address=options.address, everybodys=options.all)
    links = jobs.links(infos)
    described = [_described(info, links) for info in infos]
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
        "age": _age(info.age_s),
        "age_s": round(info.age_s, 1),
        "user": info.user,
        "verb": info.verb,
        "command": info.command,
        "mlflow": links.get(info.id),
    }


def _age(seconds: float) -> str:
    """In the largest unit that fits.

    >>> _age(59), _age(3600), _age(200_000)
    ('59 s', '60 min', '55 h')
    """
    for unit, length, until in (("s", 1, 60), ("min", 60, 7200), ("h", 3600, 259_200)):
        if seconds < until:
            return f"{int(seconds // length)} {unit}"
    return f"{int(seconds // 86_400)} days"
