"""The table of pytorch_optimizer's classes in docs/optimizers.md: run me to make it anew."""

from __future__ import annotations

from pathlib import Path

TABLE = Path(__file__).parents[2] / "docs" / "optimizers_table.md"


def write_table(rules: dict[str, str]) -> None:
    """Write class → rule as Markdown, the reconstructed ones first."""
    last = {"that": 1, "measured": 2, "none:": 3}
    rows = sorted(
        rules.items(), key=lambda row: (last.get(row[1].partition(" ")[0], 0), row[0].lower())
    )
    lines = ["| class | rule |", "|---|---|", *(f"| `{name}` | {rule} |" for name, rule in rows)]
    TABLE.write_text("\n".join(lines) + "\n", encoding="utf-8")


def read_table() -> dict[str, str]:
    """Class → rule."""
    rows = TABLE.read_text(encoding="utf-8").splitlines()[2:]
    cells = (row.strip("| ").split(" | ") for row in rows)
    return {name.strip("`"): rule for name, rule in cells}


if __name__ == "__main__":
    from packages import classes
    from test_optimizers import rule_of

    write_table({name: rule_of(cls) for name, cls in classes().items()})
