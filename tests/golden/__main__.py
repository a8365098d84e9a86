"""Write golden files with the code as it is: `python -m tests.golden NAME...`."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import tests.conftest  # noqa: F401  the environment of the tests
from tests.golden import FILES, FOLDER


def main(arguments: list[str] | None = None) -> int:
    """Write the named files. Returns 1, having written nothing, if one exists and `--replace` is not given."""
    parser = argparse.ArgumentParser(prog="python -m tests.golden", description=__doc__)
    parser.add_argument("names", nargs="+", choices=sorted(FILES), metavar="NAME", help=f"of {', '.join(FILES)}")
    parser.add_argument("--replace", action="store_true", help="overwrite the results of earlier versions")
    options = parser.parse_args(arguments)
    existing = [name for name in options.names if (FOLDER / f"{name}.json").exists()]
    if existing and not options.replace:
        print(f"{', '.join(existing)}: exists. Pass --replace to overwrite it", file=sys.stderr)
        return 1
    for name in options.names:
        with tempfile.TemporaryDirectory() as folder:
            content = FILES[name](Path(folder))
        (FOLDER / f"{name}.json").write_text(json.dumps(content, indent=None) + "\n")
        print(f"wrote {FOLDER / name}.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
