"""Schemas of custom resources, as their CRDs have them: what Kubernetes would refuse, or drop without a word.

Rules in CEL (`x-kubernetes-validations`) are not followed.
"""

from pathlib import Path
from typing import Any

import yaml

Schema = dict[str, Any]


def read_schemas(folder: Path) -> dict[tuple[str, str], Schema]:
    """Return the schema of each kind that the CRDs in a folder define, by its `apiVersion` and `kind`."""
    found = {}
    for file in sorted(folder.glob("*.yaml")):
        for crd in yaml.safe_load_all(file.read_text()):
            spec = crd["spec"]
            for version in spec["versions"]:
                api_version = f"{spec['group']}/{version['name']}"
                found[api_version, spec["names"]["kind"]] = strict(version["schema"]["openAPIV3Schema"])
    return found


def strict(schema: Schema) -> Schema:
    """Return a schema that lets no field through which it does not name, but where it says that it keeps those."""
    made = dict(schema)
    if "properties" in schema:
        made["properties"] = {name: strict(part) for name, part in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            made.setdefault("additionalProperties", False)
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            made[key] = strict(schema[key])
    return made
