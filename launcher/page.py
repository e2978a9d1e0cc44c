"""Self-contained HTML pages: one style, everything escaped unless it says otherwise, nothing from outside."""

from __future__ import annotations

from importlib.resources import files


def read_template(name: str) -> str:
    """A template that comes with the package."""
    return files("ftlaunch.launcher").joinpath(name).read_text(encoding="utf-8")


def render_template(name: str, /, **values: object) -> str:
    """The page. Texts are escaped; only `Markup` is taken as it is."""
    from jinja2 import Environment, FunctionLoader

    loader = FunctionLoader(read_template)
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template(name).render(**values)
