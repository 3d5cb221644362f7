"""One file per method; a file here, `./file.py:name` or an entry point is all it takes to add one."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from sparring.errors import InputError
from sparring.nearest import nearest
from sparring.plugins import entry_point, entry_point_names, is_file_reference, load_object, located
from sparring.types import Method

T = TypeVar("T")
GROUP = "sparring.methods"


def names() -> list[str]:
    """Every method known by name: the files of this folder and installed entry points."""
    return sorted({module.name for module in pkgutil.iter_modules(__path__)} | set(entry_point_names(GROUP)))


def factory(name: str) -> Callable[..., Method]:
    """The function that makes a method from its hyper-parameters. Raises InputError for an unknown name."""
    if is_file_reference(name):
        made = load_object(name)
    elif name in {module.name for module in pkgutil.iter_modules(__path__)}:
        made = importlib.import_module(f"{__name__}.{name}").method
    else:
        made = entry_point(GROUP, name)
    if made is None:
        raise InputError(f"method `{name}` is unknown; the nearest is `{nearest(name, names())}` (`sparring methods`)")
    if not callable(made):
        raise InputError(f"method `{name}`: a function method(*, hyper…) -> Method is wanted")
    result: Callable[..., Method] = made
    return result


def signature(name: str) -> inspect.Signature:
    """The hyper-parameters of a method with their defaults."""
    return inspect.signature(factory(name))


def make(name: str, hyper: Mapping[str, object]) -> Method:
    """The method with these hyper-parameters. Raises InputError where it refuses them."""
    build = factory(name)
    try:
        made = build(**hyper)
    except (ValueError, TypeError) as error:
        raise InputError(f"method `{name}`: {error}") from error
    except Exception as error:
        # Only a user's own file gets here: what it raises is told with its line
        path = Path(inspect.getsourcefile(build) or name)
        raise InputError(f"method `{name}`: {located(error, path)}; mend the file") from error
    if not isinstance(made, Method):
        raise InputError(f"method `{name}`: its function returned {type(made).__name__}, not sparring.Method")
    return made


def previous(t: int) -> Mapping[str, int]:
    """The roles of SPIN and of most of its relatives: the last player answers, is the reference, and is trained on."""
    return {"opponent": t, "reference": t, "start": t}


def choice(what: str, value: str, table: Mapping[str, T]) -> T:
    """The entry of a table that a text hyper-parameter names. Raises ValueError that lists the table."""
    if value not in table:
        raise ValueError(f"{what} `{value}` is unknown; known are {', '.join(table)}")
    return table[value]
