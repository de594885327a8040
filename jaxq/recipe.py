"""A recipe: which steps each parameter goes through. Data, not code: it reads and writes as TOML."""

from __future__ import annotations

import dataclasses
import inspect
import tomllib
from collections.abc import Sequence
from typing import Any

from jaxq import formats
from jaxq.activation_rule import ActivationRule
from jaxq.errors import JaxqError
from jaxq.formats.base import Format
from jaxq.formats.dense_sparse import DenseSparse
from jaxq.patterns import matches
from jaxq.solvers.registry import SOLVERS
from jaxq.steps import Step, step_from_dict
from jaxq.transforms.registry import STATISTICS, of_gradient

#: Options of `jaxq.solvers.split.solve_split` that a rule may set.
SPLIT_OPTIONS = frozenset({"sensitive"})


@dataclasses.dataclass(frozen=True)
class Rule:
    """What to do with the parameters whose path matches a pattern.

    solver: a name in `jaxq.solvers.registry.SOLVERS`; None leaves the parameters in float. options: settings of
    the solver, by name. statistics: {argument of the solver: name in `jaxq.transforms.registry.STATISTICS`, or
    "none"}, where they differ from the solver's own. With a `DenseSparse` format the solver fits its base, the
    options of the split (`sensitive`) stand beside the solver's, and its `sensitivity` is a statistic.
    """

    pattern: str
    solver: str | None = None
    format: Format | None = None
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    statistics: dict[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.solver is None:
            return
        if self.solver not in SOLVERS:
            raise self.error(f"unknown solver {self.solver!r}; use {', '.join(SOLVERS)}")
        if self.format is None:
            raise self.error(f"solver {self.solver} needs a format")
        solver = SOLVERS[self.solver]
        split = isinstance(self.format, DenseSparse)
        base = self.format.base if isinstance(self.format, DenseSparse) else self.format
        if not isinstance(base, solver.format):
            raise self.error(f"solver {self.solver} fits the format {solver.format.name!r}, not {base.name!r}")
        known = (
            set(inspect.signature(solver.solve).parameters) - set(solver.statistics) - {"w", "format", "layout"}
        )
        known |= SPLIT_OPTIONS if split else set()
        unknown = [k for k in self.options if k not in known]
        if unknown:
            raise self.error(f"solver {self.solver} has no option {', '.join(unknown)}; it has {', '.join(known)}")
        arguments = {*solver.statistics, *(("sensitivity",) if split else ())}
        for argument, name in self.statistics.items():
            if argument not in arguments:
                raise self.error(f"solver {self.solver} takes no statistic {argument!r}; it takes {arguments}")
            if name != "none" and name not in STATISTICS:
                raise self.error(f"unknown statistic {name!r}; use {', '.join(STATISTICS)} or none")

    def error(self, message: str) -> JaxqError:
        return JaxqError(f"rule {self.pattern!r}: {message}")

    @property
    def needs(self) -> dict[str, str]:
        """{argument: name} of the statistics that the solver will be given."""
        if self.solver is None:
            return {}
        named = {**SOLVERS[self.solver].statistics}
        if isinstance(self.format, DenseSparse) and self.options.get("sensitive"):
            named["sensitivity"] = "fisher"
        return {argument: name for argument, name in {**named, **self.statistics}.items() if name != "none"}

    @property
    def needs_gradients(self) -> bool:
        return bool(of_gradient(self.needs.values()))

    def to_dict(self) -> dict[str, Any]:
        out: dict[str, Any] = {"pattern": self.pattern}
        if self.solver is not None and self.format is not None:
            # TOML has no null: a setting left out has its default, and None is written as the word.
            out |= {"solver": self.solver, "format": _replaced(self.format.to_dict(), None, "none")}
            if self.options:
                out["options"] = dict(self.options)
            if self.statistics:
                out["statistics"] = dict(self.statistics)
        return out

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Rule:
        unknown = set(data) - {"pattern", "solver", "format", "options", "statistics"}
        if unknown or "pattern" not in data:
            raise JaxqError(f"a rule has pattern, solver, format, options and statistics, not {sorted(data)}")
        fmt = data.get("format")
        if fmt is not None:
            fmt = formats.from_dict(_replaced(fmt, "none", None))
        extras = (dict(data.get(name, {})) for name in ("options", "statistics"))
        return cls(data["pattern"], data.get("solver"), fmt, *extras)


def _replaced(data: Any, old: Any, new: Any) -> Any:
    """Nested dictionaries with one value in place of another."""
    if isinstance(data, dict):
        return {key: _replaced(value, old, new) for key, value in data.items()}
    return new if data == old else data


@dataclasses.dataclass(frozen=True)
class Recipe:
    """An ordered list of rules; the first whose pattern matches a path decides. Other parameters stay float.

    activations: rules of the inputs of weights and of named activations, likewise. steps: what is done to find
    their grids and to train, in order (`jaxq.steps`); without steps each weight is given to its solver, stage by
    stage, and then activations are fitted on what the quantized stages make of the data.
    """

    name: str
    rules: tuple[Rule, ...]
    activations: tuple[ActivationRule, ...] = ()
    steps: tuple[Step, ...] = ()

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
        """Whether calibration data are needed."""
        return bool(self.activations or self.steps) or any(r.needs for r in self.rules)

    @property
    def needs_gradients(self) -> bool:
        """Whether a rule's solver is given statistics of a loss's gradient."""
        return any(r.needs_gradients for r in self.rules)

    def to_dict(self) -> dict[str, Any]:
        more = {"activations": self.activations, "steps": self.steps}
        return {"name": self.name, "rules": [r.to_dict() for r in self.rules]} | {
            name: [item.to_dict() for item in items] for name, items in more.items() if items
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Recipe:
        if not isinstance(data.get("rules"), list) or not data["rules"]:
            raise JaxqError("a recipe needs a list of [[rules]], each with a pattern")
        unknown = data.keys() - {"name", "rules", "activations", "steps"}
        if unknown:
            raise JaxqError(f"a recipe has name, rules, activations and steps, not {', '.join(sorted(unknown))}")
        return cls(
            str(data.get("name", "recipe")),
            tuple(Rule.from_dict(r) for r in data["rules"]),
            tuple(ActivationRule.from_dict(r) for r in data.get("activations", ())),
            tuple(step_from_dict(s) for s in data.get("steps", ())),
        )

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
