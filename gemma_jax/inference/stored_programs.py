"""Keeps compiled programs in a folder, so that a new process neither traces nor compiles them.

JAX's own cache spares compiling alone; tracing and lowering are half a second of a small model's
start. A program is kept under all that it depends on: versions, the source files, the machine, the
settings of JAX and the structure, shapes and dtypes of what it is given. It is for one CPU device,
and off until `keep_programs` names a folder, as the command line does.
"""

import hashlib
import os
import platform
import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import flax
import jax
import jaxlib
from jax.experimental import serialize_executable
from jax.experimental.compilation_cache import compilation_cache

import gemma_kernels
from gemma_jax.atomic_files import replacing

MOST = 64  # programs in a folder, of a megabyte or two each; the oldest make room
_DIGEST = hashlib.sha256().digest_size
# Text that does not say all: a place in memory, something left out, rows fetched by the host.
_UNCLEAR = re.compile(r" at 0x|\.\.\.|HostTable|DiskTable")
_SOURCES = (".py", ".so", ".c", ".h")
_one_at_a_time = threading.Lock()
_folder: Path | None = None


def keep_programs(folder: Path | None) -> None:
    """Keeps the programs of this process in a folder of the user's own; `None`: no longer.

    Programs are loaded by `pickle`, so a file that belongs to another user is not read.
    """
    global _folder
    _folder = folder


class StoredProgram:
    """Calls a jitted function by the program in the folder, or makes it and puts it there.

    Args:
      function: Its results have the structure of the argument `like`.
      like: Number of that argument.

    Examples:
      >>> import jax
      >>> double = StoredProgram(jax.jit(lambda x: 2 * x), like=0)
      >>> double(21.0).item()
      42.0
    """

    def __init__(self, function: Callable, like: int):
        self._function, self._like = function, like
        self._programs: dict[object, Callable] = {}

    def __call__(self, *args: Any, **static: Any) -> Any:
        """As `function(*args, **static)`.

        Args:
          *args: The first one must be the same in all calls, or one of the same structure.
          **static: Static arguments of the function.
        """
        if _folder is None or jax.default_backend() != "cpu" or jax.device_count() > 1:
            return self._function(*args, **static)
        leaves, structure = jax.tree.flatten(args[1:])
        key = structure, tuple(_described(leaf) for leaf in leaves), tuple(static.items())
        if key not in self._programs:
            self._programs[key] = self._find(args, static)
        return self._programs[key](*args)

    def _find(self, args: tuple, static: dict[str, Any]) -> Callable:
        text, plain = _text_of(self._function, args, static), partial(self._function, **static)
        if text is None or _folder is None:
            return plain
        name = f"{self._function.__name__}-{hashlib.sha256(text.encode()).hexdigest()}"
        path = _folder / name
        trees = jax.tree.structure((args, {})), jax.tree.structure(args[self._like])
        try:
            if (program := _read(path, trees)) is not None:
                return program
        except Exception as error:  # whatever a damaged file makes of JAX: it is made anew
            reason = str(error).partition("\n")[0]
            print(f"the program {path} is damaged ({reason}): compiled anew", file=sys.stderr)
        if not _can_write(_folder):
            return plain
        with no_cache_of_jax():
            program = self._function.lower(*args, **static).compile()
        _write(path, program, trees)
        return program


@contextmanager
def no_cache_of_jax() -> Iterator[None]:
    """Compiles anew, and leaves nothing: a program out of JAX's own cache lacks code once it is
    written again, and one for a machine that is not there is written but cannot be read."""
    name = "jax_enable_compilation_cache"
    with _one_at_a_time:
        before = jax.config.values[name]
        jax.config.update(name, False)
        compilation_cache.reset_cache()  # it looks at the setting once
        try:
            yield
        finally:
            jax.config.update(name, before)
            compilation_cache.reset_cache()


def _described(leaf: Any) -> tuple:
    aval = jax.typeof(leaf)
    return aval.shape, str(aval.dtype), aval.weak_type


def _text_of(function: Callable, args: tuple, static: dict[str, Any]) -> str | None:
    """All that a program depends on; `None` where that cannot be said in text."""
    leaves, structure = jax.tree.flatten(args)
    own = f"{function.__module__}.{function.__name__} {structure} {static}"
    if _UNCLEAR.search(own):
        return None
    if "QuantizedMatrix" in own:
        own += _instructions()
    settings = sorted(
        (name, str(value)) for name, value in jax.config.values.items() if "cache" not in name
    )
    shapes = [_described(leaf) for leaf in leaves]
    return "\n".join([own, str(shapes), str(settings), *_surroundings()])


def _instructions() -> str:
    """Of our library for products on CPUs; programs that call it find it once it is known."""
    from gemma_kernels.quantized_matmul import cpu

    try:
        return cpu.instructions()
    except NotImplementedError as reason:
        return str(reason)


@cache
def _surroundings() -> tuple[str, ...]:
    """Versions, source files, and the machine."""
    roots = [Path(__file__).parent.parent, Path(gemma_kernels.__file__).parent]
    files = [path for root in roots for path in sorted(root.rglob("*")) if path.suffix in _SOURCES]
    stats = [(path, path.stat()) for path in files]
    sources = [(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats]
    versions = [sys.version, jax.__version__, jaxlib.__version__, flax.__version__]
    environment = [os.environ.get(name, "") for name in ("XLA_FLAGS", "GEMMA_KERNELS_CPU")]
    machine = [platform.machine(), platform.processor(), os.cpu_count(), _cpu()]
    return tuple(map(str, (sources, versions, environment, machine)))


def _cpu() -> str:
    """What a CPU can do, where the system says so; else the name of the machine."""
    try:
        lines = Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines()
    except OSError:
        return platform.node()
    named = ("model name", "flags", "Features", "CPU part")
    return "\n".join(line for line in lines if line.startswith(named))


def _read(path: Path, trees: tuple) -> Callable | None:
    """The program in a file; `None` if there is no such file of this user."""
    try:
        if hasattr(os, "getuid") and path.stat().st_uid != os.getuid():
            return None
        data = path.read_bytes()
    except OSError:
        return None
    digest, program = data[:_DIGEST], data[_DIGEST:]
    if hashlib.sha256(program).digest() != digest:
        raise ValueError("its bytes are not those that were written")
    here = jax.devices()[:1]
    return serialize_executable.deserialize_and_load(program, *trees, execution_devices=here)


def _can_write(folder: Path) -> bool:
    """Else JAX's own cache is the better one: it may hold what would be compiled in vain."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError:
        return False
    return os.access(folder, os.W_OK | os.X_OK)


def _write(path: Path, program: jax.stages.Compiled, trees: tuple) -> None:
    """Puts a program into the folder; where that fails, the next start compiles again."""
    try:
        data, *found = serialize_executable.serialize(program)
        if tuple(found) != trees:
            return
        with replacing(path) as temporary:
            temporary.write_bytes(hashlib.sha256(data).digest() + data)
        kept = sorted(path.parent.glob("*-*"), key=lambda file: file.stat().st_mtime)
        for file in kept[:-MOST]:
            file.unlink(missing_ok=True)
    except (OSError, ValueError, NotImplementedError):
        return
