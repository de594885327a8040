"""A recipe: which steps each parameter goes through. Data, not code: it reads and writes as TOML."""

from __future__ import annotations

import dataclasses
import inspect
import tomllib
from collections.abc import Sequence
from typing import Any

from jaxq import formats
from jaxq.errors import JaxqError
from jaxq.formats.base import Format
from jaxq.patterns import matches
from jaxq.solvers.registry import SOLVERS


@dataclasses.dataclass(frozen=True)
class Rule:
    """What to do with the parameters whose path matches a pattern.

    solver: a name in `jaxq.solvers.registry.SOLVERS`; None leaves the parameters in float. options: settings of
    the solver, by name.
    """

    pattern: str
    solver: str | None = None
    format: Format | None = None
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.solver is None:
            return
        if self.solver not in SOLVERS:
            raise JaxqError(f"rule {self.pattern!r}: unknown solver {self.solver!r}; use {', '.join(SOLVERS)}")
        if self.format is None:
            raise JaxqError(f"rule {self.pattern!r}: solver {self.solver} needs a format")
        known = inspect.signature(SOLVERS[self.solver].solve).parameters
        unknown = [k for k in self.options if k not in known]
        if unknown:
            raise JaxqError(f"rule {self.pattern!r}: solver {self.solver} has no option {', '.join(unknown)}")

    def to_dict(self) -> dict[str, Any]:
        out: dict[str, Any] = {"pattern": self.pattern}
        if self.solver is not None and self.format is not None:
            out |= {"solver": self.solver, "format": self.format.to_dict()}
            # TOML has no null: a setting left out has its default, and None is written as the word.
            out["format"] = {k: "none" if v is None else v for k, v in out["format"].items()}
            if self.options:
                out["options"] = dict(self.options)
        return out

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Rule:
        unknown = set(data) - {"pattern", "solver", "format", "options"}
        if unknown or "pattern" not in data:
            raise JaxqError(f"a rule has pattern, solver, format and options, not {sorted(data)}")
        fmt = data.get("format")
        if fmt is not None:
            fmt = formats.from_dict({k: None if v == "none" else v for k, v in fmt.items()})
        return cls(data["pattern"], data.get("solver"), fmt, dict(data.get("options", {})))


@dataclasses.dataclass(frozen=True)
class Recipe:
    """An ordered list of rules; the first whose pattern matches a path decides. Other parameters stay float."""

    name: str
    rules: tuple[Rule, ...]

    def rule(self, path: str) -> Rule | None:
        return next((r for r in self.rules if matches(r.pattern, path)), None)

    def check(self, paths: Sequence[str]) -> None:
        """JaxqError for a rule that decides about no path."""
        for rule in self.rules:
            if not any(self.rule(p) is rule for p in paths):
                shown = ", ".join(list(paths)[:5])
                raise JaxqError(
                    f"recipe {self.name!r}: rule {rule.pattern!r} matches no site that an earlier rule left over; "
                    f"sites are {shown}, ..."
                )

    @property
    def needs_data(self) -> bool:
        return any(r.solver is not None and SOLVERS[r.solver].statistic is not None for r in self.rules)

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "rules": [r.to_dict() for r in self.rules]}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Recipe:
        if not isinstance(data.get("rules"), list) or not data["rules"]:
            raise JaxqError("a recipe needs a list of [[rules]], each with a pattern")
        return cls(str(data.get("name", "recipe")), tuple(Rule.from_dict(r) for r in data["rules"]))

    def to_toml(self) -> str:
        import tomli_w  # only writing needs it

        return tomli_w.dumps(self.to_dict())

    @classmethod
    def from_toml(cls, text: str) -> Recipe:
        """Reads what `to_toml` writes. Raises JaxqError for anything else."""
        try:
            return cls.from_dict(tomllib.loads(text))
        except tomllib.TOMLDecodeError as error:
            raise JaxqError(f"the recipe is not valid TOML: {error}") from None
