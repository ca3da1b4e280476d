"""Which module gives the gradient of which parameter."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch import nn

from source_proj.gradients.opened import Forward, forward_for
from source_proj.gradients.rules import Rule, rule_for
from source_proj.gradients.space import ParameterSpace

__all__ = ["Owners", "uncovered"]


@dataclass(frozen=True)
class Owners:
    """Who gives the gradients of which parameters.

    Attributes:
        covered: module → its rule, {local name: full name}.
        opened: module → its tapped forward pass, {local name: full name}.
        missing: parameter → why nothing gives its gradient.
    """

    covered: dict[nn.Module, tuple[Rule, dict[str, str]]]
    opened: dict[nn.Module, tuple[Forward, dict[str, str]]]
    missing: dict[str, str]

    @classmethod
    def of(cls, model: nn.Module, space: ParameterSpace, *, opens: bool, apart: Collection[str] = ()) -> Owners:
        """Find them.

        Args:
            model: the model.
            space: the attributed parameters.
            opens: whether modules that this package has a tapped forward pass of own what is within them; not where
                a parameter within is apart, which such a pass would leave without a graph.
            apart: parameters whose gradients are taken from no module.
        """
        full = {id(p): name for name, p in space.parameters(model).items() if name not in apart}
        elsewhere = {id(p) for name, p in model.named_parameters(remove_duplicate=False) if name in apart}
        owners, within = cls({}, {}, {}), set[nn.Module]()
        for module in model.modules():
            forward = forward_for(module) if opens else None
            if forward is not None and any(id(p) in elsewhere for p in module.parameters()):
                forward = None
            own = {n: full[id(p)] for n, p in module.named_parameters(recurse=forward is not None) if id(p) in full}
            if not own or module in within:
                continue
            if forward is not None:
                owners.opened[module] = forward, own
                within.update(module.modules())
            else:
                owners._add(module, own)
        return owners

    def _add(self, module: nn.Module, own: dict[str, str]) -> None:
        rule = rule_for(module)
        for local, name in own.items():
            if isinstance(rule, str):
                self.missing[name] = rule
            elif local not in rule.parameters:
                self.missing[name] = f"the rule of {type(module).__name__} knows no parameter {local!r}"
        if isinstance(rule, Rule):
            self.covered[module] = rule, own


def uncovered(
    model: nn.Module, space: ParameterSpace, *, opens: bool = True, apart: Collection[str] = ()
) -> dict[str, str]:
    """Attributed parameter → why no rule gives its gradient; empty when the hook path may be tried.

    Args:
        model: the model.
        space: the attributed parameters.
        opens: whether modules are opened, too, by a forward pass of this package's.
        apart: parameters that are not looked for.
    """
    return Owners.of(model, space, opens=opens, apart=apart).missing
