"""Print sizes of the code as rows of a Markdown table: files, functions, parameters, docstrings.

python -m tools.sizes [FOLDER...]     default: trainer launch, tools, tests
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median, quantiles

Function = ast.FunctionDef | ast.AsyncFunctionDef

COLUMNS = (
    "code",
    "files",
    "lines",
    "lines per file: median / p90 / max",
    "lines per function: median / p90 / max",
    "functions with over 4 positional parameters",
    "functions with `Any` in the signature",
    "`# fmt: skip`",
    "public functions with a docstring",
)
MAX_POSITIONAL = 4


def functions_of(tree: ast.Module) -> Iterator[Function]:
    """Yield all functions and methods, nested ones included."""
    return (node for node in ast.walk(tree) if isinstance(node, Function))


def num_positional(function: Function) -> int:
    """Count the parameters that can be passed by position, without `self` and `cls`."""
    names = [argument.arg for argument in (*function.args.posonlyargs, *function.args.args)]
    return len(names) - (names[:1] in (["self"], ["cls"]))


def has_any(function: Function) -> bool:
    """Return whether an annotation of the signature is or contains `Any`."""
    arguments = function.args
    parameters = (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg)
    annotations = [parameter.annotation for parameter in parameters if parameter is not None]
    nodes = [node for part in (*annotations, function.returns) if part is not None for node in ast.walk(part)]
    return any(isinstance(node, ast.Name) and node.id == "Any" for node in nodes)


def spread(values: list[int]) -> str:
    """Format median, 90th percentile and maximum."""
    return f"{median(values):.0f} / {quantiles(values, n=10, method='inclusive')[-1]:.0f} / {max(values)}"


def row(folders: list[str]) -> str:
    """Measure the Python files below some folders."""
    texts = [path.read_text(encoding="utf-8") for folder in folders for path in sorted(Path(folder).rglob("*.py"))]
    functions = [function for text in texts for function in functions_of(ast.parse(text))]
    public = [function for function in functions if not function.name.startswith("_")]
    lengths = [(function.end_lineno or function.lineno) - function.lineno + 1 for function in functions]
    file_lengths = [len(text.splitlines()) for text in texts]
    documented = sum(ast.get_docstring(function) is not None for function in public)
    cells = (
        " ".join(folders),
        len(texts),
        f"{sum(file_lengths):,}",
        spread(file_lengths),
        spread(lengths),
        sum(num_positional(function) > MAX_POSITIONAL for function in functions),
        sum(map(has_any, functions)),
        sum(text.count("# fmt: skip") for text in texts),
        f"{100 * documented // len(public)} %",
    )
    return f"| {' | '.join(map(str, cells))} |"


def main() -> None:
    """Print the table."""
    print(f"| {' | '.join(COLUMNS)} |\n| {' | '.join(['---'] * len(COLUMNS))} |")
    for folders in [sys.argv[1:]] if sys.argv[1:] else [["trainer", "launch"], ["tools"], ["tests"]]:
        print(row(folders))


if __name__ == "__main__":
    main()
