"""The plan of the house: imports point one way, and what is installed claims no name but `mpo`."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

from tests.support.scripts import ROOT

# Each room may import from those before it, and from itself.
ORDER = "kernels config evaluation runtime data model world training preference ppo tools stages api".split()
FORBIDDEN = {("world", "model"), ("preference", "training"), ("runtime", "evaluation"), ("data", "evaluation")}


def room_of(module: str) -> str:
    """The room that a module of the package belongs to: "mpo.ppo.rewards" -> "ppo"."""
    return module.split(".")[1]


def imports(path: Path) -> set[str]:
    """The modules of the package that a file imports, at its top or within functions."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [node.module] if node.module.count(".") else [f"{node.module}.{a.name}" for a in node.names]
            modules |= {name for name in names if name.split(".")[0] == "mpo"}
        elif isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names if alias.name.startswith("mpo.")}
    return modules


def package_files() -> list[Path]:
    """Every file of the package; kernels/ under its own name."""
    inside = [p for p in (ROOT / "mpo").rglob("*.py") if "kernels" not in p.relative_to(ROOT).parts]
    return sorted(p for p in inside if p.name not in ("__init__.py", "__main__.py"))


def test_imports_point_one_way():
    arrows = set()
    for path in package_files():
        room = room_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
        arrows |= {(room, room_of(module)) for module in imports(path)}
    upward = {(a, b) for a, b in arrows if ORDER.index(b) > ORDER.index(a)}
    assert not upward
    assert not arrows & FORBIDDEN
    assert {a for a, _ in arrows} <= set(ORDER)


def test_kernels_know_nothing_of_the_rest():
    for path in (ROOT / "kernels").rglob("*.py"):
        assert not imports(path), path
        assert "import mpo" not in path.read_text(encoding="utf-8"), path


def test_only_tools_need_what_only_a_command_needs():
    """Neither the package nor an error message pulls in a command; printing a report loads no transformer."""
    for path in package_files():
        if not {"tools", "stages", "api"} & set(path.parts):
            assert not any(module.startswith("mpo.tools") for module in imports(path)), path
    code = "import sys, mpo.tools.report, mpo.tools.verify, mpo.tools.download; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "mpo.runtime.entry" in loaded
    for room in ("mpo.model", "mpo.kernels", "mpo.training", "mpo.ppo"):
        assert room not in loaded, room


def test_importing_the_package_imports_nothing_else():
    code = "import sys, mpo; print(*sys.modules); print(*dir(mpo))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    modules, names = (line.split() for line in done.stdout.splitlines())
    assert not {"torch", "numpy", "mpo.config"} & set(modules)
    assert {"load", "train", "losses", "equations", "split_by_gap", "InputError"} <= set(names)


def test_every_script_of_a_stage_has_its_link_in_the_package():
    scripts = {path.name for path in ROOT.glob("*.py")}
    links = {path for path in (ROOT / "mpo" / "stages").glob("*.py") if path.name != "__init__.py"}
    assert {path.name for path in links} == scripts
    assert all(path.resolve() == ROOT / path.name for path in links)


def test_the_folder_kernels_does_not_hide_a_package_of_that_name(tmp_path):
    """Tests run in the checkout, where transformers must find the package `kernels` if it is installed."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("WHOSE = 'theirs'\n")
    code = f"import sys; sys.path.append({str(tmp_path)!r}); import kernels; print(kernels.WHOSE)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "theirs\n"
