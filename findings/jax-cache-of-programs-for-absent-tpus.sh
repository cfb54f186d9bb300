#!/usr/bin/env bash
# Expected: with a persistent compilation cache a program that is compiled ahead of time for a TPU
# topology, without TPUs, is taken out of the cache the second time; or it is never put there.
# Seen with jax and jaxlib 0.10.2 and libtpu 0.0.52: the first process writes an entry. The second
# finds it, warns that it cannot be read ("PjRtCompiler must be constructed with a Client"), and
# compiles again. So whoever plans for machines that are not there fills the cache for nothing, and
# sees a warning in every run but the first.
# Exits with 0 while that is so, and with 1 when it changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q "jax==0.10.2" "jaxlib==0.10.2" "libtpu==0.0.52"
cat > "$work/plan.py" <<'PYTHON'
import sys
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
shape = jax.ShapeDtypeStruct((256, 256), jnp.float32, sharding=SingleDeviceSharding(devices[0]))
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    jax.jit(lambda x: x @ x).lower(shape).compile()
unread = sum("PjRtCompiler must be constructed with a Client" in str(one.message) for one in said)
entries = len(list(Path(sys.argv[1]).glob("*-cache")))
print(f"entries {entries}, unread {unread}")
PYTHON
export JAX_PLATFORMS=cpu
seen=$(for _ in 1 2; do "$work/venv/bin/python" "$work/plan.py" "$work/cache" 2>/dev/null; done)
echo "$seen"
[ "$seen" = "entries 1, unread 0
entries 1, unread 1" ]
