"""Writes the files that are generated from the configuration's schema.

python -m tools.schema

`ds_configs/schema.json` lets editors complete and check configurations; `docs/configuration.md` documents every key.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from trainer.distributed import prepare_environment

prepare_environment()

from tools.configuration_page import configuration_page
from trainer.config.schema import Config

ROOT = Path(__file__).parent.parent
SCHEMA = ROOT / "ds_configs" / "schema.json"
PAGE = ROOT / "docs" / "configuration.md"


def schema_text() -> str:
    """Return the JSON Schema of a configuration file: the sections, and the keys that only files have."""
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
    properties["tessera"] = {"type": "object", "description": "Metadata of a run. Ignored when the file is run again."}
    schema.pop("required", None)  # a file may inherit them from the one that it extends
    return json.dumps(schema, indent=1) + "\n"


def main() -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    for path, text in ((SCHEMA, schema_text()), (PAGE, configuration_page())):
        path.write_text(text)
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
