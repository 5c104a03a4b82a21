"""How a network of anyone's is called, and what it says: `network(x, c_noise)` or `network(x, c_noise, cond)` -> F."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .conditions import Cond

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Call:
    """Calls a network as its signature asks: with the condition in third place or by name, or without one.

    `torch.compile`, `DataParallel`, DDP and `functools.partial` take anything; the signature is that of what they hold.
    Where it stays open (`*args`) there is a third argument if there is a condition.

    Args:
        network: what is called, any callable.
    """

    def __init__(self, network: Callable[..., Any]):
        self._needs_cond, self._by_name, self.takes_cond = False, False, True
        try:
            signature = inspect.signature(_called(network))
        except ValueError:  # built-in functions have no signature
            return
        two, three, named = (_binds(signature, *given) for given in ((2, {}), (3, {}), (2, {"cond": None})))
        self._needs_cond = three and not two
        self._by_name = named and not three
        self.takes_cond = three or named

    def arguments(self, cond: Cond) -> tuple[tuple[Cond, ...], dict[str, Cond]]:
        """What follows x and c_noise: (by position, by name).

        Raises:
            ValueError: a condition for a network that takes none.
        """
        if cond is None:
            return ((None,) if self._needs_cond else ()), {}
        if not self.takes_cond:
            raise ValueError("A condition was given, but the network takes (x, c_noise) only.")
        return ((), {"cond": cond}) if self._by_name else ((cond,), {})


def _binds(signature: inspect.Signature, count: int, named: Mapping[str, None]) -> bool:
    try:
        signature.bind(*[None] * count, **named)
    except TypeError:
        return False
    return True


def _called(network: Any) -> Callable[..., Any]:
    """The function whose signature counts."""
    if isinstance(network, functools.partial):
        return functools.partial(_called(network.func), *network.args, **network.keywords)
    inner = unwrapped(network)
    return inner.forward if isinstance(inner, nn.Module) else inner


def unwrapped(network: Any) -> Any:
    """The network inside of wrappers that add nothing to what is called."""
    inner: Any
    while True:
        if isinstance(network, functools.partial):
            inner = network.func
        elif inspect.ismethod(network) and isinstance(network.__self__, nn.Module):
            return network
        else:
            inner = getattr(network, "_orig_mod", None)  # torch.compile; asking for its class would import the compiler
            if inner is None and isinstance(network, nn.Module) and _is_open(network.forward):
                inner = getattr(network, "module", None)  # DataParallel, DDP, AveragedModel and their like
        if inner is None:
            return network
        network = inner


def _is_open(forward: Callable[..., Any]) -> bool:
    """Whether the signature says nothing: (*args, **kwargs)."""
    kinds = {parameter.kind for parameter in inspect.signature(forward).parameters.values()}
    return kinds == {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}


def module_of(network: Any) -> nn.Module | None:
    """The module behind a network that is none itself: of a partial, or of a bound method."""
    inner = unwrapped(network)
    inner = inner.__self__ if inspect.ismethod(inner) else inner
    return inner if isinstance(inner, nn.Module) and inner is not network else None


class WeightType:
    """The dtype of a module's first floating-point parameter; None where there is none.

    Its place is looked for once: the walk through a module costs a few percent of a small network.

    Args:
        module: whose weights they are.
    """

    def __init__(self, module: nn.Module):
        self._module, self._place = (module,), _first(module)  # a tuple, as the module may be around this

    def __call__(self) -> torch.dtype | None:
        weight = None
        if not torch.compiler.is_compiling() and self._place is not None:
            weight = self._place[0].get(self._place[1])
        if weight is None:  # it was replaced, by a parametrisation say
            place = _first(self._module[0])
            weight = None if place is None else place[0][place[1]]
        return None if weight is None else weight.dtype


def _first(module: nn.Module) -> tuple[dict[str, nn.Parameter | None], str] | None:
    places = ((part._parameters, name) for part in module.modules() for name in part._parameters)
    return next(((owner, name) for owner, name in places if getattr(owner[name], "dtype", None) in _FLOATS), None)


def read(output: Any, what: str) -> Tensor:
    """The tensor that a network returned: itself, the only entry of a tuple or mapping, or "sample" (diffusers).

    Raises:
        TypeError: anything else, or a tensor of other than real floating-point numbers.
    """
    found: Any = output
    if isinstance(found, Mapping):
        found = found.get("sample", next(iter(found.values())) if len(found) == 1 else None)
    elif isinstance(found, (tuple, list)):
        found = found[0] if len(found) == 1 else None
    elif not isinstance(found, Tensor):
        found = getattr(found, "sample", None)
    if not isinstance(found, Tensor) or not found.is_floating_point():
        raise TypeError(
            f"{what} returned {_described(output)}; it has to be one floating-point tensor. Take it out of what else "
            "there is: lambda x, c: network(x, c)[0]."
        )
    return found


def _described(output: Any) -> str:
    if isinstance(output, Tensor):
        return f"a tensor of {output.dtype}"
    kind = f"a {type(output).__name__}"
    if isinstance(output, Mapping):
        return f"{kind} with {', '.join(map(repr, output)) or 'nothing'}"
    return f"{kind} of {len(output)}" if isinstance(output, (tuple, list)) else kind
