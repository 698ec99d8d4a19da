"""The security group of a `ray up` cluster on AWS: ssh from one network, everything among its own nodes, nothing else.

    python deploy/clouds/aws_network.py --region us-west-2 --from 198.51.100.7/32 [--vpc vpc-…] [--name onestage]

Prints the ids of the group and of a subnet, which aws.yaml wants. Called again it leaves the group with these rules
alone: what others have added is taken out.
"""

import argparse
import ipaddress
import sys
from collections.abc import Sequence
from typing import Any


def main(arguments: Sequence[str] | None = None) -> int:
    """Makes the group, or mends it; 2 where the network to be let in is none, or is the whole world."""
    parser = argparse.ArgumentParser(description="a closed security group for ray up")
    parser.add_argument("--region", required=True)
    parser.add_argument("--from", dest="source", required=True, metavar="CIDR", help="who may come in by ssh")
    parser.add_argument("--vpc", help="default: the region's default VPC")
    parser.add_argument("--name", default="onestage", help="of the group")
    options = parser.parse_args(arguments)
    try:
        source = ipaddress.IPv4Network(options.source)
    except ValueError as error:
        parser.error(f"--from {options.source}: {error}")
    if source.prefixlen < 8:
        parser.error(f"--from {source} is too wide: name the network that you come from, as 198.51.100.7/32")
    import boto3

    ec2 = boto3.client("ec2", region_name=options.region)
    vpc = options.vpc or _first(ec2.describe_vpcs(Filters=[_filter("is-default", "true")])["Vpcs"], "VpcId", parser)
    subnets = ec2.describe_subnets(Filters=[_filter("vpc-id", vpc)])["Subnets"]
    group = closed_group(ec2, name=options.name, vpc=vpc, source=str(source))
    print(f"SecurityGroupIds: [{group}]\nSubnetId: {_first(subnets, 'SubnetId', parser)}")
    return 0


def closed_group(ec2: Any, *, name: str, vpc: str, source: str) -> str:
    """The id of the group called ``name``, which has these two ways in and no other."""
    known = ec2.describe_security_groups(Filters=[_filter("group-name", name), _filter("vpc-id", vpc)])
    if known["SecurityGroups"]:
        group = known["SecurityGroups"][0]
        number, before = group["GroupId"], group["IpPermissions"]
    else:
        described = "onestage: ssh from one network, and its own nodes"
        number, before = ec2.create_security_group(GroupName=name, Description=described, VpcId=vpc)["GroupId"], []
    ssh = {"IpProtocol": "tcp", "FromPort": 22, "ToPort": 22, "IpRanges": [{"CidrIp": source}]}
    own = {"IpProtocol": "-1", "UserIdGroupPairs": [{"GroupId": number}]}
    if before:
        ec2.revoke_security_group_ingress(GroupId=number, IpPermissions=before)
    ec2.authorize_security_group_ingress(GroupId=number, IpPermissions=[ssh, own])
    return str(number)


def _filter(name: str, value: str) -> dict[str, Any]:
    return {"Name": name, "Values": [value]}


def _first(found: Sequence[dict[str, Any]], key: str, parser: argparse.ArgumentParser) -> str:
    if not found:
        parser.error(f"the account has no {key} there: name one that it has (--vpc)")
    return str(found[0][key])


if __name__ == "__main__":
    sys.exit(main())
