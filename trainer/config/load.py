"""From files and overrides to a checked `Config`: every mistake is found in one pass."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from trainer.config import rules as cross_section
from trainer.config import strict_json
from trainer.config.deepspeed import REFUSED, Batch, batch_arithmetic, resolve
from trainer.config.earlier_versions import (
    METADATA_KEY,
    NOTHING_KEPT,
    KeptMeanings,
    keep_stored_meanings,
    replaced_key,
    upgraded,
)
from trainer.config.model_facts import (
    ModelFacts,
    default_attention,
    model_config,
    model_facts,
    with_causal_attention,
)
from trainer.config.rules import Device, Draft, warnings_of
from trainer.config.schema import SECTIONS, Config
from trainer.errors import ConfigError, Problem

Raw = dict[str, Any]


@dataclass(frozen=True)
class LoadedConfig:
    """A configuration that passed every rule, with what was derived from it."""

    config: Config
    facts: ModelFacts
    batch: Batch
    world: int
    deepspeed_json: Raw
    """What DeepSpeed receives: resolved, plain JSON."""

    warnings: tuple[Problem, ...] = ()
    kept: KeptMeanings = NOTHING_KEPT
    """What a resumed run keeps of the earlier version that began it."""

    @property
    def data_ranks(self) -> int:
        return self.world // (self.config.parallel.tensor * self.config.parallel.pipeline)

    def resolved(self) -> Raw:
        """The whole configuration as plain JSON, defaults and the resolved `deepspeed` section included."""
        whole = self.config.model_dump(mode="json", exclude={"deepspeed"})
        whole["run"]["name"] = self.name
        whole["model"]["initialize"] = self.initialize
        whole["model"]["attention"] = self.attention
        return {**whole, "deepspeed": self.deepspeed_json}

    @cached_property
    def attention(self) -> str:
        section = self.config.model
        return section.attention or default_attention(model_config(section))

    @property
    def name(self) -> str:
        return self.config.run.name or Path(self.config.run.output_dir).expanduser().resolve().name

    @property
    def initialize(self) -> str:
        return self.config.model.initialize or ("pretrained" if self.config.model.path else "random")


def merge(base: Raw, over: Mapping[str, Any]) -> Raw:
    """`over` on top of `base`: objects key by key, everything else (lists too) replaced."""
    result = dict(base)
    for key, value in over.items():
        below = result.get(key)
        result[key] = merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return result


def read_config_file(path: Path, seen: tuple[Path, ...] = ()) -> Raw:
    """The file `path` with its `extends` and an external `deepspeed` file merged in.

    Paths in both keys are relative to the file that names them.
    """
    path = path.expanduser().resolve()
    if path in seen:
        chain = " -> ".join(p.name for p in (*seen, path))
        raise ConfigError(Problem(str(path), f"extends itself: {chain}"))
    raw = strict_json.read(path)
    raw.pop("$schema", None)
    if raw.pop(METADATA_KEY, None) is not None:  # a run directory's, perhaps of an earlier version
        raw = upgraded(raw)
    if isinstance(raw.get("deepspeed"), str):
        raw["deepspeed"] = strict_json.read(path.parent / Path(raw["deepspeed"]).expanduser())
    base = raw.pop("extends", None)
    if base is None:
        return raw
    if not isinstance(base, str):
        raise ConfigError(Problem("extends", f"expected the path of a file, got {base!r}"))
    return merge(read_config_file(path.parent / base, (*seen, path)), raw)


def apply_override(raw: Raw, assignment: str) -> None:
    """Sets one value: `a.b=c`, where c is JSON or, failing that, a plain string; list items by number.

    Raises:
        ConfigError: if the assignment has no `=`, a name on its way is no object or list, or a number is not finite.
    """
    path, equals, text = assignment.partition("=")
    if not equals or not path.strip():
        raise ConfigError(Problem("--set", f"expected a.b=value, got '{assignment}'"))
    if path.strip() == "extends":
        raise ConfigError(Problem("--set extends", "only a file can extend another one", "Write it into the file"))
    try:
        value = strict_json.loads(text)
    except json.JSONDecodeError:
        value = text
    if problems := list(strict_json.not_finite(value, f"--set {path.strip()}")):
        raise ConfigError(problems)
    node: Any = raw
    keys = path.strip().split(".")
    for depth, key in enumerate(keys):
        if isinstance(node, list):
            if not key.isdigit() or int(key) >= len(node):
                raise ConfigError(Problem(f"--set {path}", f"'{key}' is not an item of a list of {len(node)}"))
            index: Any = int(key)
        elif isinstance(node, dict):
            index = key
        else:
            raise ConfigError(Problem(f"--set {path}", f"'{'.'.join(keys[:depth])}' is a value, not an object"))
        if depth == len(keys) - 1:
            node[index] = value
        else:
            if isinstance(node, dict) and node.get(index) is None:
                node[index] = {}
            node = node[index]


# --- one section at a time ---------------------------------------------------------------------------------------


def _true_path(loc: Sequence[str | int], raw: Any) -> tuple[str | int, ...]:
    """`loc` of a pydantic error without the names of union members, which stand in it like keys."""
    path: list[str | int] = []
    for part in loc:
        in_list = isinstance(raw, list) and isinstance(part, int) and part < len(raw)
        if in_list or (isinstance(raw, dict) and part in raw):
            raw = raw[part]
        elif isinstance(raw, dict) and isinstance(part, str) and re.fullmatch(r"\w+", part) and part == loc[-1]:
            return (*path, part)
        else:
            continue
        path.append(part)
    return tuple(path)


def _keys_at(section: type[BaseModel], path: Sequence[str | int]) -> list[str]:
    """The keys that the object at `path` below `section` may hold."""
    kind: Any = section
    for part in path:
        if isinstance(part, str) and isinstance(kind, type) and issubclass(kind, BaseModel):
            field = kind.model_fields.get(part)
            kind = field.annotation if field else None
        kind = _model_in(kind)
    return sorted(kind.model_fields) if isinstance(kind, type) and issubclass(kind, BaseModel) else []


def _model_in(annotation: Any) -> Any:
    """The pydantic class inside `annotation` (optional, list or annotated), if there is one."""
    if isinstance(annotation, type) and not getattr(annotation, "__args__", ()):
        return annotation
    for member in getattr(annotation, "__args__", ()):
        found = _model_in(member)
        if isinstance(found, type) and issubclass(found, BaseModel):
            return found
    return None


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= 60 else text[:57] + "..."


def _expected(messages: Iterable[str]) -> str:
    """One phrase out of what each member of a union had to say."""
    phrases = []
    for message in messages:
        phrase = message.removeprefix("Input should be ").removeprefix("a valid ").replace("integer", "whole number")
        phrase = phrase.replace("dictionary", "object").replace("boolean", "true or false")
        phrases.append(phrase)
    return " or ".join(dict.fromkeys(phrases))


@dataclass
class _Findings:
    """What validating one section said: problems, and the data without what caused them."""

    problems: list[Problem]
    wrong: set[str]
    """Dotted paths whose value is wrong or missing; rules that read them are skipped."""

    repaired: Raw


def _examine(name: str, raw: Raw, error: ValidationError) -> _Findings:
    grouped: dict[tuple[str | int, ...], list[Any]] = {}
    for item in error.errors(include_url=False):
        grouped.setdefault(_true_path(item["loc"], raw), []).append(item)
    findings = _Findings([], set(), json.loads(json.dumps(raw)))
    for path, items in grouped.items():
        dotted = ".".join(str(part) for part in (name, *path))
        first = items[0]
        if first["type"] == "extra_forbidden":
            findings.problems.append(_unknown_key(name, raw, path, findings.repaired))
            continue
        findings.wrong.add(dotted)
        if first["type"] == "missing":
            findings.problems.append(Problem(dotted, "required, but missing"))
            continue
        value = _at(raw, path)
        kinds = _expected(item["msg"] for item in items)
        findings.problems.append(Problem(dotted, f"expected {kinds}, got {_shown(value)}"))
        holder = _at(findings.repaired, path[:-1])
        if path and isinstance(holder, dict):
            holder.pop(path[-1], None)
    return findings


def _at(raw: Any, path: Sequence[str | int]) -> Any:
    for part in path:
        raw = raw[part]
    return raw


def _unknown_key(name: str, raw: Raw, path: tuple[str | int, ...], repaired: Raw) -> Problem:
    """The problem of an unknown key. Where it is a misspelling, `repaired` goes on with what was meant."""
    dotted = ".".join(str(part) for part in (name, *path))
    below = ".".join(str(part) for part in path)
    holder = _at(repaired, path[:-1])
    value = holder.pop(path[-1])
    if name == "deepspeed" and below in REFUSED:
        reason, remedy = REFUSED[below]
        return Problem(dotted, reason, remedy)
    if replaced := replaced_key(dotted):
        return replaced
    key = str(path[-1])
    candidates = _keys_at(SECTIONS[name], path[:-1])
    near = get_close_matches(key, candidates, n=1)
    if near:
        holder.setdefault(near[0], value)
        return Problem(dotted, f"unknown key; did you mean '{near[0]}'?")
    elsewhere = [s for s, kind in SECTIONS.items() if key in kind.model_fields]
    if elsewhere:
        return Problem(dotted, f"unknown key; there is '{elsewhere[0]}.{key}'")
    return Problem(dotted, "unknown key", f"Known: {', '.join(candidates)}" if candidates else "")


def _build_section(name: str, raw: Any, draft: Draft) -> _Findings:
    kind = SECTIONS[name]
    if not isinstance(raw, dict):
        return _Findings([Problem(name, f"expected an object, got {_shown(raw)}")], {name}, {})
    total = _Findings([], set(), raw)
    for _ in range(2):  # the second time on what is left, so that rules still see the sound part
        try:
            setattr(draft, name, kind.model_validate_json(json.dumps(total.repaired)))
            return total
        except ValidationError as error:
            found = _examine(name, total.repaired, error)
        if not total.problems:
            total = found
        else:
            total.wrong |= found.wrong
    return total


# --- the whole ---------------------------------------------------------------------------------------------------


def _unknown_sections(raw: Raw) -> list[Problem]:
    problems = []
    for name in [key for key in raw if key not in SECTIONS]:
        near = get_close_matches(name, [*SECTIONS, "extends"], n=1)
        owner = [s for s, kind in SECTIONS.items() if name in kind.model_fields]
        if near:
            problems.append(Problem(name, f"unknown section; did you mean '{near[0]}'?"))
            raw.setdefault(near[0], raw[name])
        elif owner:
            problems.append(Problem(name, f"unknown section; '{owner[0]}.{name}' is a key"))
        else:
            problems.append(Problem(name, "unknown section", f"Known: {', '.join(SECTIONS)}"))
        del raw[name]
    return problems


def _skipped(needs: Iterable[str], wrong: set[str]) -> bool:
    def touches(a: str, b: str) -> bool:
        return a == b or a.startswith(b + ".") or b.startswith(a + ".")

    return any(touches(need, path) for need in needs for path in wrong)


def _look_at_model(draft: Draft) -> list[Problem]:
    section = draft.model
    if section is None or (section.path is None) == (section.config is None):
        return []
    try:
        draft.model = section = with_causal_attention(section)
        draft.facts = model_facts(model_config(section))
    except ConfigError as error:
        return error.problems
    return []


def check(raw: Raw, *, world: int | None, device: Device | None) -> LoadedConfig:
    """Builds and checks a merged configuration.

    Args:
        raw: the merged JSON. world: the number of processes, None when open. device: see `Draft.device`.

    Raises:
        ConfigError: with every problem there is.
    """
    raw = json.loads(json.dumps(raw))
    problems = _unknown_sections(raw)
    draft = Draft(world=world, device=device)
    wrong: set[str] = set()
    for name, field in Config.model_fields.items():
        if name not in raw:
            if field.is_required():
                problems.append(Problem(name, "required, but missing"))
                wrong.add(name)
                continue
            raw[name] = {}
        found = _build_section(name, raw[name], draft)
        problems += found.problems
        wrong |= found.wrong
        if getattr(draft, name) is None:
            wrong.add(name)
    if not _skipped(("model",), wrong):
        problems += _look_at_model(draft)
    for rule in cross_section.RULES:
        if not _skipped(rule.needs, wrong):
            problems += rule.check(draft)
    if problems:
        raise ConfigError(dict.fromkeys(problems))
    return _finish(draft)


def _finish(draft: Draft) -> LoadedConfig:
    config = Config.model_construct(**{name: getattr(draft, name) for name in SECTIONS})
    assert draft.facts is not None
    data_ranks = draft.data_ranks
    assert data_ranks is not None
    batch = batch_arithmetic(config.deepspeed, data_ranks)
    assert isinstance(batch, Batch)
    return LoadedConfig(
        config=config,
        facts=draft.facts,
        batch=batch,
        world=data_ranks * config.parallel.tensor * config.parallel.pipeline,
        deepspeed_json=resolve(
            config.deepspeed,
            data_ranks=data_ranks,
            max_steps=config.training.max_steps,
            hidden_size=draft.facts.hidden_size,
        ),
        warnings=tuple(warnings_of(draft)),
    )


def load_config(
    path: str | Path, overrides: Sequence[str] = (), *, world: int | None = None, device: Device | None = None
) -> LoadedConfig:
    """Reads, merges, overrides, checks and resolves the configuration at `path`.

    Where it resumes a run, keys added since that run began keep the meaning they had (`earlier_versions.py`).

    Raises:
        ConfigError: with every problem that was found.
    """
    raw = read_config_file(Path(path))
    problems = []
    for assignment in overrides:
        try:
            apply_override(raw, assignment)
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    if isinstance(raw.get("deepspeed"), str):
        raw["deepspeed"] = strict_json.read(Path(raw["deepspeed"]).expanduser())
    kept = keep_stored_meanings(raw)
    return replace(check(raw, world=world, device=device), kept=kept)
