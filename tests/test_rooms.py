"""The rooms of the package: imports run one way, and the pure rooms import neither torch nor diffusers."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import lesion

PACKAGE = Path(lesion.__file__).parent
# Each room may import from those before it, and from itself.
ORDER = (
    *("errors", "processes", "study", "denoising", "tasks", "toy_world", "tracking", "store", "surgery", "models"),
    *("scoring", "analysis", "rounds", "generation", "replacements", "attribution", "report", "config", "run", "audit"),
    *("api", "cli", "__main__"),
)
PURE = ("errors", "processes", "study", "tasks", "toy_world", "scoring", "analysis", "rounds")


def room_of(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imports(path: Path) -> Iterator[str]:
    """Every room that a module imports from, also within functions and for type checking."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "lesion":
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lesion."):
            yield str(node.module).split(".")[1]
        elif isinstance(node, ast.Import):
            yield from (name.name.split(".")[1] for name in node.names if name.name.startswith("lesion."))


def test_every_import_goes_to_the_same_room_or_to_one_before_it():
    modules = [path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py" or path.parent != PACKAGE]
    assert {room_of(path) for path in modules} <= set(ORDER)
    against = [
        f"{path.relative_to(PACKAGE)} imports {other}"
        for path in modules
        for other in imports(path)
        if other in ORDER and ORDER.index(other) > ORDER.index(room_of(path))
    ]
    assert not against


def test_pure_rooms_import_no_torch():
    modules = [
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
        for path in sorted(PACKAGE.rglob("*.py"))
        if room_of(path) in PURE and path.name != "__init__.py"
    ]
    assert len(modules) >= 20
    code = f"import sys, {', '.join(modules)}; sys.exit('torch' in sys.modules or 'diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_text_files_are_opened_with_their_encoding():
    """The locale's encoding, which is the default, need not be UTF-8."""
    bare = []
    for path in [*PACKAGE.rglob("*.py"), *(PACKAGE.parents[1] / "scripts").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            called = node.func
            method = isinstance(called, ast.Attribute)
            name = called.attr if method else getattr(called, "id", "")
            if method and isinstance(called.value, ast.Name) and called.value.id in ("Image", "os", "webbrowser"):
                continue
            modes = [one.value for one in node.args[0 if method else 1 :] if isinstance(one, ast.Constant)]
            text = name in ("read_text", "write_text") or (name == "open" and not any("b" in str(one) for one in modes))
            gates = method and getattr(called.value, "attr", "") == "gates"  # no files
            if text and not gates and not {"encoding"} & {one.arg for one in node.keywords}:
                bare.append(f"{path.name}:{node.lineno}")
    assert bare == []
