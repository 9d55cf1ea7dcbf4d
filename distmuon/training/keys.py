"""Every configuration key with its type, default and meaning, for help, documents and checks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Literal, get_args, get_origin, get_type_hints

from distmuon.training.config import Config, OnResume

_YAML_WORDS = ("y", "n", "yes", "no", "on", "off", "true", "false", "null")


@dataclass(frozen=True, slots=True)
class KeyInfo:
    """One configuration key as `--help` shows it.

    Attributes:
        name: dotted name, such as `optimizer.lr`.
        section: documentation of its section.
        type: what it accepts, such as `float` or `auto | cpu | cuda`.
        default: its default, as one would write it in YAML or on the command line.
        meaning: one line.
        on_resume: whether it may differ from a checkpoint's.
    """

    name: str
    section: str
    type: str
    default: str
    meaning: str
    on_resume: OnResume


def describe_keys(config: Config | None = None) -> Iterator[KeyInfo]:
    """Yield every configuration key in the order of its declaration.

    Args:
        config: whose values to give as defaults; None for the defaults themselves.
    """
    defaults = config or Config()
    for section_field in fields(Config):
        section = getattr(defaults, section_field.name)
        about = (type(section).__doc__ or "").splitlines()[0]
        types = get_type_hints(type(section))
        for key in fields(section):
            yield KeyInfo(
                name=f"{section_field.name}.{key.name}",
                section=about,
                type=_describe_type(types[key.name]),
                default=_as_yaml(getattr(section, key.name)),
                meaning=key.metadata["meaning"],
                on_resume=key.metadata["on_resume"],
            )


def _describe_type(kind: object) -> str:
    if get_origin(kind) is Literal:
        return " | ".join(get_args(kind))
    if isinstance(kind, type) and get_origin(kind) is None:
        return kind.__name__
    return str(kind).replace("None", "null")


def _as_yaml(value: object) -> str:
    # JSON is YAML; a plain word needs no quotes, unless YAML takes it for a truth value or null.
    text = json.dumps(value, ensure_ascii=False)
    plain = isinstance(value, str) and value.isidentifier() and value.lower() not in _YAML_WORDS
    return text.strip('"') if plain else text
