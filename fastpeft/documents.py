"""JSON and YAML of files that nobody vouches for: what is nested too deeply, or would grow too large, is one error."""

from __future__ import annotations

import json
from typing import Any

import yaml

DEPTH = 100  # of lists and mappings in YAML; JSON's own limit is the interpreter's, about a thousand
NODES = 1_000_000  # of a YAML document, each alias counted as what it stands for
DIGITS = 250  # of a whole number: any that has so many, in hexadecimal too, is also a float


class TooComplex(yaml.YAMLError, ValueError):
    """A document whose depth or size no real one has."""


def parse_json(text: str | bytes) -> Any:
    """``json.loads``; ValueError also for what is nested too deeply, and for a whole number that no float can hold."""
    try:
        return json.loads(text, parse_int=_whole)
    except RecursionError:
        raise ValueError("its lists and mappings are nested too deeply") from None


def _whole(digits: str) -> int:
    if len(digits) > DIGITS:
        raise ValueError(f"it holds a whole number of {len(digits)} digits")
    return int(digits)


def parse_yaml(text: str) -> Any:
    """``yaml.safe_load`` of a document of at most 100 levels and a million values, aliases counted at their full size, and without whole
    numbers that no float can hold. yaml.YAMLError for any other."""
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except RecursionError:
        raise TooComplex("its lists and mappings are nested too deeply") from None
    if root is None:
        return None
    _size(root, {}, 0)
    loader = yaml.SafeLoader("")
    try:
        return loader.construct_document(root)
    finally:
        loader.dispose()


def _size(node: yaml.Node, sizes: dict[int, int], depth: int) -> int:
    """How many values a node stands for."""
    if depth > DEPTH or sizes.get(id(node)) == 0:  # 0: around this place itself
        raise TooComplex("its lists and mappings are nested too deeply")
    if id(node) not in sizes:
        sizes[id(node)] = 0
        if node.tag == "tag:yaml.org,2002:int" and len(node.value) > DIGITS:
            raise TooComplex(f"it holds a whole number of {len(node.value)} digits")
        children = [] if isinstance(node, yaml.ScalarNode) else node.value
        if isinstance(node, yaml.MappingNode):
            children = [child for pair in node.value for child in pair]
        size = 1
        for child in children:
            size += _size(child, sizes, depth + 1)
            if size > NODES:
                raise TooComplex(f"it stands for more than {NODES:,} values")
        sizes[id(node)] = size
    return sizes[id(node)]
