"""Removes secrets from texts that are shown: tokens, passwords and signatures in URLs."""

from __future__ import annotations

import re

_USER = re.compile(r"(?<=://)[^/@\s]+@")  # user and password of a URL
_QUERY = re.compile(r"(?<=\S)\?[^\s)'\"]*(?==)[^\s)'\"]*")  # signed URLs carry their signature in the query
_TOKENS = re.compile(r"\b(?:hf|xet|api)_\w{16,}|(?<=[Bb]earer )\S+")


def redacted(text: str) -> str:
    """The text without credentials."""
    return _TOKENS.sub("***", _QUERY.sub("?***", _USER.sub("***@", text)))
