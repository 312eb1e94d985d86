"""Nothing is searched for garbage at a process's end, and everything while it works."""

import gc
import subprocess
import sys

import pytest

from openrlhf_sd import garbage, launch


def test_the_end_finds_nothing_to_search():
    code = (
        "import atexit, gc; from openrlhf_sd import garbage; "
        # Registered before, so called after.
        "atexit.register(lambda: print(gc.get_freeze_count() > 1000, gc.get_count()[0] < 100)); "
        "garbage.end_without_search(); garbage.end_without_search()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "True"]


def test_the_search_goes_on_after_imports_whatever_happens():
    with pytest.raises(ZeroDivisionError), garbage.search_postponed():
        assert not gc.isenabled()
        raise ZeroDivisionError
    assert gc.isenabled()
    assert launch.main(["--self-spec", "backwards"]) == 2
    assert gc.isenabled()
