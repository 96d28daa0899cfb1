"""The package as a user gets it: every module is in the wheel, and the installed copy type-checks.

mypy runs on an installation because the editable one is an import hook that it cannot follow.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

#: Programs that use the package, which type-check against it.
USES = [str(ROOT / "tests/typed_use.py"), *(str(ROOT / f"examples/{name}.py") for name in ("passes", "engine", "hang"))]


def modules_in_tree() -> set[str]:
    folders = [ROOT / top for top in ("compile_passes", "runtime")]
    files = [path.relative_to(ROOT) for folder in folders for path in folder.rglob("*.py")]
    files += [path.relative_to(ROOT) for path in (ROOT / "runtime/collectives/cuda").iterdir()]
    files += [path.relative_to(ROOT) for path in (ROOT / "docs").iterdir()]
    door = [path.relative_to(ROOT / "front") for path in (ROOT / "front").rglob("*.py")]
    return {f"ringfence/{path}" for path in (*files, *door)} | {"ringfence/py.typed"}


def main() -> int:
    shutil.rmtree(ROOT / "build", ignore_errors=True)  # what an earlier build copied there would be packed again
    with tempfile.TemporaryDirectory() as scratch:
        build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
        subprocess.run([*build, "--wheel-dir", scratch, str(ROOT)], check=True)
        (wheel,) = Path(scratch).glob("*.whl")
        names = zipfile.ZipFile(wheel).namelist()
        if not any(name.endswith(".dist-info/licenses/LICENSE") for name in names):
            print("wheel: no LICENSE")
            return 1
        packed = {n for n in names if ".dist-info/" not in n}
        missing, extra = modules_in_tree() - packed, packed - modules_in_tree()
        if missing or extra:
            print(f"wheel: missing {sorted(missing)}, unexpected {sorted(extra)}")
            return 1
        print(f"wheel: {len(packed)} files, as in the tree")
        installed = Path(scratch) / "installed"
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(installed)]
        subprocess.run([*install, str(wheel)], check=True)
        mypy = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml")]
        environment = os.environ | {"MYPYPATH": str(installed)}
        code = 0
        for what in (["-p", "ringfence"], USES):
            code |= subprocess.run([*mypy, *what], cwd=scratch, env=environment, check=False).returncode
        return code


if __name__ == "__main__":
    sys.exit(main())
