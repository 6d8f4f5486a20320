"""The library under the address, undefined-behaviour and thread sanitizers.

`sanitized.cpp` runs the products on plain memory, `sanitized_program.cpp` programs and operations
with MLX. Neither runs the emulator, whose units are left out. libmlx.so is as it was installed,
without instrumentation. The address sanitizer does not mind: MLX's memory comes from the same
`malloc`. UBSan's check of dynamic types (vptr) needs type information that libmlx keeps to itself,
so it is off.
"""

from __future__ import annotations

import shlex
from pathlib import Path

import exact
import harness
import pytest

from zmlx.backend.cpu import build

#: The thread sanitizer sees the locks and threads of libmlx, which are calls into the system, but
#: not its atomic counters, by which it knows who is the last to hold an event, an array or a
#: primitive. What is freed then looks like a race with whoever used it before; whether memory is
#: used after that is the address sanitizer's question. No other access of ours is left out: naming
#: libmlx.so here would leave out all that runs on a stream's thread, which begins in libmlx.
SUPPRESSIONS = """
race:mlx::core::Event::wait
race:mlx::core::array::wait
race:mlx::core::array::is_available
race:^operator delete
"""

HERE = Path(__file__).parent


def without_emulator(*, mlx: bool) -> harness.Units:
    units = harness.units(mlx=mlx)
    return {file: flags for file, flags in units.items() if not file.name.startswith("emul")}


def optimisation(file: Path) -> str:
    """Return a unit's own level; accesses are checked at each.

    Without optimisation a destructor first writes its own type, one more race as above. What has
    none and runs little is compiled in a third of the time.
    """
    return "-O0" if file.name.startswith("step_") else "-O1"


@pytest.fixture(scope="module", params=["address,undefined", "thread"])
def built(request, tmp_path_factory):
    """The compiler, its flags, and the objects by name."""
    compiler = shlex.split(build.find_compiler())
    flags = ["-g1", f"-fsanitize={request.param}", "-fno-sanitize=vptr"]
    flags.append("-fno-sanitize-recover=all")
    sources = without_emulator(mlx=True)
    sources |= {HERE / name: [] for name in ("sanitized.cpp", "sanitized_program.cpp")}
    sources = {file: [*own, optimisation(file)] for file, own in sources.items()}
    folder = tmp_path_factory.mktemp("objects")
    objects = harness.compile_units([*compiler, *flags], sources, folder)
    return compiler, flags, {Path(path).stem: path for path in objects}


def test_products_are_clean(built, tmp_path):
    compiler, flags, objects = built
    plain = [objects[unit.stem] for unit in without_emulator(mlx=False)]
    program = harness.link(compiler, flags, [*plain, objects["sanitized"]], tmp_path / "program")
    best, *ran = harness.run([str(program)])
    assert ran == exact.kernel_sets()
    assert best == f"best: {ran[0]}"


def test_programs_are_clean(built, tmp_path):
    compiler, flags, objects = built
    library = build.mlx_folder() / "lib"
    flags = [*flags, f"-L{library}", "-lmlx", f"-Wl,-rpath,{library}"]
    used = [path for name, path in objects.items() if name != "sanitized"]
    program = harness.link(compiler, flags, used, tmp_path / "program")
    (tmp_path / "suppressions").write_text(SUPPRESSIONS)
    options = f"suppressions={tmp_path}/suppressions print_suppressions=0"
    assert harness.run([str(program)], TSAN_OPTIONS=options) == []
