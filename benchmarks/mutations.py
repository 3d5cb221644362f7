"""Which term, weight, detach or sign of an objective could be lost without a test failing? The figures of docs/mutations.md.

    python benchmarks/mutations.py                          # everything; writes docs/mutations.md
    python benchmarks/mutations.py --methods tpaw losses/margin

Every expression of a method's objective and pairing, and of what takes its gradient, is changed in turn, in a copy of
the sources, and the tests of that file run until one fails. Not changed: `metrics`, `roles` and checks of
hyper-parameters. Changes, of which each is one mutant: + and − exchanged; an operand of +, −, *, /, ** or & left out; a
minus sign, a `~`, a `detach()`, a clamp, relu, abs, minimum, maximum or mask left out; one side of a `where` taken
everywhere; the two results of `pair_columns`, or a tuple of targets, turned round. A survivor is listed with the reason
why it changes nothing, or is a missing test (exit code 1).
"""

from __future__ import annotations

import argparse
import ast
import gc
import importlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/mutations.md"
SKIPPED = {"roles", "recall", "metrics", "pair_metrics", "pointwise_metrics", "defaults", "settled", "__post_init__"}
FLOORS = {"clamp", "minimum", "maximum", "masked_fill"}
PRELOADED = ("torch", "torch._dynamo", "transformers", "datasets", "pydantic", "pytest", "trl")
"""Imported once; every mutant is tested in a fork."""
OPTIONS = ("-x", "--tb=no", "--assert=plain", "-pno:cacheprovider", "-pno:unraisableexception", "-ppytest_timeout")
TESTS = {
    "alpha_spin": "spin_family theory_family",
    "cringe": "cringe",
    "ditto": "spin_family",
    "dnpo": "drift_dnpo",
    "dpo": "dpo trl_parity",
    "drift": "drift_dnpo",
    "exspin": "exspin_upft",
    "fictitious_play": "spin_family theory_family",
    "gsil": "spin_family theory_family",
    "inpo": "nash theory_nash",
    "iris": "spin_family theory_family",
    "kto": "kto trl_parity",
    "mnpo": "nash theory_nash",
    "nash_md": "nash theory_nash",
    "pairwise_cringe": "cringe",
    "sera": "spin_family theory_family",
    "sft": "losses theory trl_parity",
    "space": "spin_family theory_family",
    "spif": "spin_family theory_family",
    "spin": "losses theory pair",
    "spin_official": "official",
    "spo": "nash theory_nash",
    "sppo": "nash theory_nash",
    "t_spin": "spin_family theory_family",
    "tpaw": "spin_family theory_family",
    "upft": "exspin_upft",
    "losses/cringe": "cringe",
    "losses/density": "spin_family theory_family",
    "losses/margin": "losses dpo spin_family nash",
    "losses/preference": "dpo kto trl_parity",
    "pair/gold": "pair spin_family cringe",
    "pair/preference": "dpo kto",
    "pair/wins": "nash theory_nash",
    "types": "losses dpo nash",
    "gradient": "train coupled packed drift_dnpo",
}
"""Methods and what they share, with the test files that answer for each."""

TEAM = "the learner's part of m_j is the same for every player j and cancels in the softmax; α is a step"
BITS = "bits from len(one) on are never read and carries only go up; it keeps the rows' integers short"
PADDED = "`collate` gives padding the target 0, and no group has a gold answer without tokens"
EQUIVALENT = {
    ("tpaw", "gold_BJ.detach() → gold_BJ"): TEAM,
    ("tpaw", "sample_BJ.detach() → sample_BJ"): TEAM,
    ("losses/density", "present_BG & (batch.targets_BG == 1) → batch.targets_BG == 1"): PADDED,
    ("drift", "(1 << len(one)) - 1 → -1"): BITS,
    ("drift", "(rows[-1] + hit | rows[-1] - hit) & everything → rows[-1] + hit | rows[-1] - hit"): BITS,
}
"""Survivors that change nothing: (name, change) to the reason."""


@dataclass(frozen=True)
class Mutant:
    """One changed expression of a file."""

    line: int
    change: str
    source: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=list(TESTS), default=list(TESTS), metavar="NAME")
    names = parser.parse_args().methods
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    for module in PRELOADED:
        importlib.import_module(module)
    # What is loaded stays loaded: a fork's collector need not walk through it
    gc.freeze()
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(shutil.copytree(ROOT / "src", Path(folder) / "src"))
        found = {name: survivors(name, copy) for name in names}
    missing = [m for name, (_, left) in found.items() for m in left if (name, m.change) not in EQUIVALENT]
    page = table(found)
    print(page)
    if set(names) == set(TESTS) and not missing:
        PAGE.write_text(page, encoding="utf-8")
    sys.exit(bool(missing))


def path(name: str) -> Path:
    """A file of TESTS, relative to src."""
    shared = "/" in name or name in ("types", "gradient")
    return Path("sparring", name if shared else f"methods/{name}").with_suffix(".py")


def survivors(name: str, copy: Path) -> tuple[int, list[Mutant]]:
    """The number of a file's mutants, and those that no test told from the file itself."""
    file = copy / path(name)
    source = file.read_text(encoding="utf-8")
    tests = [f"{ROOT}/tests/test_{test}.py" for test in TESTS[name].split()]
    if not passes(tests, copy, compiled=True):
        sys.exit(f"{name}: the tests fail on the unchanged sources ({TESTS[name]}); mend them first")
    made = list(mutants(source))
    left: list[Mutant] = []
    for mutant in made:
        file.write_text(mutant.source, encoding="utf-8")
        if passes(tests, copy):
            left.append(mutant)
            print(f"{path(name)}:{mutant.line}: {mutant.change}", flush=True)
    file.write_text(source, encoding="utf-8")
    print(f"{name}: {len(made)} mutants, {len(left)} survive", flush=True)
    return len(made), left


def passes(tests: Sequence[str], copy: Path, *, compiled: bool = False) -> bool:
    """Whether the tests pass with the sources in `copy`, in a fork of this process; bytecode is kept if `compiled`."""
    child = os.fork()
    if not child:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        sys.path.insert(0, str(copy))
        os.environ["PYTHONPATH"] = str(copy)
        sys.dont_write_bytecode = not compiled
        pytest = importlib.import_module("pytest")
        os._exit(int(pytest.main([*OPTIONS, "--timeout=20", *tests])))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def mutants(source: str) -> Iterator[Mutant]:
    """Every change of one expression."""
    raw = source.encode()
    starts = [0]
    for line in raw.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    for node in expressions(ast.parse(source)):
        assert node.end_lineno is not None and node.end_col_offset is not None
        start, end = starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset
        for changed in changes(node):
            change = f"{ast.unparse(node)} → {ast.unparse(ast.parse(changed))}"
            text = (raw[:start] + f"({changed})".encode() + raw[end:]).decode()
            yield Mutant(node.lineno, change, text)


def expressions(node: ast.AST) -> Iterator[ast.expr]:
    """Expressions in their order, without those of SKIPPED functions and of checks that raise."""
    check = isinstance(node, ast.If) and all(isinstance(line, ast.Raise) for line in node.body)
    if check or (isinstance(node, ast.FunctionDef) and node.name in SKIPPED):
        return
    if isinstance(node, ast.expr):
        yield node
    for child in ast.iter_child_nodes(node):
        yield from expressions(child)


def changes(node: ast.expr) -> list[str]:
    """What an expression is replaced by, one change a mutant."""
    match node:
        case ast.BinOp(left=one, op=operator, right=other):
            a, b = f"({ast.unparse(one)})", f"({ast.unparse(other)})"
            kinds: dict[type[ast.operator], list[str]] = {
                ast.Add: [f"{a} - {b}", a, b],
                ast.Sub: [f"{a} + {b}", a, f"-{b}"],
                ast.Mult: [a, b],
                ast.Div: [a],
                ast.Pow: [a],
                ast.BitAnd: [a, b],
            }
            return kinds.get(type(operator), [])
        case ast.UnaryOp(op=ast.USub(), operand=operand) if not is_number(operand, int):
            return [ast.unparse(operand)]
        case ast.UnaryOp(op=ast.Invert(), operand=operand):
            return [ast.unparse(operand)]
        case ast.Call(func=ast.Attribute(value=value, attr="detach")):
            return [ast.unparse(value)]
        case ast.Call(func=ast.Attribute(attr="relu") | ast.Name(id="abs"), args=[value]):
            return [ast.unparse(value)]
        case ast.Call(func=ast.Attribute(value=value, attr=floor)) if floor in FLOORS:
            return [ast.unparse(value)]
        case ast.Call(func=ast.Attribute(attr="where"), args=[_, one, other]):
            return [ast.unparse(one), ast.unparse(other)]
        case ast.Call(func=ast.Name(id="min" | "max"), args=[one, other]):
            return [ast.unparse(one), ast.unparse(other)]
        case ast.Call(func=ast.Name(id="pair_columns")):
            return [f"{ast.unparse(node)}[::-1]"]
        case ast.Tuple(elts=values) if all(is_number(value, float) for value in values) and is_uneven(values):
            return [ast.unparse(ast.Tuple(values[::-1], ast.Load()))]
    return []


def is_number(node: ast.expr, kind: type) -> bool:
    """Whether it is written as a number of that kind."""
    inner = node.operand if isinstance(node, ast.UnaryOp) else node
    return isinstance(inner, ast.Constant) and type(inner.value) is kind


def is_uneven(values: Sequence[ast.expr]) -> bool:
    """Whether they differ when turned round."""
    written = [ast.unparse(value) for value in values]
    return written != written[::-1]


def table(found: dict[str, tuple[int, list[Mutant]]]) -> str:
    """The page: mutants per file, and the survivors with their reasons."""
    lines = [
        "# Mutation run",
        "",
        "Could a term, weight, detach or sign of an objective be lost without a test failing? One command changes each in",
        "turn and runs the tests of that file until one fails; it says which changes it makes, and writes this page:",
        "",
        "    python benchmarks/mutations.py",
        "",
        "A survivor is equivalent where the change alters no result, for the reason given below; any other one is a missing",
        "test. Rows with a `/`, `types` and `gradient` are shared by several methods; `spin_official` has `spin`'s objective.",
        "",
        "| file | mutants | killed | equivalent | missing tests | tests |",
        "|---|---:|---:|---:|---:|---|",
    ]
    totals = [0, 0, 0, 0]
    for name, (count, left) in found.items():
        same = sum((name, mutant.change) in EQUIVALENT for mutant in left)
        row = [count, count - len(left), same, len(left) - same]
        totals = [a + b for a, b in zip(totals, row, strict=True)]
        tests = ", ".join(f"`test_{test}`" for test in TESTS[name].split())
        lines.append(f"| `{name}` | {' | '.join(map(str, row))} | {tests} |")
    lines += [f"| all | {' | '.join(map(str, totals))} | |", "", "## Survivors", ""]
    for name, (_, left) in found.items():
        for mutant in left:
            reason = EQUIVALENT.get((name, mutant.change), "MISSING TEST")
            lines.append(f"- `{path(name)}:{mutant.line}` `{mutant.change}`: {reason}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
