"""Nothing is searched for garbage at a process's end, and everything while it works."""

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest

from openrlhf_sd import garbage, launch


def test_the_end_finds_nothing_to_search():
    code = (
        "import atexit, gc; from openrlhf_sd import garbage; "
        # Registered before, so called after.
        "atexit.register(lambda: print(gc.get_freeze_count() > 1000, gc.get_count()[0] < 100)); "
        "garbage.spare_imports(); garbage.spare_imports()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "True"]


def test_no_search_while_heavy_modules_are_imported_however_they_import_each_other(tmp_path):
    for name, body in {"openrlhf": "", "openrlhf.models": "import openrlhf.utils, gc; seen = gc.isenabled()", "openrlhf.utils": ""}.items():
        folder = tmp_path / name.replace(".", "/")
        folder.mkdir()
        (folder / "__init__.py").write_text(body)
    code = "import gc; from openrlhf_sd import garbage; garbage.spare_imports(); import openrlhf.models as m; print(m.seen, gc.isenabled())"
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[1])])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": path})
    assert done.stdout.split() == ["False", "True"]


def test_the_search_goes_on_after_imports_whatever_happens():
    with pytest.raises(ZeroDivisionError), garbage.search_postponed():
        assert not gc.isenabled()
        raise ZeroDivisionError
    assert gc.isenabled()
    assert launch.main(["--self-spec", "backwards"]) == 2
    assert gc.isenabled()
