"""Hatch's build hook: puts the service into the wheel as a package, because only a package can have types (PEP 561).

This folder must not get an `__init__.py`. Python would then import it in place of the library `packaging`, which
pytest and pip need, whenever the root of the repository is on its path.
"""

from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SERVICE = {
    "eventstore.py": "__init__.py",
    "schema.sql": "schema.sql",
    "debugger.html": "debugger.html",
    "packaging/__main__.py": "__main__.py",
    "packaging/py.typed": "py.typed",
}


class ServiceAsPackage(BuildHookInterface[Any]):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "standard":  # in an editable install, copies would hide the checkout
            build_data["force_include"] |= {source: f"eventstore/{name}" for source, name in SERVICE.items()}
