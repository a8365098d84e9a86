"""Writes `ds_configs/schema.json`, by which editors complete and check configurations.

python -m tools.schema
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from trainer.distributed import prepare_environment

prepare_environment()

from trainer.config.schema import Config

PATH = Path(__file__).parent.parent / "ds_configs" / "schema.json"


def schema_text() -> str:
    """The JSON Schema of a configuration file: the sections, and what only files have."""
    schema: dict[str, Any] = Config.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    properties = schema["properties"]
    properties["deepspeed"] = {
        "anyOf": [properties["deepspeed"], {"type": "string"}],
        "description": "A standard DeepSpeed configuration, or the path of a file that holds one.",
    }
    schema["$defs"]["DeepSpeedSection"]["properties"]["extends"] = {
        "type": "string",
        "description": "A DeepSpeed configuration file whose values this section overrides.",
    }
    properties["extends"] = {"type": "string", "description": "A file whose values this one overrides."}
    properties["$schema"] = {"type": "string"}
    properties["tessera"] = {"type": "object", "description": "About a run; written by it and ignored when read."}
    schema.pop("required", None)  # a file may take them from the one it extends
    return json.dumps(schema, indent=1) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    PATH.write_text(schema_text())
    print(f"{PATH} written")


if __name__ == "__main__":
    main()
