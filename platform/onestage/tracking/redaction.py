"""Passwords, tokens and keys, taken out of whatever is written where others read it.

Only strings are secrets: ``token_dim: 256`` and ``use_token: true`` stay.
"""

import re
from collections.abc import Mapping
from itertools import pairwise
from typing import Final

HIDDEN: Final = "***"
SECRET_WORDS: Final = frozenset({"password", "passwd", "passphrase", "secret", "token", "credentials", "apikey"})
KEY_OWNERS: Final = frozenset({"api", "access", "secret", "private", "auth", "encryption"})

_USERINFO = re.compile(r"(?<=://)[^/\s]+@")
_ASSIGNMENT = re.compile(r"([\w.\-]+)=([^&\s,;'\"]+)")
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")


def names_secret(name: str) -> bool:
    """Whether a setting of this name holds a secret, by its whole words.

    >>> [names_secret(name) for name in ("aws.secretKey", "DB_PASSWORD", "api_key", "keypoints", "key", "tokens")]
    [True, True, True, False, False, False]
    """
    words = [word.lower() for word in _WORD.findall(name)]
    owned_key = any(owner in KEY_OWNERS and word == "key" for owner, word in pairwise(words))
    return owned_key or not SECRET_WORDS.isdisjoint(words)


def redact(text: str) -> str:
    """The text without the user and password of its URIs, and without the values of ``name=secret`` pairs.

    >>> redact("https://ann:pw@host/path?api_key=abc&page=2")
    'https://***@host/path?api_key=***&page=2'
    """
    text = _USERINFO.sub(f"{HIDDEN}@", text)
    return _ASSIGNMENT.sub(lambda pair: f"{pair[1]}={HIDDEN}" if names_secret(pair[1]) else pair[0], text)


def without_user(uri: str) -> str:
    """The URI without user and password, still usable where those come from elsewhere.

    >>> without_user("https://ann:pw@host/path")
    'https://host/path'
    """
    return _USERINFO.sub("", uri)


def redact_settings(settings: Mapping[str, object]) -> dict[str, object]:
    """A copy of nested settings in which the strings that are secrets are hidden.

    >>> redact_settings({"store": {"password": "pw", "uri": "s3://bucket"}, "keypoints": ["nose"]})
    {'store': {'password': '***', 'uri': 's3://bucket'}, 'keypoints': ['nose']}
    """
    return {key: _redact_node(value, key) for key, value in settings.items()}


def _redact_node(node: object, name: str) -> object:
    if isinstance(node, Mapping):
        return {key: _redact_node(value, str(key)) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return [_redact_node(value, name) for value in node]
    if isinstance(node, str):
        return HIDDEN if node and names_secret(name) else redact(node)
    return node
