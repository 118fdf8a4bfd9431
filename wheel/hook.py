"""In a wheel the service is a package: a module alone cannot say that it has types (PEP 561)."""

from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SERVICE = {"eventstore.py": "__init__.py", "schema.sql": "schema.sql", "debugger.html": "debugger.html",
           "wheel/__main__.py": "__main__.py", "wheel/py.typed": "py.typed"}  # fmt: skip


class ServiceAsPackage(BuildHookInterface[Any]):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "standard":  # an editable install takes copies, too, and they would hide the checkout
            build_data["force_include"] |= {source: f"eventstore/{name}" for source, name in SERVICE.items()}
