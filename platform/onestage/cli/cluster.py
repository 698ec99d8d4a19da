"""``onestage cluster``: a Ray cluster of several nodes on this machine, for trying things out."""

import argparse
import json
import os
import sys
from typing import TYPE_CHECKING, Any

from onestage.cli.terminal import count
from onestage.errors import DONE, InputError

if TYPE_CHECKING:
    from onestage.cluster.local_cluster import LocalCluster


def add(verbs: Any) -> None:
    """The verb's parsers, for the command line."""
    cluster = verbs.add_parser("cluster", help="a Ray cluster of several nodes on this machine").add_subparsers(
        metavar="VERB", required=True
    )
    up = cluster.add_parser("up", help="start a head and workers, which go on in the background")
    up.add_argument("--workers", type=count, required=True, metavar="N", help="nodes besides the head")
    up.add_argument("--cpus", type=count, default=1, metavar="N", help="of each worker, as Ray counts (default: 1)")
    up.add_argument("--gpus", type=_whole, default=0, metavar="N", help="of each worker (default: 0)")
    up.add_argument("--head-cpus", type=_whole, default=0, metavar="N", help="of the head, for tasks (default: 0)")
    up.add_argument(
        "--namespaces", action="store_true", help="each node a host of its own in a network namespace (root)"
    )
    _name_and_json(up)
    up.set_defaults(run=_up)
    down = cluster.add_parser("down", help="end a cluster, and remove what it wrote")
    _name_and_json(down)
    down.set_defaults(run=_down)
    status = cluster.add_parser("status", help="which nodes are alive")
    _name_and_json(status)
    status.set_defaults(run=_status)
    execute = cluster.add_parser(
        "exec",
        help="run a command with the cluster's address and token, on a node's host",
        usage="%(prog)s [-h] [--name NAME] [NODE] -- COMMAND …",
    )
    execute.add_argument("--name", default="default", help="of the cluster (default: default)")
    execute.add_argument("words", nargs=argparse.REMAINDER, metavar="[NODE] -- COMMAND …", help="NODE: head (default)")
    execute.set_defaults(run=_execute)


def _name_and_json(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--name", default="default", help="of the cluster (default: default)")
    verb.add_argument("--json", action="store_true", help="one JSON object on stdout")


def _whole(text: str) -> int:
    return 0 if text == "0" else count(text)


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _up(options: argparse.Namespace) -> int:
    from onestage.cluster import local_cluster

    cluster = local_cluster.up(
        options.name,
        workers=options.workers,
        cpus=options.cpus,
        gpus=options.gpus,
        head_cpus=options.head_cpus,
        namespaces=options.namespaces,
        say=_say,
    )
    if options.json:
        print(json.dumps(_described(cluster)))
        return DONE
    name = "" if cluster.name == "default" else f" --name {cluster.name}"
    train = f"onestage train cluster=ray cluster.address={cluster.address} cluster.num_workers={options.workers}"
    told = f"{options.workers} {'worker' if options.workers == 1 else 'workers'} with {options.cpus} CPUs each"
    print(f"cluster {cluster.name} is up: a head and {told}")
    if cluster.subnet is None:
        print(f"address    {cluster.address}\ndashboard  {cluster.dashboard}")
        print(f"train      {train} …")
        print("other programs that use Ray need")
        for variable in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"):
            print(f"  export {variable}={cluster.environment[variable]}")
    else:
        print(f"address    {cluster.address}, from its own hosts alone")
        print(f"train      onestage cluster exec{name} -- {train} …")
    print(f"end it     onestage cluster down{name}")
    return DONE


def _down(options: argparse.Namespace) -> int:
    from onestage.cluster import local_cluster

    ended = local_cluster.down(options.name, say=_say)
    if options.json:
        print(json.dumps({"name": options.name, "ended": ended}))
    elif not ended:
        print(f"there is no cluster {options.name}")
    return DONE


def _status(options: argparse.Namespace) -> int:
    from onestage.cluster import local_cluster

    described = _described(local_cluster.load(options.name))
    if options.json:
        print(json.dumps(described))
        return DONE
    print(f"cluster {described['name']} at {described['address']}")
    for node in described["nodes"]:
        print(f"  {node['name']:10} {node['ip']:15} {'alive' if node['alive'] else 'dead'}")
    return DONE


def _described(cluster: "LocalCluster") -> dict[str, Any]:
    return {
        "name": cluster.name,
        "address": cluster.address,
        "dashboard": cluster.dashboard,
        "token": str(cluster.token),
        "environment": cluster.environment,
        "nodes": [node._asdict() for node in cluster.nodes],
    }


def _execute(options: argparse.Namespace) -> int:
    from onestage.cluster import local_cluster

    at = options.words.index("--") if "--" in options.words else -1
    node, command = options.words[:at], options.words[at + 1 :]
    if at < 0 or len(node) > 1 or not command:
        raise InputError("write onestage cluster exec [NODE] -- COMMAND …, as onestage cluster exec -- ray status")
    cluster = local_cluster.load(options.name)
    whole = cluster.command(node[0] if node else local_cluster.HEAD, command)
    try:
        os.execvpe(whole[0], whole, {**os.environ, **cluster.environment})
    except OSError as error:
        raise InputError(f"{whole[0]} can't be run ({error.strerror}): is it installed, and on PATH?") from error
