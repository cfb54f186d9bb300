#!/usr/bin/env bash
# Expected: a compiled program that JAX took out of its persistent compilation cache can be
# serialised like one that was just compiled, and the copy loaded and run.
# Seen with jax and jaxlib 0.10.2 on a CPU: the first process, which compiles, serialises a program
# that loads and runs in another process. The second one takes the same program out of the cache,
# and serialises it without an error, to a third fewer bytes; the program that is loaded from these
# raises an error when it is called: a function of it is not found. Whoever keeps programs beside the
# cache must compile them with the cache turned off.
# Exits with 0 while that is so, and with 1 when it changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q "jax==0.10.2" "jaxlib==0.10.2"
cat > "$work/make.py" <<'PYTHON'
import pickle
import sys

import jax
import jax.numpy as jnp
from jax.experimental import serialize_executable

jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
program = jax.jit(lambda x: jnp.sin(x) @ jnp.cos(x).T + x.sum()).lower(jnp.ones((64, 64))).compile()
made = serialize_executable.serialize(program)
print(len(made[0]), "bytes")
with open(sys.argv[2], "wb") as file:
    pickle.dump(made, file)
PYTHON
cat > "$work/load.py" <<'PYTHON'
import pickle
import sys

import jax.numpy as jnp
from jax.experimental import serialize_executable

with open(sys.argv[1], "rb") as file:
    data, *trees = pickle.load(file)
try:
    program = serialize_executable.deserialize_and_load(data, *trees)
    print("loads:", float(program(jnp.ones((64, 64)))[0, 0]))
except Exception as error:
    print("does not load:", str(error).splitlines()[0][:100])
    sys.exit(3)
PYTHON
export JAX_PLATFORMS=cpu
python="$work/venv/bin/python"
said=""
for name in compiled cached; do
  echo "$name:"
  "$python" "$work/make.py" "$work/cache" "$work/$name" 2>/dev/null
  status=0
  "$python" "$work/load.py" "$work/$name" 2>/dev/null || status=$?
  said="$said $status"
done
[ "$said" = " 0 3" ]
