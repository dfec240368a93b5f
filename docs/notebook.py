"""Write docs/tutorial.ipynb from docs/tutorial.md: the page is the one source, the notebook its cells.

python docs/notebook.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path

HERE = Path(__file__).parent


def notebook(page: str) -> str:
    """A page's text and python blocks as a notebook (nbformat 4)."""
    cells: list[dict[str, object]] = []
    for i, part in enumerate(re.split(r"```python\n(.*?)```\n", page, flags=re.DOTALL)):
        kind = "code" if i % 2 else "markdown"
        if source := part.strip():
            cell: dict[str, object] = {"cell_type": kind, "id": f"cell-{i}", "metadata": {}, "source": source}
            cells.append(cell | ({"execution_count": None, "outputs": []} if kind == "code" else {}))
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    whole = {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(whole, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    (HERE / "tutorial.ipynb").write_text(
        notebook((HERE / "tutorial.md").read_text(encoding="utf-8")), encoding="utf-8"
    )
