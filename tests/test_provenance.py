"""What a run is said to have run on."""

import pytest

from openrlhf_sd.config import SelfSpecError
from openrlhf_sd.provenance import begin_run, cpu_model, describe_machine

TWO_CORES = """processor\t: 0
vendor_id\t: AuthenticAMD
cpu family\t: {family}
model\t\t: 1
model name\t: AMD EPYC
flags\t\t: fpu sse4_2 {flags}

processor\t: 1
model name\t: AMD EPYC
"""


@pytest.mark.parametrize(
    ("family", "flags", "said"),
    [
        (25, "avx avx2", "AMD EPYC (family 25, model 1, AVX2)"),
        (25, "avx2 avx512f avx512_vnni", "AMD EPYC (family 25, model 1, AVX-512 with VNNI)"),
        (26, "avx2 avx512f avx512_bf16 avx512_vnni", "AMD EPYC (family 26, model 1, AVX-512 with bf16)"),
        (6, "avx2 avx_ne_convert", "AMD EPYC (family 6, model 1, AVX2 with bf16)"),
        (6, "avx", "AMD EPYC (family 6, model 1, no AVX2)"),
    ],
)
def test_processors_of_one_name_are_told_apart(family: int, flags: str, said: str) -> None:
    """By two such machines, of the same cloud and name, one of which has a tenth of the other's speed in bf16."""
    assert cpu_model(TWO_CORES.format(family=family, flags=flags)) == said


def test_a_processor_without_a_name() -> None:
    assert cpu_model("processor\t: 0\nBogoMIPS\t: 243.75\n") is None
    assert describe_machine()["cpu_model"]


def test_of_two_launches_into_one_folder_the_second_is_refused_and_writes_nothing(tmp_path) -> None:
    begin_run(tmp_path, ["first"], None, {})
    before = {path.name: path.read_text() for path in tmp_path.iterdir()}
    with pytest.raises(SelfSpecError, match="--self-spec.run_dir: .* already holds a run"):
        begin_run(tmp_path, ["second"], None, {})
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == before
