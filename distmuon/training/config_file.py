"""From a YAML file and `section.key=value` arguments to a checked `Config`, and back."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from distmuon.training.config import Config, ConfigError
from distmuon.training.keys import describe_keys


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Read a configuration: defaults, then the file, then the command line.

    Args:
        path: YAML file, or None for the defaults.
        overrides: arguments such as `"optimizer.lr=2e-2"`; later ones win.

    Returns:
        The checked configuration.

    Raises:
        ConfigError: naming the file and line or the argument, the key, and what was expected.
    """
    merged = OmegaConf.structured(Config)
    sources: dict[str, str] = {}
    if path is not None:
        merged = _merge_file(merged, Path(path), sources)
    for override in overrides:
        merged = _merge_override(merged, override, sources)
    # Ranges are checked only here: two overrides may be right together and wrong one at a time.
    try:
        config = OmegaConf.to_object(merged)
    except ConfigError as error:
        where = sources.get(error.key or "")
        raise ConfigError(f"{where}: {error}" if where else str(error), key=error.key) from None
    assert isinstance(config, Config)
    return config


def to_yaml(config: Config) -> str:
    """Write a configuration with all its keys as YAML that `load_config` reads back."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def keys_help() -> str:
    """List all sections and keys with type, default and meaning, for `--help`."""
    lines: list[str] = []
    for section, group in groupby(describe_keys(), key=lambda info: info.name.split(".")[0]):
        keys = list(group)
        lines += ["", f"{section}: {keys[0].section}"]
        for info in keys:
            lines.append(f"  {info.name}={info.default}  ({info.type})")
            lines.append(f"      {info.meaning}")
    return "\n".join(lines).lstrip("\n")


def _merge_file(base: DictConfig, path: Path, sources: dict[str, str]) -> DictConfig:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"--config {path}: no such file.{_similar_files(path)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path}: cannot be read: {error}") from None
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    if node is None:
        return base
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{path}: expected sections such as 'train:', got {text[:40]!r}.")
    for key, line in _key_lines(node):
        where = f"{path}:{line}"
        _check_key(key, where)
        if key in sources:
            raise ConfigError(f"{where}: key '{key}' stands twice, first at {sources[key]}.")
        sources[key] = where
    try:
        read = OmegaConf.create(text)
    except yaml.YAMLError as error:  # OmegaConf's parser is stricter
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    try:
        return _merge(base, read)
    except OmegaConfBaseException as error:
        blamed: str | None = getattr(error, "full_key", None) or _blamed_section(base, node)
        where = sources.get(blamed or "", str(path))
        raise ConfigError(f"{where}: {_explain(error, blamed)}", key=blamed) from None


def _merge_override(base: DictConfig, override: str, sources: dict[str, str]) -> DictConfig:
    where = f"command line '{override}'"
    key, equals, _ = override.partition("=")
    if not equals or key.startswith("-"):
        raise ConfigError(
            f"{where}: expected section.key=value without dashes, such as optimizer.lr=0.01."
        )
    _check_key(key, where)
    sources[key] = where
    try:
        return _merge(base, OmegaConf.from_dotlist([override]))
    except (OmegaConfBaseException, yaml.YAMLError, UnicodeError) as error:
        raise ConfigError(f"{where}: {_explain(error, key)}", key=key) from None


def _merge(base: DictConfig, update: DictConfig | ListConfig) -> DictConfig:
    merged = OmegaConf.merge(base, update)
    assert isinstance(merged, DictConfig)
    return merged


def _explain(error: Exception, key: str | None) -> str:
    reason = str(error).splitlines()[0].rstrip(".")
    info = next((info for info in describe_keys() if info.name == key), None)
    if key is not None and "." not in key:
        return f"{key}: expected a section with keys, such as {_keys_of(key)[0]}=..."
    if info is None:
        return f"{key or 'value'}: {reason}."
    if "expected" in reason:
        return f"{key}: {reason}."
    return f"{key}: {reason}. Expected {info.type}, such as {info.default}."


def _keys_of(section: str) -> list[str]:
    return [info.name for info in describe_keys() if info.name.startswith(f"{section}.")]


def _key_lines(node: yaml.MappingNode, prefix: str = "") -> Iterator[tuple[str, int]]:
    """Yield each dotted key of a YAML mapping with its line number (from 1)."""
    for key_node, value_node in node.value:
        key = f"{prefix}{key_node.value}"
        yield key, key_node.start_mark.line + 1
        if isinstance(value_node, yaml.MappingNode):
            yield from _key_lines(value_node, f"{key}.")


def _blamed_section(base: DictConfig, node: yaml.MappingNode) -> str | None:
    """Return the first section whose value is not a mapping (OmegaConf does not name it)."""
    for key_node, value_node in node.value:
        if key_node.value in base and not isinstance(value_node, yaml.MappingNode):
            return str(key_node.value)
    return None


def _check_key(key: str, where: str) -> None:
    known = [info.name for info in describe_keys()]
    sections = {name.split(".")[0] for name in known}
    if key in known or key in sections:
        return
    raise ConfigError(f"{where}: unknown key '{key}'.{_suggest(key, known, sections)}")


def _suggest(key: str, known: Sequence[str], sections: set[str]) -> str:
    last = key.split(".")[-1]
    same_name = [name for name in known if name.split(".")[-1] == last]
    close = difflib.get_close_matches(key, [*known, *sections], n=1, cutoff=0.7)
    close_last = [
        name
        for match in difflib.get_close_matches(last, [name.split(".")[-1] for name in known], n=1)
        for name in known
        if name.split(".")[-1] == match
    ]
    for candidates in (same_name, close, close_last):
        if candidates:
            return " Did you mean " + " or ".join(f"'{name}'" for name in candidates) + "?"
    section = key.split(".")[0]
    choices = _keys_of(section) or sorted(sections)
    return f" Known: {', '.join(choices)}. See --help."


def _similar_files(path: Path) -> str:
    folder = path.parent
    names = [str(other) for other in sorted(folder.glob("*.yaml"))] if folder.is_dir() else []
    close = difflib.get_close_matches(str(path), names, n=1) or names
    return f" Did you mean {' or '.join(close[:5])}?" if close else ""
