"""Sizes of files and functions, now and at an earlier commit: for information, never a failure.

python training/benchmarks/sizes.py --against 613385b
"""

import argparse
import ast
import subprocess
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("scrdit_diffusers", "training")
ENTRY, GOAL = ("training/train.py", "main"), "forward"
NOTES = """
- Names of a function: what is assigned or a parameter in it, nested functions included.
- Modules entered by the arguments: those of this repository that training/train.py imports, also through others.
- Calls and files entered are those of the shortest way from train.py's `main` to the transformer's `forward`. Calls are
  found by name in the modules above; a call of the model is one of `forward`.
"""


def read_sources(revision: str | None) -> dict[str, ast.Module]:
    """Parse the Python files of the package and the scripts, of the working tree or of a commit, by path."""
    if revision is None:
        paths = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
        texts = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in paths}
    else:
        names = git("ls-tree", "-r", "--name-only", revision, *FOLDERS).splitlines()
        texts = {name: git("show", f"{revision}:{name}") for name in names if name.endswith(".py")}
    return {path: parse(text) for path, text in texts.items()}


def git(*arguments: str) -> str:
    """Run git in the repository."""
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout


def parse(text: str) -> ast.Module:
    """Parse a file and keep its number of lines."""
    module = ast.parse(text)
    module.num_lines = text.count("\n")  # type: ignore[attr-defined]
    return module


def functions(module: ast.Module) -> Iterator[ast.FunctionDef]:
    """Go through the functions and methods of a module, nested ones included."""
    return (node for node in ast.walk(module) if isinstance(node, ast.FunctionDef))


def length(function: ast.FunctionDef) -> int:
    """Count the lines of a function, docstring included."""
    return (function.end_lineno or function.lineno) - function.lineno + 1


def names(function: ast.FunctionDef) -> set[str]:
    """Collect the variables and parameters of a function."""
    stored = {n.id for n in ast.walk(function) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    return stored | {n.arg for n in ast.walk(function) if isinstance(n, ast.arg)}


def imported(path: str, module: ast.Module, sources: dict[str, ast.Module]) -> set[str]:
    """Find the files of `sources` that a module imports."""
    found = set()
    for node in ast.walk(module):
        if isinstance(node, ast.ImportFrom):
            base = PurePosixPath(path).parents[node.level - 1].parts if node.level else ()
            parts = (*base, *(node.module.split(".") if node.module else ()))
            found |= {"/".join((*parts, alias.name)) for alias in node.names} | {"/".join(parts)}
        elif isinstance(node, ast.Import):
            found |= {alias.name.replace(".", "/") for alias in node.names}
    here = PurePosixPath(path).parent
    places = {f"{name}{end}" for name in found for end in (".py", "/__init__.py")}
    return (places | {str(here / place) for place in places}) & sources.keys()


def reach(start: str, sources: dict[str, ast.Module]) -> list[str]:
    """List the files that one imports, directly or through others."""
    seen, queue = [start], deque([start])
    while queue:
        path = queue.popleft()
        for other in sorted(imported(path, sources[path], sources) - set(seen)):
            seen.append(other)
            queue.append(other)
    return seen


def calls(function: ast.FunctionDef) -> set[str]:
    """Collect the names that a function calls; the model, which is a module of PyTorch, stands for its `forward`."""
    called = set()
    for node in ast.walk(function):
        if isinstance(node, ast.Call):
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            called.add(GOAL if name == "model" else name)
    return called


def count_hops(sources: dict[str, ast.Module], files_only: bool = False) -> int | None:
    """Count the calls from train.py's `main` to `forward`, or the files they enter; `None` if there is no path."""
    places: dict[str, set[str]] = {}  # files that define a function
    called: dict[tuple[str, str], set[str]] = {}
    for path in reach(ENTRY[0], sources):
        for function in functions(sources[path]):
            places.setdefault(function.name, set()).add(path)
            called.setdefault((path, function.name), set()).update(calls(function))
    hops = {ENTRY: 0}
    queue = deque(hops)
    while queue:  # cheap ones first: with `files_only` calls within a file cost nothing
        path, name = queue.popleft()
        for other in sorted(called[path, name] & places.keys()):
            for place in [path] if path in places[other] else sorted(places[other]):
                free = files_only and place == path
                cost = hops[path, name] + (not free)
                if cost < hops.get((place, other), cost + 1):
                    hops[place, other] = cost
                    queue.appendleft((place, other)) if free else queue.append((place, other))
    return min((cost for (path, name), cost in hops.items() if name == GOAL and "transformer" in path), default=None)


def find(module: ast.Module, test: Callable[[ast.AST], bool]) -> ast.AST | None:
    """Find the first node that passes a test."""
    return next((node for node in ast.walk(module) if test(node)), None)


def count_flags(sources: dict[str, ast.Module]) -> int:
    """Count the fields of `TrainingArguments`."""
    for path in ("training/arguments.py", ENTRY[0]):
        found = find(sources.get(path, ast.parse("")), lambda n: getattr(n, "name", "") == "TrainingArguments")
        if isinstance(found, ast.ClassDef):
            return sum(isinstance(node, ast.AnnAssign) for node in found.body)
    return 0


def measure(sources: dict[str, ast.Module]) -> dict[str, str]:
    """Measure what the table shows."""
    lines = {path: module.num_lines for path, module in sources.items()}  # type: ignore[attr-defined]
    everything = [(path, function) for path, module in sources.items() for function in functions(module)]
    largest_file = max(lines, key=lines.__getitem__)
    place, largest = max(everything, key=lambda entry: length(entry[1]))
    nested = sum(isinstance(node, ast.FunctionDef) for node in ast.walk(largest)) - 1
    main = next(f for f in functions(sources[ENTRY[0]]) if f.name == ENTRY[1])
    pipeline = sources["scrdit_diffusers/pipeline_scrdit.py"]
    call = next(f for f in functions(pipeline) if f.name == "__call__")
    return {
        "Python files": str(len(sources)),
        "lines": f"{sum(lines.values()):,}",
        "largest file": f"{largest_file}, {lines[largest_file]:,} lines",
        "files over 500 lines": str(sum(n > 500 for n in lines.values())),
        "largest function: lines / names / nested": f"`{largest.name}` in {place}, {length(largest)} / "
        f"{len(names(largest))} / {nested}",
        "functions over 80 lines": str(sum(length(f) > 80 for _, f in everything)),
        "functions over 40 names": str(sum(len(names(f)) > 40 for _, f in everything)),
        "train.py: lines": f"{lines[ENTRY[0]]:,}",
        "train.py: main, lines / names": f"{length(main)} / {len(names(main))}",
        "train.py: flags": str(count_flags(sources)),
        "modules entered by the arguments": str(len(reach(ENTRY[0], sources))),
        "calls from main to forward": str(count_hops(sources)),
        "files entered from train.py to forward": str(count_hops(sources, files_only=True)),
        "pipeline: line of `__call__`": str(call.lineno),
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", default="613385b", help="commit to compare with")
    args = parser.parse_args()
    before, now = measure(read_sources(args.against)), measure(read_sources(None))
    print(f"| | {args.against} | now |\n| --- | --- | --- |")
    for name, value in now.items():
        print(f"| {name} | {before[name]} | {value} |")
    print(NOTES)


if __name__ == "__main__":
    main()
