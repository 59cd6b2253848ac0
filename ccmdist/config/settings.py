"""What all settings have in common: frozen, no unknown fields, and a mark on fields that a resume may change."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class Settings(BaseModel):
    """A group of settings. Values cannot be changed after validation; unknown fields are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, use_attribute_docstrings=True)


def free(default: Any = ..., **constraints: Any) -> Any:
    """A field that does not change what is computed, so a resumed run may set it to another value."""
    return Field(default, json_schema_extra={"free": True}, **constraints)


def free_fields(kind: type[BaseModel], prefix: str = "") -> set[str]:
    """Dotted names of all fields of ``kind`` that are marked as free, nested models included."""
    found = set()
    for name, field in kind.model_fields.items():
        extra = field.json_schema_extra
        if isinstance(extra, dict) and extra.get("free"):
            found.add(prefix + name)
        elif isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found |= free_fields(field.annotation, f"{prefix}{name}.")
    return found
