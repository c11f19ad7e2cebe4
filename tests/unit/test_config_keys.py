"""The page of all configuration keys agrees with the schema."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from tools import write_keys


class Base(BaseModel):
    """Not shown: a subclass has its own docstring or none."""

    bound: Annotated[float, Field(gt=0, lt=2)] | None = 0.5
    """Distance from 1;
    null disables."""


class Narrow(Base):
    kind: Literal["narrow"] = "narrow"


class Wide(Base):
    """Wide bounds | PPO."""

    kind: Literal["wide", "wider"] = "wide"
    size: int


class Whole(BaseModel):
    inside: Annotated[Narrow | Wide, Field(discriminator="kind")] | None = None
    outside: Narrow | Wide = Field(Narrow(bound=0.25), discriminator="kind")


def sections() -> dict[str, str]:
    whole = write_keys.Section("", (Whole,), None, False, None)
    return {section.key: write_keys.write_section(section) for section in write_keys.list_sections(whole)}


def test_the_keys_page_matches_the_schema() -> None:
    page = write_keys.PAGE.read_text()
    assert page == write_keys.write_page(), "the schema has changed; run: python tools/write_keys.py"


def test_a_union_is_documented_by_kind() -> None:
    text = sections()["outside"]
    assert "Defaults to `kind: narrow`.\n" in text
    assert "#### `outside`, `kind: narrow`\n" in text
    assert "#### `outside`, `kind: wide` or `kind: wider`\n\nWide bounds | PPO.\n" in text
    assert "| `outside.size` | integer | required |  |" in text


def test_a_nullable_union_is_documented_as_nullable() -> None:
    text = sections()["inside"]
    assert "Defaults to null: switched off.\n" in text
    assert "#### `inside`, `kind: narrow`\n" in text


def test_a_field_is_documented_with_type_default_and_docstring() -> None:
    row = "| number > 0 and < 2 or null | `{}` | Distance from 1; null disables. |"
    assert "| `inside.bound` " + row.format("0.5") in sections()["inside"]
    narrow, _, wide = sections()["outside"].partition("#### `outside`, `kind: wide`")
    assert "| `outside.bound` " + row.format("0.25") in narrow
    assert "| `outside.bound` " + row.format("0.5") in wide
    assert "Not shown" not in narrow + wide


def test_the_page_has_keys_of_both_commands() -> None:
    page = write_keys.PAGE.read_text()
    for key in ("run_dir", "critic.optim.lr", "rollout.dynamic_sampling.oversample", "batch_size"):
        assert f"| `{key}` |" in page
